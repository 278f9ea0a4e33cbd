"""What of the Triton kernels is compiled for GPUs that are not here: each kernel and its calls.

Read by ahead_of_time.py and compiled_loops.py, which compile it, and by tune.py. How a kernel is
launched is in triton_launches.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import patch_kernels
from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton.launch_table import SIZES, SIZES_OF_METRIC

METRICS = ("l2", "sqeuclidean", "dot")
HALF_KINDS = ("bfloat16", "float16")
# Kinds whose points are of different dtypes, as kernels without products see them.
GIVEN_KINDS = ("float64", "ieee", "bfloat16", "float16")
# Of symmetric losses: statistics of rows and columns from the same tiles, and gradients.
BOTH_SIDES = "statistics of both sides"
BOTH_GRADIENTS = "gradients of both directions"
TRIPLETS = ("triplets forward", "triplets backward")
TRIPLET_DIMS = (32, 128, 1024)
PATCH_KINDS = ("float64", "ieee", "bfloat16")
PATCH_SIDES = (32, 224)


class Entry(NamedTuple):
    """One compilation.

    Attributes:
        architecture: One of launch.ARCHITECTURES.
        kernel: One of triton_launches.KERNELS, or of patch_kernels.KERNELS.
        kind: One of launch.KINDS.
        dim: A class of dimensions; 0 where the kernel is the same for all.
        metric: One of metrics_of(kind); for patches one of patch_kernels.METHODS.
        rows: Whether the gradients are those of the rows.
        many: With all options.
    """

    architecture: int
    kernel: str
    kind: str
    dim: int
    metric: str
    rows: bool = True
    many: bool = False


def metrics_of(kind: str) -> tuple[str, ...]:
    """What the kernels of losses are called with: "cosine" for half points alone."""
    return (*METRICS, "cosine") if kind in HALF_KINDS else METRICS


def every_entry() -> Iterator[Entry]:
    """All that can be launched."""
    both, architectures = (False, True), launches.ARCHITECTURES
    keys = [
        (*key, metric)
        for key in SIZES
        for metric in (METRICS if key[1] == "nearest" else metrics_of(key[2]))
    ]
    keys += [key for key in SIZES_OF_METRIC if key[:4] not in SIZES]
    for (arch, kernel, kind, dim, metric), many in itertools.product(keys, both):
        if kernel == "nearest":  # nor do its kernels know l2 from sqeuclidean
            if metric != "sqeuclidean":
                yield Entry(arch, "nearest limits", kind, dim, metric, many=many)
                yield Entry(arch, "nearest candidates", kind, dim, metric, many=many)
            continue
        yield Entry(arch, kernel, kind, dim, metric, True, many)
        if kernel == "statistics" and not many:
            yield Entry(arch, BOTH_SIDES, kind, dim, metric)
        if kernel == "gradients":
            yield Entry(arch, kernel, kind, dim, metric, False, many)
            yield Entry(arch, BOTH_GRADIENTS, kind, dim, metric, True, many)
            yield Entry(arch, BOTH_GRADIENTS, kind, dim, metric, False, many)
    for arch in architectures:
        for kind, many in itertools.product(launches.KINDS, both):
            for metric in metrics_of(kind):
                yield Entry(arch, "wide statistics", kind, 0, metric, many=many)
                yield Entry(arch, "wide weights", kind, 0, metric, many=many)
        for kind, metric in itertools.product(launches.KINDS, METRICS):
            yield Entry(arch, "points", kind, 0, metric)
        for kind in HALF_KINDS:
            yield Entry(arch, "directions", kind, 0, "cosine")
            yield Entry(arch, "gradients of directions", kind, 0, "cosine")
        for kind, metric in itertools.product(GIVEN_KINDS, METRICS):
            yield Entry(arch, "add pairs", kind, 0, metric)
            yield Entry(arch, "wide near columns", kind, 0, metric)
            for many in both:
                yield Entry(arch, "pair values", kind, 0, metric, many=many)
        for kind, many in itertools.product(("float64", "ieee"), both):
            yield Entry(arch, "merge of splits", kind, 0, "l2", many=many)
            yield Entry(arch, "row table", kind, 0, "l2", many=many)
        for kernel, kind, dim, metric, many in itertools.product(
            TRIPLETS, GIVEN_KINDS, TRIPLET_DIMS, METRICS[:2], both
        ):
            yield Entry(arch, kernel, kind, dim, metric, many=many)
        for kernel, side in itertools.product(patch_kernels.KERNELS, PATCH_SIDES):
            yield from patch_entries(arch, kernel, side, PATCH_KINDS)


def patch_entries(arch: int, kernel: str, side: int, kinds: tuple[str, ...]) -> Iterator[Entry]:
    """A kernel of patches of one size, plain and with all options."""
    for how, kind in itertools.product(patch_kernels.METHODS[kernel], kinds):
        yield Entry(arch, kernel, kind, side, how, many=how != "plain")
