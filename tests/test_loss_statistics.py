"""Figures beside a loss, against the matrix of scores."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


NAMES = ("lse", "entropy", "rank", "top1", "recall@2", "alignment", "uniformity")
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # 2 and 3 have no positive
KEY_LABELS = torch.tensor([0, 1, 1, 5, 0])


def check_figures(
    stats: Any, x: Tensor, columns: list[Tensor], positives: list[list[int]], metric: str
) -> None:
    """Figures of rows x against each row's own list of columns, some of them its positives."""
    ranks, gaps, potentials = [], [], []
    for i, row in enumerate(x):
        (s,) = scores_of(row[None], columns[i], metric, 0.5)
        assert stats.lse[i].item() == pytest.approx(oracle.log_sum_exp(s), **ORACLE)
        assert stats.entropy[i].item() == pytest.approx(oracle.entropy(s), rel=1e-9, abs=1e-10)
        own, unit = F.normalize(row, dim=0).tolist(), F.normalize(columns[i]).tolist()
        squared = [math.dist(own, u) ** 2 for u in unit]
        gaps += [squared[j] for j in positives[i]]
        potentials += [math.exp(-2 * d) for j, d in enumerate(squared) if j not in positives[i]]
        if positives[i]:
            best = max(s[j] for j in positives[i])
            rank = sum(v > best for j, v in enumerate(s) if j not in positives[i])
            ranks.append(rank)
        assert stats.rank[i].item() == (ranks[-1] if positives[i] else -1)
    assert stats.top1.item() == pytest.approx(sum(r == 0 for r in ranks) / len(ranks))
    assert stats.recall[2].item() == pytest.approx(sum(r < 2 for r in ranks) / len(ranks))
    assert stats.alignment.item() == pytest.approx(sum(gaps) / len(gaps), **ORACLE)
    mean = sum(potentials) / len(potentials)
    assert stats.uniformity.item() == pytest.approx(math.log(mean), **ORACLE)
    assert not any(v.requires_grad for v in stats if isinstance(v, Tensor))


def with_and_without(loss: Any, *inputs: Tensor, **options: Any) -> Any:
    """The figures; the loss beside them and its gradients are those of the loss alone."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    beside, stats = loss(*inputs, return_stats=NAMES, **options)
    alone = loss(*inputs, **options)
    torch.testing.assert_close(beside, alone)
    for a, b in zip(
        torch.autograd.grad(beside, inputs), torch.autograd.grad(alone, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    return stats


def queue_of(entries: Tensor, labels: Tensor | None = None) -> fc.MemoryQueue:
    queue = fc.MemoryQueue(9)
    queue.enqueue(entries, labels)
    return queue


@every_backend
@pytest.mark.parametrize("kind", ["batch", "keys", "queue"])
@pytest.mark.parametrize(
    ("loss", "metric"),
    [*((fc.supcon_loss, metric) for metric in METRICS), (fc.nca_loss, "sqeuclidean")],
)
def test_figures_of_classes(loss: Any, metric: str, kind: str, backend: str) -> None:
    x, y = random(7, 4), random(5, 4)
    batch, keys = (
        list(zip(points, labels.tolist(), strict=True))
        for points, labels in ((x, LABELS), (y, KEY_LABELS))
    )
    columns, positives = [], []
    for i, label in enumerate(LABELS.tolist()):
        others = batch[:i] + batch[i + 1 :]
        found = {"batch": others, "keys": keys, "queue": others + keys}[kind]
        columns.append(torch.stack([point for point, _ in found]))
        positives.append([j for j, (_, other) in enumerate(found) if other == label])
    options: dict[str, Any] = {"metric": metric, "temperature": 0.5, "backend": backend}
    options |= {"queue": queue_of(y, KEY_LABELS)} if kind == "queue" else {}
    given = (y, KEY_LABELS) if kind == "keys" else ()
    stats = with_and_without(
        lambda x, *key, **o: loss(x, LABELS, *(key and (*key, KEY_LABELS)), **o),
        x, *given[:1], **options,
    )  # fmt: skip
    check_figures(stats, x, columns, positives, metric)
    if kind != "queue":
        recall = fc.recall_at_k(x, LABELS, *given, k=(1, 2), metric=metric)
        assert recall == pytest.approx({1: stats.top1.item(), 2: stats.recall[2].item()})


@every_backend
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("name", ["squared", "distance", "proxies", "proxies without", "clip"])
def test_figures_and_queues_of_other_losses(name: str, with_queue: bool, backend: str) -> None:
    """One column is each row's positive, or none is; entries of a queue are further columns."""
    x, y, more = random(7, 4), random(5, 4), random(3, 4)
    target = torch.tensor([0, 4, -1, 2, -1, 1, 0])
    options: dict[str, Any] = {"backend": backend, "queue": queue_of(more) if with_queue else None}
    metric = "l2" if name == "distance" else "sqeuclidean"
    if name in ("squared", "distance"):
        loss = lambda x, y, **o: fc.metric_embedding_loss(  # noqa: E731
            x, y, target, squared=name == "squared", temperature=0.5, **o
        )
    elif name == "clip":
        x, y, metric, target = x[:5], y, "dot", torch.arange(5)
        loss = lambda x, y, **o: fc.clip_loss(x, y, 2.0, **o)  # noqa: E731
    else:
        target = target.clamp(min=0)
        loss = lambda x, y, **o: fc.proxy_nca_loss(  # noqa: E731
            x, target, y, positive_in_sum=name == "proxies", temperature=0.5, **o
        )
    stats = with_and_without(loss, x, y, **options)
    columns = torch.cat([y, more]) if with_queue else y
    if "proxies" in name:
        x, columns = F.normalize(x), F.normalize(columns)
    positives = [[t] if t >= 0 else [] for t in target.tolist()]
    check_figures(stats, x, [columns] * len(x), positives, metric)
    if with_queue:  # further columns of no class are what further classes are that nobody has
        queue = options.pop("queue")
        if name == "clip":
            both = fc.info_nce_loss(x, y, queue=queue, metric="dot", temperature=0.5)
            both = (both + fc.info_nce_loss(y, x, metric="dot", temperature=0.5)) / 2
        else:
            both = loss(x, torch.cat([y, more]), **options)
        torch.testing.assert_close(loss(x, y, queue=queue, **options), both)


@every_backend
@pytest.mark.parametrize("loss", [fc.supcon_loss, fc.nca_loss], ids=["supcon", "nca"])
def test_figures_where_no_row_has_a_positive(loss: Any, backend: str) -> None:
    x = torch.randn(4, 3)
    value, stats = loss(x, torch.arange(4), return_stats=NAMES, backend=backend)
    assert value.item() == 0.0
    assert stats.rank.tolist() == [-1] * 4
    assert math.isnan(stats.top1.item())
    assert math.isnan(stats.alignment.item())
    _, stats = loss(x, torch.arange(4), x[:0], torch.arange(0), return_stats=NAMES, backend=backend)
    assert stats.lse.tolist() == [-math.inf] * 4
    assert stats.entropy.tolist() == [0.0] * 4


@pytest.mark.parametrize("loss", [fc.supcon_loss, fc.metric_embedding_loss])
def test_figures_under_the_compiler(loss: Any) -> None:
    x, y = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4)
    arguments = (y, LABELS) if loss is fc.metric_embedding_loss else (LABELS,)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (f(x, *arguments, return_stats=NAMES) for f in (loss, compiled))
    torch.testing.assert_close(a.loss, b.loss)
    for name, value in a.stats._asdict().items():
        torch.testing.assert_close(value, getattr(b.stats, name))


LOSSES_WITH_COLUMNS = [
    fc.InfoNCELoss, fc.NTXentLoss, fc.MultipleNegativesRankingLoss, fc.SpatialContrastingLoss,
    fc.ClipLoss, fc.SupConLoss, fc.NCALoss, fc.MetricEmbeddingLoss,
    lambda **o: fc.ProxyNCALoss(4, 3, **o),
]  # fmt: skip


@pytest.mark.parametrize("make", LOSSES_WITH_COLUMNS)
def test_modules_take_a_queue_and_return_figures(make: Any) -> None:
    """Every loss that has columns; triplets and pairs have none."""
    x, y, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    queue = fc.MemoryQueue(9)
    queue.enqueue(torch.randn(6, 3), torch.arange(6))
    kind = type(make())
    arguments: tuple = {
        fc.SupConLoss: (x, labels), fc.NCALoss: (x, labels), fc.ProxyNCALoss: (x, labels),
        fc.MetricEmbeddingLoss: (x, y, labels),
    }.get(kind, (x, y))  # fmt: skip
    torch.manual_seed(0)
    module = make(queue=queue, return_stats=("lse", "top1"))
    loss, stats = module(*arguments)
    assert isinstance(stats, fc.LossStatistics)
    assert not stats.lse.requires_grad
    assert "queue.entries" in module.state_dict()
    torch.manual_seed(0)
    assert not torch.equal(make()(*arguments), loss)  # the entries count
    if kind is not fc.ClipLoss:  # which holds the logarithm of its scale
        module = make(temperature=nn.Parameter(torch.tensor(0.5)))
        module(*arguments).backward()
        assert module.temperature.grad.item() != 0


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
