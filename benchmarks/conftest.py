"""Interleaved timing under pytest-benchmark, and the table of ratios at the end of a run.

``pytest benchmarks`` runs everything; ``--record FILE`` keeps the seconds of every round. Every
case times ours and its peers in turn, so that a busy moment of the machine falls on all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As in tests/conftest.py: threads that spin while they wait disturb what is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

CONTROL = "GEMMs"
_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=8, help="rounds of a case (default: 8)")
    parser.addoption("--record", type=Path, help="write environment and all times to this file")
    parser.addoption("--threads", type=int, default=2, help="torch's threads (default: 2)")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run ``race(job, ours, peers)``: ours by pytest-benchmark, peers before each of its rounds.

    ``control`` names the peer that the others are set against in the table. Every
    implementation runs ``warm`` times, unmeasured, before each of its rounds: for jobs that fit
    into the caches, where the first calls pay for what the previous implementation left in them.
    """
    import torch

    rounds = request.config.getoption("--rounds")
    torch.set_num_threads(request.config.getoption("--threads"))

    def run(
        job: str,
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        control: str = CONTROL,
        warm: int = 0,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in peers}
        for function in (ours, *peers.values()):
            function()  # compiles, allocates, wakes threads

        def others() -> None:
            for name, function in peers.items():
                for _ in range(warm):
                    function()
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
            for _ in range(warm):
                ours()

        benchmark.pedantic(ours, setup=others, rounds=rounds)
        row = {"job": job, "fastcontrast": list(benchmark.stats.stats.data)} | times
        if control in times:
            row["control"] = control
            row["drift"] = statistics.median(times[control]) / min(times[control]) - 1
        _rows.append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Minimum and median in ms of every implementation, and its ratio to the control."""
    if not _rows:
        return
    config = terminalreporter.config
    if config.getoption("--record"):
        from benchmarks.environment import describe

        command = " ".join(["pytest", *config.invocation_params.args])
        record = {"command": command, "environment": describe(), "seconds": _rows}
        config.getoption("--record").write_text(json.dumps(record, indent=1) + "\n")
    write = terminalreporter.write_line
    write("")
    write("ms minimum / median; x = minimum of the control over minimum; higher is better")
    for row in _rows:
        drift = row.pop("drift", None)
        job = row.pop("job")
        control = row.pop("control", None)
        note = "" if drift is None else f"  (control: {control}, median {drift:+.0%} over minimum"
        note += (
            ": the machine was busy)" if drift is not None and drift > 0.15 else ")" if note else ""
        )
        write(f"{job}{note}")
        for name, seconds in row.items():
            ratio = "" if control is None else f"  x {min(row[control]) / min(seconds):5.2f}"
            low, middle = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
            write(f"  {name:28}{low:10.3f} /{middle:10.3f}{ratio}")
