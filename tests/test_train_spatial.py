"""The spatial recipe: networks, the contrasted patches, and whole runs on tiny sets."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from data_files import write_pictures, write_stl10
from mnist_files import write_mnist
from runs_of import assert_same_run, stop_after
from torch import nn

from fastcontrast import sample_coords
from fastcontrast.train import contrasts, loop, models, plots, reports, spatial
from fastcontrast.train.config import SpatialConfig
from fastcontrast.train.runs import RunFolder, read_metrics
from fastcontrast.train.spatial import PatchTargets, contrast_patches, train_spatial


@pytest.mark.parametrize(
    ("name", "channels", "side", "cells", "millions"),
    [
        ("mnist", 1, 28, (64, 6, 6), 0.13),
        ("cifar10", 3, 32, (192, 8, 8), 1.37),
        ("stl10", 3, 96, (192, 23, 23), 1.45),
    ],
)
def test_networks_are_the_papers(name, channels, side, cells, millions):
    trunk = models.spatial_trunk(name, channels, 0.01).eval()
    head = models.spatial_head(name, 10, 0.01, 0.0).eval()
    features = trunk(torch.randn(1, channels, side, side))
    assert features.shape[1:] == cells
    assert head(features).shape == (1, 10)
    convolutions = [m for m in (*trunk, *head) if isinstance(m, nn.Conv2d)]
    weights = sum(m.weight.numel() for m in convolutions)
    assert weights / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "blocks", "cells"), [("mnist", 1, (16, 13, 13)), ("stl10", 2, (96, 23, 23))]
)
def test_an_earlier_map_of_a_narrower_network(name, blocks, cells):
    """Trunk and head together are the same layers wherever they are parted."""
    side, channels = (28, 1) if name == "mnist" else (96, 3)
    shapes = []
    for parted in (blocks, 0):
        trunk = models.spatial_trunk(name, channels, 0.01, 0.5, parted).eval()
        head = models.spatial_head(name, 10, 0.01, 0.0, 0.5, parted).eval()
        features = trunk(torch.randn(2, channels, side, side))
        assert parted == 0 or features.shape[1:] == cells
        assert head(features).shape == (2, 10)
        shapes.append([p.shape for p in (*trunk.parameters(), *head.parameters())])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduce", ["flatten", "mean"])
def test_patches_are_contrasted_by_equation_4(size, reduce):
    config = SpatialConfig(patch_size=size, reduce=reduce)
    features = torch.randn(6, 5, 7, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 9, 1, 0, 7, 2])
    loss, _ = contrast_patches(features, PatchTargets(ids, 4), config)
    coords, _ = sample_coords(6, 2, (7, 8), size, seed=config.seed + 1, step=4, sample_ids=ids)
    points = np.empty((2, 6), object)
    for i in range(6):
        for k in range(2):
            y, x, h, w = coords[i, k].tolist()
            patch = features[i, :, y : y + h, x : x + w].detach().numpy()
            points[k, i] = patch.mean((1, 2)) if reduce == "mean" else patch.reshape(-1)
    rows = []
    for i in range(6):
        distances = np.array([np.linalg.norm(points[0, i] - points[1, j]) for j in range(6)])
        rows.append(distances[i] + np.log(np.exp(-distances).sum()))
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-9)
    loss.backward()
    assert 0 < (features.grad != 0).double().mean() < 1  # only the cells in a patch
    flat, _ = contrast_patches(torch.ones(6, 5, 7, 8), PatchTargets(ids, 4), config)
    assert flat.item() == pytest.approx(math.log(6), rel=1e-6)


def test_each_contrast_is_its_equation():
    """Debiased and hard negatives of one batch, and a queue that holds earlier second patches."""
    points = torch.randn(3, 2, 6, 4, dtype=torch.float64)  # steps, patches, images

    def mean_loss(step, change, extra=()):
        rows = []
        for i, anchor in enumerate(points[step, 0]):
            keys = [*points[step, 1], *extra]
            weights = [math.exp(-(anchor - key).norm().item()) for key in keys]
            positive = weights.pop(i)
            rows.append(math.log1p(change(positive, np.array(weights)) / positive))
        return np.mean(rows)

    def loss(step, config, queue=None):
        return contrasts.contrast(*points[step], config, queue)[0].item()

    def debiased(positive, w):
        return len(w) * max(0.0, (w.mean() - 0.05 * positive) / 0.95)

    def hard(positive, w):
        return len(w) * (w**1.5).sum() / (w**0.5).sum()

    for name, change in (("debiased", debiased), ("hard-negative", hard)):
        config = SpatialConfig(contrast=name, tau_plus=0.05, hardness=0.5)
        assert contrasts.queue_of(config) is None
        assert loss(0, config) == pytest.approx(mean_loss(0, change), rel=1e-9)
    config = SpatialConfig(contrast="queue", queue_size=9)
    queue = contrasts.queue_of(config)
    for step, entries in enumerate([[], [0], [0, 1]]):
        past = torch.cat([points[step, 1] for step in entries])[-9:] if entries else ()
        truth = mean_loss(step, lambda _, w: w.sum(), past)
        assert loss(step, config, queue) == pytest.approx(truth, rel=1e-9)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    write_mnist(tmp_path / "data", train=60)
    return SpatialConfig(
        data=str(tmp_path / "data"), out_dir=tmp_path, name="run", device="cpu", threads=1,
        pretraining_steps=3, steps=3, batch_size=8, labels_per_class=2, log_every=1,
        eval_every=2, shift=2, head_dropout=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_stopped_in_any_stage_and_resumed_equals_straight(config, monkeypatch, stop):
    straight = train_spatial(config)
    assert [p.name for p in straight.run.stages] == ["baseline", "finetuned", "pretraining"]
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        part = train_spatial(dataclasses.replace(config, name="part"))
    assert part.interrupted
    assert len(part.figures) < len(straight.figures) == 4
    whole = train_spatial(dataclasses.replace(config, name="part", resume=True))
    assert_same_run(straight.run, whole.run)
    assert straight.figures == whole.figures


@pytest.mark.parametrize("stop", [2, 9])
def test_a_queue_is_part_of_the_checkpoint(config, monkeypatch, stop):
    """Stopped while it fills, and in the second epoch, which begins after 7 steps without it."""
    config = dataclasses.replace(
        config, contrast="queue", queue_size=20, pretraining_steps=10, steps=1, baseline=False
    )
    lengths = []

    def counted(anchors, positives, config, queue):
        lengths.append(len(queue))
        return contrasts.contrast(anchors, positives, config, queue)

    with monkeypatch.context() as patch:
        patch.setattr(spatial, "contrast", counted)
        straight = train_spatial(config)
    assert lengths == [0, 8, 16, 20, 20, 20, 20, 0, 8, 16]
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        train_spatial(dataclasses.replace(config, name="part"))
    (saved,) = (config.out_dir / "part" / "pretraining" / "checkpoint").iterdir()
    assert (saved / "memory.safetensors").is_file()
    whole = train_spatial(dataclasses.replace(config, name="part", resume=True))
    assert_same_run(straight.run, whole.run)


def test_both_networks_start_from_the_same_weights(config):
    """Nothing but spatial contrasting distinguishes them: at rate 0, not even that."""
    config = dataclasses.replace(
        config,
        pretraining_learning_rate=1e-30,
        learning_rate=0.01,
        baseline_learning_rate=0.01,
        weight_decay=0.0,
    )
    result = train_spatial(config)
    losses = [
        [r["loss"] for r in read_metrics(result.run.stage(name)) if "loss" in r]
        for name in ("finetuned", "baseline")
    ]
    # Training mode does not use the running statistics, which pretraining moved.
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        (3, "--pretraining-learning-rate RATE --init-from {run}/pretraining/checkpoint/step-"),
        (6, "--learning-rate RATE --pretraining-steps 0 --init-from {run} --name NAME"),
        (9, "--baseline-learning-rate RATE --name NAME"),
    ],
)
def test_a_nan_in_each_stage_says_which_rate_to_lower(config, monkeypatch, step, advice):
    take, calls = loop.train_step, []

    def lose(*arguments):
        calls.append(None)
        return take(*arguments) * (math.nan if len(calls) == step else 1)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lose)
        with pytest.raises(loop.NonFiniteLossError) as caught:
            train_spatial(config)
    assert advice.format(run=config.out_dir / "run") in str(caught.value)
    if step == 6:  # from the contrasted weights
        lower = {"learning_rate": 0.01, "pretraining_steps": 0, "init_from": str(config.out_dir)}
        lower["init_from"] += "/run"
        assert not train_spatial(dataclasses.replace(config, name="other", **lower)).interrupted


def test_folds_are_trained_on_one_by_one(config, tmp_path):
    write_stl10(tmp_path / "stl")
    result = train_spatial(
        dataclasses.replace(
            config, data=str(tmp_path / "stl"), network="mnist", protocol="folds",
            pretraining_steps=1, steps=1, baseline=False, shift=0,
        )
    )  # fmt: skip
    names = ["finetuned-fold0", "finetuned-fold1", "pretraining"]
    assert [p.name for p in result.run.stages] == names
    figure = result.figures[-1]
    assert "10 labels" in figure.protocol
    assert "mean of 2 folds, deviation" in figure.protocol
    saved = json.loads(result.run.results.read_text())
    assert saved["figures"][-1]["value"] == figure.value
    loaded = reports.load_run(result.run.path)
    assert loaded.source.parent.parent.name == "finetuned-fold0"
    figures = reports.evaluate_run(loaded)
    assert all(f.protocol.endswith(", fold 0 of 2 alone") for f in figures)


def test_patches_of_images_and_folders_of_pictures(config, tmp_path):
    """The same command on one's own pictures, with the patches cut from them."""
    write_pictures(tmp_path / "pictures", split=False)
    result = train_spatial(
        dataclasses.replace(
            config, data=str(tmp_path / "pictures"), patches="images", patch_size=20,
            mirror=True, min_offset=2.0, network="mnist", pretraining_steps=2, steps=1,
        )
    )  # fmt: skip
    losses = [r["loss"] for r in read_metrics(result.run.stage("pretraining"))]
    assert all(0 < loss < 20 for loss in losses)
    assert not result.interrupted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 7}, "patch_size is 7; there are 6 cells a side"),
        ({"patches": "images", "patch_size": 29}, "there are 28 pixels a side"),
        ({"protocol": "folds"}, "mnist has none"),
        ({"labels_per_class": 7}, "class 0 has only 6 images"),
        ({"batch_size": 61}, "there are 60 images"),
        ({"network": "stl10", "dataset": "cifar10"}, "CIFAR-10"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(config, change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        spatial.prepare(dataclasses.replace(config, **change))
    assert not RunFolder(config.out_dir / "run").path.exists()
