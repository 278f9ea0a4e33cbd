"""The ways in which patch libraries are known to go wrong, one test for each.

Geometry 1-6 and randomness 7-14; graphs, memory and numerics, 15-30, are in
test_patch_traps_memory.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from test_patches import assert_same_bits
from torch import Tensor
from variants import on_every_backend

from fastcontrast import (
    MultiCrop,
    Patches,
    RandomPatches,
    extract_patches,
    random_patches,
    sample_coords,
)

every_backend = on_every_backend("extract_patches")


def box(*values: int) -> Tensor:
    return torch.tensor([[values]], dtype=torch.int32)


@every_backend
def test_01_a_patch_larger_than_the_image_is_an_error(backend: str) -> None:
    images = torch.rand(1, 3, 8, 9)
    with pytest.raises(ValueError, match="patches of 9x9 pixels are larger than images of 8x9"):
        random_patches(images, 1, 9, backend=backend)
    with pytest.raises(ValueError, match=r"patches of 12x9 .* larger than images of 10x11"):
        random_patches(images, 1, (12, 9), padding=1, padding_mode="edge", backend=backend)
    whole = random_patches(images, 2, (8, 9), seed=0, backend=backend)
    assert torch.equal(whole.data[0, 1], images[0])


@every_backend
def test_02_boxes_are_half_open(backend: str) -> None:
    images = torch.arange(12.0).reshape(1, 1, 1, 12)
    patch = extract_patches(images, box(0, 4, 1, 8), backend=backend)
    assert patch.flatten().tolist() == list(range(4, 12))
    with pytest.raises(ValueError, match="must lie inside the image"):
        extract_patches(images, box(0, 5, 1, 8), backend=backend)


@every_backend
def test_03_rows_come_before_columns_everywhere(backend: str) -> None:
    images = torch.arange(20.0).reshape(1, 1, 4, 5)
    patch = extract_patches(images, box(1, 3, 2, 1), backend=backend)
    assert patch.shape[-2:] == (2, 1)
    assert patch.flatten().tolist() == [8.0, 13.0]
    coords, _ = sample_coords(300, 1, (4, 50), (2, 3), seed=0, backend=backend)
    assert int(coords[..., 0].max()) == 2
    assert int(coords[..., 1].max()) == 47
    assert coords[0, 0, 2:].tolist() == [2, 3]
    assert Patches._fields == ("data", "coords", "flips")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@every_backend
def test_04_affine_maps_pixel_centres_flips_included(backend: str, layout: str) -> None:
    """Images whose pixels are their own coordinates say where each pixel of a patch is from."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    images = torch.stack([x, y])[None].double()
    for scale in (None, (0.1, 0.8)):
        patches = random_patches(
            images, 12, (6, 8), scale=scale, antialias=False, hflip=0.5, vflip=0.5, seed=1,
            layout=layout, backend=backend,
        )  # fmt: skip
        data = patches.data.permute(0, 1, 4, 2, 3) if layout == "NHWC" else patches.data
        j, i = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
        grid = torch.stack([i, j, torch.ones_like(i)])
        where = torch.einsum("bkdc,chw->bkdhw", patches.affine(layout), grid)
        # Enlarged border pixels clamp to the box; within it the map is exact in float32.
        assert float((where - data)[..., 1:-1, 1:-1].abs().max()) < 0.5
        inner = (patches.coords[..., 2] >= 6) & (patches.coords[..., 3] >= 8)
        assert bool(inner.any())
        assert float((where - data)[inner].abs().max()) < 1e-4


@every_backend
def test_05_resizing_clamps_to_the_crop(backend: str) -> None:
    images = torch.full((1, 1, 30, 30), torch.nan)
    images[..., 5:15, 7:18] = torch.rand(10, 11)
    crop = images[..., 5:15, 7:18]
    for antialias in (False, True):
        for size in ((4, 5), (23, 24), (1, 1), (10, 24)):
            options: dict[str, Any] = dict(interpolation="bilinear", antialias=antialias)
            result = extract_patches(images, box(5, 7, 10, 11), size, backend=backend, **options)
            expected = F.interpolate(crop, size, mode="bilinear", antialias=antialias)
            torch.testing.assert_close(result[0], expected, rtol=0, atol=1e-6)
        same = extract_patches(images, box(5, 7, 10, 11), (10, 11), backend=backend, **options)
        assert_same_bits(same[0], crop.contiguous())
    one = torch.rand(1, 1, 1, 1)  # axes of one pixel, both ways
    wide = extract_patches(one, box(0, 0, 1, 1), 3, interpolation="bilinear", backend=backend)
    assert torch.equal(wide, one[0, 0, 0, 0].expand(1, 1, 1, 3, 3))


@every_backend
def test_06_padding_is_virtual_and_coordinates_may_be_negative(backend: str) -> None:
    images = torch.arange(9.0).reshape(1, 1, 3, 3)

    def cut(mode: str) -> list[list[float]]:
        patch = extract_patches(images, box(-2, -1, 3, 3), padding_mode=mode, backend=backend)
        return patch[0, 0, 0].tolist()

    assert cut("constant") == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert cut("reflect") == [[7, 6, 7], [4, 3, 4], [1, 0, 1]]
    assert cut("edge") == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="at most 2 rows and 2 columns beyond"):
        extract_patches(images, box(-3, 0, 3, 3), padding_mode="reflect", backend=backend)


@every_backend
def test_07_positions_never_round_up_to_the_range(backend: str) -> None:
    """A million words near 2³² among others: a float32 of 2³² - 1 would be 1."""
    coords, _ = sample_coords(2000, 500, 2**31 - 1, 1, seed=0, backend=backend)
    assert int(coords[..., :2].min()) >= 0
    assert 2**31 - 2**14 < int(coords[..., :2].max()) <= 2**31 - 2


@every_backend
def test_08_words_are_32_bits_wide_at_every_counter(backend: str) -> None:
    """Ids and steps beyond 32 bits are split, not cut off and not widened."""
    near = torch.tensor([1, 2**32 + 1, 2**39 + 1])
    draws = [
        sample_coords(3, 1, 2**20, 1, sample_ids=near, seed=1, step=step, backend=backend)[0]
        for step in (0, 2**32, 2**47)
    ]
    assert len({tuple(row) for d in draws for row in d.flatten(1).tolist()}) == 9


@every_backend
def test_09_more_patches_keep_the_first(backend: str) -> None:
    options: dict[str, Any] = dict(scale=(0.1, 1.0), hflip=0.5, seed=2, backend=backend)
    few = sample_coords(4, 3, 64, 8, **options)
    many = sample_coords(4, 50, 64, 8, **options)
    assert all(torch.equal(b[:, :3], a) for a, b in zip(few, many, strict=True))


def test_10_sizes_need_no_logarithm_of_the_machine() -> None:
    """The table of ratios is symmetric and rounded from 40 digits; test_patch_draws draws 10⁶."""
    from fastcontrast.backends.patch_sets import ratio_table

    rows, columns = ratio_table(0.5, 2.0, torch.device("cpu")).factors
    assert torch.equal(rows, columns.flip(0))
    assert bool((columns[1:] > columns[:-1]).all())
    expected = 2 ** ((torch.arange(1024.0, dtype=torch.float64) + 0.5) / 1024 - 0.5)
    assert float((columns.double() / 2**24 - expected).abs().max()) <= 2**-25 + 1e-15


def test_11_modules_advance_and_functions_do_not() -> None:
    images = torch.rand(2, 1, 64, 64)
    module = RandomPatches(3, 8, seed=1)
    assert not torch.equal(module(images).coords, module(images).coords)
    calls = [random_patches(images, 3, 8, seed=1).coords for _ in range(2)]
    assert torch.equal(*calls)
    two = [RandomPatches(3, 8)(images).coords for _ in range(2)]
    assert not torch.equal(*two)


@every_backend
def test_12_the_patches_of_ranks_do_not_depend_on_their_number(backend: str) -> None:
    images = torch.rand(12, 1, 32, 32)
    one = random_patches(images, 2, 8, seed=4, backend=backend).data
    for world in (2, 3, 4):
        ids = [torch.arange(rank, 12, world) for rank in range(world)]
        parts = [
            random_patches(images[i], 2, 8, seed=4, sample_ids=i, backend=backend).data for i in ids
        ]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), one)


def test_13_checkpointing_cuts_the_same_patches_again() -> None:
    """Boxes are drawn outside and passed in: the second forward pass is the first."""
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    crop = RandomPatches(3, 8, seed=0)
    patches = crop(images.detach())

    def encode(x: Tensor) -> Tensor:
        return extract_patches(x, patches.coords, 8).square().sum()

    again = torch.utils.checkpoint.checkpoint(encode, images, use_reentrant=False)
    (grad,) = torch.autograd.grad(again, images)
    (expected,) = torch.autograd.grad(encode(images), images)
    assert torch.equal(grad, expected)
    assert int(crop.step) == 1


def test_14_resume_needs_the_state_dict_alone() -> None:
    images = torch.rand(8, 3, 32, 32)
    ids = torch.arange(100, 108)
    module = MultiCrop([(2, 16, (0.3, 1.0)), (3, 8)])
    module(images)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    whole = module(images, sample_ids=ids)
    torch.manual_seed(123)
    resumed = MultiCrop([(2, 16, (0.3, 1.0)), (3, 8)])
    resumed.load_state_dict(state)
    # With another batch size and another order of ranks.
    parts = []
    for part in (slice(5, 8), slice(0, 5)):
        resumed.load_state_dict(state)
        parts.append(resumed(images[part], sample_ids=ids[part]))
    for i in range(2):
        assert torch.equal(torch.cat([parts[1][i].data, parts[0][i].data]), whole[i].data)
