"""Times, peak memory and errors of one case: what the processes of processes.py run.

Providers are timed in turn, so that a busy moment of the machine falls on all alike; each is warmed
before every round that is short. A round has so many calls that reading the clock is no part of it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import Call, Case

ROUND_SECONDS = 2e-3  # at least, by repeating short calls
WARMED_SECONDS = 2e-2  # shorter calls run once, unmeasured, before each round
LEAST_ROUNDS = 3
OUTLIER = 1.5  # a round that takes this much longer than the median
DRIFT = 0.15  # of the control: beyond, the machine was busy


class Pace(NamedTuple):
    """How long a case is timed, in seconds, and rounds at most."""

    seconds: float
    rounds: int
    threads: int


QUICK = Pace(1.5, 5, 2)
FULL = Pace(4.0, 12, 2)


class Peak(NamedTuple):
    """One call in a process of its own."""

    seconds: float
    peak_bytes: int
    errors: dict[str, float]


def wait_for(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes(field: str) -> int:
    """VmRSS (now), VmHWM (peak) or VmSize (addresses) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def restarted_peak() -> int:
    """Resident bytes now; VmHWM counts from here."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def peak_of(case: Case, provider: str, pace: Pace) -> Peak:
    """Memory of one call above its inputs and gradients, then its errors."""
    torch.set_num_threads(pace.threads)
    if not case.compiles(provider):
        case.smaller().build(provider)()  # libraries load, threads start, buffers are allocated
    call = case.build(provider)
    if case.compiles(provider):
        call()
    gc.collect()
    cuda = case.device.type == "cuda"
    wait_for(case.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = restarted_peak()
    start = time.perf_counter()
    kept = call()
    wait_for(case.device)
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    del kept, call
    gc.collect()
    return Peak(seconds, max(after - before, 0), case.errors(provider))


def repeated(call: Call, times: int) -> Call:
    """A call, so many times."""
    if times == 1:
        return call

    def run() -> None:
        for _ in range(times):
            call()

    return run


def in_turn(
    calls: dict[str, Call],
    pace: Pace,
    device: torch.device,
    rounds: int | None = None,
    warm: int | None = None,
    known: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, in each round.

    Args:
        calls: What is timed, by name.
        pace: How long.
        device: What is waited for.
        rounds: So many, of one call each; None: as many as fit the pace, at least LEAST_ROUNDS.
        warm: Unmeasured calls before each round; None: one where a round is short.
        known: About the seconds of calls that have been warmed; of long ones that is good enough.
    """

    def seconds_of(call: Call) -> float:
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        return time.perf_counter() - start

    counts: dict[str, int] = {}
    times_once: dict[str, float] = {}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        taken = (known or {}).get(name, 0.0)
        if taken < WARMED_SECONDS:
            taken = seconds_of(call)
        if taken < WARMED_SECONDS:
            taken = max(seconds_of(call), 1e-7)
        times_once[name] = taken
        counts[name] = 1 if rounds else max(1, math.ceil(ROUND_SECONDS / taken))
    runs = {name: repeated(call, counts[name]) for name, call in calls.items()}
    ends = time.perf_counter() + pace.seconds
    while True:
        for name, run in runs.items():
            short = counts[name] * times_once[name] < WARMED_SECONDS
            for _ in range(warm if warm is not None else int(short)):
                run()
            found[name].append(seconds_of(run) / counts[name])
        done = len(next(iter(found.values())))
        if rounds:
            if done >= rounds:
                return found
        elif done >= pace.rounds or (done >= LEAST_ROUNDS and time.perf_counter() > ends):
            return found


def figures(seconds: list[float]) -> dict[str, Any]:
    """What is said of the rounds: all of them, minimum, median, and how many lay far out."""
    middle = statistics.median(seconds)
    outliers = sum(s > OUTLIER * middle for s in seconds)
    return {"seconds": seconds, "minimum": min(seconds), "median": middle, "outliers": outliers}


def drift_of(seconds: list[float]) -> float:
    """How far the median of the control lies over its minimum."""
    return statistics.median(seconds) / min(seconds) - 1


def times_of(case: Case, providers: dict[str, float], pace: Pace) -> dict[str, Any]:
    """Rounds of all providers and of the control, and why some have none.

    ``providers`` with about the seconds of a call.
    """
    torch.set_num_threads(pace.threads)
    control = case.control()
    calls: dict[str, Callable[[], Any]] = {"control": control.call}
    reasons: dict[str, str] = {}
    for name in providers:
        try:
            call = case.build(name)
            call()
            calls[name] = call
        except Exception as error:  # a peer's failure is its row
            reasons[name] = f"{type(error).__name__}: {error}"
    seconds = in_turn(calls, pace, case.device, known=providers)
    alone = seconds.pop("control")
    return {
        "control": {"name": control.name, "times": control.times, "drift": drift_of(alone)}
        | figures(alone),
        "seconds": seconds,
        "reasons": reasons,
    }
