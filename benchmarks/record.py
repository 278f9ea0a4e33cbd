"""The record of a run: one JSON file, written after every case, read by report and comparison.

``schema``, ``command``, ``environment``, ``elapsed_seconds`` (of all parts of the run together),
``rates`` (limits.py), and ``rows``: one for every case and provider. A row that was measured has
``status`` "ok", ``once`` (seconds in a process of its own) and maybe a ``remark``; "skipped",
"failed", "out of memory" and "differs" (another job) have a ``reason``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "skipped", "failed", "out of memory", "differs")
TOP = {"schema": int, "command": str, "environment": dict, "rates": dict, "rows": list}
ROW = {"job": str, "name": str, "case": dict, "provider": str, "status": str}
# What a measured row has; times in seconds. Limits are of the whole record: limits.with_limits.
MEASURED = {
    "version": str, "seconds": list, "minimum": float, "median": float, "outliers": int,
    "peak_bytes": int, "error": dict, "control": dict,
}  # fmt: skip
# Of the environment, what may differ between the parts of one run.
CHANGES = ("date",)
NOT_INSTALLED = "not installed"
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
