"""Losses on `triplet_distances`: equations, parity with torch, gradients, reductions, swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("triplet_distances")

LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": lambda *x, **o: fc.triplet_ratio_loss(*x, objective="mse", **o),
    "nll": lambda *x, **o: fc.triplet_ratio_loss(*x, objective="nll", **o),
    "hinge": lambda *x, **o: fc.triplet_margin_loss(*x, margin=0.8, **o),
    "soft": lambda *x, **o: fc.triplet_margin_loss(*x, margin=None, **o),
    "hinge, swap": lambda *x, **o: fc.triplet_margin_loss(*x, margin=0.8, swap=True, **o),
    "soft, swap": lambda *x, **o: fc.triplet_margin_loss(*x, margin=None, swap=True, **o),
    "squared": lambda *x, **o: fc.triplet_margin_loss(*x, metric="sqeuclidean", **o),
}


def triplets(rows: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(rows, dim, dtype=dtype, requires_grad=True) for _ in range(3)]


@every_backend
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("margin", [0.7, None])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_margin_loss_is_the_equation(
    metric: str, margin: float | None, swap: bool, backend: str
) -> None:
    points = triplets(9, 4)
    loss = fc.triplet_margin_loss(
        *points, margin=margin, metric=metric, swap=swap, reduction="none", backend=backend
    )
    rows = zip(*(x.tolist() for x in points), strict=True)
    truth = [oracle.triplet_margin(a, p, n, margin, metric, swap) for a, p, n in rows]
    # Both in float64 over four columns.
    assert loss.tolist() == pytest.approx(truth, rel=1e-13, abs=1e-14)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("swap", [False, True])
def test_margin_loss_is_torchs_without_its_eps(swap: bool, reduction: str, backend: str) -> None:
    """Also where swapped distances are equal (rows 0, 1) and at the hinge (row 2)."""
    points = triplets(20, 6)
    with torch.no_grad():
        a, p, n = points
        a[0], p[0], n[0] = 1.0, -1.0, torch.tensor([1.0, -1.0] * 3)
        a[1], p[1], n[1] = 0.0, 0.0, 1.0
        a[2], p[2], n[2] = 0.0, 0.0, 0.0
        p[2, 0], n[2, 1] = 1.0, 2.0
    upstream = torch.randn(20, dtype=torch.float64) if reduction == "none" else None
    results = []
    for loss in (
        fc.triplet_margin_loss(
            *points, margin=1.0, swap=swap, reduction=reduction, backend=backend
        ),
        F.triplet_margin_loss(*points, margin=1.0, swap=swap, reduction=reduction, eps=0.0),
    ):
        results.append([loss, *torch.autograd.grad(loss, points, upstream)])
    for mine, theirs in zip(*results, strict=True):
        # Row 1 has a pair at distance 0, whose subgradient is 0 in both.
        torch.testing.assert_close(mine, theirs)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str, reduction: str, backend: str) -> None:
    """First and second derivatives; gradcheck would notice a slope that is not the loss's."""

    def loss(*points: Tensor) -> Tensor:
        return LOSSES[name](*points, reduction=reduction, backend=backend)

    points = triplets(5, 3)
    assert torch.autograd.gradcheck(loss, points)
    assert torch.autograd.gradgradcheck(loss, points)


@every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_create_graph_leaves_first_gradients_as_they_are(name: str, backend: str) -> None:
    """Also for points that are computed from each other."""
    results = []
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for create_graph in (False, True):
        loss = LOSSES[name](x, x.tanh(), 2 * x + 1, backend=backend)
        results.append(torch.autograd.grad(loss, x, create_graph=create_graph)[0])
    torch.testing.assert_close(results[0], results[1].detach())


@every_backend
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_in_other_dtypes(dtype: torch.dtype, name: str, backend: str) -> None:
    points = [x.detach().to(dtype).requires_grad_() for x in triplets(33, 47)]
    exact = [x.detach().double().requires_grad_() for x in points]
    results = []
    for inputs, chosen in ((points, backend), (exact, "reference")):
        loss = LOSSES[name](*inputs, backend=chosen)
        # A loss scaler's factor, which keeps small gradients out of float16's denormals.
        results.append([loss, *torch.autograd.grad(1024 * loss, inputs)])
    mine, truth = results
    assert mine[0].dtype == torch.float32
    assert relative_error(mine[0], truth[0]) < VALUE_FLOOR[dtype]
    for gradient, true in zip(mine[1:], truth[1:], strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, true) < GRADIENT_FLOOR[dtype]


@every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_and_reductions(name: str, backend: str) -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = LOSSES[name](empty, empty, empty, reduction=reduction, backend=backend)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 4)
    points = triplets(7, 3)
    rows = LOSSES[name](*points, reduction="none", backend=backend)
    torch.testing.assert_close(LOSSES[name](*points, backend=backend), rows.mean())
    torch.testing.assert_close(LOSSES[name](*points, reduction="sum", backend=backend), rows.sum())


@every_backend
def test_backward_twice_and_frozen_sides(backend: str) -> None:
    a, p, n = triplets(6, 5)
    loss = fc.triplet_ratio_loss(a, p.detach(), n, backend=backend)
    first = torch.autograd.grad(loss, [a, n], retain_graph=True)
    second = torch.autograd.grad(loss, [a, n])
    full = torch.autograd.grad(fc.triplet_ratio_loss(a, p, n, backend=backend), [a, n])
    for one, two, three in zip(first, second, full, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@every_backend
def test_a_confident_triplet_keeps_its_gradient(backend: str) -> None:
    """1 - d₊ by a sigmoid of its own: at a difference of 30 float32 would round it to 0."""
    a, p = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), 30.0, requires_grad=True)
    loss = fc.triplet_ratio_loss(a, p, torch.zeros(1, 1), backend=backend)
    (gradient,) = torch.autograd.grad(loss, p)
    assert gradient.item() == pytest.approx(2 * torch.sigmoid(torch.tensor(-30.0)).item(), rel=1e-6)


X = torch.randn(4, 3)
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "margin type": ({"margin": "1"}, TypeError, "margin must be a number or None, got str"),
    "margin zero": ({"margin": 0.0}, ValueError, "margin must be positive and finite, or None"),
    "margin NaN": ({"margin": float("nan")}, ValueError, "margin must be positive and finite"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
    "metric": ({"metric": "cosine"}, ValueError, "metric must be one of l2, sqeuclidean"),
    "shape": ({"negative": X[:2]}, ValueError, "anchor and negative must have the same shape"),
    "backend": ({"backend": "cpp"}, ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    change, error, message = BAD_CALLS[name]
    options: dict[str, Any] = {"anchor": X, "positive": X, "negative": X} | change
    with pytest.raises(error, match=message):
        fc.triplet_margin_loss(**options)
