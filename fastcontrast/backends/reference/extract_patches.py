"""The deterministic half of `extract_patches` in plain PyTorch, on any device: crops by indexing.

The oracle of the other backends' pixels, within a rounding. csrc/common/resize.h states the weights
of resized crops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.backends.patch_sets import Pixels

# Elements of an intermediate result, which bounds the memory of resized patches.
CHUNK = 1 << 24


def first_invalid_box(
    coords: Tensor, image_size: Sequence[int], size: Sequence[int], pixels: Pixels
) -> int:
    """Flat index of the first box that leaves image and padding or has a wrong size; -1: none."""
    boxes = coords.reshape(-1, 4).long()
    start, extent = boxes[:, :2], boxes[:, 2:]
    reach = torch.tensor(pixels.reach(image_size), device=coords.device)
    limit = torch.tensor(image_size, device=coords.device) + reach
    wanted = torch.tensor(size, device=coords.device)
    invalid = (start < -reach) | (extent < 1) | (start + extent > limit)
    if pixels.interpolation == "none":
        invalid = invalid | (extent != wanted)
    found = invalid.any(1).nonzero()
    return int(found[0]) if len(found) else -1


def extract_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    out: Tensor,
) -> None:
    """Write ``scale·pixel + offset`` of every box into ``out`` [B, K, C, h, w]."""
    if out.numel() == 0:
        return
    dtype = _arithmetic(images.dtype, out.dtype)
    for rows, chunk in _chunks(coords, flips, index, images, out.shape, pixels):
        patches = (
            _crops(images, chunk, pixels)
            if pixels.plain
            else _resampled(images, chunk, pixels, dtype)
        )
        if pixels.scale or pixels.offset:
            patches = patches.to(dtype)
            if pixels.scale:
                patches = patches * _per_channel(pixels.scale, patches)
            if pixels.offset:
                patches = patches + _per_channel(pixels.offset, patches)
        if out.dtype == torch.uint8 and patches.dtype != torch.uint8:
            patches = patches.round().clamp(0, 255)
        out[rows] = patches.to(out.dtype)


def extract_patches_backward(
    grad: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    grad_images: Tensor,
) -> None:
    """Write into ``grad_images`` [N, C, H, W] the sum of the patches' gradients at every pixel."""
    dtype = _arithmetic(grad.dtype, grad_images.dtype)
    n, c, h, w = grad_images.shape
    # Indexed sums want the axes that they run over in front, and are in order on every device.
    sums = grad_images.new_zeros(n, h, c, w, dtype=dtype)
    if grad.numel():
        for rows, chunk in _chunks(coords, flips, index, grad_images, grad.shape, pixels):
            values = grad[rows].to(dtype).transpose(2, 3)  # [b, K, h, C, w]
            columns = values.new_zeros(*values.shape[:4], w)
            _add_columns(columns, chunk.columns, values)
            _add_rows(sums, chunk, columns)
    result = sums.transpose(1, 2)
    if pixels.scale:
        result = result * _per_channel(pixels.scale, result)
    grad_images.copy_(result)


class _Taps(NamedTuple):
    """Where the pixels of an axis come from: [b, K, length, T]; -1 is the fill value."""

    position: Tensor
    weight: Tensor


class _Chunk(NamedTuple):
    image: Tensor  # [b]
    rows: _Taps
    columns: _Taps


def _chunks(
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    images: Tensor,
    patch_shape: Sequence[int],
    pixels: Pixels,
) -> Iterator[tuple[slice, _Chunk]]:
    """A few rows of ``coords`` at a time."""
    batch, num_patches, channels, height, width = patch_shape
    image = torch.arange(batch, device=coords.device) if index is None else index
    each = num_patches * channels * height * max(width, images.shape[3])
    count = max(1, CHUNK // max(1, each))
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    for begin in range(0, batch, count):
        part = slice(begin, begin + count)
        boxes = coords[part].long()
        taps = []
        for axis, (size, side) in enumerate(zip((height, width), images.shape[2:], strict=True)):
            flipped = None if flips is None else (flips[part] & (2 >> axis)).bool()
            taps.append(
                _taps(boxes[..., axis], boxes[..., 2 + axis], size, side, flipped, pixels, dtype)
            )
        yield part, _Chunk(image[part], *taps)


def _taps(
    start: Tensor,
    extent: Tensor,
    size: int,
    side: int,
    flipped: Tensor | None,
    pixels: Pixels,
    dtype: torch.dtype,
) -> _Taps:
    """Positions and weights along one axis, for boxes ``start``, ``extent`` [b, K]."""
    i = torch.arange(size, device=start.device)
    extent = extent[..., None]
    if pixels.interpolation == "bilinear":
        radius = extent.clamp_min(size) if pixels.antialias else torch.full_like(extent, size)
        centre = (2 * i + 1) * extent - size
        first = (centre - 2 * radius).div(2 * size, rounding_mode="floor") + 1
        most = int((2 * radius.max()).div(size, rounding_mode="floor")) + 1 if start.numel() else 1
        tap = first[..., None] + torch.arange(most, device=start.device)
        distance = (2 * tap + 1) * size - ((2 * i + 1) * extent)[..., None]
        numerator = (2 * radius[..., None] - distance.abs()).clamp_min(0)
        numerator = numerator * ((tap >= 0) & (tap < extent[..., None]))
        weight = numerator.double() / numerator.sum(-1, keepdim=True).double()
        tap = torch.minimum(tap.clamp_min(0), extent[..., None] - 1)
    else:
        tap = ((2 * i + 1) * extent).div(2 * size, rounding_mode="floor")[..., None]
        weight = torch.ones_like(tap, dtype=torch.float64)
    position = _padded(start[..., None, None] + tap, side, pixels.padding_mode)
    if flipped is not None:
        position = torch.where(flipped[..., None, None], position.flip(-2), position)
        weight = torch.where(flipped[..., None, None], weight.flip(-2), weight)
    return _Taps(position, weight.to(dtype))


def _padded(position: Tensor, side: int, mode: str) -> Tensor:
    """Position inside of the image that stands for each; -1 for the fill value."""
    if mode == "reflect":
        position = position.abs()
        return torch.where(position >= side, 2 * (side - 1) - position, position)
    if mode == "edge":
        return position.clamp(0, side - 1)
    return torch.where((position >= 0) & (position < side), position, -1)


def _crops(images: Tensor, chunk: _Chunk, pixels: Pixels) -> Tensor:
    rows, columns = chunk.rows.position[..., 0], chunk.columns.position[..., 0]
    image = chunk.image[:, None, None, None]
    # Indices round a slice put their axes first: [b, K, h, w, C].
    return images[image, :, rows[..., :, None], columns[..., None, :]].movedim(-1, 2)


def _resampled(images: Tensor, chunk: _Chunk, pixels: Pixels, dtype: torch.dtype) -> Tensor:
    """Rows are mixed first, then columns: [b, K, C, h, w] in the type of arithmetic."""
    fill = torch.zeros((), dtype=dtype, device=images.device)
    if pixels.fill:
        fill = _per_channel(pixels.fill, images.to(dtype))[:, 0, :]  # [C or 1, 1]
        fill = fill.to(images.dtype).to(dtype)
    mixed: Tensor | None = None  # [b, K, h, C, W]
    for position, weight in _each_tap(chunk.rows):
        row = images[chunk.image[:, None, None], :, position.clamp_min(0)].to(dtype)
        outside, weight = (position < 0)[..., None, None], weight[..., None, None]
        mixed = _added(mixed, weight, torch.where(outside, fill, row))
    assert mixed is not None
    result: Tensor | None = None
    for position, weight in _each_tap(chunk.columns):
        shape = (*mixed.shape[:4], position.shape[-1])
        column = mixed.gather(-1, position.clamp_min(0)[:, :, None, None].expand(shape))
        outside, weight = (position < 0)[:, :, None, None], weight[:, :, None, None]
        result = _added(result, weight, torch.where(outside, fill, column))
    assert result is not None
    return result.transpose(2, 3)


def _each_tap(taps: _Taps) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(taps.position.unbind(-1), taps.weight.unbind(-1), strict=True)


def _added(total: Tensor | None, weight: Tensor, values: Tensor) -> Tensor:
    """An unused tap must not turn an infinite pixel into NaN, nor a lone -0 into 0."""
    weight = weight.to(values.dtype)
    if total is None:
        return torch.where(weight == 0, 0.0, weight * values)
    return torch.where(weight == 0, total, total + weight * values)


def _add_columns(columns: Tensor, taps: _Taps, values: Tensor) -> None:
    """Transpose of the mix of columns: adds [b, K, h, C, w] to [b, K, h, C, W]."""
    flat = columns.view(-1, columns.shape[-1])
    row = torch.arange(flat.shape[0], device=flat.device)[:, None]
    for position, weight in _each_tap(taps):
        weight = torch.where(position < 0, 0.0, weight.to(values.dtype))
        where = position.clamp_min(0)[:, :, None, None].expand(values.shape)
        terms = values * weight[:, :, None, None]
        width = values.shape[-1]
        flat.index_put_((row, where.reshape(-1, width)), terms.reshape(-1, width), accumulate=True)


def _add_rows(sums: Tensor, chunk: _Chunk, columns: Tensor) -> None:
    """Transpose of the mix of rows: adds [b, K, h, C, W] to the images [N, H, C, W]."""
    image = chunk.image[:, None, None].expand(columns.shape[:3])
    for position, weight in _each_tap(chunk.rows):
        weight = torch.where(position < 0, 0.0, weight.to(columns.dtype))
        terms = columns * weight[..., None, None]
        sums.index_put_((image, position.clamp_min(0)), terms, accumulate=True)


def _arithmetic(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
