"""Studies of what is contrasted: each variant and seed at equal budget, in one file.

``python -m benchmarks.contrast_study STUDY --data DIR --out FILE.json`` runs what the file does not
hold yet, and saves after every run. ``--render`` writes table and pictures into docs/contrast.md
and docs/images instead, and keeps the file in benchmarks/results. Every budget is a run of its own,
with its own schedule; seconds are those of training, of all but spatial contrasting with the one
evaluation at its end, and count the process's own time: other programs on the machine do not
lengthen them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from benchmarks.contrast_pages import render, stem
from benchmarks.contrast_runs import STUDIES, Record
from benchmarks.environment import describe

ROOT = Path(__file__).resolve().parents[1]


def run_one(study: str, variant: str, seed: int, steps: int, data: str, threads: int) -> Record:
    """Train one variant in a folder that is removed afterwards.

    Returns:
        What it was, its test errors by name, and its seconds.
    """
    clock = mock.patch.object(time, "perf_counter", time.process_time)
    with tempfile.TemporaryDirectory() as folder, clock:
        common: Record = {
            "seed": seed, "threads": threads, "device": "cpu", "out_dir": Path(folder),
            "name": "run",
        }  # fmt: skip
        found = STUDIES[study].run(variant, steps, data, common)
    given = {"variant": variant, "seed": seed, "steps": steps}
    return {**given, **found, "environment": describe()}


def save(record: Record, path: Path) -> None:
    """Write the record in one move, a run a line: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    runs = ",\n  ".join(json.dumps(run) for run in record["runs"])
    head = f'"study": {json.dumps(record["study"])}, "data": {json.dumps(record["data"])}'
    beside.write_text(f'{{{head}, "runs": [\n  {runs}\n]}}\n', "utf-8")
    os.replace(beside, path)


def read(path: Path, study: str, data: str | None) -> Record:
    """The record so far, or an empty one.

    Args:
        path: The file.
        study: Its study.
        data: Name of its data set; None for any.

    Raises:
        ValueError: If it is of another study or data set.
        FileNotFoundError: If there is none, and any data set would do.
    """
    if not path.is_file() and data is not None:
        return {"study": study, "data": data, "runs": []}
    record = json.loads(path.read_text("utf-8"))
    if record["study"] != study or (data is not None and record["data"] != data):
        raise ValueError(
            f"{path}: of study {record['study']} on {record['data']}; wanted {study} on {data}"
        )
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or render what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default="sample", help="folder of the data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", help="in place of the study's budgets")
    parser.add_argument("--variants", nargs="+", help="some of the study's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args(arguments)
    if args.render:
        data = Path(args.data) if args.data != "sample" else None
        record = read(args.out, args.study, None)
        save(record, ROOT / "benchmarks" / "results" / f"{stem(record)}.json")
        render(record, STUDIES[args.study], ROOT / "docs", data)
        return
    place = Path(args.data).resolve()
    if place.name == "raw":  # as torchvision lays MNIST out
        place = place.parent
    record = read(args.out, args.study, place.name)
    torch.set_num_threads(args.threads)
    points = STUDIES[args.study].points
    if args.steps:
        variants = dict.fromkeys(variant for variant, steps in points if steps)
        points = [(variant, steps) for variant in variants for steps in args.steps]
    done = {(run["variant"], run["seed"], run["steps"]) for run in record["runs"]}
    for seed in args.seeds:
        for variant, steps in points:
            if (variant, seed, steps) in done or variant not in (args.variants or [variant]):
                continue
            run = run_one(args.study, variant, seed, steps, args.data, args.threads)
            record["runs"].append(run)
            save(record, args.out)


if __name__ == "__main__":
    main()
