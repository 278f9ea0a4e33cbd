"""Nearest-neighbour evaluation, embedding, and the pictures."""

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from fastcontrast.train.evaluation import embed, neighbour_errors, pixel_errors
from fastcontrast.train.plots import plot_curve, plot_embedding, principal_directions


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
    records = [
        {"step": 10, "loss_labelled": 1.0, "loss_unlabelled": 0.0, "loss": 1.0},
        {"step": 15, "error_1nn": 0.2},
        {"step": 20, "loss_labelled": 0.01, "loss_unlabelled": 0.5, "loss": 1.0, "error_1nn": 0.1},
    ]
    curve, embedding = tmp_path / "curve.png", tmp_path / "embedding.png"
    assert plot_curve(records, 0.3, (12, 99), "title", curve)
    generator = torch.Generator().manual_seed(0)
    points, marks = torch.randn(50, 5, generator=generator), torch.randn(6, 5)
    labels, names = torch.arange(50) % 3, ("a", "b", "c")
    plot_embedding(points, labels, marks, torch.arange(6) % 3, names, "title", embedding)
    for path in (curve, embedding):
        picture = imread(path)
        assert min(picture.shape[:2]) > 500
        assert picture[..., :3].std() > 0.02  # not blank
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "embedding.png"]


def test_no_curve_without_a_loss(tmp_path):
    assert not plot_curve([{"step": 5, "error_1nn": 0.1}], 0.3, (), "title", tmp_path / "c.png")
    assert not plot_curve([], 0.3, (), "title", tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []
