"""Resized and padded patches on every backend: against F.interpolate, F.pad and torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import on_every_backend

from benchmarks import image_libraries
from fastcontrast import backends, extract_patches, random_patches, sample_coords

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def boxes_of_any_size(b: int, k: int, h: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return sample_coords(
        b, k, (h, w), 1, scale=(0.02, 1.0), ratio=(0.3, 3.0), hflip=0.5, vflip=0.5, seed=seed
    )


def interpolated(
    images: Tensor, coords: Tensor, flips: Tensor, size: tuple[int, int], mode: str, antialias: bool
) -> Tensor:
    """Crop by crop with F.interpolate, in the dtype of ``images``."""
    rows = []
    for b, row in enumerate(coords.tolist()):
        for k, (y0, x0, h, w) in enumerate(row):
            crop = images[b, :, y0 : y0 + h, x0 : x0 + w][None]
            if mode == "bilinear":
                patch = F.interpolate(crop, size, mode="bilinear", antialias=antialias)[0]
            else:
                patch = F.interpolate(crop, size, mode="nearest-exact")[0]
            axes = [axis for axis, bit in ((2, 1), (1, 2)) if int(flips[b, k]) & bit]
            rows.append(patch.flip(axes))
    return torch.stack(rows).unflatten(0, coords.shape[:2])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (16, 16), (33, 40), (1, 1), (1, 20)])
@on_every_backend("extract_patches")
def test_bilinear_is_interpolate_of_the_crop(
    backend: str, size: tuple[int, int], antialias: bool
) -> None:
    """Enlarged, reduced and both at once; pixels beyond the box never count."""
    images = torch.rand(3, 3, 37, 50, dtype=torch.float64)
    coords, flips = boxes_of_any_size(3, 5, 37, 50)
    options: dict[str, Any] = dict(
        flips=flips, interpolation="bilinear", antialias=antialias, backend=backend
    )
    expected = interpolated(images, coords, flips, size, "bilinear", antialias)
    result = extract_patches(images, coords, size, **options)
    # Weights and their sums are rounded by both sides, to a few eps of values up to 1.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
    single = extract_patches(images.float(), coords, size, **options)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)
    halves = extract_patches(images, coords, size, dtype=torch.bfloat16, **options)
    torch.testing.assert_close(halves, expected.to(torch.bfloat16), rtol=2**-8, atol=0)
    # Nothing beyond the crops: NaN there changes no bit.
    poisoned = torch.full_like(images, torch.nan)
    for b, row in enumerate(coords.tolist()):
        y0, x0, h, w = row[0]
        poisoned[b, :, y0 : y0 + h, x0 : x0 + w] = images[b, :, y0 : y0 + h, x0 : x0 + w]
    alone = extract_patches(poisoned, coords[:, :1], size, **options | {"flips": flips[:, :1]})
    assert torch.equal(alone, result[:, :1])


@on_every_backend("extract_patches")
def test_nearest_is_the_pixel_of_the_centre(backend: str) -> None:
    images = torch.randint(0, 256, (2, 3, 31, 40), dtype=torch.uint8)
    coords, flips = boxes_of_any_size(2, 6, 31, 40)
    result = extract_patches(
        images, coords, (8, 8), flips=flips, interpolation="nearest", dtype=torch.uint8,
        backend=backend,
    )  # fmt: skip
    # Powers of two: torch's float position is exact, so that ties fall alike.
    expected = interpolated(images.double(), coords, flips, (8, 8), "nearest", False)
    assert torch.equal(result.double(), expected)


@on_every_backend("extract_patches")
def test_resized_bytes_are_rounded(backend: str) -> None:
    images = torch.randint(0, 256, (2, 3, 31, 40), dtype=torch.uint8)
    coords, flips = boxes_of_any_size(2, 6, 31, 40)
    options: dict[str, Any] = dict(flips=flips, interpolation="bilinear", backend=backend)
    exact = extract_patches(images.double(), coords, 12, **options)
    result = extract_patches(images, coords, 12, dtype=torch.uint8, **options)
    # Half a level, and what float32 sums may be off at a tie.
    assert float((result.double() - exact).abs().max()) <= 0.5 + 1e-4
    shown = extract_patches(images, coords, 12, mean=0.5, std=0.25, **options)
    torch.testing.assert_close(shown.double(), (exact / 255 - 0.5) / 0.25, rtol=0, atol=3e-6)


@on_every_backend("extract_patches")
def test_infinite_pixels_stay_infinite(backend: str) -> None:
    """Taps of weight 0 do not make NaN of an infinite pixel."""
    images = torch.zeros(1, 1, 12, 12)
    images[0, 0, 3, 4] = torch.inf
    coords = torch.tensor([[[0, 0, 12, 12], [2, 3, 3, 4]]], dtype=torch.int32)
    for size in (5, 17):
        result = extract_patches(images, coords, size, interpolation="bilinear", backend=backend)
        assert not result.isnan().any()
        assert result.isinf().any()


PADS = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


@pytest.mark.parametrize("mode", PADS)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATING], ids=str)
@on_every_backend("extract_patches")
def test_padding_is_pad_and_cut(backend: str, dtype: torch.dtype, mode: str) -> None:
    images = (torch.rand(2, 3, 11, 9) * 200).to(dtype)
    fill = 7.0 if mode == "constant" else 0.0
    value = {"value": fill} if mode == "constant" else {}
    padded = F.pad(images.double(), (8, 8, 8, 8), mode=PADS[mode], **value)
    options: dict[str, Any] = dict(
        padding=8, padding_mode=mode, fill=fill, hflip=0.5, seed=3, dtype=dtype, backend=backend
    )
    patches = random_patches(images, 20, (6, 7), **options)
    assert int(patches.coords[..., :2].min()) < 0
    moved = patches.coords + torch.tensor([8, 8, 0, 0], dtype=torch.int32)
    expected = extract_patches(padded, moved, flips=patches.flips, backend="reference")
    assert torch.equal(patches.data.double(), expected)
    resized = random_patches(images, 8, (5, 4), scale=(0.1, 0.9), **options)
    moved = resized.coords + torch.tensor([8, 8, 0, 0], dtype=torch.int32)
    expected = extract_patches(
        padded, moved, (5, 4), flips=resized.flips, interpolation="bilinear", backend="reference"
    )
    error = (resized.data.double() - expected).abs().max()
    # Half a unit in the last place of 200, or half a level.
    unit = 1.0 if dtype == torch.uint8 else 256 * torch.finfo(dtype).eps
    assert float(error) <= 0.51 * unit + 1e-4 * (dtype != torch.float64) + 1e-12


@on_every_backend("extract_patches")
def test_fill_is_normalised_per_channel(backend: str) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    coords = torch.tensor([[[-9, -9, 2, 2]]], dtype=torch.int32)
    result = extract_patches(
        images, coords, padding_mode="constant", fill=(51, 102, 255), mean=0.2, std=0.5,
        backend=backend,
    )  # fmt: skip
    expected = torch.tensor([0.0, 0.4, 1.6])[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(result[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(interpolation="bilinear"),
        dict(interpolation="bilinear", antialias=False),
        dict(interpolation="nearest"),
        dict(interpolation="bilinear", padding_mode="reflect"),
        dict(interpolation="bilinear", padding_mode="edge"),
        dict(interpolation="bilinear", padding_mode="constant", fill=0.3),
        dict(interpolation="bilinear", index=[1, 0, 1]),
        dict(interpolation="bilinear", memory_format=torch.channels_last),
        dict(interpolation="bilinear", layout="NHWC", mean=0.1, std=(0.5, 2.0)),
    ],
    ids=str,
)
@on_every_backend("extract_patches")
def test_gradcheck_of_resized_patches(backend: str, options: dict[str, Any]) -> None:
    options = dict(options)
    images = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    coords, flips = boxes_of_any_size(2, 3, 4, 5, seed=4)
    if "index" in options:
        options["index"] = torch.tensor(options["index"])
        coords, flips = coords[[0, 1, 0]], flips[[0, 1, 0]]
    if "padding_mode" in options:
        coords = coords + torch.tensor([2, -3, 0, 0], dtype=torch.int32)

    def cut(x: Tensor) -> Tensor:
        return extract_patches(x, coords, (4, 3), flips=flips, backend=backend, **options)

    assert torch.autograd.gradcheck(cut, images)
    assert torch.autograd.gradgradcheck(cut, images)


@on_every_backend("extract_patches")
def test_gradients_of_every_dtype_and_large_outputs(backend: str) -> None:
    """Against autograd of F.interpolate in float64, and the same bits each time."""
    images = torch.randn(2, 3, 40, 41)
    coords, flips = boxes_of_any_size(2, 4, 40, 41)
    double = images.double().requires_grad_()
    expected = interpolated(double, coords, flips, (16, 24), "bilinear", True)
    upstream = torch.randn(expected.shape)
    (exact,) = torch.autograd.grad(expected, double, upstream.double())
    for dtype in FLOATING:
        source = images.to(dtype).requires_grad_()
        result = extract_patches(
            source, coords, (16, 24), flips=flips, interpolation="bilinear", dtype=torch.float32,
            backend=backend,
        )  # fmt: skip
        grads = [torch.autograd.grad(result, source, upstream, retain_graph=True)[0]
                 for _ in range(2)]  # fmt: skip
        assert torch.equal(*grads)
        # Sums of up to a hundred terms of size 1 in float32, and one rounding.
        limit = 2e-5 + torch.finfo(dtype).eps * 0.51 * exact.abs()
        assert bool(((grads[0].double() - exact).abs() <= limit).all())


@on_every_backend("extract_patches")
def test_index_sums_the_gradients_of_one_image(backend: str) -> None:
    images = torch.randn(5, 2, 8, 9, requires_grad=True)
    index = torch.tensor([3, 0, 3, 3, 1])
    options: dict[str, Any] = dict(hflip=0.5, seed=2, backend=backend)
    direct = random_patches(images, 3, 4, index=index, **options)
    gathered = random_patches(images[index], 3, 4, sample_ids=index, **options)
    assert torch.equal(direct.data, gathered.data)
    assert torch.equal(direct.coords, gathered.coords)
    upstream = torch.randn(direct.data.shape)
    (mine,) = torch.autograd.grad(direct.data, images, upstream)
    (expected,) = torch.autograd.grad(gathered.data, images, upstream)
    torch.testing.assert_close(mine, expected, rtol=0, atol=5e-6)
    assert not mine[2].any()
    assert not mine[4].any()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("scale", [None, (0.2, 0.8)])
@on_every_backend("extract_patches")
def test_layouts_hold_the_same_pixels(
    backend: str, scale: tuple[float, float] | None, channels: int
) -> None:
    images = torch.randint(0, 256, (2, channels, 20, 21), dtype=torch.uint8)
    options: dict[str, Any] = dict(scale=scale, hflip=0.5, mean=0.5, seed=1, backend=backend)
    plain = random_patches(images, 3, (5, 7), **options).data
    last = random_patches(images, 3, (5, 7), memory_format=torch.channels_last, **options).data
    shown = random_patches(images, 3, (5, 7), layout="NHWC", **options).data
    assert torch.equal(last, plain)
    assert last.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shown.permute(0, 1, 4, 2, 3), plain)
    assert shown.is_contiguous()
    out = torch.empty_like(shown)
    assert random_patches(images, 3, (5, 7), layout="NHWC", out=out, **options).data is out
    assert torch.equal(out, shown)
    copies = extract_patches(
        images, random_patches(images, 3, 5, seed=0).coords, layout="NHWC", dtype=torch.uint8,
        backend=backend,
    )  # fmt: skip
    assert copies.shape == (2, 3, 5, 5, channels)


@pytest.mark.parametrize("antialias", [False, True])
def test_torchvision_given_the_same_boxes(antialias: bool) -> None:
    reason = image_libraries.why_not("torchvision")
    if reason:
        pytest.skip(reason)
    image_libraries.torchvision()
    from torchvision.transforms.v2 import functional

    images = torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8)
    patches = random_patches(
        images, 4, (24, 20), scale=(0.1, 1.0), hflip=0.5, vflip=0.5, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4), antialias=antialias, seed=0,
    )  # fmt: skip
    for b in range(2):
        for k in range(4):
            y0, x0, h, w = patches.coords[b, k].tolist()
            image = functional.to_dtype(images[b], torch.float32, scale=True)
            image = functional.resized_crop(image, y0, x0, h, w, [24, 20], antialias=antialias)
            flip = int(patches.flips[b, k])
            image = functional.horizontal_flip(image) if flip & 1 else image
            image = functional.vertical_flip(image) if flip & 2 else image
            image = functional.normalize(image, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
            # torchvision's float32 weights are off by up to 1e-6 each, divided by std.
            torch.testing.assert_close(patches.data[b, k], image, rtol=0, atol=2e-5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_backends_agree_on_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    b, c, k = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    h, w = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    size = (draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    mode = draw(st.sampled_from(["error", "constant", "reflect", "edge"]))
    padding = 0 if mode == "error" else draw(st.integers(0, min(h, w) - 1))
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]))
    transposed = draw(st.booleans())
    images = (torch.rand(b, c, w, h) if transposed else torch.rand(b, c, h, w)) * 200
    images = (images.transpose(2, 3) if transposed else images).to(dtype)
    options: dict[str, Any] = dict(
        scale=(draw(st.floats(0.01, 1.0)), 1.0), ratio=(0.2, 4.0), hflip=0.5, vflip=0.5,
        interpolation=draw(st.sampled_from(["nearest", "bilinear"])),
        antialias=draw(st.booleans()), padding=padding, padding_mode=mode, dtype=torch.float32,
        seed=draw(st.integers(0, 2**64 - 1)), step=draw(st.integers(0, 2**48 - 1)),
    )  # fmt: skip
    results = [
        random_patches(images, k, size, backend=name, **options)
        for name in backends.available_backends("extract_patches")
    ]
    for other in results[1:]:
        assert torch.equal(other.coords, results[0].coords)
        assert torch.equal(other.flips, results[0].flips)
        torch.testing.assert_close(other.data, results[0].data, rtol=1e-6, atol=1e-4)
