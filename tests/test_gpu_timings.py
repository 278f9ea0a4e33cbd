"""The timings of a GPU, on the CPU: cases that agree with eager PyTorch, and a file after each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_timings
from fastcontrast.backends import native

pytestmark = pytest.mark.skipif(
    native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM)
)


class Event:
    """A point in time, in place of one of the device."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


@pytest.fixture(autouse=True)
def _small_and_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "DEVICE": "cpu", "CALLS": 1, "ROUNDS": 1, "BATCH": 2, "SIDE": 12,
        "TRIPLETS": ((5, 4),), "PATCHES": ((2, 8),), "LOSSES": ((6, 9, 4), (30, 9, 4)),
        "SEARCHES": ((6, 9, 4, 2),), "EAGER_SCORES": 6 * 9, "captured": lambda function: function,
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(gpu_timings, name, value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_what_is_timed_agrees() -> None:
    """Losses and searches with eager PyTorch, but where that would write too many scores."""
    for jobs in (gpu_timings.loss_jobs, gpu_timings.nearest_jobs):
        for facts, moved, job in jobs():
            assert ("eager" in job) == (facts["rows"] * facts["columns"] <= 6 * 9)
            assert moved > 0
            if "eager" not in job:
                continue
            # One rounding of half gradients, and of distances taken through squares.
            limit = 1e-2 if "bfloat16" in facts["dtype"] else 1e-4
            for mine, true in zip(job["native"](), job["eager"](), strict=True):
                torch.testing.assert_close(mine, true, rtol=limit, atol=limit)


def test_the_file_holds_every_case(tmp_path: Path) -> None:
    gpu_timings.main(tmp_path / "timings.json")
    cases = json.loads((tmp_path / "timings.json").read_text())["cases"]
    assert {case["op"] for case in cases} == {
        "triplet_ratio_loss", "random_patches", "extract_patches and back", "info_nce_loss",
        "nearest",
    }  # fmt: skip
    for case in cases:
        assert case["call_seconds"].keys() == case["host_seconds"].keys()
        assert case["call_seconds"]["native"] >= case["host_seconds"]["native"] > 0
        assert case["seconds"].keys() == {*case["call_seconds"], "copy of the bytes"}


def test_triton_is_timed_beside_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph, which its search cannot be in."""
    monkeypatch.setattr(gpu_timings.backends, "why_not", lambda *_: None)
    job = gpu_timings.on_backends("nearest", lambda backend: backend)
    assert {name: function() for name, function in job.items()} == {
        "native": "native", "triton": "triton",
    }  # fmt: skip
    assert gpu_timings.time_in_turn(job).keys() == {"native"}
