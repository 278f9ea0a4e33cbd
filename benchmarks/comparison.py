"""What changed between two records beyond noise: times, peak memory, errors, and what is gone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.peers import OURS
from benchmarks.record import key_of

FLOOR = 0.05  # a change of a time below it is never said to be one
# Peaks vary by what libraries allocate on the way, errors by the order of sums.
MEMORY_SHARE, MEMORY_BYTES = 0.1, 4 << 20
ERROR_FACTOR, ERROR_FLOOR = 3.0, 1e-6
WORSE = ("slower", "more memory", "larger error", "no longer measured")
Row = dict[str, Any]


def compare(old: Row, new: Row, jobs: tuple[str, ...] | None = None) -> list[Row]:
    """Rows of both records with what changed beyond noise, the largest slowdown first.

    Noise is how far the medians of both lie over their minima, or those of the controls, and
    FLOOR at least. ``change``, ``memory`` and ``error`` are new over old; ``verdicts`` is empty
    where all is the same. ``jobs``: those that the new run was asked for, None for all.
    """
    before = {key_of(row): row for row in old["rows"] if row["status"] == "ok"}
    found = []
    for row in new["rows"]:
        past = before.pop(key_of(row), None)
        if past is None:
            continue
        if row["status"] == "ok":
            found.append(_changed(past, row))
        else:
            verdict = f"now {row['status']}"
            found.append(_named(row) | {"change": math.inf, "noise": 0.0, "verdicts": [verdict]})
    for row in before.values():
        if jobs is None or row["job"] in jobs:
            lost = {"change": math.inf, "noise": 0.0, "verdicts": ["no longer measured"]}
            found.append(_named(row) | lost)
    return sorted(found, key=lambda r: -r["change"])


def _named(row: Row) -> Row:
    return {"job": row["job"], "name": row["name"], "provider": row["provider"]}


def _changed(past: Row, row: Row) -> Row:
    change = row["minimum"] / past["minimum"]
    spreads = [r["median"] / r["minimum"] - 1 for r in (row, past)]
    spreads += [r["control"].get("drift", 0.0) for r in (row, past)]
    noise = max(FLOOR, *spreads)
    verdicts = []
    if change > 1 + noise or change < 1 / (1 + noise):
        verdicts.append("slower" if change > 1 else "faster")
    peaks = (row["peak_bytes"], past["peak_bytes"])
    if max(peaks) > (1 + MEMORY_SHARE) * min(peaks) and abs(peaks[0] - peaks[1]) > MEMORY_BYTES:
        verdicts.append("more memory" if peaks[0] > peaks[1] else "less memory")
    errors = [max(ERROR_FLOOR, *r["error"].values()) for r in (row, past)]
    if max(errors) > ERROR_FACTOR * min(errors):
        verdicts.append("larger error" if errors[0] > errors[1] else "smaller error")
    return _named(row) | {
        "change": change, "noise": noise, "verdicts": verdicts,
        "memory": peaks[0] / max(peaks[1], 1), "error": errors[0] / errors[1],
    }  # fmt: skip


def is_worse(changes: list[Row]) -> bool:
    """Whether something of ours is, or does not run any more; a peer's affairs are its own."""
    return any(
        verdict in WORSE or verdict.startswith("now ")
        for change in changes
        if change["provider"] == OURS
        for verdict in change["verdicts"]
    )


def text(changes: list[Row]) -> str:
    """What changed beyond noise, a line each."""
    both = [c for c in changes if c["verdicts"] != ["no longer measured"]]
    beyond = [c for c in changes if c["verdicts"]]
    lines = [
        f"{len(both)} measurements in both runs, {len(changes) - len(both)} no longer made; "
        f"{len(beyond)} changed beyond noise"
    ]
    for change in beyond:
        lines += [f"  {said}  {change['provider']}: {change['name']}" for said in _said(change)]
    return "\n".join(lines)


def _said(change: Row) -> Iterator[str]:
    for verdict in change["verdicts"]:
        if verdict in ("slower", "faster"):
            yield f"{verdict} x {change['change']:.2f}, noise {change['noise']:.0%}"
        elif verdict.endswith("memory"):
            yield f"{verdict} x {change['memory']:.2f}"
        elif verdict.endswith("error"):
            yield f"{verdict} x {change['error']:.1f}"
        else:
            yield verdict
