"""The record of a run: one JSON file, written after every case, read by report and comparison.

``schema``, ``command``, ``environment``, ``rates`` (limits.py), and ``rows``: one for every case
and provider. A row that was measured has ``status`` "ok"; "skipped", "failed", "out of memory"
and "differs" (another job) have a ``reason``.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "skipped", "failed", "out of memory", "differs")
TOP = {"schema": int, "command": str, "environment": dict, "rates": dict, "rows": list}
ROW = {"job": str, "name": str, "case": dict, "provider": str, "status": str}
# What a measured row has; times in seconds, the limit with what bounds it.
MEASURED = {
    "version": str, "seconds": list, "minimum": float, "median": float, "outliers": int,
    "limit": dict, "ratio": float, "peak_bytes": int, "error": dict, "control": dict,
}  # fmt: skip
# Of the environment, what may differ between the parts of one run.
CHANGES = ("date",)
NOT_INSTALLED = "not installed"
FLOOR = 0.05  # a change below it is never said to be one
Key = tuple[str, str, str]


def check(record: Any, where: str = "record") -> None:
    """See that a record has this schema.

    Raises:
        ValueError: Naming what is missing or wrong.
    """
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: schema is {found!r}; wanted {SCHEMA}")
    _has(record, TOP, where)
    for number, row in enumerate(record["rows"]):
        here = f"{where}: rows[{number}]"
        _has(row, ROW, here)
        if row["status"] not in STATUSES:
            raise ValueError(f"{here}: status is {row['status']!r}; wanted one of {STATUSES}")
        _has(row, MEASURED if row["status"] == "ok" else {"reason": str}, here)


def _has(part: dict[str, Any], fields: dict[str, type], where: str) -> None:
    for field, kind in fields.items():
        if not isinstance(part.get(field), kind):
            found = type(part[field]).__name__ if field in part else "missing"
            raise ValueError(f"{where}: {field} is {found}; wanted {kind.__name__}")


def key_of(row: dict[str, Any]) -> Key:
    """What makes two rows the same measurement."""
    return row["job"], json.dumps(row["case"], sort_keys=True), row["provider"]


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        ValueError: If the file is no record.
        OSError: If it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    check(record, str(path))
    return record


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record, so that a run that ends here leaves the old file or the new one."""
    check(record)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def continues(old: dict[str, Any], environment: dict[str, Any]) -> str | None:
    """Why a run in this environment is no continuation of an older record, or None."""
    for name, value in environment.items():
        if name not in CHANGES and old["environment"].get(name) != value:
            return f"{name} was {old['environment'].get(name)!r} and is {value!r}"
    return None


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of both records with what changed beyond noise, the largest slowdown first.

    Noise is how far the medians of both lie over their minima, or those of the controls, and
    FLOOR at least. ``change`` is the new minimum over the old one, ``memory`` that of the peaks.
    """
    before = {key_of(row): row for row in old["rows"] if row["status"] == "ok"}
    found = []
    for row in new["rows"]:
        past = before.pop(key_of(row), None)
        if past is None:
            continue
        if row["status"] != "ok":
            verdict, change, noise = f"now {row['status']}", math.inf, 0.0
        else:
            change = row["minimum"] / past["minimum"]
            spreads = [r["median"] / r["minimum"] - 1 for r in (row, past)]
            spreads += [r["control"].get("drift", 0.0) for r in (row, past)]
            noise = max(FLOOR, *spreads)
            verdict = "same"
            if change > 1 + noise or change < 1 / (1 + noise):
                verdict = "slower" if change > 1 else "faster"
        memory = row.get("peak_bytes", 0) / max(past["peak_bytes"], 1)
        found.append(
            {"job": row["job"], "name": row["name"], "provider": row["provider"]}
            | {"change": change, "noise": noise, "verdict": verdict, "memory": memory}
        )
    return sorted(found, key=lambda r: -r["change"])


def comparison_text(changes: list[dict[str, Any]]) -> str:
    """What changed beyond noise, a line each."""
    beyond = [c for c in changes if c["verdict"] != "same"]
    lines = [f"{len(changes)} measurements in both runs, {len(beyond)} changed beyond noise"]
    for c in beyond:
        amount = "" if math.isinf(c["change"]) else f" x {c['change']:.2f}, noise {c['noise']:.0%}"
        lines.append(f"  {c['verdict']:8}{amount}  {c['provider']}: {c['name']}")
    return "\n".join(lines)
