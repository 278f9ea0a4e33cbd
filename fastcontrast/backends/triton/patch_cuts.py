"""Forward kernels of `extract_patches` in Triton: boxes from memory, or drawn in the same launch.

Maths, memory and numerics: extract_patches.py.
Tiling: a program owns LINES lines of PATCHES patches, COLUMNS elements of each. Where boxes are
    drawn, every program of a patch draws the same one (patch_draws.py), which takes less than it
    would to read it back, and the one of the patch's first elements writes it down.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from fastcontrast.backends.triton.patch_draws import NOT_SPECIALIZED, draw_boxes, store_boxes
from fastcontrast.backends.triton.patch_pixels import (
    narrow,
    numerator,
    numerators,
    padded_position,
    tap_radius,
    taps,
    weight_of,
    widen,
)


@triton.jit
def load_pixels(at, row, column, mask, row_stride, column_stride, fill, PADDING: tl.constexpr):
    """Pixels at positions of the image; ``fill`` at negative ones."""
    if PADDING == "constant":
        inside = (row >= 0) & (column >= 0)
        at += tl.maximum(row, 0).to(tl.int64) * row_stride
        at += tl.maximum(column, 0).to(tl.int64) * column_stride
        value = tl.load(at, mask=mask & inside, other=0)
    else:
        at += row.to(tl.int64) * row_stride
        at += column.to(tl.int64) * column_stride
        value = tl.load(at, mask=mask, other=0)
    return value


@triton.jit
def cut_tile(
    images, index, maps, out, patch, in_patches, line, column,
    top, left, box_height, box_width, flip,
    num_patches, channels, image_height, image_width, height, width,
    image_stride, image_channel, image_row, image_column,
    out_stride, out_channel, out_row, out_column,
    FLIPS: tl.constexpr, COPY: tl.constexpr, METHOD: tl.constexpr, ANTIALIAS: tl.constexpr,
    PADDING: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, FILL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT: tl.constexpr, ACC: tl.constexpr,
    PATCHES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Cut the tile of (patch, line, column) out of boxes [PATCHES], and write it."""
    line, column = line[None, :, None], column[None, None, :]
    if CHANNELS_LAST:
        x, channel, y = column // channels, column % channels, line
        in_patch = (line < height) & (column < width * channels)
        to = column.to(tl.int64) + y.to(tl.int64) * out_row
    else:
        channel, y, x = line // height, line % height, column
        in_patch = (line < channels * height) & (column < width)
        to = channel.to(tl.int64) * out_channel + y.to(tl.int64) * out_row
        to += x.to(tl.int64) * out_column
    top, left = top.to(INT)[:, None, None], left.to(INT)[:, None, None]
    box_height, box_width = box_height.to(INT)[:, None, None], box_width.to(INT)[:, None, None]
    image = patch // num_patches
    if index is not None:
        image = tl.load(index + image, mask=in_patches, other=0)
    y, x = y.to(INT), x.to(INT)
    if FLIPS:
        flip = flip[:, None, None]
        y = tl.where((flip & 2) != 0, height - 1 - y, y)
        x = tl.where((flip & 1) != 0, width - 1 - x, x)
    mask = in_patches[:, None, None] & in_patch
    at = images + (image * image_stride)[:, None, None] + channel.to(tl.int64) * image_channel
    fill = 0.0
    if FILL:
        fill = tl.load(maps + 2 * channels + channel, mask=in_patch, other=0.0)
    if METHOD == "bilinear":
        radius_y = tap_radius(box_height, height, ANTIALIAS)
        radius_x = tap_radius(box_width, width, ANTIALIAS)
        begin_y, end_y = taps(y, box_height, height, radius_y, METHOD)
        begin_x, end_x = taps(x, box_width, width, radius_x, METHOD)
        total_y = numerators(y, begin_y, end_y, box_height, height, radius_y)
        total_x = numerators(x, begin_x, end_x, box_width, width, radius_x)
        value = tl.full([PATCHES, LINES, COLUMNS], -0.0, dtype=ACC)
        for step_x in range(0, tl.max(end_x - begin_x).to(tl.int32)):
            tap_x = begin_x + step_x
            used_x = tap_x < end_x
            source_x = padded_position(tl.minimum(tap_x, end_x - 1) + left, image_width, PADDING)
            weight_x = weight_of(numerator(x, tap_x, box_width, width, radius_x), total_x, ACC)
            mixed = tl.full([PATCHES, LINES, COLUMNS], -0.0, dtype=ACC)
            for step_y in range(0, tl.max(end_y - begin_y).to(tl.int32)):
                tap_y = begin_y + step_y
                used_y = tap_y < end_y
                source_y = padded_position(
                    tl.minimum(tap_y, end_y - 1) + top, image_height, PADDING
                )
                weight_y = weight_of(
                    numerator(y, tap_y, box_height, height, radius_y), total_y, ACC
                )
                pixel = load_pixels(
                    at, source_y, source_x, mask & used_x & used_y, image_row, image_column, fill,
                    PADDING,
                )  # fmt: skip
                pixel = widen(pixel, ACC)
                if FILL:
                    pixel = tl.where((source_y >= 0) & (source_x >= 0), pixel, fill)
                # What is not used may not count, nor make a NaN of an infinite pixel.
                mixed = tl.where(used_y, mixed + weight_y * pixel, mixed)
            value = tl.where(used_x, value + weight_x * mixed, value)
    else:
        if METHOD == "nearest":
            y, _ = taps(y, box_height, height, height, METHOD)
            x, _ = taps(x, box_width, width, width, METHOD)
        source_y = padded_position(y + top, image_height, PADDING)
        source_x = padded_position(x + left, image_width, PADDING)
        value = load_pixels(at, source_y, source_x, mask, image_row, image_column, fill, PADDING)
        if not COPY:
            value = widen(value, ACC)
        if FILL:
            value = tl.where((source_y >= 0) & (source_x >= 0), value, fill)
    if SCALE:
        value *= tl.load(maps + channel, mask=in_patch, other=0.0)
    if OFFSET:
        value += tl.load(maps + channels + channel, mask=in_patch, other=0.0)
    if not COPY:
        value = narrow(value, out.dtype.element_ty)
    tl.store(out + (patch * out_stride)[:, None, None] + to, value, mask=mask)


@triton.jit
def tile_of(
    line_blocks, column_blocks,
    PATCHES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Patches, lines and columns of a program, and its number among those of its patches."""
    program = tl.program_id(0)
    column_block = program % column_blocks
    program = program // column_blocks
    line_block = program % line_blocks
    patch = (program // line_blocks).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    line = line_block * LINES + tl.arange(0, LINES)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    return patch, line, column, line_block * column_blocks + column_block


@triton.jit
def cut_patches_kernel(
    images, coords, flips, index, maps, out, patches, num_patches, channels, image_height,
    image_width, height, width, line_blocks, column_blocks,
    image_stride, image_channel, image_row, image_column,
    out_stride, out_channel, out_row, out_column,
    COPY: tl.constexpr, METHOD: tl.constexpr, ANTIALIAS: tl.constexpr, PADDING: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, FILL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INT: tl.constexpr, ACC: tl.constexpr,
    PATCHES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pixels [PATCHES, LINES, COLUMNS] of the patches: lines (channel, row) of columns.

    CHANNELS_LAST: lines are rows, of (column, channel).
    """
    patch, line, column, _ = tile_of(line_blocks, column_blocks, PATCHES, LINES, COLUMNS)
    in_patches = patch < patches
    box = coords + 4 * patch
    top = tl.load(box, mask=in_patches, other=0)
    left = tl.load(box + 1, mask=in_patches, other=0)
    box_height, box_width, flip = top, left, top
    if METHOD != "none":
        box_height = tl.load(box + 2, mask=in_patches, other=1)
        box_width = tl.load(box + 3, mask=in_patches, other=1)
    if flips is not None:
        flip = tl.load(flips + patch, mask=in_patches, other=0)
    cut_tile(
        images, index, maps, out, patch, in_patches, line, column,
        top, left, box_height, box_width, flip,
        num_patches, channels, image_height, image_width, height, width,
        image_stride, image_channel, image_row, image_column,
        out_stride, out_channel, out_row, out_column,
        flips is not None, COPY, METHOD, ANTIALIAS, PADDING, SCALE, OFFSET, FILL, CHANNELS_LAST,
        INT, ACC, PATCHES, LINES, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def random_patches_kernel(
    images, coords, flips, index, maps, out, patches, num_patches, channels, image_height,
    image_width, line_blocks, column_blocks,
    image_stride, image_channel, image_row, image_column,
    out_stride, out_channel, out_row, out_column,
    seed: tl.int64, step: tl.int64, key, sample_ids, first_patch: tl.int64, height, width,
    padded_height, padded_width, pad_y, pad_x, grid_rows, grid_columns,
    area_low: tl.int64, area_range: tl.int64, factors, least_ratio: tl.int64,
    most_ratio: tl.int64, inverse_ratio: tl.int64, hflip: tl.int64, vflip: tl.int64,
    FLIPS: tl.constexpr, COPY: tl.constexpr, METHOD: tl.constexpr, ANTIALIAS: tl.constexpr,
    PADDING: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, FILL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT: tl.constexpr, ACC: tl.constexpr,
    PATCHES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As cut_patches_kernel, of boxes drawn here; ``coords`` and ``flips`` are written."""
    patch, line, column, number = tile_of(line_blocks, column_blocks, PATCHES, LINES, COLUMNS)
    in_patches = patch < patches
    top, left, box_height, box_width, flip = draw_boxes(
        patch, in_patches, num_patches, seed, step, key, sample_ids, first_patch, height, width,
        padded_height, padded_width, pad_y, pad_x, grid_rows, grid_columns, area_low, area_range,
        factors, least_ratio, most_ratio, inverse_ratio, hflip, vflip,
    )  # fmt: skip
    written = patch < tl.where(number == 0, patches, 0)
    store_boxes(coords, flips, patch, written, top, left, box_height, box_width, flip)
    cut_tile(
        images, index, maps, out, patch, in_patches, line, column,
        top, left, box_height, box_width, flip,
        num_patches, channels, image_height, image_width, height, width,
        image_stride, image_channel, image_row, image_column,
        out_stride, out_channel, out_row, out_column,
        FLIPS, COPY, METHOD, ANTIALIAS, PADDING, SCALE, OFFSET, FILL, CHANNELS_LAST, INT, ACC,
        PATCHES, LINES, COLUMNS,
    )  # fmt: skip
