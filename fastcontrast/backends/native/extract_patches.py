"""`extract_patches` on CPU: one C++ pass from the images' pixels to the finished patches.

The kernels are csrc/cpu/extract_patches.cpp. Images and incoming gradients are read in place
through their strides; only coordinates and flips, 17 bytes a patch, are made contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast import _C

# As csrc/common/scalar.h numbers them.
SCALARS = {
    torch.uint8: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float32: 3,
    torch.float64: 4,
}
# Elements below which starting threads takes longer than the work.
THREADING_MINIMUM = 32768


def sample_coords(
    coords: Tensor,
    flips: Tensor,
    sample_ids: Tensor | None,
    key: Tensor | None,
    seed: int,
    step: int,
    image_size: Sequence[int],
    size: Sequence[int],
    thresholds: Sequence[int],
) -> None:
    """Fill ``coords`` [B, K, 4] and ``flips`` [B, K] with the draws of (seed, step)."""
    if key is not None:
        seed, step = key.tolist()
    ids = None if sample_ids is None else sample_ids.contiguous()
    _C.sample_coords(
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        step=step,
        sample_ids=_address(ids),
        batch=coords.shape[0],
        num_patches=coords.shape[1],
        y_range=image_size[0] - size[0] + 1,
        x_range=image_size[1] - size[1] + 1,
        height=size[0],
        width=size[1],
        hflip_threshold=thresholds[0],
        vflip_threshold=thresholds[1],
        coords=coords.data_ptr(),
        flips=flips.data_ptr(),
    )


def first_invalid_box(coords: Tensor, image_size: Sequence[int], size: Sequence[int]) -> int:
    """Flat index of the first box outside the image or of another size; -1 where there is none."""
    coords = coords.contiguous()
    return _C.first_invalid_box(coords.data_ptr(), coords.numel() // 4, *image_size, *size)


def extract_patches_forward(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    scale: Sequence[float],
    offset: Sequence[float],
    out: Tensor,
) -> None:
    """Write ``scale·pixel + offset`` of every box into ``out`` [B, K, C, h, w]."""
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    _C.extract_patches_forward(
        **_patch_set(images.shape, coords, flips, out.shape, scale, _threads(out.numel())),
        offset=offset,
        images=images.data_ptr(),
        image_type=SCALARS[images.dtype],
        image_strides=images.stride(),
        out=out.data_ptr(),
        out_type=SCALARS[out.dtype],
    )


def extract_patches_backward(
    grad: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    scale: Sequence[float],
    grad_images: Tensor,
) -> None:
    """Write into ``grad_images`` [B, C, H, W] the sum of the patches' gradients at every pixel."""
    coords = coords.contiguous()
    flips = None if flips is None else flips.contiguous()
    threads = _threads(grad.numel() + grad_images.numel())
    double = torch.float64 in (grad.dtype, grad_images.dtype)
    sum_dtype = torch.float64 if double else torch.float32
    sums = grad_images.new_empty(threads, *grad_images.shape[2:], dtype=sum_dtype)
    _C.extract_patches_backward(
        **_patch_set(grad_images.shape, coords, flips, grad.shape, scale, threads),
        grad=grad.data_ptr(),
        grad_type=SCALARS[grad.dtype],
        grad_strides=grad.stride(),
        grad_images=grad_images.data_ptr(),
        image_type=SCALARS[grad_images.dtype],
        sums=sums.data_ptr(),
    )


def _patch_set(
    image_shape: Sequence[int],
    coords: Tensor,
    flips: Tensor | None,
    patch_shape: Sequence[int],
    scale: Sequence[float],
    threads: int,
) -> dict[str, object]:
    batch, channels, image_height, image_width = image_shape
    return {
        "coords": coords.data_ptr(),
        "flips": _address(flips),
        "batch": batch,
        "num_patches": patch_shape[1],
        "channels": channels,
        "image_height": image_height,
        "image_width": image_width,
        "height": patch_shape[3],
        "width": patch_shape[4],
        "scale": scale,
        "threads": threads,
    }


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= THREADING_MINIMUM else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
