"""Random patches in pipelines of ``torchvision.transforms.v2``.

``from fastcontrast.transforms import RandomPatches`` imports torchvision, which nothing else in the
package needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcontrast.patch_arguments import check_num_patches, check_size, threshold
from fastcontrast.patch_draws import RATIO, check_scale, sample_coords
from fastcontrast.patches import extract_patches


def __getattr__(name: str) -> Any:
    if name != "RandomPatches":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _transform()
    return globals()[name]


def _transform() -> type:
    from PIL import Image
    from torchvision import tv_tensors  # pyright: ignore[reportMissingImports]
    from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

    class RandomPatches(v2.Transform):
        """K random patches of an image, and of its mask at the same boxes, [K, C, h, w].

        Arguments as in :func:`fastcontrast.random_patches`. Takes tensors [C, H, W], PIL images,
        ``tv_tensors.Image`` and ``tv_tensors.Mask``; masks are cut without normalisation, resized
        by the nearest pixel, and filled with 0. The seed of each call is drawn from torch's default
        generator, which DataLoader seeds for each worker.

        With ``return_coords`` images become (patches, coords [K, 4]).
        """

        def __init__(
            self,
            num_patches: int,
            size: Any,
            *,
            scale: Any = None,
            ratio: Any = RATIO,
            interpolation: str = "bilinear",
            antialias: bool = True,
            hflip: float = 0.0,
            vflip: float = 0.0,
            mean: Any = None,
            std: Any = None,
            dtype: torch.dtype | None = None,
            return_coords: bool = False,
        ) -> None:
            super().__init__()
            check_num_patches(num_patches)
            threshold("hflip", hflip)
            threshold("vflip", vflip)
            self.num_patches, self.size = num_patches, check_size(size)
            self.scale = None if scale is None else check_scale(scale)
            self.ratio, self.interpolation, self.antialias = ratio, interpolation, antialias
            self.hflip, self.vflip = hflip, vflip
            self.mean, self.std, self.dtype = mean, std, dtype
            self.return_coords = return_coords

        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            """Boxes and flips for all inputs of a sample, which must be of one size."""
            sizes = {tuple(v2.functional.get_size(i)) for i in flat_inputs if _is_picture(i)}
            if len(sizes) != 1:
                raise ValueError(f"image and mask must be of one size, got {sorted(sizes)}")
            seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
            coords, flips = sample_coords(
                1, self.num_patches, sizes.pop(), self.size, scale=self.scale, ratio=self.ratio,
                hflip=self.hflip, vflip=self.vflip, seed=seed,
            )  # fmt: skip
            return {"coords": coords, "flips": flips}

        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            """Patches of one input at the boxes of ``params``."""
            if not _is_picture(inpt):
                return inpt
            mask = isinstance(inpt, tv_tensors.Mask)
            pixels = inpt if isinstance(inpt, Tensor) else v2.functional.pil_to_tensor(inpt)
            pixels = pixels.as_subclass(Tensor)
            stack = pixels if pixels.dim() == 3 else pixels[None]  # a mask may be [H, W]
            resized = None if self.scale is None else "nearest" if mask else self.interpolation
            if mask:
                patches = _mask_patches(stack, params, self.size, resized)
                patches = patches if pixels.dim() == 3 else patches[:, 0]
                return tv_tensors.wrap(patches, like=inpt)  # pyright: ignore[reportCallIssue]
            patches = extract_patches(
                stack[None], params["coords"], self.size, flips=params["flips"],
                interpolation=resized, antialias=self.antialias, mean=self.mean, std=self.std,
                dtype=self.dtype,
            )[0]  # fmt: skip
            if isinstance(inpt, tv_tensors.Image):
                patches = tv_tensors.wrap(patches, like=inpt)  # pyright: ignore[reportCallIssue]
            return (patches, params["coords"][0]) if self.return_coords else patches

    def _is_picture(value: Any) -> bool:
        if isinstance(value, tv_tensors.BoundingBoxes):
            raise TypeError("bounding boxes cannot follow patches, of which there are K per image")
        return isinstance(value, (Tensor, Image.Image))

    RandomPatches.__qualname__ = "RandomPatches"  # where pickle looks for it
    return RandomPatches


def _mask_patches(
    mask: Tensor, params: dict[str, Any], size: tuple[int, int], interpolation: str | None
) -> Tensor:
    """Labels of any integer dtype, cut as float64, which holds them up to 2⁵³."""
    dtype = mask.dtype if mask.is_floating_point() else torch.float64
    patches = extract_patches(
        mask[None].to(dtype), params["coords"], size, flips=params["flips"],
        interpolation=interpolation,
    )  # fmt: skip
    return patches[0].to(mask.dtype)
