"""A recorded run as a Markdown table: ``python -m benchmarks.table FILE``.

Milliseconds, minimum of the rounds; in brackets the minimum of the control over it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OURS = "fastcontrast"
NOT_TIMES = ("job", "control", "drift")


def cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "–"
    milliseconds = 1e3 * min(row[name])
    digits = 0 if milliseconds >= 10 else 2
    if name == row.get("control"):
        return f"{milliseconds:.{digits}f}"
    return f"{milliseconds:.{digits}f} ({min(row[row['control']]) / min(row[name]):.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """One table of rows with the same control."""
    control = rows[0]["control"]
    peers = dict.fromkeys(n for row in rows for n in row if n not in (*NOT_TIMES, OURS, control))
    names = [control, OURS, *peers]
    lines = [["job", *names, "drift"], ["---"] * (len(names) + 2)]
    for row in rows:
        lines.append([row["job"], *(cell(row, n) for n in names), f"{row['drift']:+.0%}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what --record wrote")
    record = json.loads(parser.parse_args().file.read_text())
    environment = record["environment"]
    print(f"`{record['command']}`\n")
    print(", ".join(f"{key} {value}" for key, value in environment.items()) + "\n")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["seconds"]:
        if "control" in row:
            groups.setdefault(row["control"], []).append(row)
    print("\n\n".join(table(rows) for rows in groups.values()))


if __name__ == "__main__":
    main()
