"""Random numbers of the miners: Philox words by (seed, step, purpose, row, draw).

The generator of random patches, in counters that no patch uses. A draw depends on the numbers
that name it alone, and so is the same on every device and after a restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.reference.sample_coords import philox4x32
from fastcontrast.ops.extract_patches import check_step
from fastcontrast.patch_arguments import signed_seed

_WORD = 0xFFFFFFFF
# Draws of patches end at 2048 in this part of the counter (csrc/common/crop.h).
_FIRST_PURPOSE = 0xFF00
# What a word is for; words for different purposes are independent.
POSITIVE, NEGATIVE, NEGATIVE_CLASS, BATCH = range(4)
# Weights become integers, whose running sums are the same in any order of addition.
_WEIGHT_BITS = 50


def random_words(
    rows: Tensor, draws: int, purpose: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Two independent 32-bit words for each draw of each row, int64 [len(rows), draws] each.

    Args:
        rows: Numbers of the rows, int64 [R], below 2**32.
        draws: Draws of each row.
        purpose: One of the purposes above.
        seed: -2**63 <= seed < 2**64, taken modulo 2**64.
        step: 0 <= step < 2**48.

    Raises:
        ValueError: If the seed or the step is out of range.
        TypeError: If one is not an integer.
    """
    key = signed_seed(seed)
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    check_step(step)
    c0 = torch.full_like(rows, step & _WORD)[:, None]
    c1 = torch.full_like(rows, step >> 32 | (_FIRST_PURPOSE + purpose) << 16)[:, None]
    c3 = torch.arange(draws, device=rows.device)
    words = philox4x32((c0, c1, rows[:, None], c3), (key & _WORD, key >> 32 & _WORD))
    return words[0], words[1]


def integers_below(words: Tensor, count: Tensor) -> Tensor:
    """Uniform integers 0..count-1 from 32-bit words; the bias is at most count / 2**32."""
    return words * count >> 32


def weighted_columns(log_weights: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
    """Columns drawn with replacement, int64 [m, k], in proportion to the weights of each row.

    Args:
        log_weights: [m, N], float64, -inf for a column that is never drawn, N >= 1.
        words: From :func:`random_words`, [m, k] each.

    Returns:
        Columns; -1 in a row whose weights are all 0. A share below 2**-50 counts as 0.
    """
    top = log_weights.amax(1, keepdim=True)
    weights = (log_weights - torch.where(top.isneginf(), 0.0, top)).exp()
    share = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    upper = (share * 2**_WEIGHT_BITS).to(torch.int64).cumsum(1)
    uniform = ((words[0] >> 5 << 26) + (words[1] >> 6)).to(weights.dtype) / 2**53
    place = (uniform * upper[:, -1:].to(weights.dtype)).to(torch.int64)
    drawn = torch.searchsorted(upper, place, right=True)
    return torch.where(top.isneginf(), -1, drawn)
