"""The temporal recipe: folders of sequences, its objectives, and whole runs on tiny sets."""

import dataclasses

import numpy as np
import pytest
import torch
from runs_of import assert_same_run, stop_after
from safetensors.torch import load_file
from torch import nn

from fastcontrast.data import load_sequence_set
from fastcontrast.temporal import NeighborhoodDiscriminator, TemporalPredictionLoss
from fastcontrast.train import plots
from fastcontrast.train.config import TemporalConfig
from fastcontrast.train.loop import Batch, Task, take_gradients
from fastcontrast.train.ranks import Shares
from fastcontrast.train.reports import embed_run, evaluate_run, load_run
from fastcontrast.train.runs import read_metrics
from fastcontrast.train.temporal import (
    EncoderBesideLoss,
    PlacedFrames,
    build_model,
    prepare,
    temporal_loss,
    train_temporal,
)
from fastcontrast.train.temporal_frames import choose_frames, time_error


def write_sequences(folder, *, labelled=True):
    """Six bright bars that move: down (class 0) or sideways (class 1), 12 to 17 frames each."""
    random = np.random.default_rng(0)
    (folder / "labels").mkdir(parents=True)
    for k in range(6):
        frames = random.integers(0, 20, (12 + k, 12, 14), dtype=np.uint8)
        for t, frame in enumerate(frames):
            np.moveaxis(frame, k % 2, 0)[t % 12] += 200
        np.save(folder / f"s{k}.npy", frames)
        if labelled:
            np.save(folder / "labels" / f"s{k}.npy", k % 2)
    return folder


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    return TemporalConfig(
        data=str(write_sequences(tmp_path / "data")), out_dir=tmp_path, name="run", device="cpu",
        threads=1, steps=4, batch_size=4, clip_length=3, window=4, eval_every=2, log_every=1,
    )  # fmt: skip


def test_a_folder_is_split_at_the_last_quarter(tmp_path):
    found = load_sequence_set(write_sequences(tmp_path / "data"))
    assert found.train["s0"].shape == (9, 1, 12, 14)
    assert found.test["s0"].shape == (3, 1, 12, 14)
    assert found.test_labels["s5"].tolist() == [1] * 4
    assert found.class_names == ("0", "1")


def test_splits_and_labels_of_frames_as_given(tmp_path):
    for split in ("train", "test"):
        write_sequences(tmp_path / split)
    given = np.array([2] * 5 + [-1] * 7)
    np.save(tmp_path / "train" / "labels" / "s0.npy", given)
    (tmp_path / "labels.txt").write_text("down\nsideways\nneither\n")
    found = load_sequence_set(tmp_path)
    assert found.train_labels["s0"].tolist() == given.tolist()
    assert found.class_names == ("down", "sideways", "neither")
    frames = choose_frames(found, 10_000)
    assert len(frames.train_images) == sum(range(12, 18)) - 7  # none without a label


def test_channels_are_windows_that_do_not_cross_the_split(tmp_path):
    ticks = np.arange(80, dtype=np.float32)
    np.save(tmp_path / "walk.npy", np.stack([ticks, -ticks], 1))
    found = load_sequence_set(tmp_path, ticks=5)
    train, test = found.train["walk"], found.test["walk"]
    assert train.shape[1:] == (2, 1, 5)
    assert train[3, :, 0].tolist() == [[3, 4, 5, 6, 7], [-3, -4, -5, -6, -7]]
    assert train[-1].max() < test[0, 0].min()
    assert not found.class_names
    frames = choose_frames(found, 10)
    points = frames.test_images[:, 0, 0]
    assert time_error(points, frames, window=3) == 0.0  # nearest are next, 1 or 2 ticks away
    assert time_error(points, frames, window=0) == 1.0


@pytest.mark.parametrize(
    ("array", "labels", "said"),
    [
        (np.zeros((8, 12, 14, 3), np.uint8), 0, "channels before rows"),
        (np.zeros((8, 4, 4, 4), np.float32), 0, "wanted channels"),
        (np.zeros((8, 2), np.float32), 0, "fewer than the 64 of a frame"),
        (np.zeros((8, 12, 14), np.uint8), [0, 1], "wanted one label, or 8"),
        (np.zeros((8, 12, 14), np.uint8), -2, "holds -2"),
        (np.zeros((8, 12, 14), np.uint8), 0.5, "wanted integers"),
        (np.zeros((3, 12, 14), np.uint8), 0, "wanted 4 or more"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, array, labels, said):
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "labels" / "a.npy", labels)
    with pytest.raises(ValueError, match=said) as caught:
        load_sequence_set(tmp_path)
    assert "a.npy" in str(caught.value)


OBJECTIVES = ("contrast", "triplet", "prediction", "neighborhood", "autoencoder")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stopped_and_resumed_equals_straight(config, monkeypatch, objective):
    config = dataclasses.replace(config, objective=objective, predicted=2)
    straight = train_temporal(config)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        part = train_temporal(dataclasses.replace(config, name="part"))
    assert (part.interrupted, part.step) == (True, 3)
    whole = train_temporal(dataclasses.replace(config, name="part", resume=True))
    assert_same_run(straight.run, whole.run)
    assert straight.figures == whole.figures


def test_it_learns_and_is_evaluated_as_it_was(config, tmp_path):
    config = dataclasses.replace(config, steps=40, eval_every=40, log_every=10, clip_stride=1)
    result = train_temporal(config)
    records = [r for r in read_metrics(result.run) if "loss" in r]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    of = {f.name: f for f in result.figures}
    assert "random network" in " ".join(of)
    assert "slow features" in " ".join(of)
    loaded = load_run(result.run.path)
    again = evaluate_run(loaded)
    assert [f.value for f in again] == [of[f"{f.name}, contrast"].value for f in again]
    assert embed_run(loaded, tmp_path / "x.npz")["train_embeddings"][1] == 128


@pytest.mark.parametrize("objective", ["prediction", "neighborhood"])
def test_what_the_loss_learns_is_trained_beside_the_network(config, objective):
    config = dataclasses.replace(config, objective=objective, predicted=2, clip_stride=2)
    result = train_temporal(config)
    (saved,) = result.run.checkpoints.glob("*/model.safetensors")
    weights = load_file(saved)
    before = build_model(prepare(dataclasses.replace(config, name="other"))).state_dict()
    learnt = [name for name in weights if name.startswith("learnt.")]
    assert len(learnt) == (1 if objective == "prediction" else 4)
    assert not any(torch.equal(weights[name], before[name]) for name in learnt)
    assert embed_run(load_run(result.run.path), config.out_dir / "x.npz")["train_embeddings"]


def test_gradients_of_network_and_loss_are_those_of_one_graph():
    model = EncoderBesideLoss(nn.Linear(4, 3), NeighborhoodDiscriminator(3, dropout=0.0))
    images = torch.randn(6, 4)

    def loss(outputs, _):
        value = model.learnt(outputs, outputs.flip(0)).square().mean()
        return value, value.detach()[None]

    task = Task(
        batch_at=lambda step: Batch(images, None), loss=loss, part_names=("loss",),
        shares=Shares(6), evaluate=lambda network: {}, schedule=None, steps=1, learnt=model.learnt,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    take_gradients(model, task.batch_at(0), task, optimizer, lambda part: None, amp=False)
    truth = torch.autograd.grad(loss(model(images), None)[0], list(model.parameters()))
    for parameter, true in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, true)


def test_prediction_takes_the_next_frame_of_a_clip_whatever_its_stride():
    """Of clips whose frames are two apart: the loss of the same clips with times 0, 1, 2."""
    config = TemporalConfig(objective="prediction", predicted=2, clip_length=3, clip_stride=2)
    maps, z = TemporalPredictionLoss(4, 4, 2), torch.randn(6, 4)
    ids, times = torch.arange(6) // 3, torch.arange(6) % 3
    placed = PlacedFrames(ids, 2 * times + 5, 0, z)
    found = temporal_loss(z, placed, config, 2, maps)
    torch.testing.assert_close(found, maps(z, z, ids, times))


def test_channels_without_labels_are_judged_by_time(config, tmp_path):
    folder = tmp_path / "channels"
    folder.mkdir()
    np.save(folder / "walk.npy", np.random.default_rng(0).normal(size=(160, 3)))
    config = dataclasses.replace(config, data=str(folder), ticks=8, window=8, margin=16)
    result = train_temporal(config)
    assert [f.name for f in result.figures] == ["nearest frame in time"]
    with pytest.raises(ValueError, match="no labels"):
        evaluate_run(load_run(result.run.path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"margin": 3}, "margin"),
        ({"temperature": 0.0}, "temperature"),
        ({"objective": "prediction", "predicted": 8}, "predicted is 8; wanted from 1 to clip_l"),
        ({"image_size": 9}, "0: "),
    ],
)
def test_configurations_refuse_by_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        TemporalConfig(**wrong)
