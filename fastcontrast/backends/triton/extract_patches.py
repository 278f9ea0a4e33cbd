"""`extract_patches` in Triton: one launch from images to finished patches, and one back.

`random_patches` is one launch forward as well, which draws the boxes that it cuts; boxes that keep
their distance from earlier ones are drawn first, by the reference.

Maths: out[b,k,c,y,x] = a_c·images[b,c,Y,X] + b_c, where (Y, X) walks the box of patch (b,k),
    backwards along a flipped axis; where the box is resized, images is the crop resized, and beyond
    the image its padding. Backward the transpose: grad_images[b,c,Y,X] is a_c times the sum of
    weight·grad[b,k,c,y,x] over the pixels that (Y, X) has a part in. patch_pixels.py has the
    weights, patch_draws.py the draws, patch_cuts.py the kernels of the forward direction.
Tiling: forward, a program owns some lines of one or several patches, in the order of the output's
    memory; backward, a tile of pixels of some channels of one image, for which it asks every box of
    the image, in order. Grids are 1-D. Taps of all pixels of a tile are walked together.
Memory: the output is written once, 16 bytes at a time where it is aligned, the boxes' pixels are
    read in place through their strides; backward the images' gradient is written once, and no other
    memory. Numbers of the channels lie in a table that is made once for all calls with the same.
Numerics: float32, or float64 where an element type is; rows are mixed before columns; one rounding
    at the end. Same type in and out without an affine map is a copy of bits. Sums start at -0, so
    that a lone -0 stays. One writer per element, no atomics: two runs are bit-equal.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.patch_sets import Draws, Pixels, rows_of_images
from fastcontrast.backends.reference import first_invalid_box
from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton.launch import gathering, patch_launch
from fastcontrast.backends.triton.patch_cuts import (
    cut_patches_kernel,
    load_pixels,
    random_patches_kernel,
)
from fastcontrast.backends.triton.patch_draws import (
    are_constrained,
    draw_arguments,
    sample_coords,
)
from fastcontrast.backends.triton.patch_pixels import (
    narrow,
    numerators,
    pixels_made_of,
    standing_for,
    tap_radius,
    taps,
    weight_of,
    widen,
)

__all__ = [
    "extract_patches_backward",
    "extract_patches_forward",
    "first_invalid_box",
    "random_patches_forward",
]

# Integers that are copied where bits are.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
IMAGE_STRIDES = ("image_stride", "image_channel", "image_row", "image_column")
OUT_STRIDES = ("out_stride", "out_channel", "out_row", "out_column")
# Sides of padded images and of patches up to which all products of an axis fit into 32 bits.
NARROW_SIDE = 1 << 14


@triton.jit
def axis_weight(
    i, begin, end, extent, size, radius,
    METHOD: tl.constexpr, ANTIALIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weight in pixel i of a patch of the pixels begin to end of its box, taken together."""
    first, last = taps(i, extent, size, radius, METHOD)
    total = numerators(i, first, last, extent, size, radius)
    part = numerators(i, tl.maximum(first, begin), tl.minimum(last, end), extent, size, radius)
    return weight_of(part, total, ACC)


@triton.jit
def gather_gradients_kernel(
    grad, coords, flips, order, starts, maps, grad_images, num_patches, channels, image_height,
    image_width, height, width, channel_blocks, line_blocks, column_blocks,
    grad_batch, grad_patch, grad_channel, grad_row, grad_column,
    METHOD: tl.constexpr, ANTIALIAS: tl.constexpr, PADDING: tl.constexpr, FOLDS: tl.constexpr,
    SCALE: tl.constexpr, INT: tl.constexpr, ACC: tl.constexpr,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of pixels [CHANNELS, LINES, COLUMNS] of one image."""
    program = tl.program_id(0)
    first_x = program % column_blocks * COLUMNS
    program = program // column_blocks
    first_y = program % line_blocks * LINES
    program = program // line_blocks
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    image = (program // channel_blocks).to(tl.int64)
    y = first_y + tl.arange(0, LINES)[None, :, None]
    x = first_x + tl.arange(0, COLUMNS)[None, None, :]
    mask = (channel < channels) & (y < image_height) & (x < image_width)
    own_y, own_x = y.to(INT), x.to(INT)
    sums = tl.zeros([CHANNELS, LINES, COLUMNS], dtype=ACC)
    first, last = image, image + 1
    if order is not None:
        first = tl.load(starts + image)
        last = tl.load(starts + image + 1)
    for entry in range(first, last):
        batch = tl.cast(entry, tl.int64)
        if order is not None:
            batch = tl.load(order + entry)
        for k in range(0, num_patches):
            patch = batch * num_patches + k
            top = tl.load(coords + 4 * patch).to(INT)
            left = tl.load(coords + 4 * patch + 1).to(INT)
            flip = 0
            if flips is not None:
                flip = tl.load(flips + patch).to(tl.int32)
            at = grad + batch * grad_batch + tl.cast(k, tl.int64) * grad_patch
            at = at + channel.to(tl.int64) * grad_channel
            if METHOD == "none" and PADDING == "error":
                meets = (top < first_y + LINES) & (top + height > first_y)
                meets = meets & (left < first_x + COLUMNS) & (left + width > first_x)
                if meets:
                    row, column = own_y - top, own_x - left
                    used = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                    row = tl.where((flip & 2) != 0, height - 1 - row, row)
                    column = tl.where((flip & 1) != 0, width - 1 - column, column)
                    value = load_pixels(
                        at, row, column, mask & used, grad_row, grad_column, 0.0, PADDING
                    )
                    sums += widen(value, ACC)
            else:
                box_height = tl.load(coords + 4 * patch + 2).to(INT)
                box_width = tl.load(coords + 4 * patch + 3).to(INT)
                radius_y = tap_radius(box_height, height, ANTIALIAS)
                radius_x = tap_radius(box_width, width, ANTIALIAS)
                folds = FOLDS
                if PADDING == "error" or PADDING == "constant":
                    meets = (top < first_y + LINES) & (top + box_height > first_y)
                    meets = meets & (left < first_x + COLUMNS) & (left + box_width > first_x)
                    folds = tl.where(meets, FOLDS, 0)
                for fold in range(0, folds):
                    begin_y, end_y = standing_for(own_y, image_height, fold // 3, PADDING)
                    begin_x, end_x = standing_for(own_x, image_width, fold % 3, PADDING)
                    begin_y = tl.maximum(begin_y - top, 0)
                    begin_x = tl.maximum(begin_x - left, 0)
                    end_y = tl.minimum(end_y - top, box_height)
                    end_x = tl.minimum(end_x - left, box_width)
                    row_begin, row_end = pixels_made_of(
                        begin_y, end_y, box_height, height, radius_y, METHOD
                    )
                    column_begin, column_end = pixels_made_of(
                        begin_x, end_x, box_width, width, radius_x, METHOD
                    )
                    rows = tl.max(row_end - row_begin).to(tl.int32)
                    for step_x in range(0, tl.max(column_end - column_begin).to(tl.int32)):
                        column = column_begin + step_x
                        used_x = column < column_end
                        mixed = tl.zeros([CHANNELS, LINES, COLUMNS], dtype=ACC)
                        for step_y in range(0, rows):
                            row = row_begin + step_y
                            used = mask & used_x & (row < row_end)
                            value = load_pixels(
                                at,
                                tl.where((flip & 2) != 0, height - 1 - row, row),
                                tl.where((flip & 1) != 0, width - 1 - column, column),
                                used, grad_row, grad_column, 0.0, "error",
                            )  # fmt: skip
                            value = widen(value, ACC)
                            if METHOD == "bilinear":
                                value *= axis_weight(
                                    row, begin_y, end_y, box_height, height, radius_y,
                                    METHOD, ANTIALIAS, ACC,
                                )  # fmt: skip
                            mixed += tl.where(used, value, 0.0)
                        if METHOD == "bilinear":
                            mixed *= axis_weight(
                                column, begin_x, end_x, box_width, width, radius_x,
                                METHOD, ANTIALIAS, ACC,
                            )  # fmt: skip
                        sums += tl.where(used_x, mixed, 0.0)
    if SCALE:
        sums *= tl.load(maps + channel, mask=channel < channels, other=0.0)
    to = ((image * channels + channel) * image_height + y) * image_width + x
    tl.store(grad_images + to, narrow(sums, grad_images.dtype.element_ty), mask=mask)


def extract_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    out: Tensor,
) -> None:
    """Write ``scale·pixel + offset`` of every box into ``out`` [B, K, C, h, w]."""
    boxes = {"coords": coords.contiguous(), "flips": _contiguous(flips)}
    _cut(cut_patches_kernel, images, index, pixels, out, boxes)


def random_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor,
    sample_ids: Tensor | None,
    key: Tensor | None,
    draws: Draws,
    index: Tensor | None,
    pixels: Pixels,
    out: Tensor,
) -> int:
    """:func:`sample_coords`, then :func:`extract_patches_forward`; in one launch if it can be."""
    flipped = any(draws.thresholds)
    if are_constrained(draws) or out.numel() == 0:
        lost = sample_coords(coords, flips, sample_ids, key, draws)
        if lost < 0:
            extract_patches_forward(images, coords, flips if flipped else None, index, pixels, out)
        return lost
    drawn = {"coords": coords, "flips": flips, "FLIPS": flipped}
    drawn |= draw_arguments(sample_ids, key, draws)
    _cut(random_patches_kernel, images, index, pixels, out, drawn)
    return -1


def _cut(
    kernel: Any,
    images: Tensor,
    index: Tensor | None,
    pixels: Pixels,
    out: Tensor,
    boxes: dict[str, Any],
) -> None:
    """Launch a forward kernel; ``boxes``: its arguments that say where patches lie."""
    if out.numel() == 0:
        return
    batch, num_patches, channels, height, width = out.shape
    arithmetic = _arithmetic(images, out)
    maps = _channel_maps(pixels, channels, arithmetic, images.dtype, images.device)
    copy = pixels.plain and images.dtype == out.dtype and maps is None
    if copy:
        images, out = images.view(BITS[images.itemsize]), out.view(BITS[out.itemsize])
    # Patches follow one another; within one the axes lie as the strides say.
    stride, last = out.stride(), out.stride(2) == 1 and out.stride(4) == channels > 1
    lines, columns = (height, width * channels) if last else (channels * height, width)
    patches = batch * num_patches
    drawing = "draw and cut" if pixels.plain else "draw and resize"
    name = drawing if kernel is random_patches_kernel else "cut"
    sizes = patch_launch(name, patches, lines, columns, interpreted=INTERPRETED)
    blocks = triton.cdiv(lines, sizes.lines), triton.cdiv(columns, sizes.columns)
    image_strides = dict(zip(IMAGE_STRIDES, images.stride(), strict=True))
    out_strides = dict(zip(OUT_STRIDES, (channels * height * width, *stride[2:]), strict=True))
    kernel[(triton.cdiv(patches, sizes.outer) * blocks[0] * blocks[1],)](
        images=images, index=_contiguous(index), maps=maps, out=out, patches=patches,
        num_patches=num_patches, channels=channels, image_height=images.shape[2],
        image_width=images.shape[3], line_blocks=blocks[0], column_blocks=blocks[1],
        **({"height": height, "width": width} | boxes), **image_strides, **out_strides,
        COPY=copy, METHOD=pixels.interpolation, ANTIALIAS=pixels.antialias,
        PADDING=pixels.padding_mode, SCALE=bool(pixels.scale), OFFSET=bool(pixels.offset),
        FILL=bool(pixels.fill), CHANNELS_LAST=last, INT=_integers(pixels, images.shape, out.shape),
        ACC=arithmetic, PATCHES=sizes.outer, LINES=sizes.lines, COLUMNS=sizes.columns,
        num_warps=sizes.warps,
    )  # fmt: skip


def extract_patches_backward(
    grad: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    grad_images: Tensor,
) -> None:
    """Write into ``grad_images`` [N, C, H, W] the sum of the patches' gradients at every pixel."""
    if grad_images.numel() == 0:
        return
    count, channels, image_height, image_width = grad_images.shape
    arithmetic = _arithmetic(grad, grad_images)
    maps = _channel_maps(pixels, channels, arithmetic, grad_images.dtype, grad.device)
    order, starts = (None, None) if index is None else rows_of_images(index, count)
    reflected, capability = pixels.padding_mode == "reflect", None
    if not INTERPRETED:
        capability = torch.cuda.get_device_capability(grad.device)
    kernel = gathering(pixels.plain, reflected, arithmetic == tl.float64, capability)
    sizes = patch_launch(kernel, channels, image_height, image_width, interpreted=INTERPRETED)
    blocks = (
        triton.cdiv(channels, sizes.outer), triton.cdiv(image_height, sizes.lines),
        triton.cdiv(image_width, sizes.columns),
    )  # fmt: skip
    gather_gradients_kernel[(count * blocks[0] * blocks[1] * blocks[2],)](
        grad, coords.contiguous(), _contiguous(flips), order, starts, maps, grad_images,
        grad.shape[1], channels, image_height, image_width, *grad.shape[3:], *blocks,
        *grad.stride(), METHOD=pixels.interpolation, ANTIALIAS=pixels.antialias,
        PADDING=pixels.padding_mode, FOLDS=9 if reflected else 1,
        SCALE=bool(pixels.scale), INT=_integers(pixels, grad_images.shape, grad.shape),
        ACC=arithmetic, CHANNELS=sizes.outer, LINES=sizes.lines, COLUMNS=sizes.columns,
        num_warps=sizes.warps,
    )  # fmt: skip


def _arithmetic(a: Tensor, b: Tensor) -> tl.dtype:
    return tl.float64 if torch.float64 in (a.dtype, b.dtype) else tl.float32


def _integers(pixels: Pixels, image_shape: Sequence[int], patch_shape: Sequence[int]) -> tl.dtype:
    """Type of positions and weights: beyond images filled without end boxes may have any size."""
    reach = pixels.reach(image_shape[2:])
    sides = (side + 2 * beyond for side, beyond in zip(image_shape[2:], reach, strict=True))
    return tl.int32 if max(*sides, *patch_shape[3:]) <= NARROW_SIDE else tl.int64


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _channel_maps(
    pixels: Pixels, channels: int, arithmetic: tl.dtype, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Scale, offset and fill of every channel [3, C] in the type of arithmetic; None: none."""
    numbers = (tuple(pixels.scale), tuple(pixels.offset), tuple(pixels.fill))
    if not any(numbers):
        return None
    wide = torch.float64 if arithmetic == tl.float64 else torch.float32
    return _table(numbers, channels, wide, dtype, device)


@lru_cache(maxsize=64)
def _table(
    numbers: tuple[tuple[float, ...], ...],
    channels: int,
    wide: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    rows = []
    for values, absent in zip(numbers, (1.0, 0.0, 0.0), strict=True):
        row = torch.tensor(values or (absent,), dtype=wide)
        rows.append(row.expand(channels))
    rows[2] = rows[2].to(dtype).to(wide)  # a fill value is a pixel of the images
    return torch.stack(rows).to(device)
