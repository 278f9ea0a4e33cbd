"""The quick cases of `fastcontrast bench` under pytest-benchmark, a group for each case.

``pytest benchmarks/bench_cases.py --benchmark-json FILE`` for those who keep such files; without
peak memory, errors and limits, which `fastcontrast bench` adds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case, all_cases, case_of
from benchmarks.suite import JOBS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    case_of(facts) for job in JOBS if job != "memory" for facts in all_cases(job, True, DEVICE)
]


@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(c, p, id=f"{c.name}-{p}") for c in CASES for p in c.providers()],
)
def test_case(case: Case, provider: str, benchmark: Any) -> None:
    if case.version(provider) is None:
        pytest.skip(f"{provider} is not installed")
    call = case.build(provider)
    benchmark.group = case.name

    def waited() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
