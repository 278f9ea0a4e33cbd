"""How the Triton kernels are launched: block sizes and warps by device, operands and dimension.

A plain table, so that the kernels that run are those that were compiled and looked at ahead of time
(docs/triton_kernels.md), and no call is spent on trying. Needs no Triton. ``python -m
benchmarks.tune`` measures alternatives on a GPU and rewrites TABLE.
"""

from __future__ import annotations

from typing import NamedTuple

# Up to this dimension a program keeps whole points; beyond, PyTorch's GEMMs do it (wide.py).
LARGEST_FUSED = 256
KERNELS = ("statistics", "gradients")
# How operands meet the matrix units: see backends/triton/operands.py.
KINDS = ("float64", "ieee", "tf32", "bf16x3", "bfloat16", "float16")
ARCHITECTURES = (80, 90, 100)
CLASSES = (32, 64, 128, 256)


class Launch(NamedTuple):
    """Sizes of one launch.

    Attributes:
        block: Points that a program owns.
        other: Points of the other side in a tile.
        part: Columns of the points taken at a time, 0 for all.
        warps: Warps of a program.
        stages: Tiles in flight.
    """

    block: int
    other: int
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


def launch(
    kernel: str, kind: str, dim: int, capability: tuple[int, int] | None, *, many: bool = False
) -> Launch:
    """Sizes for one call.

    Args:
        kernel: One of KERNELS.
        kind: One of KINDS.
        dim: Dimension of the points, at most LARGEST_FUSED.
        capability: Of the device; None under the interpreter.
        many: Whether ids, sums or ranks take registers of their own.
    """
    if capability is None:
        return INTERPRETED
    found = TABLE[architecture(capability), kernel, kind, dimension_class(dim)]
    return found._replace(other=max(16, found.other // 2)) if many else found


# Small, so that test shapes have several tiles on both sides, and unlike on the two sides.
INTERPRETED = Launch(block=64, other=32, part=0, warps=1, stages=1)


def _defaults() -> dict[tuple[int, str, str, int], Launch]:
    """Nothing here has run on a GPU yet: chosen to fit registers and shared memory."""
    table = {}
    for arch in ARCHITECTURES:
        for kind in KINDS:
            for dim in CLASSES:
                for kernel in KERNELS:
                    table[arch, kernel, kind, dim] = _default(arch, kernel, kind, dim)
    return table


def _default(arch: int, kernel: str, kind: str, dim: int) -> Launch:
    if kind == "float64":
        return Launch(32, 16 if kernel == "gradients" else 32, 0, 4, 1)
    if kind == "ieee":
        return Launch(64, 32, 16, 8, 2)
    return Launch(128, 64, 0, 8, 2 if dim == 256 or kind in ("tf32", "bf16x3") else 3)


TABLE = _defaults()
