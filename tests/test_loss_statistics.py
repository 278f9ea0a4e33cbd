"""Figures beside a loss, against the matrix of scores."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("distance_softmax")
METRICS = ("l2", "sqeuclidean", "cosine", "dot")
# Both sides in float64; the oracle's sums are naive.
ORACLE = {"rel": 1e-10, "abs": 1e-11}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores_of(x: Tensor, y: Tensor, metric: str, temperature: float) -> list[list[float]]:
    return [[oracle.score(a, b, metric, 1 / temperature) for b in y.tolist()] for a in x.tolist()]


@every_backend
@pytest.mark.parametrize("kind", ["plain", "hard", "own", "symmetric"])
@pytest.mark.parametrize("metric", METRICS)
def test_statistics_are_those_of_the_score_matrix(metric: str, kind: str, backend: str) -> None:
    x, y = random(6, 4), random(8, 4)
    x[2] = y[3]  # a hit
    target = torch.tensor([1, 2, 3, -100, 5, 7])
    own = random(6, 2, 4)
    names = ("lse", "entropy", "rank", "top1", "recall@2", "recall@5", "alignment", "uniformity")
    arguments: dict[str, Any] = {
        "plain": {}, "hard": {"hardness": 1.0}, "own": {"negatives": own},
        "symmetric": {"symmetric": True},
    }[kind]  # fmt: skip
    options: dict[str, Any] = {"metric": metric, "temperature": 0.5, "backend": backend}
    x.requires_grad_()
    loss, stats = fc.info_nce_loss(x, y, target, return_stats=names, **arguments, **options)
    plain = fc.info_nce_loss(x, y, target, **arguments, **options)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(plain, x)[0])
    x = x.detach()
    ranks, hits, gaps, potentials = [], [], [], []
    unit = F.normalize(x), F.normalize(y), F.normalize(own, dim=2)
    for i, t in enumerate(target.tolist()):
        columns = torch.cat([y, own[i]]) if kind == "own" else y
        (row,) = scores_of(x[i : i + 1], columns, metric, 0.5)
        assert stats.lse[i].item() == pytest.approx(oracle.log_sum_exp(row), **ORACLE)
        assert stats.entropy[i].item() == pytest.approx(oracle.entropy(row), rel=1e-9, abs=1e-10)
        units = torch.cat([unit[1], unit[2][i]]) if kind == "own" else unit[1]
        for j, u in enumerate(units.tolist()):
            if j != t:
                potentials.append(math.exp(-2 * math.dist(unit[0][i].tolist(), u) ** 2))
        if t >= 0:
            ranks.append(sum(s > row[t] for s in row))
            assert stats.rank[i].item() == ranks[-1]
            hits.append(ranks[-1] == 0)
            gaps.append(math.dist(unit[0][i].tolist(), unit[1][t].tolist()) ** 2)
    assert stats.top1.item() == pytest.approx(sum(hits) / 5)
    assert {k: v.item() for k, v in stats.recall.items()} == pytest.approx(
        {k: sum(r < k for r in ranks) / 5 for k in (2, 5)}
    )
    assert stats.alignment.item() == pytest.approx(sum(gaps) / 5, **ORACLE)
    mean = sum(potentials) / len(potentials)
    assert stats.uniformity.item() == pytest.approx(math.log(mean), **ORACLE)
    assert not any(v.requires_grad for v in stats if isinstance(v, Tensor))


def test_only_the_figures_asked_for() -> None:
    loss, stats = fc.spatial_contrasting_loss(random(3, 2), random(3, 2), return_stats=["top1"])
    assert loss.shape == ()
    assert [name for name, value in stats._asdict().items() if value is not None] == ["top1"]


@every_backend
def test_statistics_of_no_rows_and_of_a_lone_row(backend: str) -> None:
    names = ("lse", "entropy", "rank", "top1", "alignment", "uniformity")
    x = torch.randn(1, 3)
    loss, stats = fc.info_nce_loss(x, x, return_stats=names, backend=backend)
    assert loss.item() == stats.entropy.item() == stats.rank.item() == stats.alignment.item() == 0.0
    assert stats.lse.item() == 0.0
    loss, stats = fc.info_nce_loss(x[:0], x, return_stats=names, backend=backend)
    assert loss.item() == 0.0
    assert stats.lse.shape == stats.rank.shape == (0,)
    assert math.isnan(stats.top1.item())
