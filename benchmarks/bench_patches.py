"""Random patches of 256 uint8 images 3x96x96 to normalised float32, and their gradient.

The control is ``out.fill_()`` on the same output, reused: what writing alone costs. Peers cut at
the same coordinates where they take any; those that draw their own are marked "per sample" or
"batched", and take images as they want them (floats for kornia).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast
from benchmarks import image_libraries

BATCH, CHANNELS, SIDE = 256, 3, 96
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = (0.08, 1.0)
CASES = [(2, 32), (8, 32), (2, 64), (8, 64)]
# ((x/255) - mean)/std in three roundings against one multiply-add: 3 eps of values up to 5.
TOLERANCE = 3e-6


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, CHANNELS, SIDE, SIDE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def channel_tensors() -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]


def slices(x: Tensor, corners: list[list[list[int]]], p: int) -> Tensor:
    mean, std = channel_tensors()
    cut = [x[i, :, y : y + p, a : a + p] for i, row in enumerate(corners) for y, a in row]
    patches = torch.stack(cut)
    return patches.float().div_(255).sub_(mean).div_(std)


def gather_index(coords: Tensor, p: int) -> tuple[Any, ...]:
    image = torch.arange(len(coords))[:, None, None, None]
    rows = coords[..., 0, None].long() + torch.arange(p)
    columns = coords[..., 1, None].long() + torch.arange(p)
    return image, slice(None), rows[..., :, None], columns[..., None, :]


def advanced_indexing(x: Tensor, coords: Tensor, p: int) -> Tensor:
    mean, std = channel_tensors()
    patches = x[gather_index(coords, p)].movedim(-1, 2)
    return patches.float().div_(255).sub_(mean).div_(std)


def unfold_gather(x: Tensor, coords: Tensor, p: int) -> Tensor:
    mean, std = channel_tensors()
    windows = x.unfold(2, p, 1).unfold(3, p, 1).permute(0, 2, 3, 1, 4, 5)
    image = torch.arange(len(coords))[:, None]
    patches = windows[image, coords[..., 0].long(), coords[..., 1].long()]
    return patches.float().div_(255).sub_(mean).div_(std)


def libraries(x: Tensor, k: int, p: int) -> dict[str, Callable[[], Any]]:
    """Peers that draw their own crops, where they import; else the reason is printed."""
    found: dict[str, Callable[[], Any]] = {}
    reasons = {name: image_libraries.why_not(name) for name in ("torchvision", "kornia")}
    for reason in filter(None, reasons.values()):
        print(reason)
    if reasons["torchvision"] is None:
        v2 = torchvision_transforms()
        one = v2.Compose(
            [v2.RandomCrop(p), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )
        found["torchvision per sample"] = lambda: torch.stack(
            [one(image) for image in x for _ in range(k)]
        )
    if reasons["kornia"] is None:
        augmentation = image_libraries.kornia().augmentation
        crop = augmentation.RandomCrop((p, p), cropping_mode="slice")
        mean, std = channel_tensors()
        floats = x.float().div_(255)
        found["kornia batched"] = lambda: crop(floats.repeat_interleave(k, 0)).sub_(mean).div_(std)
    return found


def resizing_libraries(x: Tensor, k: int, p: int) -> dict[str, Callable[[], Any]]:
    """Peers that crop, resize and normalise, each with its defaults: torchvision antialiases."""
    found: dict[str, Callable[[], Any]] = {}
    mean, std = channel_tensors()
    if image_libraries.why_not("torchvision") is None:
        v2 = torchvision_transforms()
        one = v2.Compose(
            [
                v2.RandomResizedCrop(p, SCALE),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        found["torchvision per sample"] = lambda: torch.stack(
            [one(image) for image in x for _ in range(k)]
        )
    if image_libraries.why_not("kornia") is None:
        floats = x.float().div_(255)
        for mode in ("slice", "resample"):
            crop = image_libraries.kornia().augmentation.RandomResizedCrop(
                (p, p), scale=SCALE, cropping_mode=mode
            )
            found[f"kornia batched, {mode}"] = lambda crop=crop: (
                crop(floats.repeat_interleave(k, 0)).sub_(mean).div_(std)
            )
    return found


def torchvision_transforms() -> Any:
    image_libraries.torchvision()
    from torchvision.transforms import v2

    return v2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "p"), CASES)
def test_forward(k: int, p: int, threads: int, race: Callable[..., None]) -> None:
    torch.set_num_threads(threads)
    x = images()
    out = torch.empty(BATCH, k, CHANNELS, p, p)
    options: dict[str, Any] = dict(mean=MEAN, std=STD, seed=0)
    patches = fastcontrast.random_patches(x, k, p, **options)
    corners = patches.coords[..., :2].tolist()
    for exact in (
        slices(x, corners, p),
        advanced_indexing(x, patches.coords, p).flatten(0, 1),
        unfold_gather(x, patches.coords, p).flatten(0, 1),
    ):
        torch.testing.assert_close(
            patches.data.flatten(0, 1), exact, rtol=TOLERANCE, atol=TOLERANCE
        )
    race(
        f"(K, P) = ({k}, {p}), {threads} thread{'s'[: threads - 1]}",
        lambda: fastcontrast.random_patches(x, k, p, out=out, **options),
        {
            "fill_": lambda: out.fill_(0.5),
            "fastcontrast, fresh output": lambda: fastcontrast.random_patches(x, k, p, **options),
            "loop of slices": lambda: slices(x, corners, p),
            "advanced indexing": lambda: advanced_indexing(x, patches.coords, p),
            "unfold, gather": lambda: unfold_gather(x, patches.coords, p),
        }
        | libraries(x, k, p),
        control="fill_",
        warm=3,
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "p"), [(2, 32), (8, 32), (2, 64)])
def test_resized(k: int, p: int, threads: int, race: Callable[..., None]) -> None:
    torch.set_num_threads(threads)
    x = images()
    out = torch.empty(BATCH, k, CHANNELS, p, p)
    options: dict[str, Any] = dict(scale=SCALE, mean=MEAN, std=STD, seed=0)
    patches = fastcontrast.random_patches(x, k, p, **options)
    mean, std = channel_tensors()
    for b in range(0, BATCH, 16):
        for j, (y, a, h, w) in enumerate(patches.coords[b].tolist()):
            crop = x[b, :, y : y + h, a : a + w].float()[None] / 255
            exact = F.interpolate(crop, (p, p), mode="bilinear", antialias=True)[0]
            exact = (exact - mean) / std
            # torch's own float32 weights are off by up to 1e-6 each, divided by std.
            torch.testing.assert_close(patches.data[b, j], exact, rtol=0, atol=2e-5)
    race(
        f"resized, (K, P) = ({k}, {p}), {threads} thread{'s'[: threads - 1]}",
        lambda: fastcontrast.random_patches(x, k, p, out=out, **options),
        {
            "fill_": lambda: out.fill_(0.5),
            "fastcontrast, antialias=False": lambda: fastcontrast.random_patches(
                x, k, p, out=out, antialias=False, **options
            ),
        }
        | resizing_libraries(x, k, p),
        control="fill_",
        warm=3,
    )


# Images, where nothing but patches needs a gradient, and a feature map of spatial contrasting.
BACKWARD_CASES = [((256, 3, 96), 2, 32), ((256, 3, 96), 8, 64), ((64, 64, 24), 4, 8)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "k", "p"), BACKWARD_CASES)
def test_backward(
    shape: tuple[int, int, int], k: int, p: int, threads: int, race: Callable[..., None]
) -> None:
    """Gradient of the patches with respect to float images; the graph is kept."""
    torch.set_num_threads(threads)
    batch, channels, side = shape
    x = torch.randn(batch, channels, side, side, requires_grad=True)
    coords, _ = fastcontrast.sample_coords(batch, k, side, p, seed=0)
    ours = fastcontrast.extract_patches(x, coords, p)
    indexed = x[gather_index(coords, p)].movedim(-1, 2)
    upstream = torch.randn(ours.shape)

    def gradient(of: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(of, x, upstream, retain_graph=True)[0]

    assert torch.equal(ours, indexed)
    mine, same, theirs = gradient(ours)(), gradient(ours)(), gradient(indexed)()
    assert torch.equal(mine, same)
    # Up to K terms are added in another order: K·eps of their sum of sizes, here below 30.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=30 * k * 2.0**-23)
    row = ours.flatten(0, 1)
    unbound = torch.stack(
        [
            image[:, y : y + p, a : a + p]
            for image, corners in zip(x.unbind(0), coords[..., :2].tolist(), strict=True)
            for y, a in corners
        ]
    ).view_as(ours)
    assert torch.equal(unbound, row.view_as(ours))
    target = torch.empty_like(x)
    race(
        f"backward, images {batch}x{channels}x{side}x{side}, (K, P) = ({k}, {p}), "
        f"{threads} thread{'s'[: threads - 1]}",
        gradient(ours),
        {
            "fill_": lambda: target.fill_(0.5),
            "advanced indexing": gradient(indexed),
            "loop of slices of x.unbind()": gradient(unbound),
        },
        control="fill_",
        warm=3,
    )
