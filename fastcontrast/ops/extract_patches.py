"""The op `extract_patches`: draw boxes, cut them out of images, return gradients to the images.

``fastcontrast/patches.py`` checks what users pass and calls :func:`draw`, :func:`cut` and
:func:`draw_and_cut` here; the work is in ``fastcontrast/backends/<backend>/``. Arguments that all
of this file shares: ``index``, the image [B] of each row of ``coords``, or None for its own number;
``size`` (h, w) of a patch; the fields of ``fastcontrast.backends.patch_sets.Pixels``; ``dtype`` of
the result; ``backend``, already resolved.

Under ``torch.compile`` calls are custom operators, which the compiler keeps whole. Eager calls go
through an ``autograd.Function``, because an operator costs more than a small batch of patches.

The map from images to patches is linear but for the offset and the fill value. So its gradient is a
second op, whose gradient is the first without them, and derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.patch_sets import Draws, Pixels, ratio_table

# Bits of the counter that each field has, see csrc/common/crop.h.
STEP_BITS, SAMPLE_ID_BITS, PATCH_BITS = 48, 40, 24
ATTEMPTS = 128


def draw(
    sample_ids: Tensor | None,
    key: Tensor | None,
    seed: int,
    step: int,
    first_patch: int,
    batch: int,
    num_patches: int,
    image_size: Sequence[int],
    size: Sequence[int],
    thresholds: Sequence[int],
    padding: Sequence[int],
    grid: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    min_distance: int,
    max_iou: int,
    device: torch.device,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Boxes [B, K, 4] int32 and flips [B, K] uint8 of (seed, step).

    ``key`` is an int64 tensor (seed, step) on ``device`` that stands for the two numbers where they
    are known to the device only; ``scale`` is empty for boxes of ``size``, else least and largest
    share of the area; the others are fields of ``fastcontrast.backends.patch_sets.Draws``.
    """
    function = _sample_coords_op if torch.compiler.is_compiling() else _sample
    return function(
        sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
        padding, grid, scale, ratio, min_distance, max_iou, device, backend,
    )  # fmt: skip


def cut(
    images: Tensor,
    coords: Tensor,
    flips: Tensor | None,
    index: Tensor | None,
    size: Sequence[int],
    pixels: Pixels,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """Patches [B, K, C, h, w] of the boxes; written into ``out``, without a gradient, if given."""
    compiling = torch.compiler.is_compiling()
    if out is None:
        function = _extract_patches_op if compiling else _ExtractPatches.apply
        return function(images, coords, flips, index, size, *pixels, dtype, channels_last, backend)
    function = _extract_patches_out_op if compiling else _extract_into
    function(out, images, coords, flips, index, *pixels, backend)
    return out


def draw_and_cut(
    images: Tensor,
    index: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    seed: int,
    step: int,
    first_patch: int,
    num_patches: int,
    size: Sequence[int],
    thresholds: Sequence[int],
    options: tuple[Any, Any, Any, Any, Any, Any],
    pixels: Pixels,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, boxes and flips: :func:`draw` and :func:`cut`, in one step where a backend has it.

    ``options`` are the arguments of :func:`draw` from ``padding`` to ``max_iou``.
    """
    batch = images.shape[0] if index is None else index.shape[0]
    image_size = (images.shape[2], images.shape[3])
    arguments = (
        sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
        *options, images.device,
    )  # fmt: skip
    flipped = any(thresholds)
    if torch.compiler.is_compiling() or not backends.has(backend, "random_patches_forward"):
        coords, flips = draw(*arguments, backend)
        data = cut(
            images, coords, flips if flipped else None, index, size, pixels, dtype, channels_last,
            backend, out,
        )  # fmt: skip
        return data, coords, flips
    coords, flips = _empty_coords(batch, num_patches, images.device)
    used = flips if flipped else None
    drawn = _Drawn(flips, *_checked_draws(*arguments))
    if out is not None:
        _extract_into(out, images, coords, used, index, *pixels, backend, drawn)
        return out, coords, flips
    data = _ExtractPatches.apply(
        images, coords, used, index, size, *pixels, dtype, channels_last, backend, drawn
    )
    return data, coords, flips


def check_step(step: int) -> None:
    """Raise unless the counter has room for ``step``."""
    if not 0 <= step < 1 << STEP_BITS:
        raise ValueError(f"step must be at least 0 and below 2^{STEP_BITS}, got {step}")


class _Drawn(NamedTuple):
    """What fills the coordinates of a call that draws its boxes itself."""

    flips: Tensor
    sample_ids: Tensor | None
    key: Tensor | None
    draws: Draws


def _checked_draws(
    sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
    padding, grid, scale, ratio, min_distance, max_iou, device,
):  # fmt: skip
    """Sample ids, key and draws as backends take them."""
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
    area, factors, limits = (0, 0), None, (0, 0, 0)
    if scale:
        least, most = (int(share * 2**30) for share in scale)
        area = (max(least, 1), most - max(least, 1) + 1)
        factors, limits = ratio_table(*ratio, device)
    return sample_ids, key, Draws(
        seed, step, first_patch, image_size, size, thresholds, padding, grid, area, factors, limits,
        min_distance, max_iou,
    )  # fmt: skip


def _sample(
    sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
    padding, grid, scale, ratio, min_distance, max_iou, device, backend,
):  # fmt: skip
    sample_ids, key, draws = _checked_draws(
        sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
        padding, grid, scale, ratio, min_distance, max_iou, device,
    )  # fmt: skip
    coords, flips = _empty_coords(batch, num_patches, device)
    lost = backends.run(backend, "sample_coords", coords, flips, sample_ids, key, draws)
    _check_placed(lost, num_patches, draws)
    return coords, flips


def _empty_coords(batch, num_patches, device):
    return (
        torch.empty(batch, num_patches, 4, dtype=torch.int32, device=device),
        torch.empty(batch, num_patches, dtype=torch.uint8, device=device),
    )


def _check_placed(lost, num_patches, draws):
    if lost < 0:
        return
    image, patch = divmod(lost, num_patches)
    wanted = [f"centres at least {draws.min_distance**0.5 / 2:g} pixels apart (min_distance)"]
    wanted = wanted if draws.min_distance else []
    overlap = f"an IoU of at most {draws.max_iou / 2**29:g} (max_iou)"
    wanted += [overlap] if draws.max_iou >= 0 else []
    raise ValueError(
        f"patch {patch} of image {image} found no place in {ATTEMPTS} attempts: "
        f"{num_patches} patches of {draws.size[0]}x{draws.size[1]} pixels in an image of "
        f"{draws.image_size[0]}x{draws.image_size[1]} with {' and '.join(wanted)}; "
        "ask for fewer patches, or let them be closer"
    )


def _extract_into(
    out, images, coords, flips, index, scale, offset, interpolation, antialias, padding_mode, fill,
    backend, drawn=None,
):  # fmt: skip
    """The kernel call of every forward path, with the checks that keep it inside the images."""
    pixels = Pixels(scale, offset, interpolation, antialias, padding_mode, fill)
    size, image_size = out.shape[3:], images.shape[2:]
    if index is not None and index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= images.shape[0]:
            raise ValueError(
                f"index must be at least 0 and below the number of images, {images.shape[0]}, "
                f"got values from {low} to {high}"
            )
    if drawn is not None:
        lost = backends.run(
            backend, "random_patches_forward", images, coords, *drawn, index, pixels, out
        )
        return _check_placed(lost, coords.shape[1], drawn.draws)
    if coords.device.type == "cpu":
        invalid = backends.run(backend, "first_invalid_box", coords, image_size, size, pixels)
        if invalid >= 0:
            raise ValueError(_invalid_box(coords, invalid, image_size, size, pixels))
    backends.run(backend, "extract_patches_forward", images, coords, flips, index, pixels, out)


def _invalid_box(coords, invalid, image_size, size, pixels):
    b, k = divmod(invalid, coords.shape[1])
    y0, x0, height, width = coords[b, k].tolist()
    reach = pixels.reach(image_size)
    beyond = f" or at most {reach[0]} rows and {reach[1]} columns beyond" if max(reach) else ""
    sized = ""
    if pixels.interpolation == "none":
        sized = f", and have the height and width of the patches, {size[0]}x{size[1]}"
    return (
        f"coords[{b}, {k}] = (y0 {y0}, x0 {x0}, height {height}, width {width}) must lie "
        f"inside the image, {image_size[0]}x{image_size[1]} pixels{beyond}{sized}"
    )


def _extract(
    images, coords, flips, index, size, scale, offset, interpolation, antialias, padding_mode, fill,
    dtype, channels_last, backend, drawn=None,
):  # fmt: skip
    out = _empty_patches(images, coords, size, dtype, channels_last)
    _extract_into(
        out, images, coords, flips, index, scale, offset, interpolation, antialias, padding_mode,
        fill, backend, drawn,
    )  # fmt: skip
    return out


def _image_gradient(
    grad, coords, flips, index, image_shape, scale, interpolation, antialias, padding_mode, dtype,
    backend,
):  # fmt: skip
    grad_images = _empty_images(grad, image_shape, dtype)
    pixels = Pixels(scale, [], interpolation, antialias, padding_mode, [])
    backends.run(
        backend, "extract_patches_backward", grad, coords, flips, index, pixels, grad_images
    )
    return grad_images


def _empty_patches(images, coords, size, dtype, channels_last):
    batch, num_patches = coords.shape[:2]
    if channels_last:
        shape = (batch, num_patches, *size, images.shape[1])
        return images.new_empty(shape, dtype=dtype).permute(0, 1, 4, 2, 3)
    return images.new_empty((batch, num_patches, images.shape[1], *size), dtype=dtype)


def _empty_images(grad, image_shape, dtype):
    count, height, width = image_shape
    return grad.new_empty((count, grad.shape[2], height, width), dtype=dtype)


# Autograd. Contexts and formulas serve both paths, which differ in what a formula calls.


def _forward_context(ctx, inputs, output):
    images, coords, flips, index, _, scale, _, *how, _, _, _, backend = inputs[:14]
    ctx.save_for_backward(coords, flips, index)
    image_shape = (images.shape[0], *images.shape[2:])
    ctx.options = (image_shape, scale, *how, images.dtype, backend)
    ctx.arguments = len(inputs)


def _backward_context(ctx, inputs, output):
    grad, coords, flips, index, _, scale, *how, _, backend = inputs
    ctx.save_for_backward(coords, flips, index)
    ctx.options = (grad.shape[3:], scale, [], *how, [], grad.dtype, False, backend)


def _differentiate(ctx, grad, function, arguments):
    result = None
    if ctx.needs_input_grad[0]:
        result = function(grad, *ctx.saved_tensors, *ctx.options)
    return (result, *[None] * (arguments - 1))


class _ExtractPatches(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _extract(*inputs)

    setup_context = staticmethod(_forward_context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], _ExtractPatchesBackward.apply, ctx.arguments)


class _ExtractPatchesBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _image_gradient(*inputs)

    setup_context = staticmethod(_backward_context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], _ExtractPatches.apply, 11)


# The custom operators: what torch.compile sees.

_extract_patches_op = torch.library.custom_op(
    "fastcontrast::extract_patches",
    _extract,
    mutates_args=(),
    schema="(Tensor images, Tensor coords, Tensor? flips, Tensor? index, SymInt[] size, "
    "float[] scale, float[] offset, str interpolation, bool antialias, str padding_mode, "
    "float[] fill, ScalarType dtype, bool channels_last, str backend) -> Tensor",
)
_extract_patches_backward_op = torch.library.custom_op(
    "fastcontrast::extract_patches_backward",
    _image_gradient,
    mutates_args=(),
    schema="(Tensor grad, Tensor coords, Tensor? flips, Tensor? index, SymInt[] image_shape, "
    "float[] scale, str interpolation, bool antialias, str padding_mode, ScalarType dtype, "
    "str backend) -> Tensor",
)
_extract_patches_out_op = torch.library.custom_op(
    "fastcontrast::extract_patches_out",
    _extract_into,
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor images, Tensor coords, Tensor? flips, Tensor? index, "
    "float[] scale, float[] offset, str interpolation, bool antialias, str padding_mode, "
    "float[] fill, str backend) -> ()",
)
_sample_coords_op = torch.library.custom_op(
    "fastcontrast::sample_coords",
    _sample,
    mutates_args=(),
    schema="(Tensor? sample_ids, Tensor? key, SymInt seed, SymInt step, SymInt first_patch, "
    "SymInt batch, SymInt num_patches, SymInt[] image_size, SymInt[] size, int[] thresholds, "
    "SymInt[] padding, int[] grid, float[] scale, float[] ratio, int min_distance, int max_iou, "
    "Device device, str backend) -> (Tensor, Tensor)",
)


@_extract_patches_op.register_fake
def _(images, coords, flips, index, size, scale, offset, interpolation, antialias, padding_mode,
      fill, dtype, channels_last, backend):  # fmt: skip
    return _empty_patches(images, coords, size, dtype, channels_last)


@_extract_patches_backward_op.register_fake
def _(grad, coords, flips, index, image_shape, scale, interpolation, antialias, padding_mode, dtype,
      backend):  # fmt: skip
    return _empty_images(grad, image_shape, dtype)


@_extract_patches_out_op.register_fake
def _(out, images, coords, flips, index, scale, offset, interpolation, antialias, padding_mode,
      fill, backend):  # fmt: skip
    return None


@_sample_coords_op.register_fake
def _(sample_ids, key, seed, step, first_patch, batch, num_patches, image_size, size, thresholds,
      padding, grid, scale, ratio, min_distance, max_iou, device, backend):  # fmt: skip
    return _empty_coords(batch, num_patches, device)


_extract_patches_op.register_autograd(
    lambda ctx, grad: _differentiate(ctx, grad, _extract_patches_backward_op, 14),
    setup_context=_forward_context,
)
_extract_patches_backward_op.register_autograd(
    lambda ctx, grad: _differentiate(ctx, grad, _extract_patches_op, 11),
    setup_context=_backward_context,
)
