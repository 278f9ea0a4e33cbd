"""Modules and the torchvision transform: seeds, steps, resume, ranks, and what they return."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastcontrast
from benchmarks import image_libraries
from fastcontrast import MultiCrop, Patches, PatchPair, RandomPatches, random_patches


def images(b: int = 4, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (b, 3, side, side), dtype=torch.uint8)


def test_two_modules_differ_and_manual_seed_repeats_them() -> None:
    """The seed is drawn when a module is made, as weights are."""
    x = images()
    torch.manual_seed(1)
    first, second = RandomPatches(3, 8), RandomPatches(3, 8)
    assert not torch.equal(first(x).coords, second(x).coords)
    torch.manual_seed(1)
    again = RandomPatches(3, 8)
    first.step.zero_()
    assert torch.equal(again(x).coords, first(x).coords)
    # By hand: equal seeds are equal patches, and draw nothing from torch's generator.
    state = torch.get_rng_state()
    equal = [RandomPatches(3, 8, seed=5)(x).coords for _ in range(2)]
    assert torch.equal(*equal)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomPatches(2, 8, scale=(0.1, 0.6), hflip=0.5),
        lambda: MultiCrop([(2, 16, (0.4, 1.0)), (3, 8)], hflip=0.5),
        lambda: PatchPair(8, max_iou=0.3),
    ],
    ids=["RandomPatches", "MultiCrop", "PatchPair"],
)
def test_state_dict_resumes_another_module(make: Any) -> None:
    """A module made anew draws another seed; the saved one replaces it."""
    x = images().float()
    module = make()
    for _ in range(3):
        module(x)
    state = module.state_dict()
    resumed = make()
    assert set(state) == {"seed", "step"}
    resumed.load_state_dict(state)
    for _ in range(2):
        mine, other = tree_leaves(module(x)), tree_leaves(resumed(x))
        assert len(mine) >= 2
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert "seed=" in repr(module)


def test_multi_crop_takes_consecutive_patches() -> None:
    x = images()
    sets = MultiCrop([(2, 32, (0.4, 1.0)), (6, 16, (0.05, 0.4)), (1, 8)], seed=3, mean=0.5)(x)
    assert [p.data.shape[1:] for p in sets] == [(2, 3, 32, 32), (6, 3, 16, 16), (1, 3, 8, 8)]
    for first, patches, scale in ((0, sets[0], (0.4, 1.0)), (2, sets[1], (0.05, 0.4))):
        expected = random_patches(
            x, patches.data.shape[1], patches.data.shape[-1], scale=scale, mean=0.5, seed=3,
            first_patch=first,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(patches, expected, strict=True))
    with pytest.raises(TypeError, match=r"sets must be \(number, size\) or .* got 3"):
        MultiCrop([3])
    with pytest.raises(ValueError, match="scale must be two shares"):
        MultiCrop([(1, 8, (2.0, 3.0))])


def test_patch_pair_of_a_feature_map_trains_what_made_it() -> None:
    layer = torch.nn.Conv2d(3, 8, 3)
    features = layer(torch.rand(6, 3, 20, 20))
    anchors, positives = PatchPair(5, max_iou=0.5, seed=0)(features)
    assert anchors.shape == positives.shape == (6, 8, 5, 5)
    assert not torch.equal(anchors, positives)
    loss = fastcontrast.spatial_contrasting_loss(anchors.mean((2, 3)), positives.mean((2, 3)))
    loss.backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0


def test_module_of_an_index_takes_the_ids_of_the_data_set() -> None:
    x = images(10)
    index = torch.tensor([7, 2, 2])
    module = RandomPatches(2, 8, seed=1)
    patches = module(x, index=index)
    expected = random_patches(x[index], 2, 8, seed=1, sample_ids=index)
    assert all(torch.equal(a, b) for a, b in zip(patches, expected, strict=True))
    assert torch.equal(patches.coords[1], patches.coords[2])


_RANK = """
import os, sys, torch
import torch.distributed as dist
from fastcontrast import RandomPatches, random_patches
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.arange(8 * 3 * 32 * 32).remainder(251).to(torch.uint8).reshape(8, 3, 32, 32)
module = RandomPatches(3, 8, hflip=0.5, scale=(0.1, 0.9), seed=11)
contiguous = [module(x[4 * rank : 4 * rank + 4]).data for _ in range(2)]
ids = torch.arange(rank, 8, 2)
named = module(x[ids], sample_ids=ids).data
gathered = []
for part in (*contiguous, named):
    both = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(both, part)
    gathered.append(both)
if rank == 0:
    alone = []
    for step in range(3):
        alone.append(random_patches(x, 3, 8, hflip=0.5, scale=(0.1, 0.9), seed=11, step=step).data)
    assert torch.equal(torch.cat(gathered[0]), alone[0])
    assert torch.equal(torch.cat(gathered[1]), alone[1])
    assert torch.equal(torch.stack(gathered[2], 1).flatten(0, 1), alone[2])
    assert not torch.equal(gathered[0][0], gathered[0][1])
    print("the same union")
dist.destroy_process_group()
"""


def test_two_ranks_cut_what_one_would(tmp_path: Any) -> None:
    """By default, and with the data set's own numbers, whatever the split."""
    store = tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(store)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "the same union" in outputs[0]


def corners(patches: Patches, format: str) -> list:
    return patches.boxes(format)[0].tolist()


def test_boxes_of_other_libraries() -> None:
    coords = torch.tensor([[[4, 0, 8, 8], [1, 2, 3, 5]]], dtype=torch.int32)
    patches = Patches(torch.zeros(1, 2, 1, 8, 8), coords, torch.zeros(1, 2, dtype=torch.uint8))
    assert corners(patches, "xyxy") == [[0, 4, 8, 12], [2, 1, 7, 4]]
    assert corners(patches, "xywh") == [[0, 4, 8, 8], [2, 1, 5, 3]]
    assert corners(patches, "kornia")[0] == [[0, 4], [7, 4], [7, 11], [0, 11]]
    with pytest.raises(ValueError, match="format must be 'xyxy', 'xywh' or 'kornia', got 'yx'"):
        patches.boxes("yx")
    assert torch.equal(patches.overlap()[0].diag(), torch.ones(2))


def test_overlap_against_loops() -> None:
    coords = random_patches(torch.zeros(3, 1, 30, 30), 5, 9, seed=0).coords
    result = Patches(torch.empty(0), coords, torch.empty(0)).overlap()
    for b in range(3):
        for i in range(5):
            for j in range(5):
                cells = [
                    {(y, x) for y in range(a, a + h) for x in range(c, c + w)}
                    for a, c, h, w in (coords[b, i].tolist(), coords[b, j].tolist())
                ]
                iou = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
                assert abs(float(result[b, i, j]) - iou) < 1e-6


@pytest.fixture(scope="module")
def tv() -> Any:
    reason = image_libraries.why_not("torchvision")
    if reason:
        pytest.skip(reason)
    image_libraries.torchvision()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    return v2, tv_tensors


def test_transform_in_a_pipeline(tv: Any) -> None:
    v2, tv_tensors = tv
    from fastcontrast.transforms import RandomPatches as Transform

    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    mask = torch.arange(40 * 50).reshape(40, 50)
    crop = Transform(4, 12, scale=(0.2, 0.6), hflip=0.5, mean=0.5, std=0.25, return_coords=True)
    pipeline = v2.Compose([v2.RandomHorizontalFlip(0.0), crop])
    (patches, coords), labels, rest = pipeline(
        tv_tensors.Image(picture), tv_tensors.Mask(mask), "name"
    )
    assert isinstance(patches, tv_tensors.Image)
    assert isinstance(labels, tv_tensors.Mask)
    assert rest == "name"
    assert patches.shape == (4, 3, 12, 12)
    assert labels.shape == (4, 12, 12)
    assert labels.dtype == mask.dtype
    # The mask is cut at the same boxes, by the nearest pixel: its numbers name the pixels.
    rows, columns = labels // 50, labels % 50
    for k, (y0, x0, h, w) in enumerate(coords.tolist()):
        assert y0 <= int(rows[k].min()) <= int(rows[k].max()) < y0 + h
        assert x0 <= int(columns[k].min()) <= int(columns[k].max()) < x0 + w
    plain = Transform(2, 8)
    torch.manual_seed(0)
    tensor = plain(picture)
    torch.manual_seed(0)
    assert torch.equal(plain(v2.functional.to_pil_image(picture)), tensor)
    assert pickle.loads(pickle.dumps(plain)).size == (8, 8)
    assert tensor.shape == (2, 3, 8, 8)
    boxes = tv_tensors.BoundingBoxes([[0, 0, 4, 4]], format="XYXY", canvas_size=(40, 50))
    with pytest.raises(TypeError, match="bounding boxes cannot follow patches"):
        plain(tv_tensors.Image(picture), boxes)
    with pytest.raises(ValueError, match="image and mask must be of one size"):
        plain(tv_tensors.Image(picture), tv_tensors.Mask(mask[:20]))
    with pytest.raises(ValueError, match="patches of 41x41 pixels are larger than images of 40x50"):
        Transform(1, 41)(picture)


def test_transform_is_lazy() -> None:
    code = (
        "import sys, fastcontrast, fastcontrast.transforms as t\n"
        "assert 'torchvision' not in sys.modules\n"
        "assert not hasattr(t, 'Nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
