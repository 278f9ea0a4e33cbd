"""Job "patches": patches of uint8 images to normalised floats, of float maps, and gradients.

Peers that take coordinates cut where ours cut and are compared pixel by pixel; those that draw
their own ("its own draws") are held to what any draw must give: see `errors`. The control fills
the output, which is reused: what writing alone costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast
from benchmarks import image_libraries
from benchmarks.cases import Call, Case, Control, Work, generator
from benchmarks.peers import OURS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = (0.08, 1.0)
TRITON_AUGMENT = "triton-augment"  # on CUDA alone; floats, and an image for every patch
KINDS = {
    "cut": (
        OURS,
        "loop of slices",
        "advanced indexing",
        "unfold, gather",
        TRITON_AUGMENT,
        "torchvision",
        "kornia",
    ),
    "resized": (OURS, "torchvision", "kornia, slice", "kornia, resample"),
    "backward": (OURS, "advanced indexing", "loop of slices"),
    "of maps": (OURS, "loop of slices", "advanced indexing", "unfold, gather"),
}
# These draw their own crops, and take images as they want them: floats for kornia.
OWN_DRAWS = ("torchvision", "kornia", "kornia, slice", "kornia, resample")


def slices(x: Tensor, coords: Tensor, p: int) -> Tensor:
    """Patches [B·K, C, P, P], cut one by one from `x.unbind()`."""
    images = x.unbind(0)
    corners = coords[..., :2].tolist()
    return torch.stack(
        [images[i][:, y : y + p, a : a + p] for i, row in enumerate(corners) for y, a in row]
    )


def gathered(x: Tensor, coords: Tensor, p: int) -> Tensor:
    """The same, by one index of every pixel."""
    offsets = torch.arange(p, device=x.device)
    image = torch.arange(len(coords), device=x.device)[:, None, None, None]
    rows = coords[..., 0, None].long() + offsets
    columns = coords[..., 1, None].long() + offsets
    cut = x[image, :, rows[..., :, None], columns[..., None, :]]
    return cut.movedim(-1, 2).flatten(0, 1)


def unfolded(x: Tensor, coords: Tensor, p: int) -> Tensor:
    """The same, by a view of all windows."""
    windows = x.unfold(2, p, 1).unfold(3, p, 1).permute(0, 2, 3, 1, 4, 5)
    image = torch.arange(len(coords), device=x.device)[:, None]
    return windows[image, coords[..., 0].long(), coords[..., 1].long()].flatten(0, 1)


CUTTERS = {"loop of slices": slices, "advanced indexing": gathered, "unfold, gather": unfolded}


class PatchCase(Case):
    """Facts: kind, batch, channels, side, k (patches an image), p (their side), dtype."""

    distributions: ClassVar[dict[str, str]] = {
        OURS: "fastcontrast",
        "torchvision": "torchvision",
        TRITON_AUGMENT: TRITON_AUGMENT,
        **dict.fromkeys(("kornia", "kornia, slice", "kornia, resample"), "kornia"),
    }

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.batch, self.channels, self.side = facts["batch"], facts["channels"], facts["side"]
        self.k, self.p = facts["k"], facts["p"]

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.channels}x{self.side}x{self.side}"
        return f"patches {self.facts['kind']}, {shape}, (K, P) = ({self.k}, {self.p})"

    def providers(self) -> Sequence[str]:
        cuda = self.device.type == "cuda"
        return [name for name in KINDS[self.facts["kind"]] if cuda or name != TRITON_AUGMENT]

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"mean": MEAN, "std": STD, "seed": 0}
        return options | ({"scale": SCALE} if self.facts["kind"] == "resized" else {})

    def _maps(self) -> Tensor:
        shape = (self.batch, self.channels, self.side, self.side)
        return torch.randn(shape, generator=generator(0, self.device), device=self.device)

    def _images(self) -> Tensor:
        shape = (self.batch, self.channels, self.side, self.side)
        source = generator(0, self.device)
        if self.facts["kind"] == "backward":
            return self._maps().requires_grad_()
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=source, device=self.device)

    def _output(self) -> Tensor:
        return torch.zeros(self.batch, self.k, self.channels, self.p, self.p, device=self.device)

    def _channels(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return mean, std

    def _coords(self) -> Tensor:
        return fastcontrast.sample_coords(
            self.batch, self.k, self.side, self.p, seed=0, device=self.device
        )[0]

    def build(self, provider: str) -> Call:
        if self.facts["kind"] == "backward":
            return self._gradient(provider)
        if self.facts["kind"] == "of maps":
            maps, coords = self._maps(), self._coords()
            cut = CUTTERS.get(provider, fastcontrast.extract_patches)
            return lambda: cut(maps, coords, self.p)
        if provider in OWN_DRAWS:
            return self._library(provider)
        x = self._images()
        if provider == OURS:
            out, options = self._output(), self._options
            return lambda: fastcontrast.random_patches(x, self.k, self.p, out=out, **options).data
        if provider == TRITON_AUGMENT:
            return self._fused(x)
        coords, (mean, std), cut = self._coords(), self._channels(), CUTTERS[provider]
        return lambda: cut(x, coords, self.p).float().div_(255).sub_(mean).div_(std)

    def _fused(self, x: Tensor) -> Call:
        """triton-augment's one kernel for crop and normalisation, where ours cut."""
        augment = image_libraries.triton_augment().functional.fused_augment
        top, left = self._coords()[..., :2].flatten(0, 1).unbind(1)
        options: dict[str, Any] = {"mean": MEAN, "std": STD, "height": self.p, "width": self.p}
        floats = x.float().div_(255)
        return lambda: augment(floats.repeat_interleave(self.k, 0), top, left, **options)

    def _gradient(self, provider: str) -> Call:
        x, coords = self._images(), self._coords()
        if provider == OURS:
            patches = fastcontrast.extract_patches(x, coords, self.p).flatten(0, 1)
        else:
            patches = CUTTERS[provider](x, coords, self.p)
        source = generator(1, self.device)
        upstream = torch.randn(patches.shape, generator=source, device=self.device)
        return lambda: torch.autograd.grad(patches, x, upstream, retain_graph=True)[0]

    def _library(self, provider: str) -> Call:
        x, k, p = self._images(), self.k, self.p
        resized = self.facts["kind"] == "resized"
        if provider == "torchvision":
            image_libraries.torchvision()
            from torchvision.transforms import v2

            crop = v2.RandomResizedCrop(p, SCALE) if resized else v2.RandomCrop(p)
            one = v2.Compose([crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
            return lambda: torch.stack([one(image) for image in x for _ in range(k)])
        augmentation = image_libraries.kornia().augmentation
        mode = "resample" if provider.endswith("resample") else "slice"
        if resized:
            crop = augmentation.RandomResizedCrop((p, p), scale=SCALE, cropping_mode=mode)
        else:
            crop = augmentation.RandomCrop((p, p), cropping_mode=mode)
        mean, std = self._channels()
        floats = x.float().div_(255)
        return lambda: crop(floats.repeat_interleave(k, 0)).sub_(mean).div_(std)

    def work(self) -> Work:
        output = self._output_bytes()
        images = float(self.batch * self.channels * self.side**2)
        if self.facts["kind"] == "backward":  # gradients read, and those of every pixel written
            return Work(0.0, output + 4 * images)
        if self.facts["kind"] == "of maps":
            return Work(0.0, output + min(4 * images, output))
        return Work(0.0, output + min(images, output / 4))

    def _output_bytes(self) -> float:
        return 4.0 * self.batch * self.k * self.channels * self.p**2

    def control(self) -> Control:
        out = self._output()
        return Control("fill_", lambda: out.fill_(0.5))

    def control_work(self) -> Work:
        return Work(0.0, self._output_bytes())

    def errors(self, provider: str) -> dict[str, float]:
        """Largest difference of a pixel; of a peer with draws of its own, of shape and range."""
        mine = self.build(provider)().double().flatten(0, -4)
        if self.facts["kind"] == "of maps":
            exact = slices(self._maps(), self._coords(), self.p)
            return {"value": float((mine - exact).abs().max())}
        mean, std = (v.double() for v in self._channels())
        if provider in OWN_DRAWS:
            if mine.shape != (self.batch * self.k, self.channels, self.p, self.p):
                return {"shape": float("inf")}
            pixels = mine * std + mean
            return {"range": max(float(pixels.max()) - 1, -float(pixels.min()), 0.0)}
        if self.facts["kind"] == "backward":
            exact = PatchCase(self.facts)._gradient_in_float64()
            return {"value": float((mine - exact).abs().max())}
        x = self._images()
        if self.facts["kind"] == "cut":
            cut = slices(x, self._coords(), self.p).double()
        else:
            boxes = fastcontrast.random_patches(x, self.k, self.p, **self._options).coords
            cut = torch.cat([_resized(x[i], row, self.p) for i, row in enumerate(boxes.tolist())])
        return {"value": float((mine - (cut / 255 - mean) / std).abs().max())}

    def _gradient_in_float64(self) -> Tensor:
        x = self._images().detach().double().requires_grad_()
        patches = slices(x, self._coords(), self.p)
        upstream = torch.randn(patches.shape, generator=generator(1, self.device), device=x.device)
        return torch.autograd.grad(patches, x, upstream.double())[0]

    def remark(self, provider: str) -> str:
        if provider in OWN_DRAWS:
            floats = ", of float images" if provider.startswith("kornia") else ""
            return f"draws its own crops{floats}: shape and range are checked, not pixels"
        if provider == TRITON_AUGMENT:
            return "takes a float image for every patch"
        return ""

    def smaller(self) -> Case:
        return PatchCase(self.facts | {"batch": min(self.batch, 4)})

    def needs(self, provider: str) -> float:
        # Gathers of pixels hold an index of 8 bytes, the gathered bytes and floats.
        return 5 * self.work().bytes


def _resized(image: Tensor, boxes: list[list[int]], p: int) -> Tensor:
    crops = [image[:, y : y + h, a : a + w].double()[None] for y, a, h, w in boxes]
    resize = {"size": (p, p), "mode": "bilinear", "antialias": True}
    return torch.cat([F.interpolate(crop, **resize) for crop in crops])


CASE = PatchCase


def all_cases(
    job: str, quick: bool, device: str, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Facts of the job's cases; ``sizes`` are numbers of images."""
    images = [(256, 3, 96)] if not sizes else [(b, 3, 96) for b in sizes]
    maps = [(64, 64, 24)] if not sizes else [(b, 64, 24) for b in sizes]
    grid = [(2, 32), (8, 64)] if quick else [(2, 32), (8, 32), (2, 64), (8, 64)]
    shapes = [("cut", shape, *kp) for shape in images for kp in grid]
    shapes += [("resized", shape, *kp) for shape in images for kp in (grid[:1] if quick else grid)]
    if not quick:
        shapes += [("backward", shape, *kp) for shape in images for kp in ((2, 32), (8, 64))]
    shapes += [("backward", shape, 4, 8) for shape in maps]
    if not quick:
        shapes += [("of maps", shape, 4, 8) for shape in maps]
    return [
        {
            "job": job, "kind": kind, "batch": b, "channels": c, "side": s, "k": k, "p": p,
            "dtype": "float32", "device": device,
        }
        for kind, (b, c, s), k, p in shapes
    ]  # fmt: skip
