"""The semi-supervised recipe's parts: network, label split, batches, loss, configuration."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastcontrast.data import mnist_sample
from fastcontrast.train.batches import BYTES, split_labels
from fastcontrast.train.config import SemisupConfig
from fastcontrast.train.models import semisup_network
from fastcontrast.train.semisup import (
    build_model,
    chosen_anchors,
    prepare,
    sample_step,
    semisup_loss,
)


def test_network_is_the_papers():
    model = semisup_network("mnist", 1)
    count = {
        kind: sum(p.numel() for m in model if isinstance(m, kind) for p in m.parameters())
        for kind in (nn.Conv2d, nn.BatchNorm2d)
    }
    assert count == {nn.Conv2d: 134_336, nn.BatchNorm2d: 608}
    sizes, x = [], torch.zeros(2, 1, 28, 28)
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 13, 13), (32, 13, 13), (64, 13, 13), (64, 6, 6), (128, 6, 6)]
    assert x.shape == (2, 128)
    order = [type(layer).__name__ for layer in model]
    assert order[:4] == ["Conv2d", "MaxPool2d", "ReLU", "BatchNorm2d"]
    assert order[4:7] == ["Conv2d", "ReLU", "BatchNorm2d"]


@pytest.mark.parametrize(("width", "parameters"), [(192, 963_648), (96, 714_816)])
def test_the_second_width_of_the_cifar10_network(width, parameters):
    model = build_model(SemisupConfig(second_width=width), "cifar10", 3)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)][3] == width
    kernels = [m.weight for m in model if isinstance(m, nn.Conv2d)]
    assert sum(w.numel() for w in kernels) == parameters
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_pixels_are_normalised_as_the_authors_did():
    pixels = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    assert BYTES.cut(pixels).flatten().tolist() == [-1.0, -0.5, 0.0, 127 / 128]


def test_initial_weights_follow_the_seed_and_leave_global_state_alone():
    state = torch.random.get_rng_state()
    first, again, other = (build_model(SemisupConfig(seed=seed), "mnist", 1) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.fixture(scope="module")
def labels():
    return mnist_sample().train_labels


@pytest.fixture(scope="module")
def split(labels):
    return split_labels(labels, 10, 10, seed=0)


def test_split_is_balanced_and_complete(labels, split):
    assert split.labelled.shape == (10, 10)
    for c, members in enumerate(split.labelled):
        assert (labels.numpy()[members] == c).all()
        assert len(set(members)) == 10
    everything = np.concatenate([split.labelled.ravel(), split.unlabelled])
    np.testing.assert_array_equal(np.sort(everything), np.arange(10_000))


def test_split_follows_the_seed(labels, split):
    again, other = split_labels(labels, 10, 10, seed=0), split_labels(labels, 10, 10, seed=1)
    np.testing.assert_array_equal(split.labelled, again.labelled)
    assert not np.array_equal(split.labelled, other.labelled)


def test_split_refuses_more_labels_than_there_are():
    with pytest.raises(ValueError, match="class 1 has only 3"):
        split_labels(torch.tensor([0, 1] * 3 + [0]), 2, 4, seed=0)
    with pytest.raises(ValueError, match="labels_per_class is 1000; that leaves no image without"):
        prepare(SemisupConfig(labels_per_class=1000))


def test_step_draws_what_the_paper_says(labels, split):
    seen = {"labelled": set(), "unlabelled": set(), "anchors": set()}
    for step in range(200):
        drawn = sample_step(split, 32, seed=0, step=step)
        assert drawn.labelled.shape == drawn.unlabelled.shape == (32,)
        assert labels.numpy()[drawn.anchors].tolist() == list(range(10))  # one of each, in order
        for part, found in seen.items():
            found.update(getattr(drawn, part).tolist())
    labelled = set(split.labelled.ravel().tolist())
    assert seen["labelled"] == labelled  # 6,400 draws of 100 miss none
    assert seen["anchors"] == labelled
    assert seen["unlabelled"].isdisjoint(labelled)
    # 6,400 draws from 9,900 with replacement are expected to find 4,713 different ones.
    assert abs(len(seen["unlabelled"]) - 9900 * (1 - math.exp(-6400 / 9900))) < 150


def test_the_codes_step_draws_one_label_per_class_and_any_image(labels, split):
    unlabelled, coincide = set(), 0
    for step in range(200):
        drawn = sample_step(split, 32, seed=0, step=step, batches="code")
        for part in (drawn.labelled, drawn.anchors):
            assert labels.numpy()[part].tolist() == list(range(10))
        coincide += (drawn.labelled == drawn.anchors).sum()
        unlabelled.update(drawn.unlabelled.tolist())
    assert not unlabelled.isdisjoint(split.labelled.ravel().tolist())  # labelled images included
    assert 140 < coincide < 260  # 2,000 draws, one in ten


def test_step_is_a_function_of_seed_and_step(split):
    def draw(seed, step):
        drawn = sample_step(split, 8, seed, step)
        return np.concatenate([drawn.labelled, drawn.unlabelled, drawn.anchors])

    later = draw(0, 5)
    draw(0, 6)
    np.testing.assert_array_equal(draw(0, 5), later)
    assert not np.array_equal(draw(0, 6), later)
    assert not np.array_equal(draw(1, 5), later)
    assert not np.array_equal(draw(5, 0), later)
    assert len({tuple(draw(0, step)) for step in range(500)}) == 500


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_is_the_equation(squared, weight):
    embeddings = torch.randn(4 + 4 + 3, 5, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([2, 0, 1, 1])
    loss, parts = semisup_loss(
        embeddings, labels, classes=3, squared=squared, unlabelled_weight=weight
    )
    points, anchors = embeddings[:8].numpy(), embeddings[8:].numpy()
    cross_entropy, entropy = [], []
    for i, x in enumerate(points):
        distances = np.array([math.dist(x, z) ** (2 if squared else 1) for z in anchors])
        p = np.exp(-distances) / np.exp(-distances).sum()
        if i < 4:
            cross_entropy.append(-math.log(p[labels[i]]))
        else:
            entropy.append(-(p * np.log(p)).sum())
    expected = np.mean(cross_entropy), np.mean(entropy)
    np.testing.assert_allclose(parts[1:].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(loss, expected[0] + weight * expected[1], rtol=1e-6)
    assert parts[0] == loss


@pytest.mark.parametrize("how", ["nearest", "class-mean"])
def test_chosen_anchors_leave_the_image_itself_out(how):
    x = torch.randn(7, 3, dtype=torch.float64)
    images = torch.randn(8, 3, dtype=torch.float64)  # two classes of four
    own = torch.tensor([-1, 0, 5, -1, 7, 3, 2])
    x[1], x[4] = images[0], images[7]
    found = chosen_anchors(x, images, own, 2, how)
    for i, c in ((i, c) for i in range(7) for c in range(2)):
        rest = images[[j for j in range(4 * c, 4 * c + 4) if j != own[i]]]
        near = rest[(rest - x[i]).norm(dim=1).argmin()]
        # float64 sums of four numbers, in another order
        torch.testing.assert_close(
            found[i, c], near if how == "nearest" else rest.mean(0), rtol=1e-12, atol=1e-12
        )


def test_loss_of_a_constant_embedding_is_the_uniform_guess():
    _, parts = semisup_loss(
        torch.ones(18, 6), torch.arange(4), classes=10, squared=False, unlabelled_weight=1.0
    )
    torch.testing.assert_close(parts, torch.tensor([2 * math.log(10), *[math.log(10)] * 2]))


def test_rate_drops_at_a_half_and_three_quarters_unless_told():
    config = SemisupConfig(steps=80, learning_rate=0.1)
    rates = [config.rates.at(step) for step in (0, 39, 40, 59, 60, 79)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    told = SemisupConfig(steps=90, learning_rate=0.1, lr_drops=(10,))
    np.testing.assert_allclose([told.rates.at(s) for s in (9, 10, 89)], [0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"labels_per_class": 0},
        {"threads": -1},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"unlabelled_weight": math.inf},
        {"anchor_images": 1},
        {"anchors": "nearest", "labels_per_class": 1},
        {"anchors": "class-mean", "labels_per_class": 1},
        {"lr_drops": (5, 5)},
        {"lr_drops": (0,)},
        {"name": "a/b"},
        {"name": ".."},
        {"name": ""},
    ],
    ids=str,
)
def test_configuration_refuses_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SemisupConfig(**wrong)


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        SemisupConfig(resume=True, overwrite=True)
