"""Where InfoNCE and its op spend their time: other data, masks, further statistics, small calls.

Forward and backward, mean reduction; the sizes beside other libraries are in loss_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcontrast
from benchmarks import peers
from fastcontrast.ops.softmax_loss import LossWeights, softmax_loss


def backward_of(
    loss: Callable[..., Tensor], x: Tensor, y: Tensor, *rest: Any
) -> Callable[[], None]:
    def run() -> None:
        x.grad = y.grad = None
        loss(x, y, *rest).backward()

    return run


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
    task = peers.Task("one direction", metric)

    def repeated(loss: Callable[..., Tensor]) -> Callable[[], None]:
        run = backward_of(loss, x, y)

        def twenty() -> None:
            for _ in range(20):
                run()

        return twenty

    race(
        f"{metric}, M = N = {rows}, D = 64, 20 calls",
        repeated(peers.ours(task)),
        {"torch eager": repeated(peers.eager(task))},
        control="torch eager",
    )
