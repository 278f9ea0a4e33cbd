"""Pixels of patches on every backend: against torch slicing, in every dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import on_every_backend

from fastcontrast import Patches, RandomPatches, backends, extract_patches, random_patches

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATING = DTYPES[1:]
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "same_channel", "transposed")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random pixels: all bytes, or floats with both zeros, inf and NaN among them."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    values = torch.randn(shape).to(dtype)
    flat = values.view(-1)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    flat[: len(special)] = special[: flat.numel()]
    return values


def images_in(layout: str, dtype: torch.dtype, b: int, c: int, h: int, w: int) -> Tensor:
    if layout == "contiguous":
        return pixels(dtype, b, c, h, w)
    if layout == "channels_last":
        return pixels(dtype, b, c, h, w).to(memory_format=torch.channels_last)
    if layout == "sliced":  # an offset that leaves rows unaligned
        return pixels(dtype, b + 1, c + 2, h + 3, w + 5)[1:, 1 : c + 1, 2 : h + 2, 3 : w + 3]
    if layout == "expanded":  # one image for the whole batch
        return pixels(dtype, 1, c, h, w).expand(b, -1, -1, -1)
    if layout == "same_channel":
        return pixels(dtype, b, 1, h, w).expand(-1, c, -1, -1)
    return pixels(dtype, w, h, c, b).permute(3, 2, 1, 0)


def boxes(b: int, k: int, h: int, w: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random boxes and flips; the first and the last box touch the image's corners."""
    y0 = torch.randint(0, h - size[0] + 1, (b, k))
    x0 = torch.randint(0, w - size[1] + 1, (b, k))
    if k:
        y0[:, 0], x0[:, 0] = 0, 0
        y0[:, -1], x0[:, -1] = h - size[0], w - size[1]
    extent = torch.tensor(size).expand(b, k, 2)
    coords = torch.cat([y0[..., None], x0[..., None], extent], -1).int()
    return coords, torch.arange(b * k).reshape(b, k).remainder(4).to(torch.uint8)


def sliced(images: Tensor, coords: Tensor, flips: Tensor | None = None) -> Tensor:
    """The patches by indexing, one after the other."""
    rows = []
    for b, image in enumerate(images):
        row = []
        for k, (y0, x0, h, w) in enumerate(coords[b].tolist()):
            flip = 0 if flips is None else int(flips[b, k])
            patch = image[:, y0 : y0 + h, x0 : x0 + w]
            axes = [axis for axis, bit in ((2, 1), (1, 2)) if flip & bit]
            row.append(patch.flip(axes))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend("extract_patches")
def test_plain_patches_are_slices(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Without conversion the bits are the images' bits, NaN, inf and -0 included."""
    images = images_in(layout, dtype, 3, 3, 21, 40)
    for size in ((9, 37), (21, 16), (1, 1)):
        coords, flips = boxes(3, 5, 21, 40, size)
        plain = extract_patches(images, coords, size, dtype=dtype, backend=backend)
        assert plain.is_contiguous()
        assert_same_bits(plain, sliced(images, coords))
        flipped = extract_patches(images, coords, flips=flips, dtype=dtype, backend=backend)
        assert_same_bits(flipped, sliced(images, coords, flips))


# By regime of the row loop: one pixel, below and at the short and long vector, one beyond, ragged.
@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 71])
@on_every_backend("extract_patches")
def test_every_width(backend: str, width: int) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 71), dtype=torch.uint8)
    coords, flips = boxes(2, 4, 5, 71, (4, width))
    result = extract_patches(images, coords, flips=flips, mean=MEAN, std=STD, backend=backend)
    exact = normalized(sliced(images, coords, flips), MEAN, STD)
    assert_rounded_once(result, exact, images.dtype)


@pytest.mark.parametrize("channels", [1, 2, 4, 64, 513])
@on_every_backend("extract_patches")
def test_any_number_of_channels(backend: str, channels: int) -> None:
    """Feature maps included; one channel is contiguous and channels_last at once."""
    for layout in ("contiguous", "channels_last"):
        images = images_in(layout, torch.float32, 2, channels, 6, 7)
        coords, flips = boxes(2, 3, 6, 7, (3, 4))
        assert_same_bits(
            extract_patches(images, coords, flips=flips, backend=backend),
            sliced(images, coords, flips),
        )


@on_every_backend("extract_patches")
def test_size_of_the_image(backend: str) -> None:
    images = pixels(torch.float32, 2, 3, 8, 9)
    patches = random_patches(images, 2, (8, 9), seed=0, backend=backend)
    assert_same_bits(patches.data, images[:, None].expand(-1, 2, -1, -1, -1))


@on_every_backend("extract_patches")
def test_empty(backend: str) -> None:
    for b, k, c in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        images = torch.zeros(b, c, 8, 9, requires_grad=True)
        patches = random_patches(images, k, (4, 5), mean=0.5, seed=0, backend=backend)
        assert patches.data.shape == (b, k, c, 4, 5)
        (grad,) = torch.autograd.grad(patches.data.sum(), images)
        assert torch.equal(grad, torch.zeros_like(images))


def normalized(values: Tensor, mean: object = 0.0, std: object = 1.0) -> Tensor:
    """((x/255) - mean)/std in float64, as torchvision's ToDtype and Normalize do it."""
    m = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
    s = torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
    return (values.double() / (255.0 if values.dtype == torch.uint8 else 1.0) - m) / s


def assert_rounded_once(result: Tensor, exact: Tensor, source: torch.dtype) -> None:
    # The scale, the offset, their product and sum are rounded to the arithmetic's dtype: 2 eps of
    # the terms' size, and that is at most |x|/std + |mean|/std <= 3|value| + 5 with MEAN and STD.
    # The result is rounded to its own dtype: eps/2 of it, or half of the smallest denormal.
    wide = torch.float64 in (source, result.dtype)
    arithmetic = torch.finfo(torch.float64 if wide else torch.float32).eps
    own = torch.finfo(result.dtype)
    limit = 2 * arithmetic * (3 * exact.abs() + 5) + own.eps * 0.51 * exact.abs() + own.tiny
    error = (result.double() - exact).abs()
    assert bool((error <= limit).all()), float((error - limit).max())


@pytest.mark.parametrize("out_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend("extract_patches")
def test_normalised_and_converted(backend: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        images = images_in(layout, dtype, 2, 3, 20, 37).nan_to_num(0.5, 2.0, -2.0)
        coords, flips = boxes(2, 4, 20, 37, (7, 18))
        patches = sliced(images, coords, flips)
        options = dict(flips=flips, dtype=out_dtype, backend=backend)
        result = extract_patches(images, coords, mean=MEAN, std=STD, **options)
        assert result.dtype == out_dtype
        assert_rounded_once(result, normalized(patches, MEAN, STD), dtype)
        result = extract_patches(images, coords, std=2.0, **options)
        assert_rounded_once(result, normalized(patches, 0.0, 2.0), dtype)
        result = extract_patches(images, coords, mean=[0.5, 0.25, -1], **options)
        assert_rounded_once(result, normalized(patches, (0.5, 0.25, -1)), dtype)
        if dtype != torch.uint8:  # conversion alone is torch's conversion
            assert_same_bits(extract_patches(images, coords, **options), patches.to(out_dtype))


@on_every_backend("extract_patches")
def test_conversion_of_every_half(backend: str) -> None:
    """All 2¹⁶ bit patterns of both 16-bit types to float32, and floats round them to even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).reshape(1, 1, 256, 256)
    box = torch.tensor([[[0, 0, 256, 256]]], dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        halves = bits.view(dtype)
        wide = extract_patches(halves, box, dtype=torch.float32, backend=backend)[0]
        torch.testing.assert_close(wide, halves.float(), rtol=0, atol=0, equal_nan=True)
        # Between neighbours: half-way, a bit less and a bit more; beyond the largest: infinity.
        exact = halves.float().nan_to_num(0.0)
        step = (exact * torch.finfo(dtype).eps).abs().clamp_min(2.0**-126)
        for part in (0.0, 0.25, 0.49, 0.5, 0.51, 1.0):
            floats = exact + part * step
            result = extract_patches(floats, box, dtype=dtype, backend=backend)[0]
            assert_same_bits(result, floats.to(dtype))
        not_a_number = torch.full((1, 1, 256, 256), torch.nan)
        assert extract_patches(not_a_number, box, dtype=dtype, backend=backend).isnan().all()


@on_every_backend("extract_patches")
def test_default_dtypes(backend: str) -> None:
    for dtype in DTYPES:
        images = pixels(dtype, 1, 1, 4, 4).nan_to_num(0.0, 0.0, 0.0)
        data = random_patches(images, 1, 2, seed=0, backend=backend).data
        assert data.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    data = random_patches(bytes_, 1, (1, 3), seed=0, backend=backend).data
    torch.testing.assert_close(data.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@on_every_backend("extract_patches")
def test_out(backend: str) -> None:
    images = pixels(torch.uint8, 2, 3, 9, 9)
    out = torch.full((2, 4, 3, 5, 5), torch.nan)
    options = dict(mean=MEAN, std=STD, seed=1, hflip=0.5, backend=backend)
    patches = random_patches(images, 4, 5, out=out, **options)
    fresh = random_patches(images, 4, 5, **options)
    assert patches.data is out
    assert torch.equal(out, fresh.data)
    assert fresh.data.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    again = torch.empty_like(out)
    returned = extract_patches(
        images, fresh.coords, flips=fresh.flips, mean=MEAN, std=STD, out=again, backend=backend
    )
    assert returned is again
    assert torch.equal(again, out)
    # Neighbours in one storage are apart.
    arena = torch.zeros(2 * 3 * 81 + out.numel())
    first = arena[: 2 * 3 * 81].view(2, 3, 9, 9)
    random_patches(first, 4, 5, seed=0, out=arena[2 * 3 * 81 :].view_as(out), backend=backend)


@on_every_backend("extract_patches")
def test_results_do_not_depend_on_threads(backend: str) -> None:
    images = torch.randn(8, 3, 64, 64, dtype=torch.float32, requires_grad=True)
    halves = images.detach().to(torch.bfloat16).requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            row = []
            for source in (images, halves):
                patches = random_patches(source, 6, 48, hflip=0.5, mean=0.1, std=0.7, seed=0,
                                         backend=backend).data  # fmt: skip
                (grad,) = torch.autograd.grad(patches.float().square().sum(), source)
                row += [patches.detach(), grad]
            results.append(row)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_stride_against_numpy(data: st.DataObject) -> None:
    """Shapes, strides (zero and beyond the row included) and boxes at random, every backend."""
    draw = data.draw
    b, c = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    k = draw(st.integers(0, 3))
    size = (draw(st.integers(1, h)), draw(st.integers(1, w)))
    dtype = draw(st.sampled_from(["uint8", "float16", "float32", "float64"]))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 7, 13, 41])) for _ in range(4)]
    offset = draw(st.integers(0, 9))
    extent = (
        offset + 1 + sum((max(n, 1) - 1) * s for n, s in zip((b, c, h, w), strides, strict=True))
    )
    seed = draw(st.integers(0, 2**64 - 1))
    memory = (np.arange(extent) % 251).astype(dtype)
    array = np.lib.stride_tricks.as_strided(
        memory[offset:], (b, c, h, w), [s * memory.itemsize for s in strides]
    )
    images = torch.as_strided(torch.from_numpy(memory), (b, c, h, w), strides, offset)
    for name in backends.available_backends("extract_patches"):
        patches = random_patches(
            images, k, size, hflip=0.5, vflip=0.5, dtype=images.dtype, seed=seed, backend=name
        )
        result = patches.data.numpy()
        assert result.dtype == memory.dtype
        for i in range(b):
            for j in range(k):
                y0, x0 = patches.coords[i, j, :2].tolist()
                expected = array[i, :, y0 : y0 + size[0], x0 : x0 + size[1]]
                flip = int(patches.flips[i, j])
                expected = expected[:, :: -1 if flip & 2 else 1, :: -1 if flip & 1 else 1]
                assert np.array_equal(result[i, j], expected)


def test_seed_sources() -> None:
    images = torch.arange(256 * 256.0).reshape(1, 1, 256, 256)

    def corners(**options: object) -> list:
        return random_patches(images, 4, 8, **options).coords.tolist()

    torch.manual_seed(1)
    first, second = corners(), corners()
    torch.manual_seed(1)
    assert [corners(), corners()] == [first, second]
    assert first != second
    generator = torch.Generator().manual_seed(5)
    drawn = corners(generator=generator)
    assert corners(generator=generator) != drawn
    assert corners(generator=generator.manual_seed(5)) == drawn
    torch.manual_seed(1)
    assert corners(seed=3) == corners(seed=3)  # and draws nothing from torch's generator:
    assert corners() == first
    assert corners(seed=3, step=1) != corners(seed=3)


def test_module_counts_its_steps() -> None:
    images = torch.rand(2, 3, 64, 64)
    module = RandomPatches(3, 8, hflip=0.5, mean=0.5, std=0.5, seed=9)
    assert "num_patches=3, size=(8, 8), seed=9" in repr(module)
    runs = [module(images) for _ in range(3)]
    assert all(isinstance(run, Patches) for run in runs)
    assert not torch.equal(runs[0].coords, runs[1].coords)
    for step, run in enumerate(runs):
        expected = random_patches(images, 3, 8, hflip=0.5, mean=0.5, std=0.5, seed=9, step=step)
        assert torch.equal(run.data, expected.data)
    state = module.state_dict()
    assert int(state["step"]) == 3
    resumed = RandomPatches(3, 8, hflip=0.5, mean=0.5, std=0.5, seed=9)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(images).data, module(images).data)
    ids = torch.tensor([7, 5])
    assert torch.equal(
        module(images, sample_ids=ids).coords,
        random_patches(images, 3, 8, seed=9, step=4, sample_ids=ids).coords,
    )
