"""Time and memory of every miner, beside pytorch-metric-learning's where there is one.

``python -m benchmarks.mining --out FILE.json`` measures each call in a process of its own, on one
thread: seconds of the processor, and peak memory above embeddings and labels. What would not fit
into the machine, or would take minutes, is not run: its row says what smaller sizes predict.
``--render FILE.json`` writes the table into docs/contrast.md and keeps the file in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import describe, memory
from benchmarks.measure import resident_bytes, restarted_peak
from fastcontrast import mining

ROOT = Path(__file__).resolve().parents[1]
DIM, MEMBERS = 64, 4  # columns of the embeddings, and members of each class
LARGE = 32768
Row = dict[str, Any]
Mine = Callable[[Tensor, Tensor], Any]


class Miner(NamedTuple):
    """A miner, and what it is measured on.

    Attributes:
        mine: Takes embeddings and labels.
        rows: Sizes that are run.
        kind: Whether classes lie "apart" or are "mixed".
    """

    mine: Mine
    rows: tuple[int, ...] = (4096, LARGE)
    kind: str = "apart"


def theirs(name: str, **options: Any) -> Mine:
    """A miner of pytorch-metric-learning on Euclidean distances."""

    def mine(x: Tensor, labels: Tensor) -> Any:
        from pytorch_metric_learning import distances, miners

        distance = distances.LpDistance(normalize_embeddings=name == "DistanceWeightedMiner")
        return getattr(miners, name)(distance=distance, **options)(x, labels)

    return mine


_THEIR_ROWS = (2048, 4096)
MINERS = {
    "batch_hard_triplets": Miner(mining.batch_hard_triplets),
    "semi_hard_triplets": Miner(mining.semi_hard_triplets),
    "semi_hard_triplets, classes mixed": Miner(mining.semi_hard_triplets, kind="mixed"),
    "distance_weighted_triplets": Miner(
        lambda x, labels: mining.distance_weighted_triplets(x, labels, seed=0)
    ),
    "inverse_distance_triplets": Miner(
        lambda x, labels: mining.inverse_distance_triplets(x, labels, seed=0)
    ),
    "hard_negatives, k = 16": Miner(
        lambda x, labels: mining.hard_negatives(x, x, 16, labels=labels, key_labels=labels)
    ),
    "nearest_anchors, 10 classes": Miner(
        lambda x, labels: mining.nearest_anchors(x, x, labels % 10, 10)
    ),
    "BatchHardMiner": Miner(theirs("BatchHardMiner"), _THEIR_ROWS),
    "BatchEasyHardMiner, semi-hard": Miner(
        theirs("BatchEasyHardMiner", pos_strategy="hard", neg_strategy="semihard"), _THEIR_ROWS
    ),
    "DistanceWeightedMiner": Miner(theirs("DistanceWeightedMiner"), (1024, 2048)),  # 8 GiB
}


def points(rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, DIM] and their class ids: near their classes' centres, or anywhere."""
    torch.manual_seed(0)
    labels = torch.arange(rows) // MEMBERS
    x = torch.randn(rows, DIM)
    if kind == "apart":
        x = x[labels] + 0.1 * torch.randn(rows, DIM)
    return x, labels


def measure(name: str, rows: int) -> Row:
    """One call in this process, after one on few rows."""
    torch.set_num_threads(1)
    miner = MINERS[name]
    miner.mine(*points(256, miner.kind))
    x, labels = points(rows, miner.kind)
    gc.collect()
    before = restarted_peak()
    start = time.process_time()
    miner.mine(x, labels)
    seconds = time.process_time() - start
    peak = max(resident_bytes("VmHWM") - before, 0)
    return {"miner": name, "rows": rows, "seconds": seconds, "peak_bytes": peak}


def predicted(name: str, found: list[Row], limit: int) -> Row:
    """What the two sizes that ran say of the large one: both grow with the number of pairs."""
    small, large = (row for row in found if row["miner"] == name)
    pairs = small["rows"] ** 2, large["rows"] ** 2
    row: Row = {"miner": name, "rows": LARGE, "predicted": True}
    for what in ("seconds", "peak_bytes"):
        slope = (large[what] - small[what]) / (pairs[1] - pairs[0])
        row[what] = large[what] + max(slope, 0) * (LARGE**2 - pairs[1])
    return {**row, "fits": row["peak_bytes"] < limit}


def table(record: Row) -> str:
    """A row for each miner and size."""
    lines = ["| miner | M = N | processor seconds | MiB above the inputs | |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in record["rows"]:
        note = ""
        if row.get("predicted"):
            note = "predicted, not run"
            if not row["fits"]:
                note = f"out of memory, of {record['memory_bytes'] / 2**30:.0f} GiB: not run"
        seconds, size = row["seconds"], row["peak_bytes"] / 2**20
        name = f"`{row['miner'].split(',')[0]}`" + row["miner"][len(row["miner"].split(",")[0]) :]
        lines.append(f"| {name} | {row['rows']:,} | {seconds:.2f} | {size:,.0f} | {note} |")
    return "\n".join(lines)


def section(record: Row) -> str:
    """What stands between the comments of the page."""
    made = record["environment"]
    return (
        "```sh\npython -m benchmarks.mining --out mining_cpu.json\n```\n\n"
        f"D = {DIM}, float32, classes of {MEMBERS}, one thread of {made['processor']}, torch "
        f"{made['torch']}, pytorch-metric-learning {record['peer']}, commit {made['commit']}; "
        f"[the runs](../benchmarks/results/mining_cpu.json).\n\n{table(record)}"
    )


def render(path: Path, root: Path) -> None:
    """Write the table of a record into docs/contrast.md, and keep the record.

    Raises:
        ValueError: If the page has no place for it.
    """
    record = json.loads(path.read_text("utf-8"))
    page = root / "docs" / "contrast.md"
    text = page.read_text("utf-8")
    begin, end = "<!-- mining -->\n", "<!-- end of mining -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: wanted one {begin.strip()} and one {end.strip()}")
    before, rest = text.split(begin)
    written = f"{before}{begin}\n{section(record)}\n\n{end}{rest.split(end)[1]}"
    page.write_text(written, "utf-8")
    save(record, root / "benchmarks" / "results" / "mining_cpu.json")


def save(record: Row, path: Path) -> None:
    """A row a line."""
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    rest = json.dumps({key: value for key, value in record.items() if key != "rows"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{rest[:-1]}, "rows": [\n  {rows}\n]}}\n', "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every miner, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--render", type=Path, metavar="FILE", help="file to show")
    args = parser.parse_args(arguments)
    if args.render:
        render(args.render, ROOT)
        return
    if args.out is None:
        parser.error("wanted --out or --render")
    import pytorch_metric_learning.miners

    record = {
        "environment": describe(), "peer": pytorch_metric_learning.__version__,
        "memory_bytes": memory("MemTotal"), "rows": [],
    }  # fmt: skip
    found: list[Row] = record["rows"]
    torch.set_num_threads(1)  # before there are threads, which a fork would lose
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, miner in MINERS.items():
            for rows in miner.rows:
                found.append(pool.apply(measure, (name, rows)))
                print(found[-1], flush=True)
            if LARGE not in miner.rows:
                found.append(predicted(name, found, record["memory_bytes"]))
                print(found[-1], flush=True)
            save(record, args.out)


if __name__ == "__main__":
    main()
