"""The order of the GPU gate's steps and the time that each may take, with steps that do nothing."""

from __future__ import annotations

import sys

import pytest

from benchmarks import gpu_gate


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, by what the steps say they took."""
    passed = [0.0]
    monkeypatch.setattr(gpu_gate.time, "monotonic", lambda: passed[0])
    return passed


@pytest.fixture
def steps(clock, monkeypatch, tmp_path):
    """Runs the gate; every step takes what ``takes`` says, or its limit: name, limit, command."""
    found: list[tuple[str, float, list[str]]] = []
    takes: dict[str, float] = {}

    def wait(command, log, limit, env):
        name = log.name.rsplit("/", 1)[-1].removesuffix(".log")
        found.append((name, limit, command))
        clock[0] += min(takes.get(name, limit), limit)
        ok = takes.get(name, limit) < limit
        return {"ok": ok, "reason": "" if ok else f"not done after {limit:.0f} s"}

    monkeypatch.setattr(gpu_gate.Gate, "_wait", staticmethod(wait))
    monkeypatch.setattr(gpu_gate, "facts", lambda gate: "9.0")
    monkeypatch.setattr(gpu_gate, "_tool", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["gpu_gate", str(tmp_path)])

    def run(**seconds):
        takes.update(seconds)
        found.clear()
        status = gpu_gate.main()
        return status, found

    return run


def _seconds_of_bench(command):
    return float(command[command.index("--seconds") + 1])


def test_the_benchmark_has_its_time_whatever_the_others_take(steps, clock):
    status, found = steps(build=190.0)  # and all the rest run into their limits
    assert status == 1
    by_name = {name: (limit, command) for name, limit, command in found}
    limit, command = by_name["bench"]
    assert limit >= gpu_gate.BENCH
    assert _seconds_of_bench(command) >= gpu_gate.BENCH - gpu_gate.LAST_CASE > 60
    assert clock[0] <= gpu_gate.BUDGET


def test_sanitizers_come_last_and_have_time_where_there_is_some(steps):
    quick = {"build": 60.0, "gpu-tests": 20.0, "conformance": 60.0, "timings": 30.0}
    _, found = steps(**quick)
    names = [name for name, _, _ in found]
    assert names[-2:] == ["bench", "sanitizer-memcheck"]  # the other has no time left
    assert dict((n, limit) for n, limit, _ in found)["sanitizer-memcheck"] >= 55


def test_every_step_that_passes_is_a_gate_that_passes(steps):
    names = ("build", "gpu-tests", "conformance", "timings", "bench")
    status, found = steps(
        **dict.fromkeys(names, 1.0), **{"sanitizer-memcheck": 1.0, "sanitizer-racecheck": 1.0}
    )
    assert status == 0
    assert [name for name, _, _ in found[-2:]] == ["sanitizer-memcheck", "sanitizer-racecheck"]


def test_a_benchmark_that_is_ended_has_its_page(steps, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        gpu_gate.subprocess, "run", lambda command, **options: written.append(command) or _Done()
    )
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.json").write_text("{}")
    steps(build=60.0)
    assert [sys.executable, "-m", "benchmarks.report", str(tmp_path / "bench")] in written

    written.clear()
    (tmp_path / "bench" / "bench.html").write_text("")
    steps(build=60.0)
    assert not any("benchmarks.report" in command for command in written)


class _Done:
    returncode, stdout = 1, ""
