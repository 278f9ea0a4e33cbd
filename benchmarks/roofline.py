"""What the Triton kernels must take, by their bytes and operations, beside the limit and the goal.

    python -m benchmarks.roofline           writes docs/roofline.md
    python -m benchmarks.roofline --print   and says what each launch is bound by

The counts are in pair_model.py and row_model.py, the GPUs and the two ways to add up a launch in
gpu_model.py: at least what the slowest unit takes by the source, all units at once; at most what
the compiled loop takes, products and the rest in turn. Measured times are those of records of
``fastcontrast bench`` in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import pair_model, row_model
from benchmarks.backend_choice import CALLS, POINTS, bounds_table, choice_table, search_time
from benchmarks.cases import case_of
from benchmarks.gpu_model import CALL, DEVICES, Counts, Device, Launch, milliseconds, total
from benchmarks.pair_model import Shape
from benchmarks.patch_cases import SCALE
from benchmarks.peers import OURS
from benchmarks.row_model import Patches
from fastcontrast.backends import native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "roofline.md"
LOOPS = ("statistics", "gradients of rows", "gradients of columns")


class Job(NamedTuple):
    """A row of the page.

    Attributes:
        name: In words.
        facts: Those of the benchmark's case (benchmarks/cases.py), or None where it has none.
        launches: On each device.
        calls: Of the host.
        products: Multiplications of the GEMMs that it is compared with; 0 for none.
        goals: Their time over ours: what must be reached, is good, would be best.
    """

    name: str
    facts: dict[str, Any] | None
    launches: dict[str, list[Launch]]
    calls: int
    products: float = 0.0
    goals: tuple[float, ...] = ()


def loss_job(
    metric: str, dim: int, goals: tuple[float, ...] = (), *, symmetric: bool = False
) -> Job:
    """A loss of bfloat16 points, M = N = POINTS; symmetric ones have statistics of both sides."""
    facts = {
        "job": "losses", "kind": "symmetric" if symmetric else "one direction", "metric": metric,
        "rows": POINTS, "dim": dim, "dtype": "bfloat16", "precision": "auto", "device": "cuda",
    }  # fmt: skip
    shape = Shape(POINTS, POINTS, dim, metric)
    launches = {d.name: pair_model.loss(shape, d, symmetric=symmetric) for d in DEVICES}
    name = f"{'symmetric ' if symmetric else ''}{metric}, D = {dim}"
    return Job(name, facts, launches, CALLS["triton"], 4.0 * POINTS**2 * dim, goals)


def losses() -> Iterator[Job]:
    """The targets' shapes, and their neighbours."""
    near, wide = (0.40, 0.55, 0.70), (0.50, 0.65, 0.80)
    for dim in (64, 128, 256):
        yield loss_job("l2", dim, near if dim == 128 else ())
    for metric, dim in (("sqeuclidean", 128), ("dot", 128), ("cosine", 128), ("dot", 256)):
        yield loss_job(metric, dim)
    for metric in ("sqeuclidean", "dot", "cosine"):
        yield loss_job(metric, 512, wide)
    for metric in ("l2", "dot", "cosine"):
        yield loss_job(metric, 128, symmetric=True)


def searches() -> Iterator[Job]:
    """Nearest columns; beside them the one GEMM that a search contains."""
    facts = {
        "job": "losses", "kind": "nearest", "metric": "l2", "rows": POINTS, "dim": 128,
        "dtype": "bfloat16", "precision": "auto", "device": "cuda",
    }  # fmt: skip
    for kind, k in (("bfloat16", 1), ("bfloat16", 10), ("tf32", 10), ("tf32", 100)):
        shape = Shape(POINTS, POINTS, 128, "l2", kind)
        launches = {d.name: pair_model.nearest_columns(shape, d, k) for d in DEVICES}
        dtype = "float32" if kind == "tf32" else kind
        products = pair_model.SCORE_PRODUCTS[kind] * float(POINTS) ** 2 * 128
        name, own = f"nearest, {dtype}, k = {k}", facts if k == 1 else None
        yield Job(name, own, launches, CALLS["nearest"], products)


def everywhere(launches: list[Launch]) -> dict[str, list[Launch]]:
    """Launches that do not depend on the device."""
    return {device.name: launches for device in DEVICES}


def rows_jobs() -> Iterator[Job]:
    """Triplets and patches, bound by memory."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        facts = {
            "job": "triplet", "kind": "ratio", "rows": 16384, "dim": 128, "dtype": dtype,
            "device": "cuda",
        }  # fmt: skip
        launches = everywhere(row_model.triplets(16384, 128, size))
        yield Job(f"triplets, M = 16384, D = 128, {dtype}", facts, launches, CALLS["triplets"])

    def facts_of(kind: str, job: Patches) -> dict[str, Any]:
        return {
            "job": "patches", "kind": kind, "batch": job.batch, "channels": job.channels,
            "side": job.side, "k": job.k, "p": job.p, "dtype": "float32", "device": "cuda",
        }  # fmt: skip

    for k, p in ((2, 32), (8, 32), (2, 64), (8, 64)):
        job, name = Patches(256, 3, 96, k, p), f"(K, P) = ({k}, {p})"
        launches = everywhere(row_model.cut_patches(job, 1, 4))
        yield Job(f"cut {name}", facts_of("cut", job), launches, CALLS["patches"])
        if (k, p) == (8, 64):
            half = everywhere(row_model.cut_patches(job, 1, 2))
            yield Job(f"cut {name}, to bfloat16", None, half, CALLS["patches"])
            last = everywhere(row_model.cut_patches(job, 1, 4, last=True))
            yield Job(f"cut {name}, channels_last", None, last, CALLS["patches"])
        else:
            resized = everywhere(row_model.resized_patches(job, 1, 4, SCALE))
            yield Job(f"resized {name}", facts_of("resized", job), resized, CALLS["patches"])
    for job in (Patches(256, 3, 96, 2, 32), Patches(256, 3, 96, 8, 64), Patches(64, 64, 24, 4, 8)):
        back = everywhere(row_model.patch_gradients(job, 4))
        name = f"backward {job.channels}x{job.side}x{job.side}, (K, P) = ({job.k}, {job.p})"
        yield Job(name, facts_of("backward", job), back, CALLS["back"])


def limit(job: Job, device: Device) -> float | None:
    """Seconds that any implementation takes: the benchmark's least work at the device's rates."""
    if job.facts is None:
        return None
    work = case_of(job.facts).work()
    unit = {"matrix": work.flops / 2, "memory": work.bytes, "special": work.specials}
    return device.overlapped(Counts(unit))


def measured(job: Job, device: Device) -> float | None:
    """Least time of this case in the records of the benchmark, of this project on this device."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if "rows" not in record or device.name not in str(record["environment"].get("gpu")):
            continue
        found += [
            row["minimum"]
            for row in record["rows"]
            if row["case"] == job.facts and row["provider"] == OURS and row["status"] == "ok"
        ]
    return min(found, default=None)


def gemms(job: Job, device: Device) -> float:
    """Seconds of the GEMMs that a job is compared with."""
    return job.products / device.rate("matrix")


def slowest(job: Job, device: Device) -> str:
    """The launch that takes longest, and its unit."""
    launch = max(job.launches[device.name], key=lambda launch: launch.high(device))
    counts = launch.counts + (launch.compiled or {})
    if sum(each.high(device) for each in job.launches[device.name]) < job.calls * CALL:
        return "calls of the host"
    return f"{launch.name}: {device.bound(counts)}"


def table(jobs: list[Job], compared: str) -> str:
    """Markdown: milliseconds of each job on each device; ``compared``: what the GEMMs are."""
    ratio = f"{compared} ÷ ours" if compared else ""
    heads = ["job", "GPU", "limit", *([compared] if compared else []), "at least", "at most"]
    heads += [*([ratio, "goal"] if compared else []), "longest", "measured"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for job in jobs:
        for device in DEVICES:
            low, high = total(job.launches[device.name], device, job.calls)
            cells = [job.name, device.name, milliseconds(limit(job, device))]
            if compared:
                whole = gemms(job, device)
                goal = " / ".join(f"{g:.2f}" for g in job.goals) or "–"
                cells += [milliseconds(whole), milliseconds(low), milliseconds(high)]
                cells += [f"{whole / high:.2f} to {whole / low:.2f}", goal]
            else:
                cells += [milliseconds(low), milliseconds(high)]
            cells += [slowest(job, device), milliseconds(measured(job, device))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def symmetric_table() -> str:
    """Both directions over one, and both statistics from the same tiles or by a second launch."""
    lines = [
        "| metric | GPU | both directions ÷ one | statistics of both, ms | two launches, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    shape = Shape(POINTS, POINTS, 128)
    for metric in ("l2", "dot", "cosine"):
        one, both = loss_job(metric, 128), loss_job(metric, 128, symmetric=True)
        for device in DEVICES:
            low, high = (total(job.launches[device.name], device, job.calls) for job in (one, both))
            own = shape._replace(metric=metric)
            joint = pair_model.statistics(own, device, both=True)
            single = pair_model.statistics(own, device)
            lines.append(
                f"| {metric} | {device.name} | {high[0] / low[0]:.2f} to {high[1] / low[1]:.2f} | "
                f"{milliseconds(joint.low(device))} to {milliseconds(joint.high(device))} | "
                f"{milliseconds(2 * single.low(device))} to "
                f"{milliseconds(2 * single.high(device))} |"
            )
    return "\n".join(lines)


def memory_table() -> str:
    """Peak of a loss at a million rows and columns."""
    lines = ["| M = N | D | points | peak, GB |", "| --- | --- | --- | --- |"]
    for dtype, half in (("float32", False), ("bfloat16", True)):
        peak = pair_model.peak_bytes(10**6, 10**6, 128, half)
        lines.append(f"| 1,000,000 | 128 | {dtype} | {peak / 1e9:.2f} |")
    return "\n".join(lines)


def launches_text(jobs: list[Job]) -> str:
    """Every launch of the jobs with the time of each unit, for a terminal."""
    lines = []
    for job in jobs:
        for device in DEVICES:
            lines.append(f"{device.name}: {job.name}")
            for launch in job.launches[device.name]:
                counts = launch.counts + (launch.compiled or {})
                parts = sorted(device.seconds(counts).items(), key=lambda pair: -pair[1])
                text = ", ".join(f"{unit} {1e3 * s:.3f}" for unit, s in parts if s > 1e-7)
                span = f"{1e3 * launch.low(device):.3f} to {1e3 * launch.high(device):.3f} ms"
                lines.append(f"    {launch.name}: {span} ({text})")
    return "\n".join(lines)


def page() -> str:
    """Text of docs/roofline.md."""
    loop = {name: pair_model.COMPILED[90, name, "l2"][0] for name in LOOPS}
    issue = 1e3 * sum(loop.values()) * POINTS**2 / DEVICES[0].rate("slots")
    search = search_time(DEVICES[0], POINTS**2 * 128.0)
    return f"""# The limit, by the model

Written by `python -m benchmarks.roofline`; `tests/test_roofline.py` holds it to the kernels.
**Nothing here was measured**, but where the last column says so: times of a run of
`fastcontrast bench` on that GPU that lies in `benchmarks/results/`. Milliseconds.

* **limit**: what any implementation takes, as the benchmark has it: 6MND operations or all special
  functions of a loss, bytes that must move.
* **at least**: these kernels, by the operations and bytes counted in their source
  (`benchmarks/pair_model.py`, `benchmarks/row_model.py`), launch after launch, if the slowest unit
  of a launch never waits; or the host's calls, of {1e6 * CALL:.0f} µs each.
* **at most**: with the instructions that Triton 3.9.0 made of the inner loops, where they were
  counted (`python -m benchmarks.compiled_loops`: losses on bfloat16 but for the wide way, patches
  but for resized ones), and with products and the rest in turn, as where a multiprocessor holds one
  program. Barriers, bank conflicts, the last wave of programs and GEMMs below their peak come on
  top.
* **longest**: the launch that takes longest, and its unit.

## Losses with their gradients, bfloat16, M = N = {POINTS}

8MND: four GEMMs of M × N × D at the peak of the matrix units.

{table(list(losses()), "8MND")}

What it says:

* **l2, D = 128, H200**: the instructions of the loops bind, not the products. A score costs
  {loop["statistics"]:.0f} instructions in the statistics, {loop["gradients of rows"]:.0f} in the \
gradients of the rows and {loop["gradients of columns"]:.0f} in those of the columns,
  and a multiprocessor issues 128 a clock, in which it could multiply 16 pairs of points. By their
  issue alone, overlapped with the products, the loss would take {issue:.2f} ms.
* **D = 256**: no size of the gradients of distances compiles without spilling, and they go the
  wide way.
* **Wide** (D = 512): 6MND, as a block's statistics, weights and gradients follow one another.
  Blocks of {4 * pair_model.wide.BLOCK_SCORES >> 20} MiB outgrow the L2 cache: scores cross the \
memory three times, weights
  four times, and the gradient of all columns twice for every block.
* **cosine** of half points: they are multiplied as they come, and the inverse norms are taken into
  the scores and weights. Weights are rounded as those of distances are, so that sums are taken of
  them as well.
* **A100**: with tiles of 16 columns, operands of products are read from shared memory for longer
  than they are multiplied.
* **RTX 4090**: with such tiles, sums that go on in float64 take a quarter of the products' time.

## Symmetric losses

The goal is 1.2 of one direction. Sums over the rows of a tile go from lane to lane and through
shared memory: a score of both statistics takes less than of two launches, and more than half more
than of one.

{symmetric_table()}

## Memory above inputs and gradients

The goal is 2 GB at M = N = 10⁶, D = 128. Of half points the peak is in the backward pass, where
gradients are kept in float32 and scaled, and what comes of it is added to gradients that exist; of
float32 points, in the forward pass, where both sides lie centred beside the gradients.

{memory_table()}

## Nearest columns, M = N = {POINTS}, D = 128

2MND: one GEMM, of float32 points in TF32. The products are taken twice, and with ten neighbours and
more the second pass finds candidates in nearly every tile.

{table(list(searches()), "2MND")}

## Triplets and patches

Images are uint8 of 256x3x96x96 to float32, unless said; resized ones with `scale=(0.08, 1)`,
bilinear and antialiased. Where drawn and cut at once, every thread of a program takes its patch's
box, for four pixels: {row_model.COMPILED["patches drawn and cut"]:.0f} instructions a pixel, \
{row_model.COMPILED["patches cut"]:.0f} where boxes come from memory. CUDA C++ draws in one thread.

{table(list(rows_jobs()), "")}

## CUDA C++ or Triton

`backend=None` takes CUDA C++, where it was built, up to a size and Triton beyond
([design](design.md), section 5): what saves calls of the host is faster until its arithmetic takes
as long as they did. M·N·D at which it does; the table of the backends has the power of two in the
middle, one for all GPUs:

{bounds_table()}

A loss of up to {native.FEW_COLUMNS} columns waits for memory in both, and stays in CUDA C++ at any
size. At least, l2, bfloat16, D = 128, with {CALLS["native"]} calls by the host against \
{CALLS["triton"]}:

{choice_table()}

* Matrix units take half points, and float32 where the precision allows rounding. Of CUDA C++'s
  loops the least is known and not what the compiler made of them: twice that is compared, as
  Triton's compiled loops take twice theirs. At M = N = {POINTS} the model cannot tell the two
  apart before they have been counted.
* The differences of `nearest` take {1e3 * search:.0f} ms on an H200 at the shape above, where \
Triton's products
  take a tenth. Triton's waits for the device, so a CUDA graph takes CUDA C++ at any size, and so
  does compiled code, which may become one.
* Triplets and patches move the same bytes in both; the host's microseconds decide, as said there,
  and for patches drawn and cut at once the instructions.
"""


def main() -> None:
    """Write the page, or print the launches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="each launch with its units")
    if parser.parse_args().print:
        print(launches_text([*losses(), *searches(), *rows_jobs()]))
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
