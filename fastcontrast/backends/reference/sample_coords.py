"""The random half of `extract_patches` in plain PyTorch: Philox and boxes in int64 arithmetic.

The oracle of the other backends' coordinates, bit for bit. csrc/common/crop.h states the counter
layout and the rule that turns words into boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast.backends.patch_sets import Draws

_WORD = 0xFFFFFFFF
_ROUNDS = 10
# As csrc/common/crop.h has them.
TRIES, ATTEMPTS, DRAWS_PER_ATTEMPT = 10, 128, 16


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Philox4x32-10: four counter words and two key words to four words.

    Args:
        counter: Four int64 tensors of one shape (or that broadcast), values 0..2³²-1.
        key: Two words, ints or 0-dim int64 tensors, values 0..2³²-1.

    Returns:
        Four int64 tensors with values 0..2³²-1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words wraps in int64 as it does in uint64: the bits are the same, and
        # the mask takes away the sign that the arithmetic shift drags in.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def sample_coords(
    coords: Tensor, flips: Tensor, sample_ids: Tensor | None, key: Tensor | None, draws: Draws
) -> int:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K]; index of the first without a place, or -1.

    With a distance to keep, the device is asked after every attempt whether all are placed.
    """
    batch, num_patches = flips.shape
    device = coords.device
    ids = torch.arange(batch, device=device) if sample_ids is None else sample_ids
    seed, step = (draws.seed, draws.step) if key is None else key.unbind()
    counter = _Counter(ids[:, None], seed, step, draws.first_patch)
    k = torch.arange(num_patches, device=device)
    words = counter.words(k, 0)
    flips.copy_((words[2] < draws.thresholds[0]) | (words[3] < draws.thresholds[1]).long() << 1)
    if draws.min_distance == 0 and draws.max_iou < 0:
        coords.copy_(_boxes(draws, counter, k, 0))
        return -1
    lost = torch.zeros(batch, num_patches, dtype=torch.bool, device=device)
    for i in range(num_patches):
        box = _boxes(draws, counter, k[i : i + 1], 0)[:, 0]
        for attempt in range(1, ATTEMPTS + 1):
            close = _too_close(draws, box[:, None], coords[:, :i].long()).any(1)
            if not bool(close.any()):
                break
            if attempt == ATTEMPTS:
                lost[:, i] = close
                break
            again = _boxes(draws, counter, k[i : i + 1], attempt)[:, 0]
            box = torch.where(close[:, None], again, box)
        coords[:, i] = box
    found = lost.flatten().nonzero()
    return int(found[0]) if len(found) else -1


class _Counter:
    """The counter of a call: words of every image and patch for a draw."""

    def __init__(
        self, ids: Tensor, seed: int | Tensor, step: int | Tensor, first_patch: int
    ) -> None:
        self.ids, self.step, self.first_patch = ids, step, first_patch
        self.key = (seed & _WORD, (seed >> 32) & _WORD)

    def words(self, k: Tensor, draw: int) -> list[Tensor]:
        """Four words [B, K]."""
        zero = torch.zeros_like(self.ids)
        counter = (
            zero + (self.step & _WORD),
            zero + (((self.step >> 32) & 0xFFFF) | draw << 16),
            self.ids & _WORD,
            ((self.ids >> 32) & 0xFF) | (k + self.first_patch) << 8,
        )
        return philox4x32(counter, self.key)


def _boxes(draws: Draws, counter: _Counter, k: Tensor, attempt: int) -> Tensor:
    """Boxes [B, K, 4] int64 of one attempt."""
    origin, extent = _regions(draws, k)
    draw = attempt * DRAWS_PER_ATTEMPT
    if draws.factors is None:
        words = counter.words(k, draw)[:2]
        sides = [torch.full_like(words[0], side) for side in draws.size]
        return _placed(origin, extent, sides, words)
    box = _largest_centred(draws, origin, extent).expand(counter.ids.shape[0], -1, -1)
    found = torch.zeros(box.shape[:2], dtype=torch.bool, device=box.device)
    for t in range(TRIES):
        words = counter.words(k, draw + 1 + t)
        # The product may pass 2⁶³ by nothing: the number of shares is at most 2³⁰ + 1.
        share = draws.area[0] + ((words[0] * draws.area[1]) >> 32)
        root = _integer_root(share * extent[0] * extent[1])
        ratio = words[1] >> 22
        sides = [(root * factor[ratio] + (1 << 38)) >> 39 for factor in draws.factors]
        fits = torch.ones_like(found)
        for side, most in zip(sides, extent, strict=True):
            fits = fits & (side >= 1) & (side <= most)
        box = torch.where(
            (fits & ~found)[..., None], _placed(origin, extent, sides, words[2:]), box
        )
        found = found | fits
    return box


def _regions(draws: Draws, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Origin and extent along rows and columns of what the boxes are drawn in, each [K]."""
    cell = (k // draws.grid[1] % draws.grid[0], k % draws.grid[1])
    origin, extent = [], []
    for i, count, side, pad in zip(cell, draws.grid, draws.image_size, draws.padding, strict=True):
        padded = side + 2 * pad
        begin, end = i * padded // count, (i + 1) * padded // count
        origin.append(begin - pad)
        extent.append(end - begin)
    return origin, extent


def _placed(
    origin: Sequence[Tensor],
    extent: Sequence[Tensor],
    sides: Sequence[Tensor],
    words: Sequence[Tensor],
) -> Tensor:
    starts = [
        first + ((word * (most - side + 1)) >> 32)
        for first, most, side, word in zip(origin, extent, sides, words, strict=True)
    ]
    return torch.stack([*starts, *sides], -1)


def _largest_centred(draws: Draws, origin: Sequence[Tensor], extent: Sequence[Tensor]) -> Tensor:
    """The largest centred boxes [K, 4] whose ratio is within the limits."""
    height, width = extent
    least, most, inverse = draws.limits
    one, half = torch.ones_like(height), 1 << 23
    narrow = (width << 24) < height * least
    wide = (width << 24) > height * most
    lower = torch.minimum(torch.maximum((width * inverse + half) >> 24, one), height)
    shorter = torch.minimum(torch.maximum((height * most + half) >> 24, one), width)
    sides = [torch.where(narrow, lower, height), torch.where(wide & ~narrow, shorter, width)]
    starts = [
        first + (space - side) // 2
        for first, space, side in zip(origin, extent, sides, strict=True)
    ]
    return torch.stack([*starts, *sides], -1)


def _integer_root(n: Tensor) -> Tensor:
    root = n.double().sqrt().long()
    for _ in range(2):
        root = root - (root * root > n).long()
        root = root + ((root + 1) * (root + 1) <= n).long()
    return root


def _too_close(draws: Draws, a: Tensor, b: Tensor) -> Tensor:
    """Which pairs of boxes [..., 4] int64 break the rule."""
    close = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1], dtype=torch.bool)
    close = close.to(a.device)
    if draws.min_distance > 0:
        difference = (2 * a[..., :2] + a[..., 2:]) - (2 * b[..., :2] + b[..., 2:])
        close = close | (difference.square().sum(-1) < draws.min_distance)
    if draws.max_iou >= 0:
        begin = torch.maximum(a[..., :2], b[..., :2])
        end = torch.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
        both = (end - begin).clamp_min(0).prod(-1)
        either = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
        close = close | ((both << 29) > draws.max_iou * either)
    return close
