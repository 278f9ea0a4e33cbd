"""The pictures of a record: matplotlib figures, as PNG files and as SVG for the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import numerics
from benchmarks.peers import OURS

SIZE = (5.6, 4.2)  # inches: labels stay readable across a phone
INK = "#17202a"  # of text and axes; on the page it follows the page's own colour
LIMIT = "#8a8a8a"
OURS_COLOR = "#2f81c7"
PEER_COLOR = "#d4772a"
# Of peers, in the order in which a record names them; readable on white and on black.
COLORS = (
    "#d4772a", "#3f9f5f", "#c94f5d", "#9a6fd0", "#8c7355", "#d667a8", "#4d9494", "#8f8f2f"
)  # fmt: skip
MARKERS = "s^vDPX*<"
BARS = 20  # cases in one picture of bars, at most
STYLE = {
    "font.size": 10, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11,
    "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
Row = dict[str, Any]


def measured(rows: list[Row]) -> list[Row]:
    """Rows that have figures."""
    return [row for row in rows if row["status"] == "ok"]


def _axes(title: str, height: float = SIZE[1]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(figure: Figure, axes: Any) -> None:
    """Names of the lines outside of the axes, as anywhere inside lines may run; two to a row."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // 2)
    figure.set_figheight(figure.get_figheight() + 0.18 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _same_but_rows(row: Row) -> str:
    case = {k: v for k, v in row["case"].items() if k not in ("rows", "job")}
    return str(sorted(case.items()))


def _ladders(rows: list[Row], job: str) -> dict[str, list[Row]]:
    """Rows of a job that differ in M alone, where there are three M or more."""
    found: dict[str, list[Row]] = {}
    for row in measured(rows):
        if row["job"] == job and row["case"].get("kind") == "one direction":
            found.setdefault(_same_but_rows(row), []).append(row)
    return {k: v for k, v in found.items() if len({r["case"]["rows"] for r in v}) > 2}


def _lines(axes: Any, rows: list[Row], value: str, scale: float) -> None:
    """A line for each provider over M; ours last, and on top."""
    names = sorted(dict.fromkeys(r["provider"] for r in rows), key=lambda n: n == OURS)
    for place, name in enumerate(names):
        own = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["case"]["rows"])
        color = OURS_COLOR if name == OURS else COLORS[place % len(COLORS)]
        axes.plot(
            [r["case"]["rows"] for r in own], [max(r[value], 1) * scale if value == "peak_bytes"
            else r[value] * scale for r in own], label=name, color=color, markersize=5,
            marker="o" if name == OURS else MARKERS[place % len(MARKERS)],
            linewidth=2 if name == OURS else 1.2, zorder=3 if name == OURS else 2,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="M = N")
    ladder = sorted({r["case"]["rows"] for r in rows})
    axes.set_xticks(ladder, [f"{m >> 10}k" if m >= 1024 else str(m) for m in ladder])
    axes.set_xticks([], minor=True)


def _described(row: Row) -> str:
    case = row["case"]
    return f"{case['metric']}, D = {case['dim']}, {case['dtype']}"


def time_against_rows(rows: list[Row]) -> Figure:
    """Time of a loss over M, with the limit."""
    figure, axes = _axes(f"InfoNCE, forward and backward: {_described(rows[0])}")
    _lines(axes, rows, "minimum", 1e3)
    limits = sorted({(r["case"]["rows"], 1e3 * r["limit"]["seconds"]) for r in rows})
    axes.plot(*zip(*limits, strict=True), color=LIMIT, linestyle="--", label="limit")
    axes.set_ylabel("milliseconds")
    _legend_below(figure, axes)
    return figure


def memory_against_rows(rows: list[Row]) -> Figure:
    """Peak memory of a loss over M, above inputs and gradients."""
    figure, axes = _axes(f"Peak above inputs and gradients: {_described(rows[0])}")
    kept = [r for r in rows if r["peak_bytes"] > 0]  # a small one may hide in what is there
    _lines(axes, kept, "peak_bytes", 2.0**-20)
    axes.set_ylabel("MiB")
    _legend_below(figure, axes)
    return figure


def bar_groups(rows: list[Row]) -> list[list[str]]:
    """Names of all cases, shared out evenly over as few pictures of bars as hold them."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    pictures = max(-(-len(names) // BARS), 1)
    size = max(-(-len(names) // pictures), 1)
    return [names[start : start + size] for start in range(0, len(names), size)]


def ratio_bars(rows: list[Row], job: str, names: list[str]) -> Figure:
    """Limit over time of these cases, ours and the best peer's: 1 is the machine's limit."""
    figure, axes = _axes("", 1.2 + 0.42 * len(names))
    # Of the figure, not of the axes: beside the long names there is no room for it.
    figure.suptitle(f"Limit over time, {job}: longer is better", x=0.01, ha="left", fontsize=11)
    for place, name in enumerate(names):
        own = [r["ratio"] for r in rows if r["name"] == name and r["provider"] == OURS]
        others = [(r["ratio"], r["provider"]) for r in rows if r["name"] == name]
        others = sorted(o for o in others if o[1] != OURS)
        if own:
            axes.barh(place - 0.2, own[0], 0.36, color=OURS_COLOR, label="" if place else OURS)
        if others:
            ratio, peer = others[-1]
            axes.barh(
                place + 0.2, ratio, 0.36, color=PEER_COLOR, label="" if place else "best peer"
            )
            axes.annotate(
                peer, (ratio, place + 0.2), (3, 0), textcoords="offset points", va="center",
                fontsize=7, color=INK,
            )  # fmt: skip
    axes.axvline(1, color=LIMIT, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def error_against(series: Row, label: str, what: str, title: str) -> Figure:
    """Errors against float64 over distance or temperature."""
    figure, axes = _axes(title)
    numerics.draw_errors(axes, series, what, label)
    _legend_below(figure, axes)
    return figure


def figures(record: Row) -> Iterator[tuple[str, Figure]]:
    """Every picture that the record has data for, with the name of its file."""
    rows = record["rows"]
    with matplotlib.rc_context(STYLE):
        for job, draw in (("losses", time_against_rows), ("memory", memory_against_rows)):
            for ladder in _ladders(rows, job).values():
                case = ladder[0]["case"]
                yield (
                    f"{draw.__name__}_{case['metric']}_{case['dim']}_{case['dtype']}",
                    draw(ladder),
                )
        for job in ("losses", "patches", "triplet", "train"):
            own = [row for row in measured(rows) if row["job"] == job]
            for place, names in enumerate(bar_groups(own), 1):
                name = f"ratio_{job}" if place == 1 else f"ratio_{job}_{place}"
                yield name, ratio_bars(own, job, names)
        for name, label, title in (
            ("distance", "distance of a pair", "InfoNCE on distances, float32"),
            ("temperature", "temperature", "InfoNCE on cosines, float32"),
        ):
            if "numerics" in record:
                for what in ("loss", "gradient"):
                    series = record["numerics"][name]
                    yield f"error_{name}_{what}", error_against(series, label, what, title)


def save_png(figure: Figure, path: Path) -> None:
    """On white."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=110)


def svg(figure: Figure, name: str) -> str:
    """For a page: no background, ink in the colour of the text, as wide as there is room."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<svg [^>]*?)width="[^"]+" height="[^"]+"|(<svg )', r"\1\2", text, count=1)
