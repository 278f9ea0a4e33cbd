"""Studies of what is contrasted: each variant and seed at equal budget, in one file.

``python -m benchmarks.contrast_study triplet --data DIR --out FILE.json`` runs what the file does
not hold yet, and saves after every run. ``--render`` prints the table, and draws the picture beside
the file. Every budget is a run of its own, with its own schedule; seconds are those of training
with the one evaluation at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.environment import describe
from fastcontrast.train.config import RunConfig, SemisupConfig, TripletConfig
from fastcontrast.train.runs import read_metrics
from fastcontrast.train.semisup import train_semisup
from fastcontrast.train.triplet import train_triplet

Record = dict[str, Any]

# Reduced budgets, for minutes on one core; the papers train for hundreds of times as many steps.
STUDIES = {
    "triplet": (
        "mining",
        ("uniform", "semi-hard", "batch-hard", "distance-weighted", "inverse-distance"),
        (100, 200, 400),
    ),
    "anchors": ("anchors", ("random", "nearest", "class-mean"), (250, 500, 1000)),
}


def run_one(study: str, variant: str, seed: int, steps: int, data: str, threads: int) -> Record:
    """Train one variant in a folder that is removed afterwards.

    Returns:
        What it was, its test errors by name, and its seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        common: Record = {
            "data": data, "seed": seed, "steps": steps, "eval_every": steps, "threads": threads,
            "device": "cpu", "out_dir": Path(folder), "name": "run", STUDIES[study][0]: variant,
        }  # fmt: skip
        config: RunConfig
        if study == "triplet":
            config = TripletConfig(**common, schedule="cosine")
            result = train_triplet(config)
        else:
            config = SemisupConfig(**common)
            result = train_semisup(config)
        if result.interrupted:
            raise KeyboardInterrupt
        seconds = read_metrics(result.run)[-1]["seconds"]
        saved = json.loads(result.run.config.read_text("utf-8"))
    return {
        "variant": variant, "seed": seed, "steps": steps, "seconds": seconds,
        "figures": {figure.name: figure.value for figure in result.figures},
        "config": saved["config"], "environment": describe(),
    }  # fmt: skip


def save(record: Record, path: Path) -> None:
    """Write the record in one move: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    os.replace(beside, path)


def read(path: Path, study: str, data: str | None) -> Record:
    """The record so far, or an empty one.

    Raises:
        ValueError: If it is of another study or data set.
    """
    if not path.is_file():
        return {"study": study, "data": data, "runs": []}
    record = json.loads(path.read_text("utf-8"))
    if record["study"] != study or (data is not None and record["data"] != data):
        raise ValueError(
            f"{path}: of study {record['study']} on {record['data']}; wanted {study} on {data}"
        )
    return record


def summary(record: Record, figure: str) -> dict[str, list[tuple[int, float, float, float, int]]]:
    """For each variant: steps, mean seconds, mean and deviation of the accuracy, and seeds."""
    found: dict[str, list[tuple[int, float, float, float, int]]] = {}
    for variant in dict.fromkeys(run["variant"] for run in record["runs"]):
        own = [run for run in record["runs"] if run["variant"] == variant]
        for steps in sorted({run["steps"] for run in own}):
            runs = [run for run in own if run["steps"] == steps]
            values = [100 * (1 - run["figures"][figure]) for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            seconds = statistics.mean(run["seconds"] for run in runs)
            row = (steps, seconds, statistics.mean(values), spread, len(values))
            found.setdefault(variant, []).append(row)
    return found


def table(record: Record, figure: str) -> str:
    """Accuracy in Markdown, mean ± standard deviation over seeds."""
    head = f"| variant | steps | seconds | accuracy, {figure}, % | seeds |\n" + "| --- " * 5 + "|"
    rows = [
        f"| {variant} | {steps} | {seconds:.0f} | {mean:.2f} ± {spread:.2f} | {count} |"
        for variant, points in summary(record, figure).items()
        for steps, seconds, mean, spread, count in points
    ]
    return "\n".join([head, *rows])


def draw(record: Record, figure: str, path: Path) -> None:
    """Accuracy against steps and against seconds, with standard deviations."""
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    axes: Any = picture.subplots(1, 2, sharey=True)
    for variant, points in summary(record, figure).items():
        for place, axis in enumerate(axes):
            spread = [point[3] for point in points]
            axis.errorbar(
                [point[place] for point in points], [point[2] for point in points], spread,
                marker="o", capsize=3, label=variant,
            )  # fmt: skip
    for axis, name in zip(axes, ("steps", "seconds"), strict=True):
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"accuracy, {figure}, %")
    axes[0].legend()
    picture.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, or render what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    data = None if args.render else (args.data or "sample")
    record = read(args.out, args.study, data)
    if args.render:
        figure = "linear layer" if args.study == "triplet" else "1-NN test error, embedding"
        print(table(record, figure))
        draw(record, figure, args.out.with_suffix(".png"))
        return
    torch.set_num_threads(args.threads)
    _, variants, budgets = STUDIES[args.study]
    done = {(run["variant"], run["seed"], run["steps"]) for run in record["runs"]}
    for seed in args.seeds:
        for variant in variants:
            for steps in args.steps or budgets:
                if (variant, seed, steps) in done:
                    continue
                run = run_one(args.study, variant, seed, steps, record["data"], args.threads)
                record["runs"].append(run)
                save(record, args.out)


if __name__ == "__main__":
    main()
