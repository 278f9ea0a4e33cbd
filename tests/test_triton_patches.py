"""What is Triton's own in patches: tiles, addresses, draws by the million, gradients of padding.

The conformance suite is the other half. bfloat16 is read and rounded by bits under the interpreter,
which would cut it off: what is compared there is the kernel's own rounding, not a GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_patches import assert_same_bits
from torch import Tensor
from variants import active, variants

from fastcontrast import extract_patches, random_patches, sample_coords
from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton import launch as launches

TRITON = next(v for v in variants("extract_patches") if v.backend == "triton")
NEEDS_TRITON = pytest.mark.skipif(TRITON.skip_reason is not None, reason=str(TRITON.skip_reason))


@pytest.fixture
def _on_triton() -> Iterator[None]:
    with active(TRITON):
        yield


@pytest.fixture
def _small_tiles(_on_triton: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles on every axis of a small shape."""
    sizes = {
        kernel: (128, 16, 1) if kernel.startswith("gather") else (64, 8, 1)
        for kernel in launches.PATCHES
    }
    sizes["draw"] = (8, 8, 1)
    monkeypatch.setattr(launches, "PATCHES" + "_INTERPRETED" * INTERPRETED, sizes)
    launches.patch_launch.cache_clear()
    yield
    launches.patch_launch.cache_clear()


def patches_and_gradient(images: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    data = random_patches(images, 1, backend=backend, **options).data
    upstream = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    return data.detach(), torch.autograd.grad(data, images, upstream.to(data.dtype))[0]


@pytest.mark.parametrize(
    "options",
    [
        dict(size=(9, 11)),
        dict(size=(9, 11), padding=5, padding_mode="constant", fill=(0.5, 2.0), layout="NHWC"),
        dict(size=(9, 5), padding=5, padding_mode="reflect"),
        dict(size=(9, 5), padding=5, padding_mode="edge", scale=(0.2, 0.9)),
        dict(size=(4, 5), padding=5, padding_mode="reflect", scale=(0.2, 0.9)),
        dict(size=(7, 5), padding=3, padding_mode="edge", scale=(0.2, 1.0), antialias=False),
        dict(size=(7, 5), padding=3, padding_mode="reflect", scale=(0.1, 1.0),
             interpolation="nearest"),
    ],
    ids=str,
)  # fmt: skip
@NEEDS_TRITON
@pytest.mark.usefixtures("_small_tiles")
def test_tiles_and_gradients_of_padding(options: dict[str, Any]) -> None:
    """Every way of padding and resizing against the reference, over tile borders."""
    images = torch.rand(2, 2, 9, 12, dtype=torch.float64)
    options = options | dict(hflip=0.5, vflip=0.5, std=0.5, seed=6)
    options["index"] = torch.tensor([1] if "scale" in options else [1, 1])
    mine = patches_and_gradient(images, "triton", **options)
    for found, true in zip(mine, patches_and_gradient(images, "reference", **options), strict=True):
        # Sums of up to a hundred products of size 2, each rounded by a few eps.
        torch.testing.assert_close(found, true, rtol=0, atol=2e-13)


@pytest.mark.parametrize(("images", "scale"), [(8000, None), (2000, (0.05, 1.0))])
@NEEDS_TRITON
@pytest.mark.usefixtures("_on_triton")
def test_a_million_draws(images: int, scale: tuple[float, float] | None) -> None:
    """The same bits as the reference's int64 arithmetic, at ids and steps of every width.

    A quarter of a million with sizes of their own, which the interpreter takes as long for.
    """
    ids = torch.arange(images) * (2**40 // images) + 1
    options: dict[str, Any] = dict(scale=scale, hflip=0.5, vflip=0.25, seed=2**63 + 7, step=2**47)
    drawn = [
        sample_coords(images, 125, (480, 641), 32, sample_ids=ids, backend=backend, **options)
        for backend in ("triton", "reference")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(size=(9, 11), hflip=0.5, vflip=0.5, grid=(2, 2), padding=4, padding_mode="edge"),
        dict(size=(4, 5), scale=(0.2, 0.9), hflip=0.5, std=0.5, layout="NHWC"),
        dict(size=3, min_distance=3),
    ],
    ids=str,
)  # fmt: skip
@NEEDS_TRITON
@pytest.mark.usefixtures("_small_tiles")
def test_drawn_and_cut_at_once(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes, flips and pixels of drawing and cutting apart, from one launch, over tile borders."""
    from fastcontrast.backends.triton import extract_patches as module

    images = torch.rand(3, 2, 14, 23, dtype=torch.float64)
    options = options | dict(index=torch.tensor([2, 0]), seed=2**63 + 5, step=2**40)
    true = random_patches(images, 2, backend="reference", **options)
    if "min_distance" not in options:

        def launched(*_: Any) -> int:
            raise AssertionError("a launch of its own")

        monkeypatch.setattr(module, "sample_coords", launched)
    found = random_patches(images, 2, backend="triton", **options)
    assert torch.equal(found.coords, true.coords)
    assert torch.equal(found.flips, true.flips)
    # Of values up to 2, rounded by a few eps.
    torch.testing.assert_close(found.data, true.data, rtol=0, atol=2e-15)


@NEEDS_TRITON
@pytest.mark.usefixtures("_on_triton")
def test_seed_and_step_are_read_where_they_lie() -> None:
    """As a tensor, the key of a graph: equal to the numbers."""
    from fastcontrast.backends import BACKENDS
    from fastcontrast.backends.patch_sets import Draws

    def draw(key: Tensor | None, seed: int, step: int) -> tuple[Tensor, Tensor]:
        coords = torch.empty(3, 5, 4, dtype=torch.int32)
        flips = torch.empty(3, 5, dtype=torch.uint8)
        draws = Draws(seed, step, 7, (90, 80), (9, 8), (1 << 31, 1 << 32), (2, 1), (2, 3), (0, 0),
                      None, (0, 0, 0), 0, -1)  # fmt: skip
        assert BACKENDS["triton"].sample_coords(coords, flips, None, key, draws) == -1
        return coords, flips

    for seed, step in ((3, 4), (-(2**63), 2**32 - 1), (2**31, 2**48 - 1)):
        by_value = draw(None, seed, step)
        by_tensor = draw(torch.tensor([seed, step]), 0, 0)
        assert all(torch.equal(a, b) for a, b in zip(by_value, by_tensor, strict=True))


@NEEDS_TRITON
@pytest.mark.usefixtures("_on_triton")
def test_offsets_beyond_32_bits() -> None:
    """Strides of 2³³ elements to a row, and to a channel, of images that are never so large."""
    if not INTERPRETED:
        pytest.skip("a carried storage keeps its size, but strides are read there as they are here")
    storage = torch.arange(16.0)
    coords = torch.tensor([[[0, 1, 1, 3]]], dtype=torch.int32)
    for strides in ((0, 2**33, 2**34, 1), (2**35, 0, 2**33, 2)):
        images = storage.as_strided((1, 1, 1, 6), strides)
        cut = extract_patches(images, coords, backend="triton")
        assert_same_bits(cut[0, 0, 0, 0], images[0, 0, 0, 1:4])


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("kernel", launches.PATCHES)
def test_tiles_of_patches(kernel: str, interpreted: bool) -> None:
    """Needs no Triton: powers of two, within the limits, with little padding."""
    table = launches.PATCHES_INTERPRETED if interpreted else launches.PATCHES
    elements, longest, _ = table[kernel]
    for shape in ((1, 1, 1), (5, 27, 37), (8, 96, 32), (1 << 20, 672, 224), (64, 7, 7)):
        sizes = launches.patch_launch(kernel, *shape, interpreted=interpreted)
        tile = sizes.outer * sizes.lines * sizes.columns
        assert tile & (tile - 1) == 0
        assert tile <= elements
        assert sizes.columns <= longest
        if not interpreted and kernel == "cut" and shape[2] % 32 == 0:
            assert shape[2] % sizes.columns == 0
            assert tile >= min(1024, shape[0] * shape[1] * shape[2])
