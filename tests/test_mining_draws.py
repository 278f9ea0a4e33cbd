"""Triplets drawn at random: their distributions, and that (seed, step) decides them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from mining_cases import cloud, farness, listed, same_class
from torch import Tensor

from fastcontrast import mining

# Draws: shares of n draws have a standard deviation of sqrt(p (1 - p) / n); five of them are
# passed once in two million. Seeds are fixed, so that it is decided once.
DRAWS = 4000


def assert_drawn_from(drawn: Tensor, p: np.ndarray) -> None:
    share = np.bincount(drawn.numpy(), minlength=len(p)) / len(drawn)
    assert (share[p == 0] == 0).all()
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / len(drawn)) + 1e-12).all()


def by_anchor(found: mining.Triplets, i: int) -> mining.Triplets:
    return mining.Triplets(*(part[found.anchor == i] for part in found))


def sphere_weights(x: Tensor, cutoff: float, limit: float) -> np.ndarray:
    n = x.shape[1]
    d = np.maximum(farness(F.normalize(x), F.normalize(x), "l2"), cutoff)
    inside = np.minimum(d, limit)
    w = inside ** (2.0 - n) * (1 - inside**2 / 4) ** (-(n - 3) / 2)
    return np.where(d < limit, w, 0.0)


@pytest.mark.parametrize("dim", [2, 3, 9])
def test_distance_weighted_draws_have_their_distribution(dim: int) -> None:
    x, labels = torch.randn(11, dim, dtype=torch.float64), torch.arange(11) % 3
    found = mining.distance_weighted_triplets(x, labels, per_anchor=DRAWS, seed=5)
    w = sphere_weights(x, 0.5, 1.4) * ~same_class(labels, labels)
    assert len(found.anchor) == DRAWS * (w.sum(1) > 0).sum()
    for i in found.anchor.unique().tolist():
        part = by_anchor(found, i)
        assert_drawn_from(part.negative, w[i] / w[i].sum())
        positives = (labels == labels[i]).double().numpy()
        positives[i] = 0
        assert_drawn_from(part.positive, positives / positives.sum())
        # Independent draws: of few columns, every pair of positive and negative comes up.
        joint = Counter(zip(part.positive.tolist(), part.negative.tolist(), strict=True))
        likely = np.outer(positives / positives.sum(), w[i] / w[i].sum())
        assert_drawn_from(torch.tensor([p * 11 + n for p, n in joint.elements()]), likely.flatten())


def test_distance_weighted_equals_pytorch_metric_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    miners = peers.peer("pytorch_metric_learning.miners")
    functions = peers.peer("pytorch_metric_learning.utils.loss_and_miner_utils")
    captured = {}
    draw = functions.get_random_triplet_indices

    def captures(labels: Tensor, ref_labels: Tensor, weights: Tensor) -> Any:
        captured["weights"] = weights
        return draw(labels, ref_labels=ref_labels, weights=weights)

    monkeypatch.setattr(functions, "get_random_triplet_indices", captures)
    x, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    miners.DistanceWeightedMiner()(x, labels)
    found = mining.distance_weighted_triplets(x, labels, per_anchor=DRAWS, seed=6)
    for i, p in enumerate(captured["weights"].nan_to_num(0).numpy()):
        assert (p.sum() > 0) == (i in found.anchor)
        if p.sum() > 0:
            assert_drawn_from(by_anchor(found, i).negative, p)


def test_inverse_distance_draws_have_their_distribution() -> None:
    x = torch.tensor([[0.0], [3.0], [0.0], [2.5], [7.0], [7.0], [40.0]])
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    found = mining.inverse_distance_triplets(x, labels, per_anchor=DRAWS, seed=7)
    assert len(found.anchor) == DRAWS * 7
    assert (found.anchor != found.positive).all()
    assert torch.equal(labels[found.anchor], labels[found.positive])
    for i in range(7):
        part = by_anchor(found, i)
        for positive in part.positive.unique().tolist():
            drawn = part.negative[part.positive == positive]
            p = np.zeros(7)
            for c in {0, 1, 2} - {labels[i].item()}:
                columns = [j for j in range(7) if labels[j] == c]
                w = [1 / max(1, np.ceil(abs((x[positive] - x[j]).item()))) for j in columns]
                p[columns] = np.array(w) / sum(w) / 2
            assert_drawn_from(drawn, p)


DRAWN: dict[str, Callable[..., mining.Triplets]] = {
    "distance weighted": mining.distance_weighted_triplets,
    "inverse distance": mining.inverse_distance_triplets,
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_a_function_of_seed_and_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, (x, labels) = DRAWN[name], cloud(40, 5)
    first = draw(x, labels, seed=1, step=3, per_anchor=2)
    assert listed(first) == listed(draw(x, labels, seed=1, step=3, per_anchor=2))
    big = draw(x, labels, seed=2**64 - 1)
    assert listed(big) == listed(draw(x, labels, seed=-1))  # the same 64 bits
    for seed, step in ((2, 3), (1, 4), (1 + 2**32, 3), (1, 3 + 2**32)):
        assert listed(first) != listed(draw(x, labels, seed=seed, step=step, per_anchor=2))
    # More draws keep the first, and blocks of rows change none.
    more = draw(x, labels, seed=1, step=3, per_anchor=5)
    kept = [i * 5 + k for i in range(40) for k in range(2)]
    assert [listed(more)[i] for i in kept] == listed(first)
    monkeypatch.setattr("fastcontrast.mining.draw_triplets.BLOCK_WEIGHTS", 90)
    assert listed(first) == listed(draw(x, labels, seed=1, step=3, per_anchor=2))
    # The anchor among the references is not its own positive.
    own = draw(x, labels, x, labels, own=torch.arange(40), seed=1, step=3, per_anchor=2)
    assert listed(own) == listed(first)
    free = draw(x, labels, x, labels, seed=1, per_anchor=50)
    assert (free.anchor == free.positive).any()
