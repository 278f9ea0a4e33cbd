"""The op `extract_patches`: draw boxes, cut them out of images, return gradients to the images.

``fastcontrast/patches.py`` checks what users pass and calls :func:`draw` and :func:`cut` here; the
work is in ``fastcontrast/backends/<backend>/extract_patches.py``. Arguments that all of this file
shares: ``size`` (h, w) of a patch; ``scale`` and ``offset``, the affine map of the channels as a
list of C numbers, of one number for all, or of none for the identity; ``dtype`` of the result;
``backend``, already resolved.

Under ``torch.compile`` calls are custom operators, which the compiler keeps whole. Eager calls go
through an ``autograd.Function``, because an operator costs more than a small batch of patches.

The map from images to patches is linear but for the offset. So its gradient is a second op, whose
gradient is the first without the offset, and derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcontrast import backends

# Bits of the counter that each field has, see csrc/common/crop.h.
STEP_BITS, SAMPLE_ID_BITS, PATCH_BITS = 48, 40, 24


def draw(
    sample_ids: Tensor | None,
    key: Tensor | None,
    seed: int,
    step: int,
    batch: int,
    num_patches: int,
    image_size: Sequence[int],
    size: Sequence[int],
    thresholds: Sequence[int],
    device: torch.device,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Boxes [B, K, 4] int32 and flips [B, K] uint8 of (seed, step).

    ``key`` is an int64 tensor (seed, step) on ``device`` that stands for the two numbers where they
    are known to the device only; ``thresholds`` are the flips' probabilities in units of 2⁻³².
    """
    function = _sample_coords_op if torch.compiler.is_compiling() else _sample
    return function(
        sample_ids, key, seed, step, batch, num_patches, image_size, size, thresholds, device,
        backend,
    )  # fmt: skip


def cut(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    size: Sequence[int],
    scale: Sequence[float],
    offset: Sequence[float],
    dtype: torch.dtype,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """Patches [B, K, C, h, w] of the boxes; written into ``out``, without a gradient, if given."""
    compiling = torch.compiler.is_compiling()
    if out is None:
        function = _extract_patches_op if compiling else _ExtractPatches.apply
        return function(images, coords, flips, size, scale, offset, dtype, backend)
    function = _extract_patches_out_op if compiling else _extract_into
    function(out, images, coords, flips, scale, offset, backend)
    return out


def check_step(step: int) -> None:
    """Raise unless the counter has room for ``step``."""
    if not 0 <= step < 1 << STEP_BITS:
        raise ValueError(f"step must be at least 0 and below 2^{STEP_BITS}, got {step}")


def _sample(
    sample_ids, key, seed, step, batch, num_patches, image_size, size, thresholds, device, backend
):
    if key is not None and key.device.type == "cpu":
        seed, step = key.tolist()
        key = None
        check_step(step)
    if sample_ids is not None and sample_ids.device.type == "cpu" and sample_ids.numel():
        low, high = (int(bound) for bound in sample_ids.aminmax())
        if low < 0 or high >= 1 << SAMPLE_ID_BITS:
            raise ValueError(
                f"sample_ids must be at least 0 and below 2^{SAMPLE_ID_BITS}, "
                f"got values from {low} to {high}"
            )
    coords = torch.empty(batch, num_patches, 4, dtype=torch.int32, device=device)
    flips = torch.empty(batch, num_patches, dtype=torch.uint8, device=device)
    backends.run(
        backend, "sample_coords", coords, flips, sample_ids, key, seed, step, image_size, size,
        thresholds,
    )  # fmt: skip
    return coords, flips


def _extract_into(out, images, coords, flips, scale, offset, backend):
    """The kernel call of every forward path, with the check that keeps it inside the images."""
    size = out.shape[3:]
    if coords.device.type == "cpu":
        image_size = images.shape[2:]
        index = backends.run(backend, "first_invalid_box", coords, image_size, size)
        if index >= 0:
            b, k = divmod(index, coords.shape[1])
            y0, x0, height, width = coords[b, k].tolist()
            raise ValueError(
                f"coords[{b}, {k}] = (y0 {y0}, x0 {x0}, height {height}, width {width}) must lie "
                f"inside the image, {image_size[0]}x{image_size[1]} pixels, and have the height "
                f"and width of the patches, {size[0]}x{size[1]}"
            )
    backends.run(backend, "extract_patches_forward", images, coords, flips, scale, offset, out)


def _extract(images, coords, flips, size, scale, offset, dtype, backend):
    out = images.new_empty(_patches_shape(images, coords, size), dtype=dtype)
    _extract_into(out, images, coords, flips, scale, offset, backend)
    return out


def _image_gradient(grad, coords, flips, image_size, scale, dtype, backend):
    grad_images = grad.new_empty(grad.shape[0], grad.shape[2], *image_size, dtype=dtype)
    backends.run(backend, "extract_patches_backward", grad, coords, flips, scale, grad_images)
    return grad_images


def _patches_shape(images, coords, size):
    return (*coords.shape[:2], images.shape[1], *size)


# Autograd. Contexts and formulas serve both paths, which differ in what a formula calls.


def _forward_context(ctx, inputs, output):
    images, coords, flips, _, scale, _, _, backend = inputs
    ctx.save_for_backward(coords, flips)
    ctx.options = (images.shape[2:], scale, images.dtype, backend)


def _backward_context(ctx, inputs, output):
    grad, coords, flips, _, scale, _, backend = inputs
    ctx.save_for_backward(coords, flips)
    ctx.options = (grad.shape[3:], scale, grad.dtype, backend)


def _differentiate_forward(ctx, grad, image_gradient):
    image_size, scale, dtype, backend = ctx.options
    result = None
    if ctx.needs_input_grad[0]:
        result = image_gradient(grad, *ctx.saved_tensors, image_size, scale, dtype, backend)
    return (result, *[None] * 7)


def _differentiate_backward(ctx, grad, extract):
    size, scale, dtype, backend = ctx.options
    result = None
    if ctx.needs_input_grad[0]:
        result = extract(grad, *ctx.saved_tensors, size, scale, [], dtype, backend)
    return (result, *[None] * 6)


class _ExtractPatches(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _extract(*inputs)

    setup_context = staticmethod(_forward_context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate_forward(ctx, grads[0], _ExtractPatchesBackward.apply)


class _ExtractPatchesBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _image_gradient(*inputs)

    setup_context = staticmethod(_backward_context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate_backward(ctx, grads[0], _ExtractPatches.apply)


# The custom operators: what torch.compile sees.

_extract_patches_op = torch.library.custom_op(
    "fastcontrast::extract_patches",
    _extract,
    mutates_args=(),
    schema="(Tensor images, Tensor coords, Tensor? flips, SymInt[] size, float[] scale, "
    "float[] offset, ScalarType dtype, str backend) -> Tensor",
)
_extract_patches_backward_op = torch.library.custom_op(
    "fastcontrast::extract_patches_backward",
    _image_gradient,
    mutates_args=(),
    schema="(Tensor grad, Tensor coords, Tensor? flips, SymInt[] image_size, float[] scale, "
    "ScalarType dtype, str backend) -> Tensor",
)
_extract_patches_out_op = torch.library.custom_op(
    "fastcontrast::extract_patches_out",
    _extract_into,
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor images, Tensor coords, Tensor? flips, float[] scale, "
    "float[] offset, str backend) -> ()",
)
_sample_coords_op = torch.library.custom_op(
    "fastcontrast::sample_coords",
    _sample,
    mutates_args=(),
    schema="(Tensor? sample_ids, Tensor? key, SymInt seed, SymInt step, SymInt batch, "
    "SymInt num_patches, SymInt[] image_size, SymInt[] size, int[] thresholds, Device device, "
    "str backend) -> (Tensor, Tensor)",
)


@_extract_patches_op.register_fake
def _(images, coords, flips, size, scale, offset, dtype, backend):
    return images.new_empty(_patches_shape(images, coords, size), dtype=dtype)


@_extract_patches_backward_op.register_fake
def _(grad, coords, flips, image_size, scale, dtype, backend):
    return grad.new_empty(grad.shape[0], grad.shape[2], *image_size, dtype=dtype)


@_extract_patches_out_op.register_fake
def _(out, images, coords, flips, scale, offset, backend):
    return None


@_sample_coords_op.register_fake
def _(
    sample_ids, key, seed, step, batch, num_patches, image_size, size, thresholds, device, backend
):
    return (
        torch.empty(batch, num_patches, 4, dtype=torch.int32, device=device),
        torch.empty(batch, num_patches, dtype=torch.uint8, device=device),
    )


_extract_patches_op.register_autograd(
    lambda ctx, grad: _differentiate_forward(ctx, grad, _extract_patches_backward_op),
    setup_context=_forward_context,
)
_extract_patches_backward_op.register_autograd(
    lambda ctx, grad: _differentiate_backward(ctx, grad, _extract_patches_op),
    setup_context=_backward_context,
)
