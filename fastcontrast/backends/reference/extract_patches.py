"""`extract_patches` in plain PyTorch, on any device: Philox in int64 arithmetic, crops by indexing.

The oracle of the other backends' coordinates, bit for bit, and of their pixels within a rounding.
csrc/common/crop.h states the counter layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10


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
    coords: Tensor,
    flips: Tensor,
    sample_ids: Tensor | None,
    key: Tensor | None,
    seed: int | Tensor,
    step: int | Tensor,
    image_size: Sequence[int],
    size: Sequence[int],
    thresholds: Sequence[int],
) -> None:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K] with the draws of (seed, step)."""
    batch, num_patches = flips.shape
    device = coords.device
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    if key is not None:
        seed, step = key.unbind()
    k = torch.arange(num_patches, device=device)
    ids = sample_ids[:, None]
    zero = torch.zeros_like(ids)
    counter = (
        zero + (step & _WORD),
        zero + ((step >> 32) & 0xFFFF),  # draw 0
        ids & _WORD,
        ((ids >> 32) & 0xFF) | (k << 8),
    )
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    for axis in (0, 1):
        coords[..., axis] = (words[axis] * (image_size[axis] - size[axis] + 1)) >> 32
        coords[..., 2 + axis] = size[axis]
    flips.copy_((words[2] < thresholds[0]) | (words[3] < thresholds[1]).long() << 1)


def first_invalid_box(coords: Tensor, image_size: Sequence[int], size: Sequence[int]) -> int:
    """Flat index of the first box outside the image or of another size; -1 where there is none."""
    boxes = coords.reshape(-1, 4).long()
    start, extent = boxes[:, :2], boxes[:, 2:]
    limit = torch.tensor(image_size, device=coords.device)
    wanted = torch.tensor(size, device=coords.device)
    invalid = (start < 0) | (extent < 1) | (start + extent > limit) | (extent != wanted)
    found = invalid.any(1).nonzero()
    return int(found[0]) if len(found) else -1


def extract_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    scale: Sequence[float],
    offset: Sequence[float],
    out: Tensor,
) -> None:
    """Write ``scale·pixel + offset`` of every box into ``out`` [B, K, C, h, w]."""
    if out.numel() == 0:
        return
    rows, columns = _pixels(coords, flips, out.shape[3:])
    image = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    # Indices round a slice put their axes first: [B, K, h, w, C].
    patches = images[image, :, rows[..., :, None], columns[..., None, :]].movedim(-1, 2)
    if scale or offset:
        patches = patches.to(_arithmetic(images.dtype, out.dtype))
        if scale:
            patches = patches * _per_channel(scale, patches)
        if offset:
            patches = patches + _per_channel(offset, patches)
    out.copy_(patches)


def extract_patches_backward(
    grad: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    scale: Sequence[float],
    grad_images: Tensor,
) -> None:
    """Write into ``grad_images`` [B, C, H, W] the sum of the patches' gradients at every pixel."""
    dtype = _arithmetic(grad.dtype, grad_images.dtype)
    sums = torch.zeros_like(grad_images, dtype=dtype)
    if grad.numel():
        rows, columns = _pixels(coords, flips, grad.shape[3:])
        image = torch.arange(sums.shape[0], device=sums.device)[:, None, None]
        # One patch of every image at a time: no two of them share a pixel, so nothing is written
        # twice, and the order of the sum is fixed on every device.
        for k in range(grad.shape[1]):
            where = (image, slice(None), rows[:, k, :, None], columns[:, k, None, :])
            sums[where] = sums[where] + grad[:, k].movedim(1, -1).to(dtype)
    if scale:
        sums = sums * _per_channel(scale, sums)
    grad_images.copy_(sums)


def _pixels(coords: Tensor, flips: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Source rows [B, K, h] and columns [B, K, w] of the patches' pixels, flips applied."""
    height, width = size
    row = torch.arange(height, device=coords.device).expand(*coords.shape[:2], height)
    column = torch.arange(width, device=coords.device).expand(*coords.shape[:2], width)
    if flips is not None:
        horizontal, vertical = (flips & 1).bool()[..., None], (flips & 2).bool()[..., None]
        row = torch.where(vertical, height - 1 - row, row)
        column = torch.where(horizontal, width - 1 - column, column)
    return coords[..., 0, None] + row, coords[..., 1, None] + column


def _arithmetic(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
