"""Gradients taken in the forward pass: the same as those of the rows, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import operands
from tolerances import (
    DTYPES,
    GRADIENT_FLOOR,
    VALUE_FLOOR,
    assert_within_budget,
    relative_error,
)
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc
from fastcontrast.backends import native

every_backend = on_every_backend("distance_softmax")


def evaluate(
    loss: Any, x: Tensor, y: Tensor, dtype: torch.dtype, backend: str, upstream: float = 1.0
) -> list[Tensor]:
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.9, dtype=accumulator, requires_grad=True)
    value = upstream * loss(x, y, temperature=temperature, backend=backend)
    return [value, *torch.autograd.grad(value, [x, y, temperature])]


def info_nce(metric: str, reduction: str, symmetric: bool = False) -> Any:
    return lambda x, y, **k: fc.info_nce_loss(
        x, y, metric=metric, reduction=reduction, symmetric=symmetric, **k
    )


def embedding(squared: bool) -> Any:
    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        targets = torch.arange(x.shape[0]) % (y.shape[0] + 1) - 1
        return fc.metric_embedding_loss(
            x, y, targets, squared=squared, unlabelled_weight=0.7, **options
        )

    return loss


LOSSES = {
    "l2 mean": info_nce("l2", "mean"),
    "sqeuclidean sum": info_nce("sqeuclidean", "sum"),
    "dot mean": info_nce("dot", "mean"),
    "cosine mean": info_nce("cosine", "mean"),
    "l2 mean symmetric": info_nce("l2", "mean", symmetric=True),
    "sqeuclidean sum symmetric": info_nce("sqeuclidean", "sum", symmetric=True),
    "dot mean symmetric": info_nce("dot", "mean", symmetric=True),
    "embedding squared": embedding(squared=True),
    "embedding": embedding(squared=False),
}


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 7, 1), (5, 17, 15), (67, 131, 50), (513, 2049, 5)]
)
def test_conforms(shape: tuple[int, int, int], name: str, dtype: torch.dtype, backend: str) -> None:
    x, y = operands(shape, dtype)
    truth = evaluate(LOSSES[name], x, y, torch.float64, "reference")
    eager = evaluate(LOSSES[name], x, y, dtype, "reference")
    result = evaluate(LOSSES[name], x, y, dtype, backend)
    assert_within_budget("loss", result[0], truth[0], eager[0], VALUE_FLOOR[dtype])
    for i, gradient in enumerate(("dx", "dy", "dtemperature"), 1):
        assert_within_budget(gradient, result[i], truth[i], eager[i], GRADIENT_FLOOR[dtype])
        assert result[i].dtype == (eager[i].dtype)


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 15), (67, 131, 50)])
def test_small_problems_by_tiles(
    shape: tuple[int, int, int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one call computes for a small problem, tiles and GEMMs compute as well."""
    from fastcontrast.backends.native import distance_softmax as module

    monkeypatch.setattr(module, "SMALL_PRODUCT", 0)
    test_conforms(shape, name, dtype, "native")


@every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_gradients_of_the_rows(name: str, backend: str) -> None:
    """`reduction="none"` recomputes; its sum has the gradients of `reduction="sum"`."""
    x, y = operands((30, 41, 7), torch.float64)
    if "embedding" in name:
        targets = torch.arange(30) % 42 - 1
        options = {"squared": "squared" in name, "backend": backend}

        def loss(reduction: str) -> Tensor:
            return fc.metric_embedding_loss(a, b, targets, reduction=reduction, **options)
    else:

        def loss(reduction: str) -> Tensor:
            return info_nce(name.split()[0], reduction, "symmetric" in name)(a, b, backend=backend)

    a, b = x.requires_grad_(), y.requires_grad_()
    rows, total = loss("none").sum(), loss("sum")
    torch.testing.assert_close(total, rows)
    for left, right in zip(
        torch.autograd.grad(total, [a, b]), torch.autograd.grad(rows, [a, b]), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
@pytest.mark.parametrize("name", LOSSES)
def test_many_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcontrast.backends.native import distance_softmax as module

    monkeypatch.setattr(module, "SMALL_PRODUCT", 0)  # not in one call
    monkeypatch.setattr(module, "LOSS_BLOCK", 1)  # the smallest block: 64 rows
    x, y = operands((131, 200, 9), torch.float64)
    truth = evaluate(LOSSES[name], x, y, torch.float64, "reference")
    result = evaluate(LOSSES[name], x, y, torch.float64, "native")
    for a, b in zip(result, truth, strict=True):
        torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 100.0])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_symmetric_is_two_cross_entropies(metric: str, temperature: float, backend: str) -> None:
    """Rows over columns and columns over rows, by definition; keys beyond the targets are only
    negatives, and targets in any order.
    """
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(55, 6, dtype=torch.float64)
    x[3], x[4] = 100.0, 100.0  # rows far from all columns, whose row softmax says nothing of them
    target = torch.randperm(55)[:40]
    x, y = x.float().requires_grad_(), y.float().requires_grad_()
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    distance = (a[:, None] - b).square().sum(2)
    scores = {"l2": -distance.clamp(min=1e-30).sqrt(), "sqeuclidean": -distance, "dot": a @ b.T}
    s = scores[metric] / temperature
    cross_entropy = torch.nn.functional.cross_entropy
    truth = (cross_entropy(s, target) + cross_entropy(s.T[target], torch.arange(40))) / 2
    true = torch.autograd.grad(truth, [a, b])
    loss = fc.info_nce_loss(
        x, y, target, metric=metric, temperature=temperature, symmetric=True, backend=backend
    )
    assert relative_error(loss, truth) < VALUE_FLOOR[torch.float32]
    # A score of size s is rounded to s·eps before the exponential, in eager PyTorch as well.
    largest = float(s.detach().abs().max())
    limit = GRADIENT_FLOOR[torch.float32] + 4 * largest * torch.finfo(torch.float32).eps
    for mine, known in zip(torch.autograd.grad(loss, [x, y]), true, strict=True):
        assert relative_error(mine, known) < limit


@every_backend
def test_symmetric_with_infinite_and_nan_points(backend: str) -> None:
    """An infinitely far key is nobody's negative; a NaN query reaches every key."""
    x, y = torch.randn(6, 3), torch.randn(8, 3)
    y[7] = torch.inf
    expected = fc.info_nce_loss(x, y[:7], symmetric=True, backend=backend)
    torch.testing.assert_close(fc.info_nce_loss(x, y, symmetric=True, backend=backend), expected)
    x.requires_grad_()
    loss = fc.info_nce_loss(x, y, symmetric=True, backend=backend)
    torch.testing.assert_close(loss.detach(), expected)
    bad = x.detach().clone()
    bad[2] = torch.nan
    bad.requires_grad_()
    assert fc.info_nce_loss(bad, y, symmetric=True, backend=backend).isnan()


def test_symmetric_needs_distinct_targets() -> None:
    x, y = torch.randn(3, 2), torch.randn(4, 2)
    with pytest.raises(ValueError, match="target must not repeat an index here, got 1 twice"):
        fc.info_nce_loss(x, y, torch.tensor([1, 0, 1]), symmetric=True)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_upstream_factors_come_before_rounding(dtype: torch.dtype, backend: str) -> None:
    """Gradients of a mean over many rows vanish in float16 unless a scaler lifts them first."""
    x, y = operands((500, 500, 8), dtype)
    plain = evaluate(LOSSES["l2 mean"], x, y, torch.float64, "reference")
    scaled = evaluate(LOSSES["l2 mean"], x, y, dtype, backend, upstream=2.0**16)
    for mine, true in zip(scaled[1:3], plain[1:3], strict=True):
        error = (mine.double() / 2**16 - true).norm() / true.norm()
        assert error < GRADIENT_FLOOR[dtype]


@every_backend
def test_backward_twice_and_gradients_not_aliased(backend: str) -> None:
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    loss = fc.info_nce_loss(x, y, backend=backend)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.mul_(5)  # a user's optimiser may write into its gradient
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(second, kept)


@every_backend
@pytest.mark.parametrize("frozen", ["query", "key"])
def test_a_frozen_side_gets_no_gradient(frozen: str, backend: str) -> None:
    q, k = torch.randn(6, 3), torch.randn(8, 3)
    moving = k if frozen == "query" else q
    moving.requires_grad_()
    fc.info_nce_loss(q, k, backend=backend).backward()
    both = [t.detach().clone().requires_grad_() for t in (q, k)]
    fc.info_nce_loss(*both, backend=backend).backward()
    torch.testing.assert_close(moving.grad, both[1 if frozen == "query" else 0].grad)
    assert (q if frozen == "query" else k).grad is None


@every_backend
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_equal_runs(threads: int, backend: str) -> None:
    x, y = operands((300, 400, 20), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        runs = [evaluate(LOSSES["l2 mean"], x, y, torch.float32, backend) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@every_backend
def test_no_gradient_no_work(backend: str) -> None:
    """Without gradients the value comes from the forward pass alone."""
    x, y = torch.randn(20, 4), torch.randn(21, 4)
    a = fc.info_nce_loss(x, y, backend=backend)
    b = fc.info_nce_loss(x.clone().requires_grad_(), y, backend=backend)
    assert not a.requires_grad
    torch.testing.assert_close(a, b.detach())
    with torch.no_grad():
        c = fc.info_nce_loss(x.clone().requires_grad_(), y, backend=backend)
    assert torch.equal(a, c)
