"""Modules that cut random patches and count their own steps.

They store options and call ``fastcontrast/patches.py``; the seed contract is that of
:func:`fastcontrast.sample_coords`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.patch_arguments import check_num_patches, check_size, signed_seed, threshold
from fastcontrast.patch_draws import check_ratio, check_scale
from fastcontrast.patch_records import Patches
from fastcontrast.patches import random_patches

# What a module sets itself, call by call.
_OWN = {"images", "num_patches", "size", "seed", "step", "sample_ids", "generator", "index",
        "out", "backend", "first_patch"}  # fmt: skip
_OPTIONS = set(random_patches.__annotations__) - _OWN - {"return"}


class _CountsSteps(nn.Module):
    """``seed`` and ``step`` as int64 buffers."""

    seed: Tensor
    step: Tensor

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        if seed is None:
            drawn = torch.randint(-(2**63), 2**63 - 1, ())
        else:
            drawn = torch.tensor(signed_seed(seed))
        self.register_buffer("seed", drawn)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


class RandomPatches(_CountsSteps):
    """Module of :func:`fastcontrast.random_patches` that counts its own steps.

    ``seed`` and ``step``, int64 buffers, are in the ``state_dict``: training that is resumed goes
    on with the patches it would have had. ``step`` advances by one with every forward pass, in
    training and evaluation alike. Activation checkpointing runs a forward pass twice: keep this
    module outside of it.

    Where no ``sample_ids`` are given and a process group is initialised, those of rank r are
    r·B to r·B + B-1: ranks with equal seeds draw different patches.

    Args:
        num_patches: As in :func:`fastcontrast.random_patches`.
        size: As in :func:`fastcontrast.random_patches`.
        seed: 64-bit seed. None draws it here from torch's default generator, as layers draw their
            weights: two modules differ, and ``torch.manual_seed`` makes both repeatable. Equal
            seeds given by hand draw equal patches.
        backend: As in :func:`fastcontrast.random_patches`.
        **options: Every other option of :func:`fastcontrast.random_patches` that is not about one
            call: ``scale``, ``hflip``, ``mean``, ``dtype``, ``grid`` and so on.

    Example:
        >>> crop = RandomPatches(2, 4, hflip=0.5, seed=7)
        >>> crop(torch.zeros(3, 1, 8, 8)).data.shape, int(crop.step)
        (torch.Size([3, 2, 1, 4, 4]), 1)
    """

    def __init__(
        self,
        num_patches: int,
        size: int | Sequence[int],
        *,
        seed: int | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(seed)
        _check_options(num_patches, options)
        self.num_patches = num_patches
        self.size = check_size(size)
        self.backend = backend
        self.options = options

    def forward(
        self, images: Tensor, sample_ids: Tensor | None = None, index: Tensor | None = None
    ) -> Patches:
        """Cut patches of ``images`` [B, C, H, W], or of ``images[index]``, and advance ``step``."""
        batch = images.shape[0] if index is None else index.shape[0]
        patches = random_patches(
            images,
            self.num_patches,
            self.size,
            **self.options,
            index=index,
            seed=self.seed,
            step=self.step,
            sample_ids=_rank_ids(sample_ids, index, batch, images.device),
            backend=self.backend,
        )
        self.step.add_(1)
        return patches

    def extra_repr(self) -> str:
        """Return what distinguishes this module in a printed model."""
        height, width = self.size
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        seed = int(self.seed)
        return f"num_patches={self.num_patches}, size=({height}, {width}), seed={seed}{options}"


class MultiCrop(_CountsSteps):
    """Several sets of patches of the same images, as SwAV and DINO train on.

    All sets share one seed and one ``step``, and take consecutive patches of the counter: no two
    patches of an image have a draw in common.

    Args:
        sets: (number of patches, size) or (number, size, scale) of each set.
        seed: As in :class:`RandomPatches`.
        backend: As in :class:`RandomPatches`.
        **options: As in :class:`RandomPatches`, for all sets.

    Example:
        >>> crops = MultiCrop([(2, 32, (0.4, 1.0)), (6, 16, (0.05, 0.4))], hflip=0.5, seed=0)
        >>> [patches.data.shape for patches in crops(torch.zeros(5, 3, 48, 48))]
        [torch.Size([5, 2, 3, 32, 32]), torch.Size([5, 6, 3, 16, 16])]
    """

    def __init__(
        self,
        sets: Sequence[tuple[Any, ...]],
        *,
        seed: int | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(seed)
        self.sets: list[tuple[int, tuple[int, int], Sequence[float] | None]] = []
        for entry in sets:
            if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
                raise TypeError(
                    f"sets must be (number, size) or (number, size, scale) each, got {entry!r}"
                )
            number, size, *rest = entry
            scale = rest[0] if rest else options.get("scale")
            _check_options(number, options | {"scale": scale})
            self.sets.append((number, check_size(size), scale))
        self.backend = backend
        self.options = {name: value for name, value in options.items() if name != "scale"}

    def forward(
        self, images: Tensor, sample_ids: Tensor | None = None, index: Tensor | None = None
    ) -> list[Patches]:
        """Patches of every set, in order; advances ``step``."""
        batch = images.shape[0] if index is None else index.shape[0]
        ids = _rank_ids(sample_ids, index, batch, images.device)
        result, first = [], 0
        for number, size, scale in self.sets:
            result.append(
                random_patches(
                    images, number, size, scale=scale, **self.options, index=index, seed=self.seed,
                    step=self.step, sample_ids=ids, backend=self.backend, first_patch=first,
                )
            )  # fmt: skip
            first += number
        self.step.add_(1)
        return result

    def extra_repr(self) -> str:
        """Return what distinguishes this module in a printed model."""
        return f"sets={self.sets}, seed={int(self.seed)}"


class PatchPair(RandomPatches):
    """Two patches of every image, or of every feature map, for spatial contrasting.

    What :func:`fastcontrast.spatial_contrasting_loss` compares: encode both, and patches of one
    image are positives of each other (Hoffer, Hubara, Ailon, arXiv 1610.00243, section 3). From a
    feature map [B, C, H, W] gradients flow back through the patches.

    Args:
        size: As in :func:`fastcontrast.random_patches`.
        seed: As in :class:`RandomPatches`.
        backend: As in :class:`RandomPatches`.
        **options: As in :class:`RandomPatches`; ``max_iou`` or ``min_distance`` keep the two apart.

    Example:
        >>> first, second = PatchPair(4, seed=0)(torch.zeros(3, 8, 12, 12))
        >>> first.shape, second.shape
        (torch.Size([3, 8, 4, 4]), torch.Size([3, 8, 4, 4]))
    """

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        seed: int | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(2, size, seed=seed, backend=backend, **options)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Tensor, sample_ids: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """First and second patches [B, C, h, w] each; advances ``step``."""
        data = super().forward(images, sample_ids, index).data
        return data[:, 0], data[:, 1]


def _check_options(num_patches: int, options: dict[str, Any]) -> None:
    """Raise where a module is made for what its first call would raise for."""
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(
            f"unknown option {unknown[0]!r}; a module takes {', '.join(sorted(_OPTIONS))}"
        )
    check_num_patches(num_patches)
    threshold("hflip", options.get("hflip", 0.0))
    threshold("vflip", options.get("vflip", 0.0))
    if options.get("scale") is not None:
        check_scale(options["scale"])
    if "ratio" in options:
        check_ratio(options["ratio"])


def _rank_ids(
    sample_ids: Tensor | None, index: Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """Ids that differ between ranks, unless the caller names the samples."""
    distributed = torch.distributed
    if sample_ids is not None or index is not None:
        return sample_ids
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return torch.arange(batch, device=device) + batch * distributed.get_rank()
