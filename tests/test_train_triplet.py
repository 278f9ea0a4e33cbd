"""The triplet recipe: networks, draws, losses, and whole runs on a tiny set."""

import dataclasses

import numpy as np
import pytest
import torch
from mnist_files import write_mnist
from runs_of import assert_same_run, stop_after

from fastcontrast.train import plots, triplet
from fastcontrast.train.batches import generator
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.config import TripletConfig
from fastcontrast.train.mined import MinedBatches, classes_of
from fastcontrast.train.models import triplet_network
from fastcontrast.train.runs import read_metrics
from fastcontrast.train.triplet import (
    draw_pairs,
    draw_triplets,
    members_of,
    train_triplet,
    triplet_loss,
)


@pytest.mark.parametrize(
    ("name", "channels", "side", "parameters"),
    [("mnist", 1, 28, 93_184), ("cifar10", 3, 32, 505_088), ("stl10", 3, 96, 505_088)],
)
def test_networks_are_the_papers(name, channels, side, parameters):
    model = triplet_network(name, channels, 0.5).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.randn(2, channels, side, side)
    cells = model[:-2](x)
    assert cells.shape == (2, 128, 1, 1)  # no averaging at the papers' size
    assert model(x).shape == (2, 128)
    assert (model(x) >= 0).all()


def test_triplets_are_uniform_over_classes_and_then_over_images():
    labels = torch.tensor([0] * 90 + [1] * 4 + [2] * 6)  # as uneven as SVHN and more
    members = members_of(labels, 3)
    drawn = draw_triplets(members, 60_000, generator(0, 1))
    anchors, positives, negatives = labels[torch.from_numpy(drawn)].T
    assert (anchors == positives).all()
    assert (anchors != negatives).all()
    assert (drawn[:, 0] != drawn[:, 1]).all()
    # 60,000 draws: a count of 20,000 has a deviation of 115, one of 10,000 of 91; five of them.
    assert (anchors.bincount() - 20_000).abs().max() < 580
    pairs = (anchors * 3 + negatives).bincount(minlength=9).reshape(3, 3)
    assert (pairs[~torch.eye(3, dtype=torch.bool)] - 10_000).abs().max() < 460
    small = drawn[anchors.numpy() == 1, 1]
    assert (np.bincount(small - 90, minlength=4) - len(small) / 4).max() < 320
    assert len(np.unique(drawn[:, 0])) == 100


def test_pairs_are_half_of_one_class():
    labels = torch.arange(40) % 4
    drawn, same = draw_pairs(members_of(labels, 4), 101, generator(0, 1))
    first, second = labels[torch.from_numpy(drawn)].T
    assert same.sum() == 51
    assert ((first == second).numpy() == same).all()


def test_a_class_without_a_pair_is_named():
    with pytest.raises(ValueError, match="class 1 of 2 has 1 images"):
        members_of(torch.tensor([0, 0, 1]), 2)


@pytest.mark.parametrize("objective", ["mse", "nll"])
def test_loss_is_the_equation(objective):
    points = torch.randn(15, 4, dtype=torch.float64)
    loss, parts = triplet_loss(points, objective)
    anchors, positives, negatives = points.numpy().reshape(3, 5, 4)
    near = np.linalg.norm(anchors - positives, axis=1)
    far = np.linalg.norm(anchors - negatives, axis=1)
    share = 1 / (1 + np.exp(far - near))
    expected = (share**2).mean() if objective == "mse" else -np.log(1 - share).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert parts.tolist() == pytest.approx([expected, (near >= far).mean()])
    constant = triplet_loss(torch.ones(6, 3), "mse")[1]
    assert constant.tolist() == [0.25, 1.0]  # nothing to tell apart; ties are errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_mnist(tmp_path_factory.mktemp("data"), train=120))


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    return TripletConfig(
        data=data, out_dir=tmp_path, name="run", device="cpu", threads=1, steps=6, batch_size=8,
        log_every=2, eval_every=2, held_out=0.3, test_triplets=500, schedule="plateau",
        patience=1, ema=0.9,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_and_resumed_equals_straight(config, monkeypatch, stop):
    """Dropout, plateau, average and best checkpoint included; a stop between two evaluations."""
    straight = train_triplet(config)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        part = train_triplet(dataclasses.replace(config, name="part"))
    assert (part.interrupted, part.step) == (True, stop)
    whole = train_triplet(dataclasses.replace(config, name="part", resume=True))
    assert_same_run(straight.run, whole.run)
    assert straight.figures == whole.figures


def test_a_plateau_ends_the_run_and_the_best_is_kept(config, monkeypatch):
    # Test and held-out triplets in turn; 0.5 of the latter lowers the rate, the last 0.3 ends it.
    errors = iter([0.4, 0.3, 0.3, 0.5, 0.3, 0.2, 0.3, 0.3, 0.25])
    monkeypatch.setattr(triplet, "triplet_error", lambda *_: next(errors))
    config = dataclasses.replace(config, steps=100, eval_every=1, log_every=1, plateau_drops=1)
    result = train_triplet(config)
    assert (result.step, result.interrupted) == (4, False)
    rates = [r["learning_rate"] for r in read_metrics(result.run)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])
    assert latest_checkpoint(result.run.checkpoints, "best").name == "best-0000003"
    assert result.figures[0].value == 0.25


@pytest.mark.parametrize(
    "mining", ["semi-hard", "batch-hard", "distance-weighted", "inverse-distance"]
)
def test_mined_triplets_train_and_resume(config, monkeypatch, mining):
    config = dataclasses.replace(config, mining=mining, steps=4)
    straight = train_triplet(config)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train_triplet(dataclasses.replace(config, name="part"))
    whole = train_triplet(dataclasses.replace(config, name="part", resume=True))
    assert_same_run(straight.run, whole.run)
    assert straight.figures == whole.figures


def test_mined_batches_have_as_many_images_as_uniform_triplets():
    labels = torch.arange(120) % 10
    kept = np.arange(3, 120)
    batch = MinedBatches(labels, kept, 8, seed=1).at(5)
    assert len(batch) == 24
    assert batch.min() >= 3
    assert sorted(torch.bincount(labels[batch]).tolist()) == [0, 0, *[3] * 8]


def test_mining_that_cannot_be_is_named(config):
    with pytest.raises(ValueError, match="mining is 'batch-hard'; wanted 'uniform'"):
        dataclasses.replace(config, mining="batch-hard", loss="siamese")
    with pytest.raises(ValueError, match="cuda_graphs is True; wanted False, or mining 'uniform'"):
        dataclasses.replace(config, mining="batch-hard", cuda_graphs=True)
    with pytest.raises(ValueError, match="batch_size is 1"):
        classes_of(3, 2)


def test_siamese_pairs_train_too(config):
    result = train_triplet(
        dataclasses.replace(config, loss="siamese", steps=2, held_out=0.0, schedule="step")
    )
    assert "error_train" not in read_metrics(result.run)[0]
    assert {"linear layer", "linear SVM", "1-NN"} <= {f.name for f in result.figures}


def test_classifiers_of_some_training_images(config, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *a: None)
    config = dataclasses.replace(config, steps=1, classifier_images=25)
    figures = {figure.name: figure for figure in train_triplet(config).figures}
    assert "of 25 training images" in figures["linear layer"].protocol
    drawn = [triplet.classifier_images(dataclasses.replace(config, seed=s), 60) for s in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert len(np.unique(drawn[0])) == 25
    everything = triplet.classifier_images(dataclasses.replace(config, classifier_images=0), 60)
    assert np.array_equal(everything, np.arange(60))


def test_it_learns(config):
    config = dataclasses.replace(
        config, steps=60, batch_size=24, eval_every=60, log_every=20, dropout=0.0, ema=0.0,
        schedule="constant",
    )  # fmt: skip
    result = train_triplet(config)
    records = [r for r in read_metrics(result.run) if "loss" in r]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert next(f for f in result.figures if f.name == "1-NN").value <= 0.2


def test_initial_weights_are_taken_from_a_run(config):
    first = train_triplet(dataclasses.replace(config, steps=2, ema=0.0))
    other = dataclasses.replace(
        config, name="other", init_from=str(first.run.path), ema=0.0, steps=1, learning_rate=1e-30
    )
    second = train_triplet(other)
    weights = [
        (latest_checkpoint(r.run.checkpoints) / "model.safetensors").read_bytes()
        for r in (first, second)
    ]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match="no run with a checkpoint"):
        train_triplet(dataclasses.replace(other, name="third", init_from=str(config.out_dir)))
