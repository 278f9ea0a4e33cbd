"""Rule 8 of docs/design.md section 3: double backward is right, or raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, relative_error
from torch import Tensor
from variants import on_every_backend

from fastcontrast import info_nce_loss
from fastcontrast.temporal import temporal_contrasting_loss, temporal_prediction_loss

every_backend = on_every_backend("distance_softmax")


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot", "cosine"])
def test_double_backward_goes_through_the_reference(metric: str, backend: str) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
        return info_nce_loss(x, y, metric=metric, temperature=temperature, backend=backend)

    assert torch.autograd.gradgradcheck(loss, (x, y, temperature))


@every_backend
def test_double_backward_of_the_operator_raises(backend: str) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    lse, *_ = torch.ops.fastcontrast.distance_softmax(
        x,
        x.detach(),
        torch.tensor(1.0),
        "l2",
        None,
        None,
        None,
        "all",
        None,
        False,
        "ieee",
        backend,
    )
    (dx,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward works in eager mode"):
        dx.sum().backward()


DEPENDENT = {
    "independent": lambda x, y: (x, y),
    "the same tensor": lambda x, y: (x, x),
    "keys from queries": lambda x, y: (x, torch.cat([2 * x + 1, y])),
    "queries from keys": lambda x, y: (y.tanh(), y),
}


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot", "cosine"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_create_graph_leaves_first_gradients_as_they_are(
    name: str, metric: str, reduction: str, backend: str
) -> None:
    """A recomputation that walked past its inputs would count shared paths twice."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for create_graph in (False, True):
        query, key = DEPENDENT[name](x, y)
        temperature = 0.5 + query.square().mean()
        loss = info_nce_loss(
            query, key, metric=metric, temperature=temperature, reduction=reduction,
            backend=backend,
        ).sum()  # fmt: skip
        results.append(
            torch.autograd.grad(loss, [x, y], create_graph=create_graph, materialize_grads=True)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.detach())


TEMPORAL: dict[str, Any] = {
    "contrasting": lambda x, y, **o: temporal_contrasting_loss(
        torch.cat([x, y]), torch.arange(12) % 2, torch.arange(12), window=2, margin=3, **o
    ),
    "prediction": lambda x, y, **o: temporal_prediction_loss(
        x, y, torch.arange(5) % 2, torch.arange(5), torch.eye(4).double().expand(2, 4, 4), **o
    ),
}


@every_backend
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", TEMPORAL)
def test_create_graph_of_temporal_losses(name: str, metric: str, backend: str) -> None:
    """A frame is a row, a column and a near frame at once: its gradients stay as they are."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for create_graph in (False, True):
        query, key = x.tanh(), torch.cat([2 * x + 1, y])[: 7 if name == "contrasting" else 5]
        temperature = 0.5 + query.square().mean()
        loss = TEMPORAL[name](query, key, metric=metric, temperature=temperature, backend=backend)
        results.append(
            torch.autograd.grad(loss, [x, y], create_graph=create_graph, materialize_grads=True)
        )
    assert results[0][0].abs().max() > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.detach())


@every_backend
def test_a_gradient_penalty_equals_the_dense_one(backend: str) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 3, dtype=torch.float64)
    penalties = []
    for loss in (
        info_nce_loss(x, y, backend=backend),
        F.cross_entropy(-(x[:, None] - y[None]).square().sum(2).sqrt(), torch.arange(6)),
    ):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*penalties)


@every_backend
def test_double_backward_under_autocast_is_in_full_precision(backend: str) -> None:
    x, y = torch.randn(20, 32, requires_grad=True), torch.randn(20, 32)
    (plain,) = torch.autograd.grad(info_nce_loss(x, y, metric="dot", backend=backend), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce_loss(x, y, metric="dot", backend=backend)
        (graphed,) = torch.autograd.grad(loss, x, create_graph=True)
    assert relative_error(graphed, plain) < GRADIENT_FLOOR[torch.float32]
