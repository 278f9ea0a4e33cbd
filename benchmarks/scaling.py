"""Time and memory of the losses over W GPUs, on paper, and what this machine's ranks say to it.

    python -m benchmarks.scaling --out docs/images    the plot and the tables of docs/scaling.md
    python -m benchmarks.scaling --measure FILE       1 to 4 gloo ranks on this machine

The model has the operations and bytes of docs/distributed.md, divided by rates. "gather" waits for
all columns, computes, and waits for the gradients; in the "ring" a shard travels while another is
computed, so each of its steps takes the longer of the two; on a CPU, where a core that sends does
not compute, their sum.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import describe
from benchmarks.processes import RETURNING

WORLDS = tuple(1 << k for k in range(13))  # 1 to 4096
ROWS = tuple(1 << k for k in range(8, 20))  # of a rank: 256 to 524,288
MANY = 64  # ranks, where what a rank sends hardly depends on their number any more
STRATEGIES = ("gather", "ring")
BLOCK = 1 << 24  # bytes of scores in work at a time
COLORS = {"gather": "#2f81c7", "ring": "#d9822b"}
ROUNDS = 5
PATIENCE = timedelta(minutes=5)  # until ranks end that wait for a dead one


class Cluster(NamedTuple):
    """Operations per second of a rank, bytes per second in each direction, seconds a message."""

    name: str
    rate: float
    link: float
    latency: float


# Half of an H200's dense bfloat16 peak (989e12), what a good kernel reaches; links as vendors say.
CLUSTERS = (
    Cluster("NVLink, 450 GB/s", 5e14, 450e9, 5e-6),
    Cluster("InfiniBand, 50 GB/s", 5e14, 50e9, 1e-5),
    Cluster("Ethernet, 3 GB/s", 5e14, 3e9, 5e-5),
)


class Step(NamedTuple):
    """Seconds of one loss, forward and backward, on one rank, and bytes beside its own points."""

    compute: float
    waiting: float
    memory: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.compute + self.waiting


def loss_step(
    cluster: Cluster,
    world: int,
    rows: int,
    dim: int,
    strategy: str,
    width: int,
    *,
    overlap: bool = True,
) -> Step:
    """One direction of a loss: n rows a rank, D numbers of ``width`` bytes."""
    shard = float(rows) * dim  # numbers
    pairs = float(rows) * rows * dim  # of a step of the ring
    if strategy == "gather":
        compute = 6 * world * pairs / cluster.rate
        sent = 2 * (world - 1) * shard * width
        waiting = sent / cluster.link + 2 * (world - 1) * cluster.latency
        return Step(compute, waiting, 2 * world * shard * width + BLOCK)
    width = max(width, 4)  # the ring sends half precision as float32
    total = waiting = 0.0
    # Scores forward; scores and both gradients backward, where gradients travel with the columns.
    for operations, travels in ((2, 1), (6, 2)):
        compute = operations * pairs / cluster.rate
        transfer = travels * shard * width / cluster.link + cluster.latency
        total += world * compute
        hidden = compute if overlap else 0.0
        waiting += max(transfer - hidden, 0.0) * (world - 1)
    if world > 1:  # the gradients' last step, home
        waiting += shard * width / cluster.link + cluster.latency
    return Step(total, waiting, 4 * shard * width + BLOCK)


def balance(cluster: Cluster, strategy: str, width: int) -> float:
    """Rows a rank at which sending takes as long as computing, of many ranks; without latency.

    D and W cancel: both bytes and operations are proportional to them.
    """
    if strategy == "gather":
        return width * cluster.rate / (3 * cluster.link)
    return max(width, 4) * cluster.rate / (2 * cluster.link)


def tables(rows: int, dim: int, width: int) -> str:
    """Markdown: balance of each link, and steps over the number of ranks."""
    lines = ["| link | gather | ring |", "| --- | --- | --- |"]
    for cluster in CLUSTERS:
        found = [f"{balance(cluster, s, width):,.0f}" for s in STRATEGIES]
        lines.append(f"| {cluster.name} | " + " | ".join(found) + " |")
    lines += [
        "", "| W | whole batch | memory, gather | memory, ring | "
        + " | ".join(f"{c.name}: gather, ring" for c in CLUSTERS) + " |",
        "| --- " * (4 + len(CLUSTERS)) + "|",
    ]  # fmt: skip
    for world in WORLDS[::3]:
        cells = [f"{world:,}", f"{world * rows:,}"]
        for strategy in STRATEGIES:
            memory = loss_step(CLUSTERS[0], world, rows, dim, strategy, width).memory
            cells.append(f"{memory / 2**20:,.0f} MiB")
        for c in CLUSTERS:
            times = [1e3 * loss_step(c, world, rows, dim, s, width).seconds for s in STRATEGIES]
            cells.append(", ".join(f"{t:,.2f}" for t in times))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: int, dim: int, width: int, path: Path) -> None:
    """Time a step and share of it spent waiting, and memory, over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels: Any = figure.subplots(2, 2).ravel()
    for cluster, line in zip(CLUSTERS, ("-", "--", ":"), strict=True):
        for strategy in STRATEGIES:
            steps = [loss_step(cluster, w, rows, dim, strategy, width) for w in WORLDS]
            style = {"color": COLORS[strategy], "linestyle": line}
            label = f"{strategy}, {cluster.name}"
            panels[0].plot(WORLDS, [1e3 * s.seconds for s in steps], label=label, **style)
            panels[1].plot(WORLDS, [s.waiting / s.seconds for s in steps], **style)
            steps = [loss_step(cluster, MANY, n, dim, strategy, width) for n in ROWS]
            panels[3].plot(ROWS, [s.waiting / s.seconds for s in steps], **style)
    for strategy in STRATEGIES:
        steps = [loss_step(CLUSTERS[0], w, rows, dim, strategy, width) for w in WORLDS]
        memory = [s.memory / 2**20 for s in steps]
        panels[2].plot(WORLDS, memory, color=COLORS[strategy], label=strategy)
    panels[3].axvline(rows, color="#888888", linewidth=0.8)
    titles = (
        f"milliseconds a step, {rows:,} rows a rank", f"share of it spent waiting, {rows:,} rows",
        f"MiB a rank, {rows:,} rows", f"share spent waiting, {MANY} ranks",
    )  # fmt: skip
    for axes, title in zip(panels, titles, strict=True):
        last = axes is panels[3]
        ticks = ROWS[::3] if last else WORLDS[::3]
        axes.set(xscale="log", xlabel="rows a rank" if last else "ranks", title=title)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[2].set_yscale("log")
    panels[0].legend(fontsize=7, frameon=False)
    panels[2].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Model, one direction of a loss, D = {dim}, bfloat16")
    figure.savefig(path, dpi=110)


def rank_of(
    rank: int, world: int, rows: int, dim: int, strategy: str, store: str, what: str
) -> None:
    """What one rank measures, "times" or "memory", as JSON on standard output; one thread."""
    import torch
    import torch.distributed as dist

    import fastcontrast
    from benchmarks.measure import resident_bytes, restarted_peak
    from fastcontrast.distributed import Ranks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE
    )
    generator = torch.Generator().manual_seed(rank)
    x, y = (
        torch.randn(rows, dim, generator=generator).div_(dim**0.25).requires_grad_()
        for _ in range(2)
    )

    def step() -> None:
        loss: Any = fastcontrast.info_nce_loss(x, y, ranks=Ranks(strategy))
        loss.backward()

    def gemm() -> None:
        with torch.no_grad():
            x @ y.T

    def send() -> None:
        parts = [torch.empty_like(y) for _ in range(world)]
        dist.all_gather(parts, y.detach())

    found: dict[str, Any] = {}
    if what == "memory":
        step()  # libraries are loaded, and gradients there to be added to
        dist.barrier()
        before = restarted_peak()
        step()
        found["bytes"] = max(resident_bytes("VmHWM") - before, 0)
    else:
        for name, call in (("gemm", gemm), ("seconds", step), ("all_gather", send)):
            call()
            found[name] = []
            for _ in range(ROUNDS):
                dist.barrier()
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


def run_ranks(world: int, rows: int, dim: int, strategy: str, what: str) -> list[dict[str, Any]]:
    """What every rank has found."""
    environment = RETURNING if what == "memory" else {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [str(f) for f in (world, rows, dim, strategy, f"{folder}/store", what)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scaling", "--rank", str(r), *flags],
                stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_WAIT_POLICY": "passive"} | environment,
            )
            for r in range(world)
        ]  # fmt: skip
        printed = [rank.communicate()[0] for rank in ranks]
    if codes := [rank.returncode for rank in ranks if rank.returncode]:
        raise SystemExit(f"{len(codes)} of {world} ranks ended with exit codes {codes}")
    return [json.loads(text) for text in printed]


def measure(rows: int, dim: int, worlds: list[int], path: Path) -> None:
    """Run the ranks, and set the model beside what they took.

    Its rate is that of the loss of one rank, less where ranks share cores, by what the GEMM takes
    among so many; its link is the all_gather of as many.
    """
    results: list[dict[str, Any]] = []
    alone = {"gemm": 0.0, "rate": 0.0}
    for world in sorted({1, *worlds}):
        for strategy in STRATEGIES[: 1 if world == 1 else None]:
            found = run_ranks(world, rows, dim, strategy, "times")[0]
            peaks = [r["bytes"] for r in run_ranks(world, rows, dim, strategy, "memory")]
            seconds, gemm, gathering = (
                min(found[name]) for name in ("seconds", "gemm", "all_gather")
            )
            if world == 1:
                alone = {"gemm": gemm, "rate": 6.0 * rows * rows * dim / seconds}
            rate = alone["rate"] * alone["gemm"] / gemm
            link = 4.0 * (world - 1) * rows * dim / gathering if world > 1 else float("inf")
            cluster = Cluster("", rate, link, 0.0)
            model = loss_step(cluster, world, rows, dim, strategy, 4, overlap=False)
            results.append(
                {"ranks": world, "strategy": strategy, "rows": rows, "dim": dim, **found}
                | {"bytes": max(peaks), "rate": rate, "link": link if world > 1 else None}
                | {"model_seconds": model.seconds, "model_bytes": model.memory}
            )
            print(
                f"W = {world}, {strategy}: {1e3 * seconds:.0f} ms, model "
                f"{1e3 * model.seconds:.0f}; {max(peaks) / 2**20:.0f} MiB, model "
                f"{model.memory / 2**20:.0f}"
            )
            record = {
                "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
                "environment": describe(),
                "results": results,
            }
            path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Print the tables and write the plot, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="a rank (default: 4096)")
    parser.add_argument("--dim", type=int, default=512, help="D (default: 512)")
    parser.add_argument("--out", type=Path, help="folder of the plot")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="time gloo ranks here")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 2, 3, 4], metavar="W", help="of --measure"
    )
    parser.add_argument("--rank", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank, world, rows, dim = map(int, options.rank[:4])
        rank_of(rank, world, rows, dim, *options.rank[4:])
    elif options.measure:
        measure(options.rows, options.dim, options.worlds, options.measure)
    else:
        print(tables(options.rows, options.dim, 2))
        if options.out:
            draw(options.rows, options.dim, 2, options.out / "scaling.png")


if __name__ == "__main__":
    main()
