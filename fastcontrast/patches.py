"""Random patches of images: sample boxes, cut them out, normalise, convert, in one pass.

:func:`random_patches` does all of it, :func:`sample_coords` the random half and
:func:`extract_patches` the deterministic half; :class:`RandomPatches` is the module. What users
pass is checked by ``fastcontrast/patch_arguments.py``; ``fastcontrast/ops/extract_patches.py`` runs
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from fastcontrast import backends
from fastcontrast.ops.extract_patches import cut, draw
from fastcontrast.patch_arguments import (
    affine_map,
    check_apart,
    check_fits,
    check_images,
    check_num_patches,
    check_out,
    check_sample_ids,
    check_size,
    check_tensor,
    random_key,
    result_dtype,
    signed_seed,
    size_of,
    threshold,
)


class Patches(NamedTuple):
    """Patches and where they come from.

    Attributes:
        data: Pixels [B, K, C, h, w]; ``data.flatten(0, 1)`` is a batch for an encoder.
        coords: Boxes [B, K, 4] int32, (y0, x0, height, width) in source pixels, half-open, as they
            are before flipping.
        flips: Flips [B, K] uint8: bit 0 horizontal, bit 1 vertical.
    """

    data: Tensor
    coords: Tensor
    flips: Tensor


def random_patches(
    images: Tensor,
    num_patches: int,
    size: int | Sequence[int],
    *,
    hflip: float = 0.0,
    vflip: float = 0.0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Patches:
    r"""Cut K random patches from every image, with random flips, normalised, in one pass.

    Boxes have integer corners, uniform over all positions inside the image, drawn for each patch on
    its own (see :func:`sample_coords`); pixels are those of :func:`extract_patches`. Other
    libraries call this random crops, multi-crop or glimpses. Gradients flow to floating images.

    Args:
        images: Images [B, C, H, W], uint8 or floating point, any strides.
        num_patches: Patches per image, K >= 0.
        size: Height and width of a patch in pixels, or one number for both.
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        mean: As in :func:`extract_patches`.
        std: As in :func:`extract_patches`.
        dtype: As in :func:`extract_patches`.
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

    Returns:
        :class:`Patches` on the images' device.

    Raises:
        ValueError: If a value, shape or device is not as above, or a patch is larger than the
            image.
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
    image_size = check_fits(size, images.shape[2:])
    check_num_patches(num_patches)
    thresholds = [threshold("hflip", hflip), threshold("vflip", vflip)]
    dtype = result_dtype(images, dtype, mean, std)
    scale, offset = affine_map(images, dtype, mean, std)
    batch = images.shape[0]
    check_sample_ids(sample_ids, batch, images.device)
    if out is not None:
        check_out(out, images, (batch, num_patches, images.shape[1], *size), dtype)
    key, seed, step = random_key(seed, step, generator, images.device)
    backend = backends.resolve("extract_patches", images, backend)
    coords, flips = draw(
        sample_ids, key, seed, step, batch, num_patches, image_size, size, thresholds,
        images.device, backend,
    )  # fmt: skip
    used = flips if thresholds != [0, 0] else None
    data = cut(images, coords, used, size, scale, offset, dtype, backend, out)
    return Patches(data, coords, flips)


def extract_patches(
    images: Tensor,
    coords: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    flips: Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
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

    Args:
        images: Images [B, C, H, W], uint8, float16, bfloat16, float32 or float64, any strides; also
            feature maps, with any C. Never copied.
        coords: Boxes [B, K, 4] int32, (y0, x0, height, width) in source pixels, half-open. Checked
            against the image if they are on the CPU. On a GPU a check would wait for the device:
            there, boxes outside the image are undefined behaviour.
        size: Height and width of the patches in pixels, or one number for both; every box must have
            it. None reads it from ``coords``, which must then be on the CPU.
        flips: [B, K] uint8: bit 0 horizontal, bit 1 vertical.
        mean: Subtracted from each channel: one number or C of them, in units of the images (of
            [0, 1] for uint8).
        std: Each channel is divided by it: one number or C of them, positive.
        dtype: Of the result. None keeps a floating dtype and makes float32 of uint8.
            ``torch.uint8`` from uint8 images copies pixels as they are, without normalisation.
        out: Contiguous tensor of the result's shape and dtype to write to and return; it must share
            no memory with the images, and nothing may require a gradient. Memory that is
            allocated anew for a large batch costs more time than cutting the patches.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Patches [B, K, C, h, w], contiguous, on the images' device.

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
    batch = images.shape[0]
    check_tensor("coords", coords, torch.int32, "[B, K, 4]", images.device)
    if coords.dim() != 3 or coords.shape[0] != batch or coords.shape[2] != 4:
        raise ValueError(
            f"coords must have shape [{batch}, K, 4] for images {list(images.shape)}, "
            f"got {list(coords.shape)}"
        )
    size = size_of(coords) if size is None else check_size(size)
    check_fits(size, images.shape[2:])
    if flips is not None:
        check_tensor("flips", flips, torch.uint8, "[B, K]", images.device)
        if flips.shape != coords.shape[:2]:
            raise ValueError(
                f"flips must have shape {list(coords.shape[:2])} like coords, "
                f"got {list(flips.shape)}"
            )
    dtype = result_dtype(images, dtype, mean, std)
    scale, offset = affine_map(images, dtype, mean, std)
    if out is not None:
        check_out(out, images, (*coords.shape[:2], images.shape[1], *size), dtype)
        check_apart(out, {"coords": coords, "flips": flips})
    backend = backends.resolve("extract_patches", images, backend)
    return cut(images, coords, flips, size, scale, offset, dtype, backend, out)


def sample_coords(
    batch: int,
    num_patches: int,
    image_size: int | Sequence[int],
    size: int | Sequence[int],
    *,
    hflip: float = 0.0,
    vflip: float = 0.0,
    seed: int,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
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

    Draws 1 to 2**16 - 1 are kept for later use. The bias of a position is at most
    (H - h + 1) / 2**32.

    Args:
        batch: Number of images, B >= 0.
        num_patches: Patches per image, 0 <= K <= 2**24.
        image_size: Height and width of the images in pixels, or one number for both.
        size: Height and width of a patch in pixels, or one number for both.
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        seed: 64-bit seed, -2**63 <= seed < 2**64, taken modulo 2**64.
        step: Number of the batch in training, 0 <= step < 2**48. An int64 tensor without axes, on
            ``device``, is read there: a captured graph then draws new patches whenever it is
            advanced.
        sample_ids: Ids of the images, [B] int64, 0 <= id < 2**40; None means 0 to B-1. Ranks with
            equal seeds need them, or they draw the same boxes; indices into the data set make the
            boxes independent of how it is spread. Checked on the CPU only.
        device: Of the result; None means that of ``sample_ids``, or the CPU.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Boxes [B, K, 4] int32, (y0, x0, height, width) in pixels, half-open, and flips [B, K] uint8
        with bit 0 horizontal, bit 1 vertical.

    Raises:
        ValueError: If a value, shape or device is not as above, or a patch is larger than the
            image.
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
    check_num_patches(num_patches)
    size = check_size(size)
    image_size = check_fits(size, check_size(image_size, "image_size"))
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
        sample_ids, key, seed, step, batch, num_patches, image_size, size, thresholds, device,
        backend,
    )  # fmt: skip


class RandomPatches(nn.Module):
    """Module of :func:`random_patches` that counts its own steps.

    ``step``, an int64 buffer, is in the ``state_dict``: training that is resumed goes on with the
    patches it would have had. It advances by one with every forward pass, in training and
    evaluation alike. Two modules need different seeds to draw different patches. Activation
    checkpointing runs a forward pass twice: keep this module outside of it.

    Args:
        num_patches: As in :func:`random_patches`.
        size: As in :func:`random_patches`.
        hflip: As in :func:`random_patches`.
        vflip: As in :func:`random_patches`.
        mean: As in :func:`random_patches`.
        std: As in :func:`random_patches`.
        dtype: As in :func:`random_patches`.
        seed: 64-bit seed.
        backend: As in :func:`random_patches`.

    Example:
        >>> crop = RandomPatches(2, 4, hflip=0.5, seed=7)
        >>> crop(torch.zeros(3, 1, 8, 8)).data.shape, int(crop.step)
        (torch.Size([3, 2, 1, 4, 4]), 1)
    """

    step: Tensor

    def __init__(
        self,
        num_patches: int,
        size: int | Sequence[int],
        *,
        hflip: float = 0.0,
        vflip: float = 0.0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_num_patches(num_patches)
        threshold("hflip", hflip)
        threshold("vflip", vflip)
        self.num_patches = num_patches
        self.size = check_size(size)
        self.hflip, self.vflip = hflip, vflip
        self.mean, self.std, self.dtype = mean, std, dtype
        self.seed = signed_seed(seed)
        self.backend = backend
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor, sample_ids: Tensor | None = None) -> Patches:
        """Cut patches of ``images`` [B, C, H, W], and advance ``step``."""
        patches = random_patches(
            images,
            self.num_patches,
            self.size,
            hflip=self.hflip,
            vflip=self.vflip,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
            seed=self.seed,
            step=self.step,
            sample_ids=sample_ids,
            backend=self.backend,
        )
        self.step.add_(1)
        return patches

    def extra_repr(self) -> str:
        """Return what distinguishes this module in a printed model."""
        height, width = self.size
        return f"num_patches={self.num_patches}, size=({height}, {width}), seed={self.seed}"
