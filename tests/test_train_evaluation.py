"""Nearest-neighbour evaluation, embedding, and the pictures."""

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from fastcontrast.data import ImageDataset
from fastcontrast.train import plots
from fastcontrast.train.config import SemisupConfig, SpatialConfig
from fastcontrast.train.evaluation import embed, neighbour_errors, pixel_errors, triplet_error
from fastcontrast.train.plots import plot_curve, plot_run, principal_directions
from fastcontrast.train.probes import linear_probe
from fastcontrast.train.runs import RunFolder, append_metrics, save_embeddings
from fastcontrast.train.sheets import confusion


def test_errors_are_fractions_by_k():
    references, labels = torch.tensor([[0.0], [0.1], [0.2], [1.0]]), torch.tensor([0, 0, 0, 1])
    queries, truth = torch.tensor([[0.0], [0.9]]), torch.tensor([0, 1])
    assert neighbour_errors(references, labels, queries, truth, (1, 3)) == {1: 0.0, 3: 0.5}


def test_bytes_are_not_subtracted_as_bytes():
    references = torch.tensor([[[[250]]], [[[5]]]], dtype=torch.uint8)
    queries = torch.tensor([[[[0]]]], dtype=torch.uint8)  # 0 - 5 wraps to 251, 0 - 250 to 6
    labels = torch.tensor([1, 0])
    references, labels = references.repeat(3, 1, 1, 1), labels.repeat(3)
    assert pixel_errors(references, labels, queries, torch.tensor([0])) == {1: 0, 3: 0, 5: 0}
    with pytest.raises(ValueError, match="k must be at most the number of references, 2, got 3"):
        pixel_errors(references[:2], labels[:2], queries, torch.tensor([0]))


def test_embed_uses_evaluation_mode_and_batches_change_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    images = torch.arange(44, dtype=torch.uint8).reshape(11, 1, 2, 2)
    model.train()
    before = model[2].running_mean.clone()
    whole = embed(model, images)
    assert model.training
    assert torch.equal(model[2].running_mean, before)
    assert not whole.requires_grad
    torch.testing.assert_close(embed(model, images, batch_size=3), whole)
    expected = model.eval()((images.float() - 128) / 128)
    torch.testing.assert_close(whole, expected.detach())


def test_principal_directions_of_a_known_cloud():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    points = torch.randn(5000, 4, generator=generator) * torch.tensor([5.0, 2.0, 0.1, 0.1])
    mean, directions, shares = principal_directions(points @ axes.T + 3, 2)
    alignment = (directions.float() * axes[:, :2]).sum(0).abs()
    torch.testing.assert_close(alignment, torch.ones(2), atol=1e-3, rtol=0)
    assert shares == pytest.approx([25 / 29.02, 4 / 29.02], rel=0.05)
    torch.testing.assert_close(mean.float(), torch.full((4,), 3.0), atol=0.3, rtol=0)


def test_pictures_are_drawn_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    run = RunFolder(tmp_path)
    before = {"loss_labelled": 1.0, "loss_unlabelled": 0.0, "loss": 1.0, "learning_rate": 0.1}
    after = {"loss_labelled": 0.01, "loss_unlabelled": 0.5, "loss": 1.0, "learning_rate": 0.01}
    append_metrics(run, {"step": 10, **before})
    append_metrics(run, {"step": 15, "error_1nn": 0.2})
    append_metrics(run, {"step": 20, **after, "error_1nn": 0.1})
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(50, 5, generator=generator), torch.arange(50) % 3
    save_embeddings(
        run.embeddings, test_embeddings=points, test_labels=labels,
        test_predictions=labels.roll(1), labelled_embeddings=points[:6],
        labelled_labels=labels[:6],
    )  # fmt: skip
    images = (torch.rand(50, 3, 8, 8, generator=generator) * 255).byte()
    data = ImageDataset("tiny", images, labels, images, labels, ("a", "b", "c"))
    written = plot_run(run, SemisupConfig(), data)
    assert written == [run.curve, run.embedding, run.confusion, run.neighbours]
    for path in written:
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.02  # not blank
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {p.name for p in (*written, run.metrics, run.embeddings)}


def test_confusion_counts_what_was_taken_for_what():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 2])
    assert confusion(labels, predictions, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("kind", ["softmax", "svm"])
def test_linear_probes_agree_with_scikit_learn(kind):
    linear_model = pytest.importorskip("sklearn.linear_model")
    svm = pytest.importorskip("sklearn.svm")
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(3, 6, generator=generator)
    labels, test_labels = torch.arange(300) % 3, torch.arange(200) % 3
    points = centres[labels] + torch.randn(300, 6, generator=generator)
    test = centres[test_labels] + torch.randn(200, 6, generator=generator)
    probe = linear_probe(points, labels, test, test_labels, kind)
    mean, std = points.mean(0), points.std(0, unbiased=False)
    # mean loss + penalty/2 |w|^2 there is C * sum of losses + 1/2 |w|^2
    strength = 1 / (probe.penalty * len(points))
    if kind == "softmax":
        other = linear_model.LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
    else:
        other = svm.LinearSVC(C=strength, tol=1e-8, max_iter=10000)
    other.fit(((points - mean) / std).numpy(), labels.numpy())
    found = torch.from_numpy(other.predict(((test - mean) / std).numpy()))
    # LinearSVC penalises its bias too: a point or two near a border may differ.
    assert (found != probe.predictions).sum() <= (0 if kind == "softmax" else 3)
    assert probe.error == (probe.predictions != test_labels).double().mean().item()
    assert probe.error < 0.3


def test_triplet_error_counts_ties_as_errors():
    points = torch.tensor([[0.0], [1.0], [2.0], [1.0]])
    triplets = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 3]])
    assert triplet_error(points, triplets) == pytest.approx(2 / 3)


@pytest.mark.parametrize("schedule", ["step", "plateau", "cosine"])
def test_every_stage_is_marked_where_its_own_rate_fell(tmp_path, monkeypatch, schedule):
    """Wherever that was: of a plateau nothing but the metrics says it."""
    drawn, run = {}, RunFolder(tmp_path)
    rates = {"pretraining": [1.0, 1.0, 0.1, 0.1, 0.01], "finetuned": [0.1, 0.009], "baseline": [1]}
    for stage, each in rates.items():
        run.stage(stage).path.mkdir()
        for step, rate in enumerate(each, 1):
            append_metrics(run.stage(stage), {"step": step, "loss": 1.0, "learning_rate": rate})
            append_metrics(run.stage(stage), {"step": step, "error_test": 1.0})
    monkeypatch.setattr(
        plots, "plot_curve", lambda records, drops, title, path: drawn.update({path: drops})
    )
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    data = ImageDataset("tiny", images, torch.arange(2), images, torch.arange(2), ("a", "b"))
    plot_run(run, SpatialConfig(schedule=schedule, lr_drops=(1,)), data)
    marked = {"pretraining": [2, 4], "finetuned": [1], "baseline": []}
    for stage, drops in marked.items():
        assert drawn[run.stage(stage).curve] == ([] if schedule == "cosine" else drops)


def test_no_curve_without_a_loss(tmp_path):
    assert not plot_curve([{"step": 5, "error_1nn": 0.1}], (), "title", tmp_path / "c.png")
    assert not plot_curve([], (), "title", tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []
