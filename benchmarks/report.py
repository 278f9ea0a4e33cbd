"""The report of a record: one page without further files, its pictures, and a Markdown table."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.limits import with_limits
from benchmarks.measure import DRIFT
from benchmarks.record import NOT_INSTALLED, read

Row = dict[str, Any]
COLUMNS = ("provider", "ms", "median", "limit ÷ time", "MiB", "error", "remarks")
JOBS = {
    "losses": "Losses, forward and backward",
    "patches": "Random patches",
    "triplet": "Triplet losses, forward and backward",
    "train": "Training steps",
    "memory": "Memory: one call in a process of its own",
}
NOTES = (
    "Times are of one call, the minimum and the median of interleaved rounds on the same inputs.",
    "The limit is what the machine needs at least: operations of products, or bytes moved, "
    "whichever takes longer; on a GPU special functions by its clock as well. Its rates are the "
    "highest of the run: of GEMMs of several shapes and of copies and fills of that size or "
    "larger, before and after the cases, and of the controls. limit ÷ time is 1 at the limit.",
    "MiB: peak above inputs and gradients, of one call in a process of its own (CPU), or of "
    "torch's allocator (CUDA).",
    "Error: the largest relative error of loss or gradient against float64 on up to 512 rows "
    "(of patches, the largest difference of a value). A provider beyond the bound computes "
    "another job and is not timed.",
)
STYLE = """
:root { color-scheme: light dark; --ink: #17202a; --soft: #5b6670; --paper: #fff; --line: #d5dade;
  --ours: #eaf3fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #9aa5ae; --paper: #14181c;
  --line: #333b42; --ours: #1b2c3b; } }
* { box-sizing: border-box; }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 1180px; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, li, dd { max-width: 75ch; } .soft, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid #d9822b; padding: .3rem .8rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 1.5rem; align-items: start; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; width: 100%; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
td:last-child { white-space: normal; min-width: 12rem; } tr.ours { background: var(--ours); }
th.case { padding-top: .9rem; white-space: normal; }
th.case div { position: sticky; left: .6rem; max-width: min(85vw, 70rem); }
th.case span { font-weight: normal; } pre { white-space: pre-wrap; }
"""


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: Row) -> list[str]:
    """A row of the table, as COLUMNS."""
    if row["status"] != "ok":
        return [row["provider"], "–", "–", "–", "–", "–", f"{row['status']}: {row['reason']}"]
    remarks = [row["remark"]] if row.get("remark") else []
    if len(row["seconds"]) == 1:
        remarks.append("one call")
    if row["outliers"]:
        remarks.append(f"{row['outliers']} of {len(row['seconds'])} rounds far out")
    return [
        f"{row['provider']} {row['version']}",
        milliseconds(row["minimum"]),
        milliseconds(row["median"]),
        f"{row['ratio']:.2f}",
        f"{row['peak_bytes'] / 2**20:,.1f}",
        f"{max(row['error'].values()):.0e}",
        "; ".join(remarks),
    ]


def absent(rows: list[Row]) -> list[str]:
    """Providers that are not installed."""
    return list(dict.fromkeys(r["provider"] for r in rows if r.get("reason") == NOT_INSTALLED))


def cases(rows: list[Row], job: str) -> dict[str, list[Row]]:
    """A job's rows by case, without those of providers that are not installed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["job"] == job and row.get("reason") != NOT_INSTALLED:
            found.setdefault(row["name"], []).append(row)
    return found


def heading(rows: list[Row]) -> str:
    """A case: limit, control and its drift."""
    row = next((r for r in rows if r["status"] == "ok"), None)
    if row is None:
        return ""
    text = f"limit {milliseconds(row['limit']['seconds'])} ms ({row['limit']['by']})"
    control = row["control"]
    if not control:
        return text
    text += f", {control['name']} {milliseconds(control['times'] * control['minimum'])} ms"
    busy = ", machine busy" if control["drift"] > DRIFT else ""
    return f"{text}, drift {control['drift']:.0%}{busy}"


def machine(record: Row) -> dict[str, str]:
    """What the run was made with."""
    rates = record["rates"]
    facts = {k.replace("_", " "): str(v) for k, v in record["environment"].items() if v is not None}
    if "memory bytes" in facts:
        facts["memory"] = f"{int(facts.pop('memory bytes')) / 2**30:.0f} GiB"
    products = [f"{name} {rate / 1e9:,.0f}" for name, rate in rates["operations"].items()]
    facts["products, GFLOP/s"] = ", ".join(products)
    copies = [f"{_size(int(n))} {rate / 1e9:,.0f}" for n, rate in rates["bytes"].items()]
    facts["copies, GB/s"] = ", ".join(copies)
    if absent(record["rows"]):
        facts["not installed"] = ", ".join(absent(record["rows"]))
    facts["command"] = record["command"]
    if "elapsed_seconds" in record:
        facts["the run took"] = f"{record['elapsed_seconds'] / 60:.1f} minutes"
    return facts


def _size(count: int) -> str:
    return f"{count >> 10} KiB" if count < 1 << 20 else f"{count >> 20} MiB"


def warning(rows: list[Row]) -> str:
    """What to think of a run on a busy machine; empty of a quiet one."""
    drifts = {r["name"]: r["control"]["drift"] for r in plots.measured(rows) if r["control"]}
    busy = sum(drift > DRIFT for drift in drifts.values())
    if not busy:
        return ""
    return (
        f"In {busy} of {len(drifts)} cases the control's median lies more than {DRIFT:.0%} over "
        "its minimum: the machine was busy, and their times say little."
    )


def markdown(record: Row) -> str:
    """Machine and tables."""
    lines = ["# Benchmark", ""]
    lines += [f"* {name}: {value}" for name, value in machine(record).items()]
    lines += ["", *(f"{note}" for note in NOTES), ""]
    if warning(record["rows"]):
        lines += [f"**{warning(record['rows'])}**", ""]
    for job, title in JOBS.items():
        found = cases(record["rows"], job)
        if found:
            lines += [f"## {title}", "", "| case | " + " | ".join(COLUMNS) + " |"]
            lines.append("| --- " * (len(COLUMNS) + 1) + "|")
        for name, rows in found.items():
            lines.append(f"| **{name}** | {heading(rows)} |" + " |" * (len(COLUMNS) - 1))
            for row in rows:
                text = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells(row)]
                lines.append("| | " + " | ".join(text) + " |")
        if found:
            lines.append("")
    return "\n".join(lines)


def page(record: Row, pictures: dict[str, str], changes: str) -> str:
    """The page; pictures are SVG by name."""
    e = html.escape
    facts = machine(record)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>fastcontrast benchmark</title><style>{STYLE}</style>",
        "<h1>fastcontrast benchmark</h1>",
        "<dl>" + "".join(f"<dt>{e(k)}</dt><dd>{e(v)}</dd>" for k, v in facts.items()) + "</dl>",
    ]
    if warning(record["rows"]):
        parts.append(f"<p class=warning>{e(warning(record['rows']))}</p>")
    if changes:
        parts.append(f"<h2>Changes</h2><pre>{e(changes)}</pre>")
    drawn = "".join(f"<figure>{text}</figure>" for text in pictures.values())
    parts.append(f"<h2>Pictures</h2><div class=figures>{drawn}</div>" if drawn else "")
    for job, title in JOBS.items():
        found = cases(record["rows"], job)
        if found:
            head = "".join(f"<th>{e(c)}</th>" for c in COLUMNS)
            body = "".join(_group(name, rows) for name, rows in found.items())
            parts.append(
                f"<h2>{e(title)}</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>"
            )
    parts.append("<h2>How to read it</h2><ul>" + "".join(f"<li>{e(n)}</li>" for n in NOTES))
    return "\n".join([*parts, "</ul></html>"]) + "\n"


def _group(name: str, rows: list[Row]) -> str:
    e = html.escape
    note = f"<span class=soft> {e(heading(rows))}</span>"
    lines = [f"<tr><th class=case colspan={len(COLUMNS)}><div>{e(name)}{note}</div></th></tr>"]
    for row in rows:
        kind = " class=ours" if row["provider"] == plots.OURS else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{e(c)}</td>" for c in cells(row)) + "</tr>")
    return "".join(lines)


def write(record: Row, folder: Path, changes: str = "") -> list[Path]:
    """Write page, table and pictures into the folder; their paths."""
    record = with_limits(record)
    pictures, written = {}, []
    for name, figure in plots.figures(record):
        plots.save_png(figure, folder / f"{name}.png")
        written.append(folder / f"{name}.png")
        pictures[name] = plots.svg(figure, name)
    for path, text in (
        (folder / "bench.html", page(record, pictures, changes)),
        (folder / "bench.md", markdown(record)),
    ):
        path.write_text(text)
        written.append(path)
    return written


def main() -> None:
    """Write page, table and pictures of the record in a folder again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="with the bench.json of a run")
    folder = parser.parse_args().folder
    for path in write(read(folder / "bench.json"), folder):
        print(path)


if __name__ == "__main__":
    main()
