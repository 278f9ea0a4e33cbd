"""Random patches of images: sample boxes, cut them out, resize, normalise, convert, in one pass.

:func:`random_patches` does all of it, :func:`sample_coords` the random half and
:func:`extract_patches` the deterministic half; ``fastcontrast/patch_modules.py`` has the modules.
What users pass is checked by ``fastcontrast/patch_draws.py`` and ``patch_arguments.py``;
``fastcontrast/ops/extract_patches.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from fastcontrast import backends
from fastcontrast.backends.patch_sets import Pixels
from fastcontrast.ops.extract_patches import cut, draw_and_cut
from fastcontrast.patch_arguments import (
    affine_map,
    check_apart,
    check_fits,
    check_images,
    check_index,
    check_interpolation,
    check_layout,
    check_out,
    check_sample_ids,
    check_size,
    check_tensor,
    fill_values,
    random_key,
    result_dtype,
    size_of,
    threshold,
)
from fastcontrast.patch_draws import RATIO, draw_options
from fastcontrast.patch_records import Patches


def random_patches(
    images: Tensor,
    num_patches: int,
    size: int | Sequence[int],
    *,
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] = RATIO,
    interpolation: str = "bilinear",
    antialias: bool = True,
    hflip: float = 0.0,
    vflip: float = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    layout: str = "NCHW",
    padding: int | Sequence[int] = 0,
    padding_mode: str = "error",
    fill: float | Sequence[float] = 0,
    min_distance: float | None = None,
    max_iou: float | None = None,
    grid: int | Sequence[int] | None = None,
    index: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    first_patch: int = 0,
) -> Patches:
    r"""Cut K random patches from every image, resized, flipped, normalised, in one pass.

    Boxes have integer corners, uniform over all positions inside the image, drawn for each patch on
    its own (see :func:`sample_coords`); pixels are those of :func:`extract_patches`. Other
    libraries call this random crops, RandomCropSamples, multi-crop, random resized crops or
    glimpses. Gradients flow to floating images.

    Args:
        images: Images [B, C, H, W], uint8 or floating point, any strides.
        num_patches: Patches per image, K >= 0.
        size: Height and width of a patch in pixels, or one number for both.
        scale: None cuts boxes of ``size``, pixel for pixel. A pair (low, high) draws boxes of a
            random share of the image's area and resizes them to ``size``, as torchvision's
            RandomResizedCrop does; smaller boxes are enlarged.
        ratio: As in :func:`sample_coords`.
        interpolation: With ``scale``: as in :func:`extract_patches`.
        antialias: As in :func:`extract_patches`.
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        mean: As in :func:`extract_patches`.
        std: As in :func:`extract_patches`.
        dtype: As in :func:`extract_patches`.
        memory_format: As in :func:`extract_patches`.
        layout: As in :func:`extract_patches`.
        padding: As in :func:`sample_coords`.
        padding_mode: As in :func:`extract_patches`.
        fill: As in :func:`extract_patches`.
        min_distance: As in :func:`sample_coords`.
        max_iou: As in :func:`sample_coords`.
        grid: As in :func:`sample_coords`.
        index: [B] int64: cut from ``images[index]``, which is not made: B rows of patches from N
            images, for data sets that lie in memory whole. These are then also the default
            ``sample_ids``.
        seed: 64-bit seed. With it the patches are a pure function of (seed, step, sample id, k):
            equal arguments give equal patches, so advance ``step``. Without it and without
            ``generator``, a seed is drawn from torch's default CPU generator, which
            ``torch.manual_seed`` sets.
        step: As in :func:`sample_coords`.
        sample_ids: As in :func:`sample_coords`.
        generator: Draw the 64-bit seed from this generator instead; ``seed`` must be None. One on a
            GPU makes the call wait for the device. Not inside ``torch.compile``.
        out: As in :func:`extract_patches`.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.
        first_patch: As in :func:`sample_coords`.

    Returns:
        :class:`Patches` on the images' device.

    Raises:
        ValueError: If a value, shape or device is not as above, a patch is larger than the
            image, or a constraint between patches cannot be kept.
        TypeError: If an argument has the wrong type or dtype.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
        >>> patches = random_patches(images, 4, 5, hflip=0.5, mean=0.5, std=0.25, seed=0)
        >>> patches.data.shape, patches.data.dtype
        (torch.Size([2, 4, 3, 5, 5]), torch.float32)
        >>> again = extract_patches(
        ...     images, patches.coords, 5, flips=patches.flips, mean=0.5, std=0.25
        ... )
        >>> torch.equal(again, patches.data)
        True
    """
    check_images(images)
    size = check_size(size)
    image_size = (images.shape[2], images.shape[3])
    options = draw_options(
        num_patches, image_size, size, scale=scale, ratio=ratio, padding=padding,
        padding_mode=padding_mode, grid=grid, min_distance=min_distance, max_iou=max_iou,
        first_patch=first_patch,
    )  # fmt: skip
    method = check_interpolation(interpolation, antialias) if scale is not None else "none"
    shown = check_layout(layout, memory_format)
    thresholds = [threshold("hflip", hflip), threshold("vflip", vflip)]
    dtype = result_dtype(images, dtype, mean, std)
    values = fill_values(images, padding_mode, fill)
    pixels = Pixels(*affine_map(images, dtype, mean, std), method, antialias, padding_mode, values)
    check_index(index, images)
    batch = images.shape[0] if index is None else index.shape[0]
    sample_ids = index if sample_ids is None else sample_ids
    check_sample_ids(sample_ids, batch, images.device)
    target = None
    if out is not None:
        shape = (batch, num_patches, images.shape[1], *size)
        target = check_out(out, images, shape, dtype, shown)
    key, seed, step = random_key(seed, step, generator, images.device)
    backend = backends.resolve("extract_patches", images, backend)
    data, coords, flips = draw_and_cut(
        images, index, sample_ids, key, seed, step, first_patch, num_patches, size, thresholds,
        options, pixels, dtype, shown.channels_last, backend, target,
    )  # fmt: skip
    return Patches(shown.show(data) if out is None else out, coords, flips)


def extract_patches(
    images: Tensor,
    coords: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    flips: Tensor | None = None,
    interpolation: str | None = None,
    antialias: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    layout: str = "NCHW",
    padding_mode: str = "error",
    fill: float | Sequence[float] = 0,
    index: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Cut the given boxes out of every image: replay of :func:`random_patches` on any tensor.

    .. math::
        \mathrm{out}_{b,k,c,y,x} = a_c \, \mathrm{images}_{b,c,\,y_0+y,\,x_0+x} + b_c, \qquad
        a_c = \frac{1}{m \, \mathrm{std}_c}, \quad b_c = -\frac{\mathrm{mean}_c}{\mathrm{std}_c}

    with m = 255 for uint8 images, which thereby become [0, 1] before normalisation, and m = 1 for
    floating ones. A flipped patch runs through its box from the far side. Computed in float32
    (float64 where images or result are), rounded once. Linear in the images: gradients of any order
    flow to them, added where patches overlap, the same bits every time. Coordinates have none.

    With ``interpolation`` boxes of any size are resized to ``size``, equal to ``F.interpolate`` of
    the crop with ``align_corners=False`` within rounding: no pixel outside of the box counts. A box
    of the patch's size is copied exactly.

    Args:
        images: Images [B, C, H, W], uint8, float16, bfloat16, float32 or float64, any strides; also
            feature maps, with any C. Never copied.
        coords: Boxes [B, K, 4] int32, (y0, x0, height, width) in source pixels, half-open. Checked
            against the image if they are on the CPU. On a GPU a check would wait for the device:
            there, boxes outside the image are undefined behaviour.
        size: Height and width of the patches in pixels, or one number for both. None reads it from
            ``coords``, which must then be on the CPU.
        flips: [B, K] uint8: bit 0 horizontal, bit 1 vertical.
        interpolation: None wants every box to have the size of the patches. ``"bilinear"`` and
            ``"nearest"`` (the pixel that the centre lies in, PIL's and torch's "nearest-exact";
            for masks) resize.
        antialias: Whether bilinear weights widen where a box shrinks, as in
            ``F.interpolate(antialias=True)``, torchvision's default.
        mean: Subtracted from each channel: one number or C of them, in units of the images (of
            [0, 1] for uint8).
        std: Each channel is divided by it: one number or C of them, positive.
        dtype: Of the result. None keeps a floating dtype and makes float32 of uint8.
            ``torch.uint8`` from uint8 images keeps 0..255, without normalisation; resized pixels
            are rounded to the nearest.
        memory_format: ``torch.channels_last`` lays each patch out channels last, in the same shape.
        layout: ``"NHWC"`` returns [B, K, h, w, C] instead, contiguous.
        padding_mode: What lies beyond the image: ``"error"``, boxes must be inside; ``"constant"``,
            ``fill``; ``"reflect"``, the image mirrored without its border pixels, up to a side less
            one; ``"edge"``, the border pixel. Equal to ``F.pad`` and cutting, without the copy.
        fill: Pixel for ``"constant"``, one number or C of them, in the images' own values (0..255
            for uint8), normalised like any other.
        index: [B] int64: row b of ``coords`` belongs to ``images[index[b]]``; any number of images.
        out: Tensor of the result's shape, dtype and memory layout to write to and return; it must
            share no memory with the images, and nothing may require a gradient. Memory that is
            allocated anew for a large batch costs more time than cutting the patches.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Patches [B, K, C, h, w], on the images' device.

    Raises:
        ValueError: If a value, shape or device is not as above, or a box leaves the image.
        TypeError: If an argument has the wrong type or dtype.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> images = torch.arange(12.0).reshape(1, 1, 3, 4)
        >>> coords = torch.tensor([[[0, 1, 2, 2], [1, 0, 2, 2]]], dtype=torch.int32)
        >>> flips = torch.tensor([[0, 1]], dtype=torch.uint8)
        >>> extract_patches(images, coords, flips=flips)[0, :, 0]
        tensor([[[1., 2.],
                 [5., 6.]],
        <BLANKLINE>
                [[5., 4.],
                 [9., 8.]]])
    """
    check_images(images)
    check_index(index, images)
    batch = images.shape[0] if index is None else index.shape[0]
    check_tensor("coords", coords, torch.int32, "[B, K, 4]", images.device)
    if coords.dim() != 3 or coords.shape[0] != batch or coords.shape[2] != 4:
        raise ValueError(
            f"coords must have shape [{batch}, K, 4] for images {list(images.shape)}, "
            f"got {list(coords.shape)}"
        )
    method = "none" if interpolation is None else check_interpolation(interpolation, antialias)
    size = size_of(coords) if size is None else check_size(size)
    if method == "none" and padding_mode == "error":
        check_fits(size, images.shape[2:])
    if flips is not None:
        check_tensor("flips", flips, torch.uint8, "[B, K]", images.device)
        if flips.shape != coords.shape[:2]:
            raise ValueError(
                f"flips must have shape {list(coords.shape[:2])} like coords, "
                f"got {list(flips.shape)}"
            )
    shown = check_layout(layout, memory_format)
    dtype = result_dtype(images, dtype, mean, std)
    values = fill_values(images, padding_mode, fill)
    pixels = Pixels(*affine_map(images, dtype, mean, std), method, antialias, padding_mode, values)
    target = None
    if out is not None:
        shape = (batch, coords.shape[1], images.shape[1], *size)
        target = check_out(out, images, shape, dtype, shown)
        check_apart(out, {"coords": coords, "flips": flips, "index": index})
    backend = backends.resolve("extract_patches", images, backend)
    data = cut(
        images, coords, flips, index, size, pixels, dtype, shown.channels_last, backend, target
    )
    return shown.show(data) if out is None else out
