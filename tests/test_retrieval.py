"""Retrieval figures against loops over their definitions, scikit-learn, and each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast as fc
from fastcontrast import retrieval


def ranking(queries: Tensor, references: Tensor | None, i: int) -> list[int]:
    """References of query i in the documented order, by plain Python."""
    points = queries if references is None else references
    d2 = [sum((a - b) ** 2 for a, b in zip(r, queries[i].tolist(), strict=True))
          for r in points.tolist()]  # fmt: skip
    return sorted(
        (j for j in range(len(d2)) if references is not None or j != i), key=lambda j: (d2[j], j)
    )


def labelled(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on a grid, so that distances tie, with labels of which some have one member only."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.integers(0, 4, (rows, 2)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, classes, rows))
    labels[0] = classes + 5
    return x, labels


CASES = {
    "among themselves": (*labelled(40, 6, 0), None, None),
    "many classes": (*labelled(30, 25, 1), None, None),
    "references": (*labelled(25, 5, 2), *labelled(37, 5, 3)),
    "a label without references": (*labelled(9, 9, 4), *labelled(4, 3, 5)),
}


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
@pytest.mark.parametrize("name", CASES)
def test_recall_and_map_at_r_are_their_definitions(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_NEIGHBORS", block)
    queries, labels, references, reference_labels = CASES[name]
    names = (labels if reference_labels is None else reference_labels).tolist()
    recalls: dict[int, list[bool]] = {1: [], 2: [], 5: [], 60: []}
    averages = []
    for i, label in enumerate(labels.tolist()):
        matches = [names[j] == label for j in ranking(queries, references, i)]
        r = sum(matches)
        if r == 0:
            continue
        for k in recalls:
            recalls[k].append(any(matches[:k]))
        averages.append(sum(sum(matches[: n + 1]) / (n + 1) for n in range(r) if matches[n]) / r)
    found = fc.recall_at_k(queries, labels, references, reference_labels, k=tuple(recalls))
    assert found == pytest.approx({k: np.mean(hits) for k, hits in recalls.items()})
    assert found[60] == 1.0
    value = fc.mean_average_precision_at_r(queries, labels, references, reference_labels)
    assert value == pytest.approx(np.mean(averages))


def test_figures_of_a_perfect_and_of_an_empty_embedding() -> None:
    labels = torch.arange(12) % 3
    x = F.one_hot(labels).float()
    for metric in ("l2", "sqeuclidean", "dot", "cosine"):
        assert fc.recall_at_k(x, labels, metric=metric) == {1: 1.0}
        assert fc.mean_average_precision_at_r(x, labels, metric=metric) == 1.0
    empty, none = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    for arguments in ((empty, none), (x, labels, empty, none), (empty, none, x, labels)):
        assert np.isnan(fc.recall_at_k(*arguments)[1])
        assert np.isnan(fc.mean_average_precision_at_r(*arguments))


def test_neighbors_among_themselves_leave_out_the_query_alone() -> None:
    x = torch.randn(30, 5)
    x[7] = x[3]
    found = fc.nearest_neighbors(x, k=29)
    assert found.indices[3, 0] == 7
    assert found.indices[7, 0] == 3
    for i, row in enumerate(found.indices.tolist()):
        assert sorted([*row, i]) == list(range(30))
    both = fc.nearest_neighbors(x, x, k=2, metric="dot")
    assert torch.equal(both.indices, fc.nearest(x, x, 2, metric="dot").indices)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_votes_equal_a_loop_with_many_ties(k: int) -> None:
    random = np.random.default_rng(k)
    references = torch.from_numpy(random.integers(0, 3, (9, 2))).float()  # most distances tie
    labels = torch.from_numpy(random.integers(0, 4, 9))
    queries = torch.from_numpy(random.integers(0, 3, (60, 2))).float()
    expected = []
    for i in range(60):
        voters = [labels[j].item() for j in ranking(queries, references, i)[:k]]
        votes = Counter(voters)
        expected.append(next(v for v in voters if votes[v] == max(votes.values())))
    assert fc.knn_classify(queries, references, labels, k).tolist() == expected


def test_tied_votes_go_to_the_nearer_voter_and_then_to_the_lower_index() -> None:
    references = torch.tensor([[3.0], [1.0], [2.0], [-1.0]])
    labels = torch.tensor([7, 5, 7, 9])
    query = torch.tensor([[0.0]])
    # Nearest first: index 1 and 3 at distance 1 (lower index first), 2 at 2, 0 at 3.
    assert fc.knn_classify(query, references, labels, 1).item() == 5
    assert fc.knn_classify(query, references, labels, 3).item() == 5  # one vote each: 5, 9, 7
    assert fc.knn_classify(query, references, labels, 4).item() == 7  # two votes


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot", "cosine"])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 1e-6])
def test_weighted_votes(temperature: float, metric: str) -> None:
    references, queries = torch.randn(50, 6), torch.randn(20, 6)
    labels = torch.randint(4, (50,))
    a, b = queries.double(), references.double()
    if metric == "cosine":
        a, b = F.normalize(a), F.normalize(b)
    s = a @ b.T if metric in ("dot", "cosine") else -torch.cdist(a, b)
    s = -s.square() if metric == "sqeuclidean" else s
    top, index = s.topk(9)
    votes = torch.zeros(20, 4, dtype=torch.float64)
    votes.scatter_add_(1, labels[index], ((top - top[:, :1]) / temperature).exp())
    found = fc.knn_classify(queries, references, labels, 9, metric=metric, temperature=temperature)
    assert torch.equal(found, votes.argmax(1))


def test_blocks_change_no_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    references, queries, labels = torch.randn(20, 3), torch.randn(50, 3), torch.arange(20) % 4
    whole = fc.knn_classify(queries, references, labels.int(), 3)
    assert whole.dtype == torch.int32
    monkeypatch.setattr(retrieval, "BLOCK_NEIGHBORS", 40)
    assert torch.equal(fc.knn_classify(queries, references, labels.int(), 3), whole)
    assert fc.knn_classify(queries[:0], references, labels, 3).shape == (0,)


# scikit-learn: brute force, so that its distances are as exact as float64 products allow.


@pytest.mark.parametrize(
    ("metric", "theirs"),
    [("l2", "euclidean"), ("sqeuclidean", "sqeuclidean"), ("cosine", "cosine")],
)
def test_neighbors_equal_scikit_learn(metric: str, theirs: str) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    x, y = torch.randn(60, 8, dtype=torch.float64), torch.randn(300, 8, dtype=torch.float64)
    search = neighbors.NearestNeighbors(n_neighbors=11, algorithm="brute", metric=theirs)
    distances, indices = search.fit(y.numpy()).kneighbors(x.numpy())
    found = fc.nearest_neighbors(x, y, 11, metric=metric)
    assert np.array_equal(found.indices.numpy(), indices)
    values = 1 - found.values if metric == "cosine" else found.values
    np.testing.assert_allclose(values.numpy(), distances, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_classes_equal_scikit_learn(k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    references, queries = torch.randn(200, 4), torch.randn(500, 4)
    labels = (references[:, 0] > 0).long()
    weigh: Any = lambda d: np.exp(-(d - d[:, :1]) / 0.5)  # noqa: E731
    for temperature, weights in ((0.5, weigh), (None, "uniform")):
        theirs = neighbors.KNeighborsClassifier(k, weights=weights, algorithm="brute")
        theirs.fit(references.double().numpy(), labels.numpy())
        share = theirs.predict_proba(queries.double().numpy())[:, 0]
        decided = np.abs(share - 0.5) > 1e-9  # it breaks tied votes by the label
        mine = fc.knn_classify(queries, references, labels, k, temperature=temperature).numpy()
        assert decided.sum() > 400
        assert np.array_equal(mine[decided], (share < 0.5)[decided])


# Alignment and uniformity: sums in float32 over a few hundred terms of one sign.
SUM = 1e-5


@pytest.mark.parametrize("alpha", [1, 2, 3.5])
def test_alignment(alpha: float) -> None:
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    value = fc.alignment(x, y, alpha=alpha)
    truth = (x.double() - y.double()).norm(dim=1).pow(alpha).mean()
    torch.testing.assert_close(value.double(), truth, rtol=SUM, atol=0)
    for mine, true in zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, (x, y)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=SUM, atol=1e-6)
    assert fc.alignment(x, x.detach(), alpha=alpha).item() == 0.0


@pytest.mark.parametrize("t", [0.1, 2.0, 30.0])
def test_uniformity(t: float) -> None:
    x = F.normalize(torch.randn(50, 6)).requires_grad_()
    value = fc.uniformity(x, t=t)
    truth = torch.pdist(x.double()).square().mul(-t).exp().mean().log()
    torch.testing.assert_close(value.double(), truth, rtol=SUM, atol=SUM)
    (mine,), (true,) = torch.autograd.grad(value, x), torch.autograd.grad(truth, x)
    torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4 * true.abs().max().item())
    assert fc.uniformity(torch.ones(5, 3)).item() == pytest.approx(0.0, abs=1e-6)


X, Y = torch.randn(4, 3), torch.randn(6, 3)
LABELS, IDS = torch.arange(4), torch.arange(6)
BAD_CALLS = {
    "labels shape": (lambda: fc.recall_at_k(X, IDS), ValueError, r"labels must have shape \[4\]"),
    "labels type": (lambda: fc.recall_at_k(X, [0] * 4), TypeError, "labels must be an int64"),
    "k alone": (
        lambda: fc.recall_at_k(X, LABELS, k=1),
        TypeError, "k must be a sequence of integers, got the number 1",
    ),
    "k zero": (lambda: fc.recall_at_k(X, LABELS, k=(1, 0)), ValueError, "k must be at least 1"),
    "no reference labels": (
        lambda: fc.mean_average_precision_at_r(X, LABELS, Y), ValueError, "must be given together",
    ),
    "no references": (
        lambda: fc.recall_at_k(X, LABELS, None, IDS), ValueError, "must be given together",
    ),
    "reference labels": (
        lambda: fc.recall_at_k(X, LABELS, Y, LABELS), ValueError,
        r"reference_labels must have shape \[6\]",
    ),
    "3-D queries": (
        lambda: fc.nearest_neighbors(X[None]), ValueError, "queries must have shape",
    ),
    "votes of none": (lambda: fc.knn_classify(X, Y, IDS, 0), ValueError, "k must be at least 1"),
    "too many votes": (
        lambda: fc.knn_classify(X, Y, IDS, 7), ValueError,
        "k must be at most the number of references, 6, got 7",
    ),
    "temperature": (
        lambda: fc.knn_classify(X, Y, IDS, temperature=0.0), ValueError,
        "temperature must be positive",
    ),
    "integer queries": (
        lambda: fc.knn_classify(X.int(), Y, IDS), TypeError, "queries must be float16",
    ),
    "pairs": (lambda: fc.alignment(X, Y), ValueError, "x and y must have the same shape"),
    "alpha": (lambda: fc.alignment(X, X, alpha=-1), ValueError, "alpha must be positive"),
    "t": (lambda: fc.uniformity(X, t=0), ValueError, "t must be positive"),
    "one row": (lambda: fc.uniformity(X[:1]), ValueError, "x must have at least 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
