"""InfoNCE forward and backward, mean reduction, positive on the diagonal: ours beside its peers.

The control is four GEMMs of equal size (X·Yᵀ twice, G·Y, Gᵀ·X: 8MND operations), what a loss that
recomputes its scores contains; gradients in the forward pass need 6MND, so the limit is 1.33. It is
in the dtype of the inputs: of bfloat16 inputs torch rounds the products to bfloat16, ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast
from fastcontrast.backends import native

SIZES = [(4096, 64), (4096, 128), (4096, 512)]
# Units on which fastcontrast/backends/native/products.py takes three products for one.
THREEFOLD_UNITS = ("amx",)
SAMPLE = 64  # rows whose loss and gradient are compared with the reference in float64
# What is multiplied: inputs' dtype and precision, and the relative error allowed to a mean of 64
# losses and its gradients (see tests/tolerances.py; gradients of bfloat16 are rounded to it).
KINDS = {
    "float32": (torch.float32, "ieee", 2e-5),
    "bfloat16": (torch.bfloat16, "auto", 4e-3),
    "float32 as bf16x3": (torch.float32, "bf16x3", 1e-4),
}


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


def assert_agrees(kind: str, metric: str, x: Tensor, y: Tensor) -> None:
    """Loss and gradient of the first rows against the reference in float64."""
    _, precision, tolerance = KINDS[kind]
    rows = x[:SAMPLE].detach()
    results = []
    for dtype, backend in ((x.dtype, None), (torch.float64, "reference")):
        a = rows.to(dtype).requires_grad_()
        loss = fastcontrast.info_nce_loss(
            a, y.detach().to(dtype), metric=metric, precision=precision, backend=backend
        )
        results.append((loss.double(), *[g.double() for g in torch.autograd.grad(loss, a)]))
    for mine, true in zip(*results, strict=True):
        assert (mine - true).norm() <= tolerance * true.norm()


def backward_of(
    loss: Callable[..., Tensor], x: Tensor, y: Tensor, *rest: Any
) -> Callable[[], None]:
    def run() -> None:
        x.grad = y.grad = None
        loss(x, y, *rest).backward()

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_info_nce(rows: int, dim: int, metric: str, kind: str, race: Callable[..., None]) -> None:
    dtype, precision, _ = KINDS[kind]
    unit = native.build_info().get("active_bf16_unit", "none")
    if precision == "bf16x3" and unit not in THREEFOLD_UNITS:
        pytest.skip(f"three bfloat16 products pay on AMX alone, the unit here is {unit}")
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, dim, generator=generator).div_(dim**0.25).to(dtype).requires_grad_()
        for _ in range(2)
    )
    target = torch.arange(rows)
    assert_agrees(kind, metric, x, y)

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

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastcontrast.info_nce_loss(x, y, metric=metric, precision=precision)

    race(f"{metric}, M = N = {rows}, D = {dim}, {kind}", backward_of(loss, x, y), peers)
