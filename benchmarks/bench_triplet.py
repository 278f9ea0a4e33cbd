"""Triplet losses forward and backward, mean reduction: ours beside peers and the memory's limit.

The control copies as many bytes as a loss has to move: three points read in each direction and
three gradients written. Nothing that does not keep the points in cache can be faster.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast

SIZES = [(rows, dim) for rows in (128, 1024, 16384) for dim in (64, 128, 512)]
# Error of a float32 mean of losses and of its gradients, relative; see tests/tolerances.py.
TOLERANCE = 2e-5
MATRICES_MOVED = 9

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_ratio(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    to_positive = torch.linalg.vector_norm(a - p, dim=1)
    to_negative = torch.linalg.vector_norm(a - n, dim=1)
    return torch.sigmoid(to_positive - to_negative).square().mean()


JOBS: dict[str, tuple[Callable[..., Tensor], Loss]] = {
    "ratio": (fastcontrast.triplet_ratio_loss, eager_ratio),
    "margin": (fastcontrast.triplet_margin_loss, F.triplet_margin_loss),
}


def assert_agrees(ours: Callable[..., Tensor], points: list[Tensor]) -> None:
    """Loss and gradients of the whole batch against the reference in float64."""
    exact = [x.detach().double().requires_grad_() for x in points]
    loss, truth = ours(*points), ours(*exact, backend="reference")
    mine = [loss, *torch.autograd.grad(loss, points)]
    for value, true in zip(mine, [truth, *torch.autograd.grad(truth, exact)], strict=True):
        assert (value.double() - true).norm() <= TOLERANCE * true.norm()


def backward_of(loss: Loss, points: list[Tensor], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            for x in points:
                x.grad = None
            loss(*points).backward()

    return run


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_triplets(rows: int, dim: int, job: str, race: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    points = [
        torch.randn(rows, dim, generator=generator).div_(dim**0.25).requires_grad_()
        for _ in range(3)
    ]
    ours, eager = JOBS[job]
    assert_agrees(ours, points)
    # Small calls are timed in groups: a clock's reading would be a part of one.
    repeats = max(1, 16384 // rows)
    source, target = torch.empty(2, MATRICES_MOVED * rows * dim // 2)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    torch._dynamo.reset()
    peers = {
        "copy": copies,
        "torch eager" if job == "ratio" else "F.triplet_margin_loss": backward_of(
            eager, points, repeats
        ),
        "torch.compile": backward_of(torch.compile(eager), points, repeats),
    }
    times = "" if repeats == 1 else f", {repeats} calls"
    name = f"triplet {job}, M = {rows}, D = {dim}, float32{times}"
    race(name, backward_of(ours, points, repeats), peers, control="copy")


@pytest.mark.parametrize(("rows", "dim"), [(128, 128), (1024, 128)])
def test_beside_metric_learning(rows: int, dim: int, race: Callable[..., None]) -> None:
    """It takes the distances of all pairs of rows and picks the triplets' from them."""
    losses, distances, reducers = (
        pytest.importorskip(
            f"pytorch_metric_learning.{part}", reason="pytorch-metric-learning is not installed"
        )
        for part in ("losses", "distances", "reducers")
    )
    module = losses.TripletMarginLoss(
        margin=1.0,
        distance=distances.LpDistance(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )
    index = torch.arange(rows)

    def theirs(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        triplets = (index, index, index + rows)
        return module(a, indices_tuple=triplets, ref_emb=torch.cat([p, n]))

    points = [torch.randn(rows, dim, requires_grad=True) for _ in range(3)]
    ours = fastcontrast.triplet_margin_loss
    torch.testing.assert_close(ours(*points), theirs(*points))
    peers = {"pytorch-metric-learning": backward_of(theirs, points, 8)}
    name = f"triplet margin, M = {rows}, D = {dim}, float32, 8 calls"
    race(name, backward_of(ours, points, 8), peers)
