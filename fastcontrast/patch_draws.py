"""The random half of patches: where boxes may lie, checked, and :func:`sample_coords`.

:func:`draw_options` turns what users say of sizes, scales, padding, grid and distances into
integers; every check names the argument, what came and what was wanted. Called by
``fastcontrast/patches.py``; ``fastcontrast/ops/extract_patches.py`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.patch_sets import PADDING_MODES
from fastcontrast.ops.extract_patches import PATCH_BITS, draw
from fastcontrast.patch_arguments import (
    check_fits,
    check_num_patches,
    check_sample_ids,
    check_size,
    random_key,
    threshold,
)

# Limits of width/height in crops of random size, torchvision's.
RATIO = (3 / 4, 4 / 3)

# Sides below which areas, and squares of distances, fit into the integers of csrc/common/crop.h.
_SIDE_LIMIT = 1 << 16
_RATIO_LIMIT = 1 << 15


def sample_coords(
    batch: int,
    num_patches: int,
    image_size: int | Sequence[int],
    size: int | Sequence[int],
    *,
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] = RATIO,
    hflip: float = 0.0,
    vflip: float = 0.0,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "constant",
    min_distance: float | None = None,
    max_iou: float | None = None,
    grid: int | Sequence[int] | None = None,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    first_patch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw the boxes and flips of random patches: a pure function of (seed, step, sample id, k).

    Equal arguments give equal bits on every device and backend, a larger ``num_patches`` keeps the
    first patches, and neither batch size nor rank nor worker matters once ``sample_ids`` name the
    images. Patch k of a sample is made, in counter layout version 1, by Philox4x32-10 with the key
    ``seed`` (64 bits) from the counter::

        c0 = step[31:0]          c1 = step[47:32] | draw << 16
        c2 = sample_id[31:0]     c3 = sample_id[39:32] | k << 8

    Draw 0 gives four 32-bit words, used in 64-bit integer arithmetic::

        y0 = w0 * (H - h + 1) >> 32        x0 = w1 * (W - w + 1) >> 32
        flipped horizontally if w2 < floor(hflip * 2**32), vertically if w3 < floor(vflip * 2**32)

    docs/patches.md states the further draws of crops of random size and of constrained ones. The
    bias of a position is at most (H - h + 1) / 2**32.

    Args:
        batch: Number of images, B >= 0.
        num_patches: Patches per image, 0 <= K <= 2**24.
        image_size: Height and width of the images in pixels, or one number for both.
        size: Height and width of a patch in pixels, or one number for both.
        scale: None draws boxes of ``size``. A pair (low, high), 0 < low <= high <= 1, draws the
            share of the area uniformly and the aspect ratio log-uniformly; after 10 tries that do
            not fit, the box is the largest centred one whose ratio is within the limits.
        ratio: With ``scale``: least and largest width/height.
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        padding: Pixels that a box may reach beyond each side of the image, or a pair for rows and
            columns. Coordinates count from the image's corner, and so may be negative.
        padding_mode: As in :func:`extract_patches`; checks ``padding`` alone.
        min_distance: Least distance between the centres of two boxes of one image, in pixels.
        max_iou: Largest intersection over union of two boxes of one image, in [0, 1]; 0 keeps them
            apart. A box that breaks either rule against an earlier one is drawn again, up to 128
            times, then it is an error. Nobody waits for a GPU: there the box is left as it is,
            128 is added to its flips, and the error may come from the next such call.
        grid: Cells (rows, columns), or one number for both: patch k lies in cell k, row by row, so
            K is at most their number; ``scale`` is then the share of the cell.
        seed: 64-bit seed, -2**63 <= seed < 2**64, taken modulo 2**64; or an int64 tensor without
            axes, on ``device``.
        step: Number of the batch in training, 0 <= step < 2**48. An int64 tensor without axes, on
            ``device``, is read there: a captured graph then draws new patches whenever it is
            advanced.
        sample_ids: Ids of the images, [B] int64, 0 <= id < 2**40; None means 0 to B-1. Ranks with
            equal seeds need them, or they draw the same boxes; indices into the data set make the
            boxes independent of how it is spread. Checked on the CPU only.
        device: Of the result; None means that of ``sample_ids``, or the CPU.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.
        first_patch: What k counts from: calls with consecutive ranges of k share no draw.

    Returns:
        Boxes [B, K, 4] int32, (y0, x0, height, width) in pixels, half-open, and flips [B, K] uint8
        with bit 0 horizontal, bit 1 vertical; bit 7 as above.

    Raises:
        ValueError: If a value, shape or device is not as above, a patch is larger than the
            image, or a patch found no place that keeps its distance.
        TypeError: If an argument has the wrong type or dtype.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> coords, flips = sample_coords(1, 2, (96, 96), 32, hflip=0.5, seed=0)
        >>> coords
        tensor([[[25, 57, 32, 32],
                 [39, 45, 32, 32]]], dtype=torch.int32)
    """
    if not isinstance(batch, int) or isinstance(batch, bool):
        raise TypeError(f"batch must be an int, got {type(batch).__name__}")
    if batch < 0:
        raise ValueError(f"batch must be at least 0, got {batch}")
    size, image_size = check_size(size), check_size(image_size, "image_size")
    options = draw_options(
        num_patches, image_size, size, scale=scale, ratio=ratio, padding=padding,
        padding_mode=padding_mode, grid=grid, min_distance=min_distance, max_iou=max_iou,
        first_patch=first_patch,
    )  # fmt: skip
    thresholds = [threshold("hflip", hflip), threshold("vflip", vflip)]
    if device is not None:
        device = torch.device(device)
    else:
        device = sample_ids.device if isinstance(sample_ids, Tensor) else torch.device("cpu")
    check_sample_ids(sample_ids, batch, device)
    if seed is None:
        raise TypeError("seed must be an int, got None")
    key, seed, step = random_key(seed, step, None, device)
    backend = backends.resolve("extract_patches", torch.empty(0, device=device), backend)
    return draw(
        sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
        *options, device, backend,
    )  # fmt: skip


class DrawOptions(NamedTuple):
    """Checked options of a draw, fields of ``fastcontrast.backends.patch_sets.Draws``."""

    padding: tuple[int, int]
    grid: tuple[int, int]
    scale: tuple[float, ...]
    ratio: tuple[float, ...]
    min_distance: int
    max_iou: int


def draw_options(
    num_patches: int,
    image_size: Sequence[int],
    size: tuple[int, int],
    *,
    scale: Sequence[float] | None,
    ratio: Sequence[float],
    padding: int | Sequence[int],
    padding_mode: str,
    grid: int | Sequence[int] | None,
    min_distance: float | None,
    max_iou: float | None,
    first_patch: int,
) -> DrawOptions:
    """Check what says where boxes may lie in an image, and turn it into integers."""
    check_num_patches(num_patches)
    if not isinstance(first_patch, int) or isinstance(first_patch, bool):
        raise TypeError(f"first_patch must be an int, got {type(first_patch).__name__}")
    if not 0 <= first_patch <= (1 << PATCH_BITS) - num_patches:
        raise ValueError(
            f"first_patch must be at least 0, and at most 2^{PATCH_BITS} with num_patches, "
            f"got {first_patch}"
        )
    pads = _check_padding(padding, padding_mode, image_size)
    padded = (image_size[0] + 2 * pads[0], image_size[1] + 2 * pads[1])
    cells = (1, 1) if grid is None else check_size(grid, "grid")
    if cells != (1, 1) and num_patches > cells[0] * cells[1]:
        raise ValueError(
            f"num_patches must be at most the number of cells of the grid, "
            f"{cells[0]}x{cells[1]}, got {num_patches}"
        )
    needed = (1, 1) if scale is not None else size
    if cells == (1, 1):
        check_fits(needed, padded)
    for side, count, least, name in zip(padded, cells, needed, ("rows", "columns"), strict=True):
        if side // count < least:
            raise ValueError(
                f"grid of {cells[0]}x{cells[1]} cells leaves {side // count} {name} of pixels for "
                f"patches of {needed[0]}x{needed[1]}, in images of {padded[0]}x{padded[1]}"
            )
    distance = _check_distance(min_distance)
    overlap = _check_overlap(max_iou)
    if (scale is not None or distance or overlap >= 0) and max(padded) >= _SIDE_LIMIT:
        raise ValueError(
            f"scale, min_distance and max_iou need images below {_SIDE_LIMIT} pixels a side, "
            f"got {padded[0]}x{padded[1]}"
        )
    if scale is None:
        return DrawOptions(pads, cells, (), (), distance, overlap)
    shares, ratios = check_scale(scale), check_ratio(ratio)
    return DrawOptions(pads, cells, shares, ratios, distance, overlap)


def check_scale(scale: Sequence[float]) -> tuple[float, float]:
    """Least and largest share of the area."""
    low, high = _pair("scale", scale)
    if not 2**-30 <= low <= high <= 1.0:
        raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}")
    return low, high


def check_ratio(ratio: Sequence[float]) -> tuple[float, float]:
    """Least and largest width/height."""
    low, high = _pair("ratio", ratio)
    if not 1 / _RATIO_LIMIT <= low <= high <= _RATIO_LIMIT:
        raise ValueError(
            f"ratio must be two widths over heights, 1/{_RATIO_LIMIT} <= low <= high <= "
            f"{_RATIO_LIMIT}, got {ratio}"
        )
    return low, high


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    is_pair = isinstance(values, (tuple, list)) and len(values) == 2
    if not is_pair or any(
        not isinstance(v, (int, float)) or isinstance(v, bool) or v != v for v in values
    ):
        raise TypeError(f"{name} must be a pair (low, high) of numbers, got {values!r}")
    return float(values[0]), float(values[1])


def _check_padding(
    padding: int | Sequence[int], mode: str, image_size: Sequence[int]
) -> tuple[int, int]:
    pair = (padding, padding) if isinstance(padding, int) else padding
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not is_pair or any(not isinstance(n, int) or isinstance(n, bool) for n in pair):
        raise TypeError(f"padding must be an int or a pair (rows, columns) of ints, got {padding}")
    rows, columns = pair
    if min(rows, columns) < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {mode!r}")
    if mode == "error" and max(rows, columns):
        raise ValueError(
            f"padding_mode must say what lies beyond the image with padding {padding}: "
            "'constant', 'reflect' or 'edge'"
        )
    if mode == "reflect" and (rows >= image_size[0] or columns >= image_size[1]):
        raise ValueError(
            f"padding must be smaller than the image, {image_size[0]}x{image_size[1]}, with "
            f"padding_mode='reflect', got {padding}"
        )
    return rows, columns


def _check_distance(min_distance: float | None) -> int:
    if min_distance is None:
        return 0
    if not isinstance(min_distance, (int, float)) or isinstance(min_distance, bool):
        raise TypeError(f"min_distance must be a number, got {type(min_distance).__name__}")
    if not 0 <= min_distance < _SIDE_LIMIT * 2:
        raise ValueError(f"min_distance must be at least 0 pixels, and finite, got {min_distance}")
    return math.ceil(4 * min_distance**2)


def _check_overlap(max_iou: float | None) -> int:
    if max_iou is None:
        return -1
    if not isinstance(max_iou, (int, float)) or isinstance(max_iou, bool):
        raise TypeError(f"max_iou must be a number, got {type(max_iou).__name__}")
    if not 0 <= max_iou <= 1:
        raise ValueError(f"max_iou must be from 0 to 1, got {max_iou}")
    return int(max_iou * 2**29)
