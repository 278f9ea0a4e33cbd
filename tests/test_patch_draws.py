"""Boxes of random size and boxes that keep their distance: the rule, its limits, its errors."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_philox import chi_square, philox_in_python
from torch import Tensor
from variants import on_every_backend

from fastcontrast import Patches, backends, sample_coords


def box_in_python(
    seed: int, step: int, sample_id: int, k: int, region: tuple[int, int, int, int],
    scale: tuple[float, float], ratio: tuple[float, float], attempt: int = 0,
) -> list[int]:  # fmt: skip
    """A box of random size by docs/patches.md, with Python's integers and 60 digits."""
    y, x, height, width = region
    low, high = (int(share * 2**30) for share in scale)
    with localcontext() as context:
        context.prec = 60
        least, most = (Decimal(r).ln() for r in ratio)
        for t in range(10):
            counter = [
                step & 0xFFFFFFFF, step >> 32 | (16 * attempt + 1 + t) << 16,
                sample_id & 0xFFFFFFFF, sample_id >> 32 | k << 8,
            ]  # fmt: skip
            w = philox_in_python(counter, [seed & 0xFFFFFFFF, seed >> 32])
            share = low + (w[0] * (high - low + 1) >> 32)
            side = math.isqrt(share * height * width)
            root = (least + (most - least) * (2 * (w[1] >> 22) + 1) / 2048).exp().sqrt()
            h = (side * round(2**24 / root) + 2**38) >> 39
            v = (side * round(2**24 * root) + 2**38) >> 39
            if 1 <= h <= height and 1 <= v <= width:
                return [y + (w[2] * (height - h + 1) >> 32), x + (w[3] * (width - v + 1) >> 32),
                        h, v]  # fmt: skip
    h, v = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        v = round(height * ratio[1])
    return [y + (height - h) // 2, x + (width - v) // 2, h, v]


@pytest.mark.parametrize(
    ("image_size", "scale", "ratio"),
    [
        ((96, 96), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((37, 1000), (0.05, 0.4), (0.5, 3.0)),
        ((1000, 20), (0.9, 1.0), (0.5, 2.0)),  # hardly ever fits: the largest centred box
        ((65535, 65535), (2**-30, 1.0), (1 / 32768, 32768.0)),  # the ends of every integer
        ((1, 1), (1.0, 1.0), (1.0, 1.0)),
    ],
)
@on_every_backend("extract_patches")
def test_random_sizes_follow_the_document(
    backend: str, image_size: tuple[int, int], scale: Any, ratio: Any
) -> None:
    ids = torch.tensor([0, 5, 2**32 + 7, 2**40 - 1])
    seed, step = 2**64 - 12345, 2**47 + 3
    coords, _ = sample_coords(
        4, 12, image_size, 8, scale=scale, ratio=ratio, seed=seed, step=step, sample_ids=ids,
        backend=backend,
    )  # fmt: skip
    region = (0, 0, *image_size)
    expected = [
        [box_in_python(seed, step, i, k, region, scale, ratio) for k in range(12)]
        for i in ids.tolist()
    ]
    assert coords.tolist() == expected


def test_backends_agree_over_a_million_draws() -> None:
    """Trap 10: no machine's exp, log or sqrt decides a pixel."""
    names = backends.available_backends("extract_patches")
    for part in range(4):
        ids = torch.arange(part * 2000, part * 2000 + 2000) * 137438953
        drawn = [
            sample_coords(
                2000,
                125,
                (480, 641),
                32,
                scale=(0.05, 1.0),
                hflip=0.5,
                seed=part,
                step=part,
                sample_ids=ids,
                backend=name,
            )
            for name in names
        ]
        for coords, flips in drawn[1:]:
            assert torch.equal(coords, drawn[0][0])
            assert torch.equal(flips, drawn[0][1])


@on_every_backend("extract_patches")
def test_areas_and_ratios_are_distributed_as_asked(backend: str) -> None:
    """Uniform area and log-uniform ratio, chi-square over 10 bins at a fixed seed."""
    coords, _ = sample_coords(
        1000, 20, (900, 900), 8, scale=(0.1, 0.5), ratio=(0.5, 2.0), seed=1, backend=backend
    )
    h, w = coords[..., 2].double().flatten(), coords[..., 3].double().flatten()
    share = h * w / 900**2
    assert 0.099 < float(share.min()) < 0.101
    assert 0.499 < float(share.max()) < 0.501
    bins = ((share - 0.1) / 0.4 * 10).long().clamp(0, 9)
    assert abs(chi_square(torch.bincount(bins, minlength=10))) < 4
    bins = (((w / h).log2() + 1) / 2 * 10).long().clamp(0, 9)
    assert abs(chi_square(torch.bincount(bins, minlength=10))) < 4
    # Positions are uniform given the size.
    place = (coords[..., 0].flatten() + 0.5) / (900 - h + 1)
    assert abs(chi_square(torch.bincount((place * 10).long().clamp(0, 9), minlength=10))) < 4


def overlap(coords: Tensor) -> Tensor:
    k = coords.shape[1]
    iou = Patches(torch.empty(0), coords, torch.empty(0)).overlap()
    return iou - torch.eye(k)


@pytest.mark.parametrize("scale", [None, (0.02, 0.1)])
@on_every_backend("extract_patches")
def test_constraints_hold_and_keep_the_first_patches(backend: str, scale: Any) -> None:
    options: dict[str, Any] = dict(
        image_size=(96, 90), size=20, scale=scale, hflip=0.5, seed=3, backend=backend
    )
    free, flips = sample_coords(40, 6, **options)
    apart, same_flips = sample_coords(40, 6, max_iou=0.0, **options)
    assert float(overlap(apart).max()) == 0.0
    assert float(overlap(free).max()) > 0.0
    assert torch.equal(flips, same_flips)
    some, _ = sample_coords(40, 6, max_iou=0.25, **options)
    assert 0.0 < float(overlap(some).max()) <= 0.25
    far, _ = sample_coords(40, 4, min_distance=30.5, **options)
    centres = far[..., :2] + far[..., 2:] / 2
    distance = torch.cdist(centres.double(), centres.double()) + 1e9 * torch.eye(4)
    assert float(distance.min()) >= 30.5
    for constrained in (apart, some, far):  # a patch that is in nobody's way stays where it was
        assert torch.equal(constrained[:, 0], free[:, 0])
        assert not torch.equal(constrained, free[:, : constrained.shape[1]])
    assert torch.equal(sample_coords(40, 3, max_iou=0.0, **options)[0], apart[:, :3])
    both, _ = sample_coords(40, 4, min_distance=25, max_iou=0.1, **options)
    assert float(overlap(both).max()) <= 0.1


def test_backends_agree_under_constraints() -> None:
    drawn = [
        sample_coords(64, 6, 80, 20, max_iou=0.05, min_distance=15, seed=8, backend=name)[0]
        for name in backends.available_backends("extract_patches")
    ]
    assert all(torch.equal(coords, drawn[0]) for coords in drawn)


@on_every_backend("extract_patches")
def test_impossible_constraints_name_the_numbers(backend: str) -> None:
    options: dict[str, Any] = dict(image_size=(40, 48), size=20, seed=0, backend=backend)
    with pytest.raises(
        ValueError,
        match=r"patch \d of image \d found no place in 128 attempts: 9 patches of 20x20 pixels in "
        r"an image of 40x48 with an IoU of at most 0 \(max_iou\); ask for fewer",
    ):
        sample_coords(4, 9, max_iou=0, **options)
    with pytest.raises(ValueError, match=r"centres at least 80 pixels apart \(min_distance\)"):
        sample_coords(4, 2, min_distance=80, **options)


@pytest.mark.parametrize("scale", [None, (0.3, 1.0)])
@on_every_backend("extract_patches")
def test_grid_has_one_patch_in_each_cell(backend: str, scale: Any) -> None:
    coords, _ = sample_coords(
        50, 6, (37, 50), (11, 12), grid=(2, 3), scale=scale, seed=0, backend=backend
    )
    for k in range(6):
        row, column = divmod(k, 3)
        y0, y1 = row * 37 // 2, (row + 1) * 37 // 2
        x0, x1 = column * 50 // 3, (column + 1) * 50 // 3
        y, x, h, w = coords[:, k].unbind(-1)
        assert bool(((y >= y0) & (y + h <= y1) & (x >= x0) & (x + w <= x1)).all())
        assert len(set(y.tolist())) > 3
    if scale is not None:
        ids = range(3)
        expected = [box_in_python(0, 0, i, 4, (18, 16, 19, 17), scale, (3 / 4, 4 / 3)) for i in ids]
        assert coords[:3, 4].tolist() == expected


@on_every_backend("extract_patches")
def test_padding_widens_the_range(backend: str) -> None:
    coords, _ = sample_coords(200, 5, (10, 12), (8, 8), padding=(3, 1), seed=0, backend=backend)
    assert (int(coords[..., 0].min()), int(coords[..., 0].max())) == (-3, 5)
    assert (int(coords[..., 1].min()), int(coords[..., 1].max())) == (-1, 5)
    larger, _ = sample_coords(2, 2, 8, 10, padding=1, seed=0, backend=backend)
    assert torch.equal(larger[0, 0], torch.tensor([-1, -1, 10, 10], dtype=torch.int32))


@on_every_backend("extract_patches")
def test_first_patch_continues_the_counter(backend: str) -> None:
    options: dict[str, Any] = dict(
        image_size=64, size=8, scale=(0.1, 0.5), hflip=0.5, seed=5, backend=backend
    )
    whole, flips = sample_coords(6, 9, **options)
    rest, rest_flips = sample_coords(6, 5, first_patch=4, **options)
    assert torch.equal(rest, whole[:, 4:])
    assert torch.equal(rest_flips, flips[:, 4:])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_stay_in_their_region(data: st.DataObject) -> None:
    draw = data.draw
    h, w = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    low = draw(st.floats(1e-6, 1.0))
    ratio = sorted([draw(st.floats(0.01, 100.0)), draw(st.floats(0.01, 100.0))])
    pad, seed = draw(st.integers(0, 5)), draw(st.integers(0, 2**64 - 1))
    results = [
        sample_coords(
            5, 6, (h, w), 3, scale=(low, 1.0), ratio=ratio, padding=pad,
            seed=seed, backend=name,
        )[0]
        for name in backends.available_backends("extract_patches")
    ]  # fmt: skip
    assert all(torch.equal(r, results[0]) for r in results)
    y, x, height, width = results[0].unbind(-1)
    assert bool(((height >= 1) & (width >= 1) & (y >= -pad) & (x >= -pad)).all())
    assert bool(((y + height <= h + pad) & (x + width <= w + pad)).all())


ERRORS = [
    (dict(scale=(0.0, 1.0)), ValueError, r"scale must be two shares .* got \(0.0, 1.0\)"),
    (dict(scale=(0.5, 0.2)), ValueError, "scale must be two shares of the area"),
    (dict(scale=(0.5, 1.5)), ValueError, "scale must be two shares of the area"),
    (dict(scale=0.5), TypeError, "scale must be a pair .* got 0.5"),
    (dict(scale=(0.1, 1), ratio=(2, 1)), ValueError, "ratio must be two widths over heights"),
    (dict(scale=(0.1, 1), ratio=(0, 1)), ValueError, "ratio must be two widths over heights"),
    (dict(scale=(0.1, 1), ratio="ab"), TypeError, "ratio must be a pair"),
    (dict(scale=(0.1, 1), image_size=65536), ValueError, "scale, min_distance and max_iou need"),
    (dict(max_iou=0.5, image_size=65536), ValueError, "need images below 65536 pixels a side"),
    (dict(max_iou=-0.1), ValueError, "max_iou must be from 0 to 1, got -0.1"),
    (dict(max_iou="0"), TypeError, "max_iou must be a number, got str"),
    (dict(min_distance=-1), ValueError, "min_distance must be at least 0 pixels"),
    (dict(min_distance=float("nan")), ValueError, "min_distance must be at least 0 pixels"),
    (dict(min_distance=[1]), TypeError, "min_distance must be a number, got list"),
    (dict(grid=(1, 2)), ValueError, "num_patches must be at most the number of cells .* 1x2, got"),
    (dict(grid=3), ValueError, "grid of 3x3 cells leaves 2 rows of pixels for patches of 4x4"),
    (dict(grid=0), ValueError, "grid must be at least 1x1"),
    (dict(padding=-1), ValueError, "padding must be at least 0, got -1"),
    (dict(padding=1.5), TypeError, "padding must be an int or a pair"),
    (dict(padding=8, padding_mode="reflect"), ValueError, "padding must be smaller than the image"),
    (dict(padding=1, padding_mode="error"), ValueError, "padding_mode must say what lies beyond"),
    (dict(padding_mode="wrap"), ValueError, "padding_mode must be one of error, constant"),
    (dict(size=9, padding=0), ValueError, "patches of 9x9 pixels are larger than images of 8x8"),
    (dict(first_patch=-1), ValueError, "first_patch must be at least 0"),
    (dict(first_patch=2**24 - 2), ValueError, r"first_patch must be .* at most 2\^24"),
    (dict(first_patch=0.0), TypeError, "first_patch must be an int, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong: dict, error: type[Exception], message: str) -> None:
    arguments = dict(batch=2, num_patches=3, image_size=8, size=4, seed=0) | wrong
    with pytest.raises(error, match=message):
        sample_coords(**arguments)
