"""Measures launches of the Triton kernels on the GPU that is here, and rewrites the launch table.

    python -m benchmarks.tune                       every kind and dimension, about an hour
    python -m benchmarks.tune --kind bfloat16 --dim 128

Only candidates that compile without spilling are timed, at M = N = --points, and only the entries
of this GPU's architecture change. fastcontrast/backends/triton/launch_table.py says where and when.
Run `python -m benchmarks.ahead_of_time` afterwards, for docs/triton_kernels.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.ahead_of_time import compiled, problem
from benchmarks.triton_entries import (
    BOTH_GRADIENTS,
    BOTH_SIDES,
    Entry,
    metrics_of,
)
from fastcontrast import distance_softmax
from fastcontrast.backends.triton import distance_softmax as entries
from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton import launch_table

PATH = Path(launch_table.__file__)
SYMMETRIC = {"statistics": BOTH_SIDES, "gradients": BOTH_GRADIENTS}
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADER = '''"""Sizes of every launch: read by launch.py, written by ``python -m benchmarks.tune``.

Per architecture, kernel, kind of operands and class of dimensions: points that a program owns,
points of a tile, the same where a call has more to do (launch.Launch), columns at a time, warps,
stages. MEASURED says which entries have been timed, where and when; the others are the largest that
compile without spilling registers. What has no entry spills at every size, and goes to wide.py.
"nearest" takes any dimension, those beyond the last class in parts. SIZES_OF_METRIC has the metrics
for which the sizes of the others spill, TILES_OF_SYMMETRIC the points of a tile of a symmetric loss
where more fit than with all options.
"""

from __future__ import annotations

'''


def candidates(kernel: str, kind: str) -> list[tuple[int, int, int, int]]:
    """(block, other, part, warps), largest first; a warp group keeps the 64 rows of WGMMA."""
    if kind == "float64":
        sizes = [(32, 32, 0, 4), (32, 16, 0, 4), (16, 16, 0, 4), (16, 16, 0, 8)]
    elif kind == "ieee":
        sizes = [(64, 64, 16, 8), (64, 32, 16, 8), (64, 16, 16, 8), (32, 32, 16, 4),
                 (32, 16, 16, 8), (32, 16, 16, 4), (16, 16, 16, 8), (16, 16, 16, 4)]  # fmt: skip
    else:
        sizes = [(128, 128, 0, 8), (128, 64, 0, 8), (128, 32, 0, 8), (64, 64, 0, 4),
                 (64, 32, 0, 4), (128, 16, 0, 8), (64, 16, 0, 4)]  # fmt: skip
    return sizes[1:] if kernel == "gradients" and len(sizes) > 4 else sizes


def fits(entry: Entry, sizes: launches.Launch, metrics: tuple[str, ...] = ("l2",)) -> bool:
    """Whether a launch compiles, spills nothing and leaves shared memory, for both owners."""
    owners = (True, False) if entry.kernel in ("gradients", BOTH_GRADIENTS) else (True,)
    wanted = [entry._replace(rows=r, metric=m) for r, m in itertools.product(owners, metrics)]
    for one in wanted:
        try:
            found = compiled(one, sizes)
        except Exception as error:  # the compiler's own, of many classes: the size is not possible
            print(f"  {sizes}: {str(error).splitlines()[0][:80]}")
            return False
        if problem(one, found):
            return False
    return True


def largest_tile(entry: Entry, sizes: launches.Launch, most: int) -> int:
    """Points of the largest tile that fits with every metric, ``most`` or a half of it; or 0."""
    for tile in (most >> k for k in range(4) if most >> k >= 16):
        if fits(entry, sizes._replace(other=tile), metrics_of(entry.kind)):
            return tile
    return 0


def seconds(kernel: str, kind: str, dim: int, points: int, sizes: launches.Launch) -> float:
    """Time of forward, or of forward and backward, with one launch replaced."""
    dtype = DTYPES.get(kind, torch.float32)
    x = torch.randn(points, dim, device="cuda").to(dtype).requires_grad_(kernel == "gradients")
    y = torch.randn(points, dim, device="cuda").to(dtype).requires_grad_(kernel == "gradients")
    precision = kind if kind in ("tf32", "bf16x3", "ieee") else "auto"
    usual = launches.launch

    def chosen(name: str, *args: Any, **options: Any) -> launches.Launch:
        return sizes if name == kernel else usual(name, *args, **options)

    def run() -> None:
        lse = distance_softmax(x, y, precision=precision, backend="triton").lse
        if kernel == "gradients":
            lse.sum().backward()

    with mock.patch.object(entries, "launch", chosen):
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median") / 1e3


Table = dict[tuple[int, str, str, int], tuple[int, ...]]
OfMetric = dict[tuple[int, str, str, int, str], tuple[int, ...]]
OfSymmetric = dict[tuple[int, str, str, int], int]


def write(
    sizes: Table, of_metric: OfMetric, of_symmetric: OfSymmetric, measured: dict[str, str]
) -> None:
    """Rewrite launch_table.py."""
    lines = [HEADER, "MEASURED: dict[str, str] = {\n"]
    lines += [f'    "{key}": "{value}",\n' for key, value in sorted(measured.items())]
    lines.append("}\n\nSIZES: dict[tuple[int, str, str, int], tuple[int, ...]] = {\n")
    for (arch, kernel, kind, dim), value in sizes.items():
        lines.append(f'    ({arch}, "{kernel}", "{kind}", {dim}): {value},\n')
    lines.append(
        "}\n\nSIZES_OF_METRIC: dict[tuple[int, str, str, int, str], tuple[int, ...]] = {\n"
    )
    for (arch, kernel, kind, dim, metric), value in of_metric.items():
        lines.append(f'    ({arch}, "{kernel}", "{kind}", {dim}, "{metric}"): {value},\n')
    lines.append("}\n\nTILES_OF_SYMMETRIC: dict[tuple[int, str, str, int], int] = {\n")
    for (arch, kernel, kind, dim), value in of_symmetric.items():
        lines.append(f'    ({arch}, "{kernel}", "{kind}", {dim}): {value},\n')
    PATH.write_text("".join([*lines, "}\n"]))


def main() -> None:
    """Time the candidates and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=launches.KINDS, action="append")
    parser.add_argument("--dim", type=int, choices=launches.CLASSES, action="append")
    parser.add_argument("--points", type=int, default=16384)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune needs a CUDA device")
    arch = launches.architecture(torch.cuda.get_device_capability())
    table, measured = dict(launch_table.SIZES), dict(launch_table.MEASURED)
    of_metric = dict(launch_table.SIZES_OF_METRIC)
    of_symmetric = dict(launch_table.TILES_OF_SYMMETRIC)
    where = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, {datetime.date.today()}"
    for kind, dim, kernel in itertools.product(
        options.kind or launches.KINDS, options.dim or launches.CLASSES, launches.KERNELS
    ):
        key = (arch, kernel, kind, dim)
        times = {}
        for (block, other, part, warps), stages in itertools.product(
            candidates(kernel, kind), (2, 3, 4)
        ):
            many = min(other, launches.Launch(*table[key]).other_many) if key in table else 16
            sizes = launches.Launch(block, other, many, part, warps, stages)
            if fits(Entry(arch, kernel, kind, dim, "l2"), sizes):
                times[sizes] = seconds(kernel, kind, dim, options.points, sizes)
                print(f"{key}: {sizes} {times[sizes] * 1e3:.3f} ms")
        for best in sorted(times, key=times.__getitem__):
            # With other metrics the same program must not spill either, nor with all options, if
            # with smaller tiles.
            entry = Entry(arch, kernel, kind, dim, "l2")
            if not fits(entry, best, metrics_of(kind)):
                continue
            many = largest_tile(entry._replace(many=True), best, best.other_many)
            if kernel == "gradients" and many:  # with all options of a symmetric loss, too
                symmetric = entry._replace(kernel=BOTH_GRADIENTS, many=True)
                many = largest_tile(symmetric, best, many)
            both = largest_tile(entry._replace(kernel=SYMMETRIC[kernel]), best, best.other)
            if many and both:
                of_metric = {k: v for k, v in of_metric.items() if k[:4] != key}
                table[key] = tuple(best._replace(other_many=many))
                of_symmetric[key] = both
                measured[f"{arch} {kernel} {kind} {dim}"] = where
                break
        write(table, of_metric, of_symmetric, measured)


if __name__ == "__main__":
    main()
