"""InfoNCE forward and backward, mean reduction, positive on the diagonal: ours beside its peers.

The control is four GEMMs of equal size (X·Yᵀ twice, G·Y, Gᵀ·X: 8MND operations), what a loss that
recomputes its scores contains; gradients in the forward pass need 6MND, so the limit is 1.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast

SIZES = [(4096, 64), (4096, 128), (4096, 512)]
SAMPLE = 64  # rows whose loss and gradient are compared with the reference in float64
# Error of a mean of 64 float32 losses and of their gradients, relative; see tests/tolerances.py.
TOLERANCE = {torch.float32: 2e-5}


def eager(metric: str, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    if metric == "l2":
        return F.cross_entropy(-torch.cdist(x, y), target)
    if metric == "sqeuclidean":
        scores = 2 * x @ y.T - x.square().sum(1, keepdim=True) - y.square().sum(1)
        return F.cross_entropy(scores, target)
    return F.cross_entropy(x @ y.T, target)


def chunked(metric: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Torch's own chunked op, which takes dot products, and squared distances through a bias."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions") or metric == "l2":
        return None
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        if metric == "dot":
            return F.linear_cross_entropy(x, y, target, options=options)
        bias = -y.square().sum(1)
        return F.linear_cross_entropy(2 * x, y, target, linear_bias=bias, options=options)

    return loss


def assert_agrees(metric: str, x: Tensor, y: Tensor) -> None:
    """Loss and gradient of the first rows against the reference in float64."""
    rows = x[:SAMPLE].detach()
    results = []
    for dtype, backend in ((x.dtype, None), (torch.float64, "reference")):
        a = rows.to(dtype).requires_grad_()
        loss = fastcontrast.info_nce_loss(a, y.detach().to(dtype), metric=metric, backend=backend)
        results.append((loss.double(), *[g.double() for g in torch.autograd.grad(loss, a)]))
    for mine, true in zip(*results, strict=True):
        assert (mine - true).norm() <= TOLERANCE[x.dtype] * true.norm()


def backward_of(
    loss: Callable[..., Tensor], x: Tensor, y: Tensor, *rest: Any
) -> Callable[[], None]:
    def run() -> None:
        x.grad = y.grad = None
        loss(x, y, *rest).backward()

    return run


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_info_nce(rows: int, dim: int, metric: str, race: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, dim, generator=generator).div_(dim**0.25).requires_grad_()
        for _ in range(2)
    )
    target = torch.arange(rows)
    assert_agrees(metric, x, y)

    def gemms() -> None:
        with torch.no_grad():
            x @ y.T
            g = x @ y.T
            g @ y
            g.T @ x

    compiled = torch.compile(lambda x, y, t: eager(metric, x, y, t))
    peers = {
        "GEMMs": gemms,
        "torch eager": backward_of(lambda x, y: eager(metric, x, y, target), x, y),
        "torch.compile": backward_of(compiled, x, y, target),
    }
    peer = chunked(metric)
    if peer is not None:
        peers["torch linear_cross_entropy"] = backward_of(peer, x, y, target)
    ours = backward_of(lambda x, y: fastcontrast.info_nce_loss(x, y, metric=metric), x, y)
    race(f"{metric}, M = N = {rows}, D = {dim}, float32", ours, peers)
