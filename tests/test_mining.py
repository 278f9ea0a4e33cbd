"""Batch-hard and semi-hard triplets against loops, and pytorch-metric-learning's miners."""

from __future__ import annotations

from typing import Any

import numpy as np
import peers
import pytest
import torch
from mining_cases import METRICS, cloud, farness, grid, listed, same_class
from variants import on_every_backend

from fastcontrast import mining
from fastcontrast.mining import triplets as triplets_file


def batch_hard(d: np.ndarray, same: np.ndarray, own: Any) -> list[tuple[int, ...]]:
    """Loops over the definition; of equal distances the lower index."""
    found = []
    for i, row in enumerate(d):
        p = [j for j in range(len(row)) if same[i, j] and j != own(i)]
        n = [j for j in range(len(row)) if not same[i, j]]
        if p and n:
            farthest = max(p, key=lambda j, row=row: (row[j], -j))
            found.append((i, farthest, min(n, key=lambda j, row=row: (row[j], j))))
    return found


def semi_hard(
    d: np.ndarray, same: np.ndarray, own: Any, positive: str, margin: float
) -> list[tuple[int, ...]]:
    found = []
    for i, row in enumerate(d):
        p = [j for j in range(len(row)) if same[i, j] and j != own(i)]
        if p and positive == "nearest":
            p = [min(p, key=lambda j, row=row: (row[j], j))]
        elif p and positive == "farthest":
            p = [max(p, key=lambda j, row=row: (row[j], -j))]
        for j in p:
            n = [k for k in range(len(row)) if not same[i, k] and row[j] < row[k] < row[j] + margin]
            if n:
                found.append((i, j, min(n, key=lambda k, row=row: (row[k], k))))
    return found


@on_every_backend("nearest")
@pytest.mark.parametrize("metric", METRICS)
def test_batch_hard_is_its_definition(backend: str, metric: str) -> None:
    # Cosines of multiples of one vector tie only up to rounding: no grid there.
    x, labels = grid(41, 4, 0)
    x = x if metric != "cosine" else torch.randn(41, 5)
    found = mining.batch_hard_triplets(x, labels, metric=metric, backend=backend)
    d, same = farness(x, x, metric), same_class(labels, labels)
    assert listed(found) == batch_hard(d, same, lambda i: i)
    assert 0 not in found.anchor  # the only one of its class
    y, others = grid(23, 4, 1)
    y = y if metric != "cosine" else torch.randn(23, 5)
    found = mining.batch_hard_triplets(x, labels, y, others, metric=metric, backend=backend)
    expected = batch_hard(farness(x, y, metric), same_class(labels, others), lambda i: -1)
    assert listed(found) == expected
    # The anchors among the references, behind others: XBM's batch in its own memory.
    both, names = torch.cat([y, x]), torch.cat([others, labels])
    own = torch.arange(41) + 23
    found = mining.batch_hard_triplets(
        x, labels, both, names, own=own, metric=metric, backend=backend
    )
    expected = batch_hard(farness(x, both, metric), same_class(labels, names), lambda i: i + 23)
    assert listed(found) == expected


@on_every_backend("nearest")
@pytest.mark.parametrize("positive", ["all", "nearest", "farthest"])
@pytest.mark.parametrize("metric", METRICS)
def test_semi_hard_is_its_definition(
    backend: str, metric: str, positive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplets_file, "CANDIDATES", 3)  # so that some pairs look at all columns
    x, labels = grid(37, 3, 2)
    x = x if metric != "cosine" else torch.randn(37, 4)
    d, same = farness(x, x, metric), same_class(labels, labels)
    for margin in (None, 1.5):
        found = mining.semi_hard_triplets(
            x, labels, positive=positive, margin=margin, metric=metric, backend=backend
        )
        limit = np.inf if margin is None else margin
        assert listed(found) == semi_hard(d, same, lambda i: i, positive, limit)
    y, others = grid(19, 3, 3)
    y = y if metric != "cosine" else torch.randn(19, 4)
    found = mining.semi_hard_triplets(
        x, labels, y, others, positive=positive, metric=metric, backend=backend
    )
    d, same = farness(x, y, metric), same_class(labels, others)
    assert listed(found) == semi_hard(d, same, lambda i: -1, positive, np.inf)


def test_blocks_change_no_semi_hard_triplet(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = grid(60, 3, 4)
    whole = mining.semi_hard_triplets(x, labels)
    for candidates, block in ((1, 1 << 22), (1, 7), (16, 50), (100, 1 << 22)):
        monkeypatch.setattr(triplets_file, "CANDIDATES", candidates)
        monkeypatch.setattr(triplets_file, "CHUNK_ELEMENTS", block)
        assert listed(mining.semi_hard_triplets(x, labels)) == listed(whole)


# pytorch-metric-learning, without normalising: its distances come from a matrix product in
# float64, so that points drawn at random rank alike.


def theirs(name: str, **options: Any) -> Any:
    distances = peers.peer("pytorch_metric_learning.distances")
    kind = getattr(peers.peer("pytorch_metric_learning.miners"), name)
    return kind(distance=distances.LpDistance(normalize_embeddings=False), **options)


def test_batch_hard_equals_pytorch_metric_learning() -> None:
    x, labels = cloud()
    y, others = cloud(50, 7)
    miner = theirs("BatchHardMiner")
    for mine, their in (
        (mining.batch_hard_triplets(x, labels), miner(x, labels)),
        (mining.batch_hard_triplets(x, labels, y, others), miner(x, labels, y, others)),
    ):
        assert listed(mine) == list(zip(*(t.tolist() for t in their), strict=True))
        assert len(mine.anchor) == 70


@pytest.mark.parametrize(("positive", "strategy"), [("nearest", "easy"), ("farthest", "hard")])
def test_semi_hard_equals_pytorch_metric_learning(positive: str, strategy: str) -> None:
    x, labels = cloud()
    miner = theirs("BatchEasyHardMiner", pos_strategy=strategy, neg_strategy="semihard")
    a, p, _, n = miner(x, labels)
    found = mining.semi_hard_triplets(x, labels, positive=positive)
    assert listed(found) == list(zip(a.tolist(), p.tolist(), n.tolist(), strict=True))
    assert len(a) > 10


def test_semi_hard_is_the_hardest_of_all_that_pytorch_metric_learning_lists() -> None:
    x, labels = cloud()
    their = theirs("TripletMarginMiner", margin=0.4, type_of_triplets="semihard")(x, labels)
    d = torch.cdist(x, x)
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for a, p, n in zip(*(t.tolist() for t in their), strict=True):
        best[a, p] = min(best.get((a, p), (np.inf, -1)), (d[a, n].item(), n))
    mine = {(a, p): n for a, p, n in listed(mining.semi_hard_triplets(x, labels, margin=0.4))}
    assert mine == {pair: n for pair, (_, n) in best.items()}
    assert len(mine) > 100
