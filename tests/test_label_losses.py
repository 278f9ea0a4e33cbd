"""Losses by class ids, and of pairs, against their equations."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("distance_softmax")
METRICS = ("l2", "sqeuclidean", "cosine", "dot")
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # 2 and 3 have no positive
# Both sides in float64; the oracle's sums are naive.
ORACLE = {"rel": 1e-10, "abs": 1e-11}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def columns_of(i: int, kind: str, x: Tensor, y: Tensor, y_labels: Tensor) -> list[tuple]:
    """(embedding, label) of what row i is compared with."""
    own = list(zip(x.tolist(), LABELS.tolist(), strict=True))
    keys = list(zip(y.tolist(), y_labels.tolist(), strict=True))
    return {"batch": own[:i] + own[i + 1 :], "keys": keys, "queue": own[:i] + own[i + 1 :] + keys}[
        kind
    ]


def arguments_of(kind: str, y: Tensor, y_labels: Tensor) -> dict[str, Any]:
    queue = fc.MemoryQueue(9)
    queue.enqueue(y, y_labels)
    return {"batch": {}, "keys": {"key": y, "key_labels": y_labels}, "queue": {"queue": queue}}[
        kind
    ]


@every_backend
@pytest.mark.parametrize("kind", ["batch", "keys", "queue"])
@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("metric", METRICS)
def test_supcon_is_the_equation(metric: str, form: str, kind: str, backend: str) -> None:
    x, y, y_labels = random(7, 3), random(5, 3), torch.tensor([0, 1, 1, 5, 0])
    truth = []
    for i, row in enumerate(x.tolist()):
        columns = columns_of(i, kind, x, y, y_labels)
        scores = [oracle.score(row, c, metric, 2.0) for c, _ in columns]
        positives = [j for j, (_, label) in enumerate(columns) if label == LABELS[i]]
        truth.append(oracle.supervised_contrast(scores, positives, form))
    options: dict[str, Any] = {
        "form": form, "metric": metric, "temperature": 0.5, "backend": backend,
        **arguments_of(kind, y, y_labels),
    }  # fmt: skip
    rows = fc.supcon_loss(x, LABELS, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    mean = fc.supcon_loss(x, LABELS, **options).item()
    assert mean == pytest.approx(sum(truth) / sum(t != 0 for t in truth), **ORACLE)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fc.supcon_loss(x, LABELS, **options), x)


@every_backend
@pytest.mark.parametrize("kind", ["batch", "keys", "queue"])
@pytest.mark.parametrize("objective", ["nll", "error"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_nca_is_the_equation(metric: str, objective: str, kind: str, backend: str) -> None:
    x, y, y_labels = random(7, 3), random(5, 3), torch.tensor([0, 1, 1, 5, 0])
    truth = []
    for i, row in enumerate(x.tolist()):
        columns = columns_of(i, kind, x, y, y_labels)
        weights = [math.exp(oracle.score(row, c, metric, 2.0)) for c, _ in columns]
        p = sum(w for w, (_, v) in zip(weights, columns, strict=True) if v == LABELS[i])
        p /= sum(weights)
        truth.append(0.0 if p == 0 else -math.log(p) if objective == "nll" else 1 - p)
    options: dict[str, Any] = {
        "objective": objective, "metric": metric, "temperature": 0.5, "backend": backend,
        **arguments_of(kind, y, y_labels),
    }  # fmt: skip
    rows = fc.nca_loss(x, LABELS, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fc.nca_loss(x, LABELS, **options), x)


@every_backend
@pytest.mark.parametrize("loss", [fc.supcon_loss, fc.nca_loss], ids=["supcon", "nca"])
def test_no_row_has_a_positive(loss: Any, backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    temperature = torch.tensor(0.5, requires_grad=True)
    value = loss(x, torch.arange(4), temperature=temperature, backend=backend)
    assert value.item() == 0.0
    for gradient in torch.autograd.grad(value, [x, temperature]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_backend
def test_all_rows_of_one_class(backend: str) -> None:
    """No negative: nothing to tell a class from. Only SupCon's outer form still spreads."""
    x = torch.randn(5, 3, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.int32)
    assert fc.nca_loss(x, labels, backend=backend).item() == 0.0
    inner = fc.supcon_loss(x, labels, form="in", backend=backend)
    assert inner.item() == pytest.approx(math.log(4), rel=1e-6)
    (gradient,) = torch.autograd.grad(inner, x)
    assert gradient.abs().max().item() == 0.0


@every_backend
@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_near_pairs_keep_their_gradient(distance: float, form: str, backend: str) -> None:
    """Softplus of a difference, and near pairs by direct difference: float32 against float64."""
    x = torch.randn(30, 32)
    x = torch.cat([x, x + distance * torch.randn(30, 32)])
    labels = torch.arange(30).repeat(2)

    def gradient(x: Tensor, backend: str) -> Tensor:
        x = x.clone().requires_grad_()
        loss = fc.supcon_loss(x, labels, form=form, metric="l2", temperature=1.0, backend=backend)
        return torch.autograd.grad(loss, x)[0]

    truth = gradient(x.double(), "reference")
    error = (gradient(x, backend) - truth).norm() / truth.norm()
    # The unit vectors of the pairs dominate; their direction comes from direct differences of
    # float32 inputs, which are exact up to eps.
    assert error.item() < 2e-5


@every_backend
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("positive_in_sum", [True, False])
def test_proxy_nca_is_the_equation(positive_in_sum: bool, normalize: bool, backend: str) -> None:
    x, p = random(6, 3), random(4, 3)
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    a, b = x, p
    if normalize:
        a, b = x / x.norm(dim=1, keepdim=True), p / p.norm(dim=1, keepdim=True)
    truth = []
    for i, row in enumerate(a.tolist()):
        s = [oracle.score(row, c, "sqeuclidean", 2.0) for c in b.tolist()]
        own = s[labels[i]]
        if not positive_in_sum:
            s.pop(int(labels[i]))
        truth.append(oracle.log_sum_exp(s) - own)
    options: dict[str, Any] = {
        "normalize": normalize, "positive_in_sum": positive_in_sum, "temperature": 0.5,
        "backend": backend,
    }  # fmt: skip
    rows = fc.proxy_nca_loss(x, labels, p, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    inputs = (x.requires_grad_(), p.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, p: fc.proxy_nca_loss(x, labels, p, **options), inputs)


def test_proxies_are_learnt() -> None:
    module = fc.ProxyNCALoss(4, 3, temperature=0.5)
    module(torch.randn(6, 3), torch.arange(6) % 4).backward()
    assert module.proxies.grad.abs().sum().item() > 0


def test_siamese_contrast_is_the_equation() -> None:
    x, y = random(6, 3), random(6, 3)
    y[4], y[5] = x[4], x[5]  # coincident, of one class and of two
    same = torch.tensor([True, False, True, False, True, False])
    rows = fc.siamese_contrastive_loss(x, y, same, margin=2.0, reduction="none")
    truth = [
        oracle.siamese_contrast(a, b, s, 2.0)
        for a, b, s in zip(x.tolist(), y.tolist(), same.tolist(), strict=True)
    ]
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rows_sum(x, y, same), x)
    assert torch.equal(gradient[4:], torch.zeros(2, 3, dtype=torch.float64))
    apart = (x[:4].detach().requires_grad_(), y[:4])
    assert torch.autograd.gradcheck(lambda x, y: rows_sum(x, y, same[:4]), apart)


def rows_sum(x: Tensor, y: Tensor, same: Tensor) -> Tensor:
    return fc.siamese_contrastive_loss(x, y, same, margin=2.0, reduction="sum")
