"""How the Triton kernels are launched: block sizes and warps by device, operands and dimension.

A plain table, launch_table.py, so that the kernels that run are those that were compiled and looked
at ahead of time (docs/triton_kernels.md), and no call is spent on trying. Needs no Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastcontrast.backends.triton.launch_table import (
    SIZES,
    SIZES_OF_METRIC,
    TILES_OF_SYMMETRIC,
)

# Up to this dimension a program keeps whole points; beyond, PyTorch's GEMMs do it (wide.py).
LARGEST_FUSED = 256
KERNELS = ("statistics", "gradients")
# Kinds of operands of the kernel "nearest", which takes any dimension.
NEAREST_KINDS = ("float64", "tf32", "bfloat16", "float16")
# How operands meet the matrix units: see backends/triton/operands.py.
KINDS = ("float64", "ieee", "tf32", "bf16x3", "bfloat16", "float16")
ARCHITECTURES = (80, 90, 100)
CLASSES = (32, 64, 128, 256)


class Launch(NamedTuple):
    """Sizes of one launch.

    Attributes:
        block: Points that a program owns.
        other: Points of the other side in a tile.
        other_many: The same for calls with ids, sums, ranks, an entropy's gradient or a scale's
            gradient, which take registers of their own, and mostly for symmetric losses.
        part: Columns of the points taken at a time, 0 for all.
        warps: Warps of a program.
        stages: Tiles in flight.
    """

    block: int
    other: int
    other_many: int
    part: int
    warps: int
    stages: int


def dimension_class(dim: int) -> int:
    """Smallest of CLASSES that holds ``dim``."""
    for size in CLASSES:
        if dim <= size:
            return size
    raise ValueError(f"dim must be at most {LARGEST_FUSED}, got {dim}")


def padded_dimension(dim: int) -> int:
    """Columns of a tile: a power of two, at least the 16 that a matrix unit takes."""
    return max(16, 1 << max(0, dim - 1).bit_length())


def architecture(capability: tuple[int, int]) -> int:
    """The newest of ARCHITECTURES that is not newer than the device."""
    found = 10 * capability[0] + capability[1]
    return max(a for a in ARCHITECTURES if a <= max(found, ARCHITECTURES[0]))


def is_fused(
    kernel: str, kind: str, dim: int, capability: tuple[int, int] | None, metric: str
) -> bool:
    """Whether a kernel keeps whole points of so many dimensions; arguments as of launch()."""
    if dim > LARGEST_FUSED or capability is None:
        return dim <= LARGEST_FUSED
    key = (architecture(capability), kernel, kind, dimension_class(dim))
    return key in SIZES or (*key, metric) in SIZES_OF_METRIC


def launch(
    kernel: str,
    kind: str,
    dim: int,
    capability: tuple[int, int] | None,
    *,
    metric: str = "l2",
    many: bool = False,
    symmetric: bool = False,
) -> Launch:
    """Sizes for one call.

    Args:
        kernel: One of KERNELS, or "nearest".
        kind: One of KINDS, or of NEAREST_KINDS.
        dim: Dimension of the points, at most LARGEST_FUSED but for "nearest".
        capability: Of the device; None under the interpreter.
        metric: "l2", "sqeuclidean" or "dot"; the same for "nearest".
        many: Whether the call has what other_many is for.
        symmetric: Whether it is that of a symmetric loss.
    """
    if capability is None:
        return INTERPRETED_NEAREST if kernel == "nearest" else INTERPRETED
    if kernel == "nearest":
        dim = min(dim, LARGEST_FUSED)
    key = (architecture(capability), kernel, kind, dimension_class(dim))
    found = Launch(*(SIZES_OF_METRIC.get((*key, metric)) or SIZES[key]))
    if many:
        return found._replace(other=found.other_many)
    if symmetric:
        return found._replace(other=TILES_OF_SYMMETRIC.get(key, found.other_many))
    return found


# Small, so that test shapes have several tiles on both sides, and unlike on the two sides.
INTERPRETED = Launch(block=64, other=32, other_many=32, part=0, warps=1, stages=1)
INTERPRETED_NEAREST = Launch(block=64, other=128, other_many=128, part=16, warps=1, stages=1)


# For scores that a GEMM has written (wide.py).
WIDE = Launch(block=8, other=256, other_many=256, part=16, warps=8, stages=2)


def wide_launch(kernel: str, kind: str, capability: tuple[int, int] | None) -> Launch:
    """Sizes beyond LARGEST_FUSED dimensions, and for what has no entry in the table.

    Near an even share of the registers (128 of them for two programs of eight warps) the assembler
    would rather spill than have one program less, so that other tiles do than larger ones.

    Args:
        kernel: "statistics", "weights", or "near columns", which has the tiles of the weights.
        kind: One of KINDS.
        capability: Of the device; None under the interpreter.
    """
    arch = None if capability is None else architecture(capability)
    if kind == "float64":
        other = 128 if arch == 80 or kernel == "statistics" else 64
        return WIDE._replace(other=other, other_many=other)
    if arch == 80 and kernel == "statistics":
        return WIDE._replace(warps=4)
    return WIDE


class PatchLaunch(NamedTuple):
    """Sizes of one launch over patches, or over images.

    Attributes:
        outer: Patches, or channels of an image, that a program owns.
        lines: Lines of each of them, an axis or two of the memory's order.
        columns: Elements of a line.
        warps: Warps of a program.
    """

    outer: int
    lines: int
    columns: int
    warps: int


# Elements of a program's tile, its longest line, and warps: forward, where the output is written,
# from boxes that are given, or drawn and taken as they are, or drawn and resized; backward, where
# gradients are gathered, from boxes as they are or resized and padded, which takes more registers,
# and by halves where these would not do (gathering); draws. For every GPU.
PATCHES = {
    "cut": (2048, 128, 8),
    "draw and cut": (1024, 128, 8),
    "draw and resize": (512, 128, 4),
    "gather": (1024, 64, 4),
    "gather resized": (1024, 32, 8),
    "gather by halves": (512, 32, 8),
    "draw": (128, 128, 4),
}
# Under the interpreter, where a program takes long and its size hardly matters.
PATCHES_INTERPRETED = {
    "cut": (1 << 15, 128, 1),
    "draw and cut": (1 << 15, 128, 1),
    "draw and resize": (1 << 15, 128, 1),
    "gather": (1 << 13, 64, 1),
    "gather resized": (1 << 13, 64, 1),
    "gather by halves": (1 << 13, 64, 1),
    "draw": (1 << 14, 1 << 14, 1),
}


def gathering(
    plain: bool, reflected: bool, float64: bool, capability: tuple[int, int] | None
) -> str:
    """Which of PATCHES gathers gradients.

    Args:
        plain: Of boxes as they are.
        reflected: Of images padded by reflection.
        float64: In float64.
        capability: Of the device; None under the interpreter.
    """
    if plain:
        return "gather"
    old = capability is not None and architecture(capability) == 80
    return "gather by halves" if float64 or (reflected and old) else "gather resized"


@lru_cache(maxsize=256)
def patch_launch(
    kernel: str, outer: int, lines: int, columns: int, *, interpreted: bool
) -> PatchLaunch:
    """Sizes for ``outer`` times ``lines`` times ``columns`` elements, with little padding.

    Args:
        kernel: One of PATCHES.
        outer: Patches, or channels of an image; 1 and more, as the others are.
        lines: Of each.
        columns: Of a line.
        interpreted: Whether the interpreter runs the kernel.
    """
    elements, longest, warps = (PATCHES_INTERPRETED if interpreted else PATCHES)[kernel]
    block = _covering_block if interpreted else _dividing_block
    width = block(columns, longest)
    height = block(lines, elements // width)
    depth = min(_power_of_two(outer), elements // (width * height))
    return PatchLaunch(depth, height, width, warps)


def _dividing_block(size: int, most: int) -> int:
    """The largest power of two that pads ``size`` by an eighth at most; of 16 and less, any."""
    block = _covering_block(size, most)
    while block > 16 and 8 * (-(-size // block) * block) > 9 * size:
        block //= 2
    return block


def _covering_block(size: int, most: int) -> int:
    return min(most, _power_of_two(size))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
