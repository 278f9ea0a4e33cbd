"""`extract_patches` in C++ and CUDA: one pass from the images' pixels to the finished patches.

The kernels are csrc/cpu/sample_coords.cpp, extract_patches.cpp and extract_patches_backward.cpp,
and csrc/cuda/extract_patches.cu, which cuts boxes of the image as they are: on CUDA, resized and
padded patches, and boxes that keep their distance, are the reference's. Images and incoming
gradients are read in place through their strides; only coordinates and flips, 17 bytes a patch, are
made contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends import reference
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
# Elements below which starting threads of the CPU takes longer than the work.
THREADING_MINIMUM = 32768


def sample_coords(
    coords: Tensor, flips: Tensor, sample_ids: Tensor | None, key: Tensor | None, draws: Draws
) -> int:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K]; index of the first without a place, or -1."""
    kernels = devices.kernels(coords)
    if kernels is not _C and (draws.min_distance > 0 or draws.max_iou >= 0):
        return reference.sample_coords(coords, flips, sample_ids, key, draws)
    ids = None if sample_ids is None else sample_ids.contiguous()
    key = None if key is None else key.contiguous()
    factors = draws.factors
    return kernels.sample_coords(
        seed=draws.seed & 0xFFFFFFFFFFFFFFFF,
        step=draws.step,
        key=_address(key),
        sample_ids=_address(ids),
        batch=coords.shape[0],
        num_patches=coords.shape[1],
        first_patch=draws.first_patch,
        image_size=draws.image_size,
        size=draws.size,
        padding=draws.padding,
        grid=draws.grid,
        area=draws.area,
        row_factors=0 if factors is None else factors[0].data_ptr(),
        column_factors=0 if factors is None else factors[1].data_ptr(),
        limits=draws.limits,
        min_distance=draws.min_distance,
        max_iou=draws.max_iou,
        hflip_threshold=draws.thresholds[0],
        vflip_threshold=draws.thresholds[1],
        coords=coords.data_ptr(),
        flips=flips.data_ptr(),
        workers=devices.workers(coords, 1),
    )


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
    if kernels is not _C and not pixels.plain:
        return reference.extract_patches_forward(images, coords, flips, index, pixels, out)
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    index = None if index is None else index.contiguous()
    workers = devices.workers(images, _threads(out.numel()))
    kernels.extract_patches_forward(
        **_patch_set(images.shape, coords, flips, out.shape, pixels, workers),
        images=images.data_ptr(),
        image_type=SCALARS[images.dtype],
        image_strides=images.stride(),
        index=_address(index),
        out=out.data_ptr(),
        out_type=SCALARS[out.dtype],
        out_strides=out.stride()[2:],
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
    if kernels is not _C and not pixels.plain:
        return reference.extract_patches_backward(grad, coords, flips, index, pixels, grad_images)
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    workers = devices.workers(grad, _threads(grad.numel() + grad_images.numel()))
    order = starts = None
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
    )


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
        "padding": PADDING_MODES.index(pixels.padding_mode),
        "workers": workers,
    }


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= THREADING_MINIMUM else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
