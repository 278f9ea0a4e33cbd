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
from torch import Tensor

import fastcontrast
from benchmarks import peers
from fastcontrast.backends import native
from fastcontrast.ops.softmax_loss import LossWeights, softmax_loss

SIZES = [(rows, dim) for rows in (4096, 8192) for dim in (64, 128, 512)]
# Peers that need several M×N matrices run at the smaller size alone.
KEEPING_MATRICES = ("torch eager", "torch checkpoint", "pytorch-metric-learning NCA")
FIRST = ("torch eager", "torch.compile", "torch linear_cross_entropy")  # with bfloat16 inputs
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


def assert_same_job(peer: peers.Loss, metric: str) -> None:
    """A peer computes the same loss and gradients as the reference in float64."""
    x, y = points(256, 32, seed=1)
    exact = [p.detach().double().requires_grad_() for p in (x, y)]
    truth = fastcontrast.info_nce_loss(*exact, metric=metric, backend="reference")
    loss = peer(x, y, torch.arange(256))
    known = [truth, *torch.autograd.grad(truth, exact)]
    for mine, true in zip([loss, *torch.autograd.grad(loss, [x, y])], known, strict=True):
        assert (mine - true).norm() <= 1e-3 * true.norm()  # eager l2 keeps its coarse distances


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

    losses, reasons = peers.available(metric)
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}")
    runs: dict[str, Callable[[], Any]] = {"GEMMs": gemms}
    for name, peer in losses.items():
        if (rows > 4096 and name in KEEPING_MATRICES) or (
            dtype != torch.float32 and name not in FIRST
        ):
            continue
        assert_same_job(peer, metric)
        runs[name] = backward_of(peer, x, y, target)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastcontrast.info_nce_loss(x, y, metric=metric, precision=precision)

    race(f"{metric}, M = N = {rows}, D = {dim}, {kind}", backward_of(loss, x, y), runs)


def points(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, dim, generator=generator).div_(dim**0.25) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_speed_does_not_depend_on_the_data(
    dim: int, metric: str, race: Callable[..., None]
) -> None:
    """Other data, and more to compute, beside the plain case as control."""
    x, y = points(4096, dim)
    a = torch.full((4096,), 1 / 4096)
    rows = torch.arange(4096)

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return fastcontrast.info_nce_loss(x, y, metric=metric, **options)

    def with_entropy(x: Tensor, y: Tensor) -> Tensor:
        weights = LossWeights(a, a)
        return softmax_loss(
            x, y, rows, weights, metric=metric, scale=1.0, precision="auto", backend=None
        )

    large = [(p.detach() * dim**0.25).requires_grad_() for p in (x, y)]  # norm √D
    near = (x.detach() + 1e-3 * torch.randn(4096, dim)).requires_grad_()
    race(
        f"{metric}, M = N = 4096, D = {dim}, random data as control",
        backward_of(loss, x, y),
        {
            "random data": backward_of(loss, x, y),
            "norms of sqrt(D)": backward_of(loss, *large),
            "near positives": backward_of(loss, x, near),
            "with entropy": backward_of(with_entropy, x, y),
            "symmetric": backward_of(lambda x, y: loss(x, y, symmetric=True), x, y),
        },
        control="random data",
    )


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_masks_and_further_statistics(dim: int, race: Callable[..., None]) -> None:
    """The op itself, forward and backward: log-sum-exp alone as control."""
    x, y = points(4096, dim)
    rows = torch.arange(4096)
    ids = rows % 100
    options: dict[str, dict[str, Any]] = {
        "lse": {},
        "with rank": {"threshold": torch.full((4096,), -5.0)},
        "with score sum": {"score_sum": True},
        "exclude": {"exclude": rows},
        "ids": {"keep": "different", "row_ids": ids, "column_ids": ids},
    }

    def lse(**chosen: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: fastcontrast.distance_softmax(x, y, **chosen).lse.mean()

    def with_entropy(x: Tensor, y: Tensor) -> Tensor:
        out = fastcontrast.distance_softmax(x, y)
        return (out.lse + out.entropy).mean()

    runs = {name: backward_of(lse(**chosen), x, y) for name, chosen in options.items()}
    runs["with entropy"] = backward_of(with_entropy, x, y)
    race(f"statistics of l2, M = N = 4096, D = {dim}", backward_of(lse(), x, y), runs, "lse")


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_small(rows: int, metric: str, race: Callable[..., None]) -> None:
    """Where the call itself is the cost: 20 calls a round, eager as control."""
    x, y = points(rows, 64)
    target = torch.arange(rows)
    peer = peers.eager("dot" if metric == "cosine" else metric)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        if metric == "cosine":
            x, y = (torch.nn.functional.normalize(p, dim=1) for p in (x, y))
        return peer(x, y, target)

    def repeated(loss: Callable[..., Tensor]) -> Callable[[], None]:
        run = backward_of(loss, x, y)

        def twenty() -> None:
            for _ in range(20):
                run()

        return twenty

    race(
        f"{metric}, M = N = {rows}, D = 64, 20 calls",
        repeated(lambda x, y: fastcontrast.info_nce_loss(x, y, metric=metric)),
        {"torch eager": repeated(eager)},
        control="torch eager",
    )
