"""What every call of the pairwise kernels is given beside its points: sizes, splits, stand-ins."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcontrast.backends.triton import INTERPRETED, processors
from fastcontrast.backends.triton.launch import Launch, padded_dimension

# Programs per multiprocessor that a launch should have; fewer owners share out the other side.
PROGRAMS_PER_PROCESSOR = 2
# Tiles that a program should at least have to do: more splits would cost more than they bring.
TILES_PER_SPLIT = 8


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a device, as launch.py wants it; None under the interpreter."""
    return None if INTERPRETED else torch.cuda.get_device_capability(device)


def widths(dim: int, sizes: Launch) -> dict[str, int]:
    """Constants of the kernels for columns of the points: of all, and of a part."""
    width = padded_dimension(dim)
    return {"BLOCK_D": width, "BLOCK_K": min(sizes.part or width, width)}


def splits_of(count: int, others: int, sizes: Launch, device: torch.device) -> tuple[int, int]:
    """Parts of the other side for which programs of their own run, and the size of one."""
    wanted = PROGRAMS_PER_PROCESSOR * processors(device)
    blocks, tiles = triton.cdiv(count, sizes.block), triton.cdiv(others, sizes.other)
    splits = max(1, min(wanted // blocks, tiles // TILES_PER_SPLIT))
    part = triton.cdiv(tiles, splits) * sizes.other
    return triton.cdiv(others, part), part


def given_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A tensor for an argument that the kernel's constants say is not read."""
    return stand_in if tensor is None else tensor
