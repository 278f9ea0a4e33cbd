"""`extract_patches` in C++ and CUDA: one pass from the images' pixels to the finished patches.

The kernels are csrc/cpu/sample_coords.cpp, extract_patches.cpp and extract_patches_backward.cpp,
and csrc/cuda/extract_patches.cu, which also draws and cuts in one launch, with
extract_patches_resized.cu and extract_patches_backward.cu beside it. Images and incoming gradients
are read in place through their strides; only coordinates and flips, 17 bytes a patch, are made
contiguous.

Nobody waits for a GPU that draws under constraints. A patch without a place there keeps the box of
its last attempt, with :data:`NO_PLACE` among its flips, and is named in a word of host memory: the
call raises if the word is there by the time it returns, else the next such call on that GPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends.native import devices
from fastcontrast.backends.patch_sets import (
    INTERPOLATIONS,
    PADDING_MODES,
    Draws,
    Pixels,
    rows_of_images,
)

# As csrc/common/scalar.h numbers them.
SCALARS = {
    torch.uint8: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float32: 3,
    torch.float64: 4,
}
# Bit of the flips, and bits of k in the word that names a patch: as csrc/common/ has them.
NO_PLACE, PATCH_BITS = 128, 24
# Elements below which starting threads of the CPU takes longer than the work.
THREADING_MINIMUM = 32768


def sample_coords(
    coords: Tensor, flips: Tensor, sample_ids: Tensor | None, key: Tensor | None, draws: Draws
) -> int:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K]; index of the first without a place, or -1."""
    kernels = devices.kernels(coords)
    sample_ids = None if sample_ids is None else sample_ids.contiguous()
    key = None if key is None else key.contiguous()
    workers = devices.workers(coords, 1)
    if kernels is _C:
        return _C.sample_coords(**_draw_set(coords, flips, sample_ids, key, draws), workers=workers)
    word = _lost_word(coords, draws)
    kernels.sample_coords(**_draw_set(coords, flips, sample_ids, key, draws, word), workers=workers)
    return _taken(word, coords.shape[1])


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
    """:func:`sample_coords`, then :func:`extract_patches_forward`; on CUDA in one launch."""
    kernels = devices.kernels(images)
    if kernels is _C:
        lost = sample_coords(coords, flips, sample_ids, key, draws)
        used = flips if any(draws.thresholds) else None
        if lost < 0:
            extract_patches_forward(images, coords, used, index, pixels, out)
        return lost
    sample_ids = None if sample_ids is None else sample_ids.contiguous()
    key = None if key is None else key.contiguous()
    index = None if index is None else index.contiguous()
    word = _lost_word(images, draws)
    kernels.random_patches_forward(
        **_draw_set(coords, flips, sample_ids, key, draws, word)
        | _patch_set(images.shape, coords, flips, out.shape, pixels, devices.workers(images, 1)),
        **_images(images, index),
        **_output(out),
    )
    return _taken(word, coords.shape[1])


def first_invalid_box(
    coords: Tensor, image_size: Sequence[int], size: Sequence[int], pixels: Pixels
) -> int:
    """Flat index of the first box that leaves image and padding or has a wrong size; -1: none."""
    coords = coords.contiguous()
    image_shape = (coords.shape[0], 0, *image_size)
    patch_shape = (*coords.shape[:2], 0, *size)
    return _C.first_invalid_box(**_patch_set(image_shape, coords, None, patch_shape, pixels, 1))


def extract_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    out: Tensor,
) -> None:
    """Write ``scale·pixel + offset`` of every box into ``out`` [B, K, C, h, w]."""
    kernels = devices.kernels(images)
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    index = None if index is None else index.contiguous()
    workers = devices.workers(images, _threads(out.numel()))
    kernels.extract_patches_forward(
        **_patch_set(images.shape, coords, flips, out.shape, pixels, workers),
        **_images(images, index),
        **_output(out),
    )


def extract_patches_backward(
    grad: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    pixels: Pixels,
    grad_images: Tensor,
) -> None:
    """Write into ``grad_images`` [N, C, H, W] the sum of the patches' gradients at every pixel."""
    kernels = devices.kernels(grad)
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    workers = devices.workers(grad, _threads(grad.numel() + grad_images.numel()))
    order = starts = units = None
    if kernels is not _C and not pixels.plain:
        wide = torch.float64 in (grad.dtype, grad_images.dtype)
        units = grad.new_empty(
            (*coords.shape[:2], grad.shape[3] + grad.shape[4]),
            dtype=torch.float64 if wide else torch.float32,
        )
    if index is not None:
        order, starts = rows_of_images(index, grad_images.shape[0])
    kernels.extract_patches_backward(
        **_patch_set(grad_images.shape, coords, flips, grad.shape, pixels, workers),
        grad=grad.data_ptr(),
        grad_type=SCALARS[grad.dtype],
        grad_strides=grad.stride(),
        grad_images=grad_images.data_ptr(),
        image_type=SCALARS[grad_images.dtype],
        images=grad_images.shape[0],
        order=_address(order),
        starts=_address(starts),
        units=_address(units),
    )


@cache
def _word(device: torch.device) -> Tensor:
    """A number that kernels of the device write where they do not find a place: -1 until then."""
    return torch.full((), -1, dtype=torch.int64, pin_memory=device.type == "cuda")


def _lost_word(tensor: Tensor, draws: Draws) -> Tensor | None:
    """The word of the tensor's device, if the draw can fail; raises what an earlier one left."""
    if draws.min_distance == 0 and draws.max_iou < 0:
        return None
    word = _word(tensor.device)
    found = _take(word)
    if found >= 0:
        image, patch = found >> PATCH_BITS, found % (1 << PATCH_BITS)
        raise ValueError(
            f"patch {patch} of image {image} of an earlier call on {tensor.device} found no place: "
            "its boxes are closer than min_distance or max_iou allow, those whose flips are "
            f"{NO_PLACE} or more; ask for fewer patches, or let them be closer"
        )
    return word


def _take(word: Tensor) -> int:
    found = int(word)
    if found >= 0:
        word.fill_(-1)
    return found


def _taken(word: Tensor | None, num_patches: int) -> int:
    """Flat index of a patch that is known to be without a place by now, or -1."""
    found = -1 if word is None else _take(word)
    if found < 0:
        return -1
    return (found >> PATCH_BITS) * num_patches + found % (1 << PATCH_BITS)


def _draw_set(
    coords: Tensor,
    flips: Tensor,
    sample_ids: Tensor | None,
    key: Tensor | None,
    draws: Draws,
    lost: Tensor | None = None,
) -> dict[str, object]:
    factors = draws.factors
    return {
        "seed": draws.seed & 0xFFFFFFFFFFFFFFFF,
        "step": draws.step,
        "key": _address(key),
        "sample_ids": _address(sample_ids),
        "batch": coords.shape[0],
        "num_patches": coords.shape[1],
        "first_patch": draws.first_patch,
        "image_size": draws.image_size,
        "size": draws.size,
        "padding": draws.padding,
        "grid": draws.grid,
        "area": draws.area,
        "row_factors": 0 if factors is None else factors[0].data_ptr(),
        "column_factors": 0 if factors is None else factors[1].data_ptr(),
        "limits": draws.limits,
        "min_distance": draws.min_distance,
        "max_iou": draws.max_iou,
        "hflip_threshold": draws.thresholds[0],
        "vflip_threshold": draws.thresholds[1],
        "coords": coords.data_ptr(),
        "flips": flips.data_ptr(),
        "lost": _address(lost),
    }


def _images(images: Tensor, index: Tensor | None) -> dict[str, object]:
    return {
        "images": images.data_ptr(),
        "image_type": SCALARS[images.dtype],
        "image_strides": images.stride(),
        "index": _address(index),
    }


def _output(out: Tensor) -> dict[str, object]:
    return {
        "out": out.data_ptr(),
        "out_type": SCALARS[out.dtype],
        "out_strides": out.stride()[2:],
    }


def _patch_set(
    image_shape: Sequence[int],
    coords: Tensor,
    flips: Tensor | None,
    patch_shape: Sequence[int],
    pixels: Pixels,
    workers: int | tuple[int, int],
) -> dict[str, object]:
    _, channels, image_height, image_width = image_shape
    return {
        "coords": coords.data_ptr(),
        "flips": _address(flips),
        "batch": coords.shape[0],
        "num_patches": patch_shape[1],
        "channels": channels,
        "image_height": image_height,
        "image_width": image_width,
        "height": patch_shape[3],
        "width": patch_shape[4],
        "scale": pixels.scale,
        "offset": pixels.offset,
        "fill": pixels.fill,
        "interpolation": INTERPOLATIONS.index(pixels.interpolation),
        "antialias": pixels.antialias,
        "padding_mode": PADDING_MODES.index(pixels.padding_mode),
        "workers": workers,
    }


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= THREADING_MINIMUM else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
