"""What the studies of benchmarks/contrast_study.py found, as tables and pictures of a document.

A section of docs/contrast.md between two comments is written anew; what stands around it is not
touched. Accuracies are in per cent, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contrast_runs import OBJECTIVES, TASKS, Record, Study

EMBEDDINGS = ("random network", "slow features", *reversed(OBJECTIVES))
CLASSIFIERS = ("linear layer", "1-NN")
COLLAPSED = 30.0  # points of accuracy below the median of a picture
FAR = "nearest frame in time"  # the figure of frames whose nearest is not near in time
FAR_ABOUT = (
    "Test frames whose nearest other one is of another sequence or more than the window away in "
    "time, in per cent; less is better, and no label is needed:"
)
DATA = {"cifar-10-batches-bin": "CIFAR-10", "sample": "the MNIST sample"}  # by folder


class Point(NamedTuple):
    """A variant at a budget: mean seconds, mean and deviation of its accuracy, and seeds."""

    steps: int
    seconds: float
    mean: float
    spread: float
    count: int


def stem(record: Record) -> str:
    """Name of a record's files and of its section."""
    data = "cifar10" if record["data"] == "cifar-10-batches-bin" else record["data"].lower()
    return f"contrast_{record['study']}" + (f"_{data}" if data != "temporal" else "")


def summary(record: Record, figure: str) -> dict[str, list[Point]]:
    """Accuracy of each variant at each budget."""
    found: dict[str, list[Point]] = {}
    for variant in dict.fromkeys(run["variant"] for run in record["runs"]):
        own = [run for run in record["runs"] if run["variant"] == variant]
        for steps in sorted({run["steps"] for run in own}):
            runs = [run for run in own if run["steps"] == steps]
            mean, spread = accuracy(run["figures"][figure] for run in runs)
            seconds = statistics.mean(run["seconds"] for run in runs)
            found.setdefault(variant, []).append(Point(steps, seconds, mean, spread, len(runs)))
    return found


def accuracy(errors: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation of 1 - error, in per cent; NaN of one seed."""
    values = [100 * (1 - error) for error in errors]
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), spread


def budget_table(record: Record, figures: dict[str, str]) -> str:
    """A row for each variant and budget."""
    columns = [f"{name}, %" for name in figures.values()]
    head = ["variant", "steps", "seconds", *columns, "seeds"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    found = [summary(record, figure) for figure in figures]
    for variant, points in found[0].items():
        for place, point in enumerate(points):
            same = [each[variant][place] for each in found]
            values = [
                f"{one.mean:.2f}" + (f" ± {one.spread:.2f}" if one.count > 1 else "")
                for one in same
            ]
            cells = [variant, str(point.steps), f"{point.seconds:.0f}", *values, str(point.count)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_budgets(record: Record, figures: dict[str, str], path: Path) -> None:
    """Accuracies against steps and against seconds; of a variant without steps, a line.

    A variant that collapsed would leave the others on one line: it is named, below the picture.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.4 * len(figures)), layout="constrained")
    rows: Any = picture.subplots(len(figures), 2, sharey="row", sharex="col", squeeze=False)
    for row, (figure, name) in zip(rows, figures.items(), strict=True):
        found = summary(record, figure)
        floor = statistics.median(p.mean for points in found.values() for p in points) - COLLAPSED
        for number, (variant, points) in enumerate(found.items()):
            means, spreads = [p.mean for p in points], [p.spread for p in points]
            if max(means) < floor:
                row[0].plot(
                    [], [], color=f"C{number}", label=f"{variant}: {max(means):.0f} % at most"
                )
                continue
            for axis, places in zip(
                row, ([p.steps for p in points], [p.seconds for p in points]), strict=True
            ):
                if places == [0]:
                    axis.axhspan(
                        means[0] - spreads[0], means[0] + spreads[0], color="#bbbbbb", alpha=0.4
                    )
                    axis.axhline(means[0], color="#666666", label=variant)
                    continue
                axis.errorbar(
                    places, means, spreads, color=f"C{number}", marker="o", capsize=3,
                    label=variant,
                )  # fmt: skip
        row[0].set_ylabel(f"{name}, accuracy, %")
        for axis in row:
            axis.grid(alpha=0.25)
    for axis, name in zip(rows[-1], ("steps", "seconds on one core"), strict=True):
        axis.set_xlabel(name)
    rows[0, 0].legend(fontsize=8)
    picture.savefig(path, dpi=110)


def judged(record: Record) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
    """Of the temporal study, for each labelled task the accuracy of (embedding, classifier)."""
    found: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for task in TASKS:
        for embedding in EMBEDDINGS:
            objective = embedding if embedding in OBJECTIVES else "contrast"
            runs = [run for run in record["runs"] if run["variant"] == f"{task}, {objective}"]
            for classifier in CLASSIFIERS:
                errors = [run["figures"].get(f"{classifier}, {embedding}") for run in runs]
                if errors and None not in errors:
                    key = embedding, classifier
                    found.setdefault(task, {})[key] = accuracy(errors)
    return found


def task_table(record: Record) -> str:
    """A row for each embedding, two columns for each task."""
    found = judged(record)
    head = ["embedding", *(f"{task}, {each}" for task in found for each in CLASSIFIERS)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for embedding in EMBEDDINGS:
        cells = [embedding]
        for of_task in found.values():
            for classifier in CLASSIFIERS:
                values = of_task.get((embedding, classifier))
                cells.append("–" if values is None else f"{values[0]:.1f} ± {values[1]:.1f}")
        if set(cells[1:]) != {"–"}:
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(record: Record) -> str:
    """Of each trained network, the share of frames whose nearest is far in time, in per cent."""
    found: dict[str, dict[str, str]] = {}
    for run in record["runs"]:
        task, objective = run["variant"].split(", ")
        own = [one["figures"][FAR] for one in record["runs"] if one["variant"] == run["variant"]]
        mean, spread = accuracy(1 - error for error in own)
        found.setdefault(objective, {})[task] = f"{mean:.1f} ± {spread:.1f}"
    tasks = list(dict.fromkeys(run["variant"].split(", ")[0] for run in record["runs"]))
    lines = [f"| trained by | {' | '.join(tasks)} |", "| --- " * (1 + len(tasks)) + "|"]
    for objective, of_task in found.items():
        lines.append(f"| {objective} | {' | '.join(of_task.get(t, '–') for t in tasks)} |")
    return "\n".join(lines)


def draw_tasks(record: Record, path: Path) -> None:
    """Accuracies of every embedding on every task, with standard deviations."""
    from matplotlib.figure import Figure

    found = judged(record)
    picture = Figure(figsize=(2.6 * len(found) + 1, 3.2), layout="constrained")
    axes: Any = picture.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (task, of_task) in zip(axes, found.items(), strict=True):
        for shift, marker, classifier in ((-0.12, "o", "linear layer"), (0.12, "s", "1-NN")):
            for place, embedding in enumerate(EMBEDDINGS):
                if (embedding, classifier) in of_task:
                    mean, spread = of_task[embedding, classifier]
                    axis.errorbar(
                        mean, place + shift, xerr=spread, marker=marker, capsize=3,
                        color="C0" if classifier == "1-NN" else "C1", linestyle="",
                        label=classifier if place == len(EMBEDDINGS) - 1 else None,
                    )  # fmt: skip
        axis.set_title(task)
        axis.set_xlabel("accuracy, %")
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(EMBEDDINGS)), EMBEDDINGS)
    axes[0].legend(fontsize=8)
    picture.savefig(path, dpi=110)


def draw_sheet(record: Record, frames: np.ndarray, path: Path) -> bool:
    """Frames of the video, and what lies nearest to each in its first three quarters.

    Args:
        record: Of the temporal study.
        frames: The video, uint8 [T, H, W, 3].
        path: PNG file to write.

    Returns:
        Whether there was a run to draw.
    """
    from matplotlib.figure import Figure

    first: dict[str, list[list[int]]] = {}
    for run in record["runs"]:
        if "nearest" in run:
            first = {**run["nearest"], **first}  # of the lowest seed
    if not first:
        return False
    kinds = [name for name in ("contrast", "autoencoder", "random network", "pixels")
             if name in first]  # fmt: skip
    begin = len(frames) - len(frames) // 4  # of the test split
    rows, each = len(first[kinds[0]]), len(first[kinds[0]][0]) - 1
    shades = (frames // 16) * 16 + 8  # small files: a few grey values do
    picture = Figure(figsize=(1.25 * (1 + each * len(kinds)), 1.12 * rows + 0.4), dpi=110)
    grid = picture.add_gridspec(
        rows, 1 + each * len(kinds), left=0.004, right=0.996, top=1 - 0.45 / (1.12 * rows + 0.4),
        bottom=0.01, wspace=0.04, hspace=0.16,
    )  # fmt: skip
    for row in range(rows):
        asked = begin + first[kinds[0]][row][0]
        shown = [("asked for", asked)]
        shown += [(kind, index) for kind in kinds for index in first[kind][row][1:]]
        for column, (kind, index) in enumerate(shown):
            axis = picture.add_subplot(grid[row, column])
            axis.imshow(shades[index], interpolation="nearest")
            axis.set_axis_off()
            axis.text(
                3, 11, f"{index / 10:.0f} s", fontsize=6, color="white",
                bbox={"facecolor": "black", "pad": 1, "linewidth": 0},
            )  # fmt: skip
            if row == 0 and (column - 1) % each == (0 if column else each - 1):
                axis.set_title(kind, fontsize=8, loc="left")
    picture.savefig(path, dpi=110)
    return True


def command(record: Record, study: Study) -> str:
    """What made the record: of DIR as the page lays it out, and what differs from the study."""
    runs, out = record["runs"], f"{stem(record)}.json"
    data = {"MNIST": "DIR/MNIST/raw", "sample": "sample"}.get(
        record["data"], f"DIR/{record['data']}"
    )
    told = [f"python -m benchmarks.contrast_study {record['study']} --data {data} --out {out}"]
    seeds = sorted({run["seed"] for run in runs})
    if seeds != [0, 1, 2]:
        told.append(f"--seeds {' '.join(map(str, seeds))}")
    variants = list(dict.fromkeys(variant for variant, _ in study.points))
    ran = {run["variant"] for run in runs}
    if ran != set(variants):
        told.append("--variants " + " ".join(f"'{v}'" for v in variants if v in ran))
    points = {(run["variant"], run["steps"]) for run in runs}
    if not points <= set(study.points):
        budgets = sorted({steps for _, steps in points if steps})
        told.append(f"--steps {' '.join(map(str, budgets))}")
    return " ".join(told)


def section(record: Record, study: Study, images: list[str]) -> str:
    """What stands between the comments of a record."""
    runs = record["runs"]
    where = {(e["processor"], e["torch"], e["commit"]) for e in (r["environment"] for r in runs)}
    machines = "; ".join(f"{p}, torch {t}, commit {c}" for p, t, c in sorted(where))
    counts = Counter((run["variant"], run["steps"]) for run in runs).values()
    seeds = f"{max(counts)} seeds" + (", or one" if min(counts) == 1 < max(counts) else "")
    data = DATA.get(record["data"], record["data"])
    head = f"### {study.title}" + (f", {data}" if study.figures else "")
    lines = [head, "", study.about, ""]
    lines += [f"Mean ± standard deviation over {seeds}, one core of {machines}; "
             f"[the runs](../benchmarks/results/{stem(record)}.json).", ""]  # fmt: skip
    lines += ["```sh", command(record, study), "```", ""]
    for image in images:
        what = image.removesuffix(".png").removeprefix("contrast_").replace("_", " ")
        lines += [f"![{what}](images/{image})", ""]
    figures = study.figures
    if figures:
        lines.append(budget_table(record, figures))
    else:
        lines += [task_table(record), "", FAR_ABOUT, "", time_table(record)]
    return "\n".join(lines)


def render(record: Record, study: Study, docs: Path, data: Path | None) -> None:
    """Draw the pictures of a record, and write its section.

    Args:
        record: The runs.
        study: What was compared.
        docs: Holds contrast.md and images/.
        data: Folder of the video's frames, for their sheet; None draws none.

    Raises:
        ValueError: If the page has no such section.
    """
    name = stem(record)
    images = [f"{name}.png"]
    if study.figures:
        draw_budgets(record, study.figures, docs / "images" / images[0])
    else:
        draw_tasks(record, docs / "images" / images[0])
        sheet = f"{name}_video.png"
        if data is not None:
            draw_sheet(record, np.load(data / "vtest.npy"), docs / "images" / sheet)
        if (docs / "images" / sheet).is_file():
            images.append(sheet)
    page = docs / "contrast.md"
    text = page.read_text("utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: wanted one {begin.strip()} and one {end.strip()}")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    written = f"{before}{begin}\n{section(record, study, images)}\n\n{end}{after}"
    page.write_text(written, "utf-8")
