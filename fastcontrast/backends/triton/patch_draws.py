"""Random boxes of `extract_patches` in Triton: the rule of csrc/common/crop.h, bit for bit.

Maths: words of Philox4x32-10, keyed by the seed, from a counter of step, draw, sample id and patch;
    boxes and flips from them as docs/patches.md states. The counter layout is frozen.
Tiling: BLOCK patches to a program, a patch to a lane. Where patches are drawn and cut at once, each
    program of the cutting kernel draws the boxes of its own patches (patch_cuts.py).
Memory: 17 bytes written per patch; seed and step by value, or read from device memory, so that a
    graph that is replayed draws anew.
Numerics: integers alone. A root is taken in float64 and mended in integers. Boxes that keep their
    distance from earlier ones depend on these, and are drawn by the reference.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends import reference
from fastcontrast.backends.patch_sets import Draws
from fastcontrast.backends.reference.sample_coords import TRIES as _TRIES
from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton.launch import patch_launch

TRIES = tl.constexpr(_TRIES)
FLIP_HORIZONTAL = tl.constexpr(1)
FLIP_VERTICAL = tl.constexpr(2)
# Numbers that change from call to call, or whose value would change their type.
NOT_SPECIALIZED = (
    "seed", "step", "first_patch", "area_low", "area_range", "least_ratio", "most_ratio",
    "inverse_ratio", "hflip", "vflip",
)  # fmt: skip


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Philox4x32-10 of csrc/common/philox.h: four words uint32 from as many, and an int64 key.

    As tl.philox, whose products of words the interpreter takes one at a time.
    """
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for turn in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ (low + turn * 0x9E3779B9).to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ (high + turn * 0xBB67AE85).to(tl.uint32)
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def crop_words(seed, step, draw, sample_id, k):
    """Four words of a draw, for sample ids and patches of one shape."""
    # Sums first: the interpreter keeps numbers from 2^31 to 2^32 in 32 bits, and shifts them wrong.
    seed, step = seed + 0 * sample_id, step + 0 * sample_id
    c0 = step.to(tl.uint32)
    c1 = (((step >> 32) & 0xFFFF) + (draw << 16)).to(tl.uint32)
    c2 = sample_id.to(tl.uint32)
    c3 = (((sample_id >> 32) & 0xFF) + (k << 8)).to(tl.uint32)
    return philox4x32(c0, c1, c2, c3, seed)


@triton.jit
def uniform_below(word, size):
    """Uniform on 0..size-1, int64, without a float."""
    return ((word.to(tl.uint64) * size.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def integer_root(n):
    """floor(sqrt(n)) of int64; float64 is off by one at most."""
    root = tl.sqrt(n.to(tl.float64)).to(tl.int64)
    root -= (root * root > n).to(tl.int64)
    return root + ((root + 1) * (root + 1) <= n).to(tl.int64)


@triton.jit
def draw_boxes(
    patch, mask, num_patches, seed, step, key, sample_ids, first_patch, height, width,
    padded_height, padded_width, pad_y, pad_x, grid_rows, grid_columns, area_low, area_range,
    factors, least_ratio, most_ratio, inverse_ratio, hflip, vflip,
):  # fmt: skip
    """Boxes (y0, x0, height, width), int64, and flips of ``patch``, int64, of one call."""
    if key is not None:
        seed = tl.load(key)
        step = tl.load(key + 1)
    image = patch // num_patches
    k = patch - image * num_patches
    sample_id = image
    if sample_ids is not None:
        sample_id = tl.load(sample_ids + image, mask=mask, other=0)
    counter_k = k + first_patch
    w0, w1, w2, w3 = crop_words(seed, step, 0, sample_id, counter_k)
    flips = tl.where(w2.to(tl.int64) < hflip, FLIP_HORIZONTAL, 0)
    flips += tl.where(w3.to(tl.int64) < vflip, FLIP_VERTICAL, 0)
    row = k // grid_columns % grid_rows
    column = k % grid_columns
    top = row * padded_height // grid_rows
    left = column * padded_width // grid_columns
    region_height = (row + 1) * padded_height // grid_rows - top
    region_width = (column + 1) * padded_width // grid_columns - left
    top -= pad_y
    left -= pad_x
    box_height = height + 0 * k
    box_width = width + 0 * k
    if factors is None:
        y0 = top + uniform_below(w0, region_height - box_height + 1)
        x0 = left + uniform_below(w1, region_width - box_width + 1)
    else:
        # The largest centred box whose ratio is within the limits, should no try fit.
        narrow = (region_width << 24) < region_height * least_ratio
        wide = (region_width << 24) > region_height * most_ratio
        lower = (region_width * inverse_ratio + (1 << 23)) >> 24
        shorter = (region_height * most_ratio + (1 << 23)) >> 24
        lower = tl.minimum(tl.maximum(lower, 1), region_height)
        shorter = tl.minimum(tl.maximum(shorter, 1), region_width)
        box_height = tl.where(narrow, lower, region_height)
        box_width = tl.where(wide & ~narrow, shorter, region_width)
        y0 = top + (region_height - box_height) // 2
        x0 = left + (region_width - box_width) // 2
        sought = mask
        t = 0
        while (t < TRIES) & (tl.max(sought.to(tl.int32)) > 0):
            w0, w1, w2, w3 = crop_words(seed, step, 1 + t, sample_id, counter_k)
            share = area_low + ((w0.to(tl.int64) * area_range) >> 32)
            side = integer_root(share * region_height * region_width)
            ratio = (w1 >> 22).to(tl.int64)
            tall = (side * tl.load(factors + ratio) + (1 << 38)) >> 39
            long = (side * tl.load(factors + 1024 + ratio) + (1 << 38)) >> 39
            fits = sought & (tall >= 1) & (tall <= region_height)
            fits = fits & (long >= 1) & (long <= region_width)
            # Clamped, so that what does not fit has a range to draw from.
            tall = tl.minimum(tall, region_height)
            long = tl.minimum(long, region_width)
            y0 = tl.where(fits, top + uniform_below(w2, region_height - tall + 1), y0)
            x0 = tl.where(fits, left + uniform_below(w3, region_width - long + 1), x0)
            box_height = tl.where(fits, tall, box_height)
            box_width = tl.where(fits, long, box_width)
            sought = sought & ~fits
            t += 1
    return y0, x0, box_height, box_width, flips


@triton.jit
def store_boxes(coords, flips, patch, mask, y0, x0, box_height, box_width, flip):
    """What was drawn, to ``coords`` [*, 4] int32 and ``flips`` [*] uint8."""
    tl.store(coords + 4 * patch, y0.to(tl.int32), mask=mask)
    tl.store(coords + 4 * patch + 1, x0.to(tl.int32), mask=mask)
    tl.store(coords + 4 * patch + 2, box_height.to(tl.int32), mask=mask)
    tl.store(coords + 4 * patch + 3, box_width.to(tl.int32), mask=mask)
    tl.store(flips + patch, flip.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sample_coords_kernel(
    coords, flips, patches, num_patches,
    seed: tl.int64, step: tl.int64, key, sample_ids, first_patch: tl.int64, height, width,
    padded_height, padded_width, pad_y, pad_x, grid_rows, grid_columns,
    area_low: tl.int64, area_range: tl.int64, factors, least_ratio: tl.int64,
    most_ratio: tl.int64, inverse_ratio: tl.int64, hflip: tl.int64, vflip: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes and flips of BLOCK patches."""
    patch = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = patch < patches
    y0, x0, box_height, box_width, flip = draw_boxes(
        patch, mask, num_patches, seed, step, key, sample_ids, first_patch, height, width,
        padded_height, padded_width, pad_y, pad_x, grid_rows, grid_columns, area_low, area_range,
        factors, least_ratio, most_ratio, inverse_ratio, hflip, vflip,
    )  # fmt: skip
    store_boxes(coords, flips, patch, mask, y0, x0, box_height, box_width, flip)


def sample_coords(
    coords: Tensor, flips: Tensor, sample_ids: Tensor | None, key: Tensor | None, draws: Draws
) -> int:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K]; index of the first without a place, or -1."""
    if are_constrained(draws):
        return reference.sample_coords(coords, flips, sample_ids, key, draws)
    patches = flips.numel()
    if patches == 0:
        return -1
    _, _, block, warps = patch_launch("draw", 1, 1, 1 << 30, interpreted=INTERPRETED)
    sample_coords_kernel[(triton.cdiv(patches, block),)](
        coords, flips, patches, flips.shape[1], **draw_arguments(sample_ids, key, draws),
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return -1


def are_constrained(draws: Draws) -> bool:
    """Whether boxes depend on earlier ones."""
    return draws.min_distance > 0 or draws.max_iou >= 0


def draw_arguments(sample_ids: Tensor | None, key: Tensor | None, draws: Draws) -> dict[str, Any]:
    """What :func:`draw_boxes` needs of a call, by name."""
    (height, width), (pad_y, pad_x) = draws.image_size, draws.padding
    least, most, inverse = draws.limits
    return {
        "seed": (draws.seed + (1 << 63)) % (1 << 64) - (1 << 63),  # its bits, in an int64
        "step": draws.step,
        "key": None if key is None else key.contiguous(),
        "sample_ids": None if sample_ids is None else sample_ids.contiguous(),
        "first_patch": draws.first_patch,
        "height": draws.size[0],
        "width": draws.size[1],
        "padded_height": height + 2 * pad_y,
        "padded_width": width + 2 * pad_x,
        "pad_y": pad_y,
        "pad_x": pad_x,
        "grid_rows": draws.grid[0],
        "grid_columns": draws.grid[1],
        "area_low": draws.area[0],
        "area_range": draws.area[1],
        "factors": draws.factors,
        "least_ratio": least,
        "most_ratio": most,
        "inverse_ratio": inverse,
        "hflip": draws.thresholds[0],
        "vflip": draws.thresholds[1],
    }
