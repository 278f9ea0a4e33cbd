"""Random integers as pure functions of (seed, step, index), by the Philox that draws patches.

The counter is that of ``csrc/common/crop.h``, with draws no patch reaches: the same seed may serve
both. Called by the triplets and clips of this folder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.reference.sample_coords import philox4x32
from fastcontrast.ops.extract_patches import check_step
from fastcontrast.patch_arguments import signed_seed

# In the 16 bits of the draw: patches use 128 attempts of 16 draws, below 0x0800.
TRIPLETS, CLIP_ORDER, CLIP_STARTS = 0xF000, 0xF001, 0xF002
_WORD = 0xFFFFFFFF


def check_seed(seed: int, step: int) -> None:
    """Raise unless the seed has 64 bits and the step is from 0 to 2^48 - 1."""
    signed_seed(seed)
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    check_step(step)


def words(seed: int, step: int, draw: int, index: Tensor) -> list[Tensor]:
    """Four words 0..2³²-1 for each index, int64 of any shape, values from 0 to 2⁶⁴-1 as bits."""
    key = signed_seed(seed)
    zero = torch.zeros_like(index)
    counter = (
        zero + (step & _WORD),
        zero + ((step >> 32) & 0xFFFF | draw << 16),
        index & _WORD,
        (index >> 32) & _WORD,
    )
    return philox4x32(counter, (key & _WORD, (key >> 32) & _WORD))


def below(word: Tensor, count: Tensor) -> Tensor:
    """Integers 0..count-1, int64, of words; the bias is at most count / 2³², count below 2³¹."""
    return (word * count) >> 32
