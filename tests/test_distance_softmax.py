"""Conformance of every backend of `distance_softmax` with the reference in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import LAYOUTS, MASKS, METRICS, SHAPES, SMALL, Case, case, in_layout
from tolerances import DTYPES, GRADIENT_FLOOR, VALUE_FLOOR, assert_within_budget
from torch import Tensor
from variants import on_every_backend

from fastcontrast import distance_softmax
from fastcontrast.backends import native

VALUES = ("lse", "entropy", "score_sum")
GRADIENTS = ("dx", "dy", "dscale")
SCALE = 0.7


def evaluate(
    c: Case, dtype: torch.dtype, metric: str, backend: str, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Statistics, and gradients for fixed random gradients of the three differentiable ones."""
    x = in_layout(c.x.to(dtype), layout).detach().requires_grad_()
    y = in_layout(c.y.to(dtype), layout).detach().requires_grad_()
    scale = torch.tensor(
        SCALE, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    threshold = torch.full((x.shape[0],), -2.0, dtype=scale.dtype)
    r = distance_softmax(
        x, y, metric=metric, scale=scale, threshold=threshold, score_sum=True, backend=backend,
        **c.options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    outputs = [getattr(r, name) for name in VALUES]
    upstream = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs
    ]
    grads = torch.autograd.grad(outputs, [x, y, scale], upstream)
    result = dict(zip(VALUES, outputs, strict=True))
    result |= dict(zip(GRADIENTS, grads, strict=True))
    return result | {"rank": r.rank, "count": r.column_count}


@functools.cache
def expected(shape: str, mask: str, dtype: torch.dtype, metric: str) -> tuple[Case, dict, dict]:
    """The case, the truth in float64, and what a user would have had: eager in the same dtype."""
    c = case(shape, mask, dtype)
    truth = evaluate(c, torch.float64, metric, "reference")
    return c, truth, evaluate(c, dtype, metric, "reference")


def assert_conforms(
    shape: str, mask: str, dtype: torch.dtype, metric: str, backend: str, layout: str = "contiguous"
) -> None:
    c, truth, same_dtype = expected(shape, mask, dtype, metric)
    result = evaluate(c, dtype, metric, backend, layout)
    for name in VALUES:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        assert result[name].dtype == accumulator
        assert_within_budget(name, result[name], truth[name], same_dtype[name], VALUE_FLOOR[dtype])
    for name in GRADIENTS:
        assert_within_budget(
            name, result[name], truth[name], same_dtype[name], GRADIENT_FLOOR[dtype]
        )
    assert result["dx"].dtype == result["dy"].dtype == dtype
    assert torch.equal(result["count"], truth["count"])
    # A score within rounding of the threshold may fall on either side.
    assert (result["rank"] - truth["rank"]).abs().sum() <= 1 + truth["rank"].sum() // 1000


@on_every_backend("distance_softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, metric: str, dtype: torch.dtype, backend: str) -> None:
    assert_conforms(shape, "diagonal", dtype, metric, backend)


@on_every_backend("distance_softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SMALL)
def test_masks(shape: str, mask: str, metric: str, dtype: torch.dtype, backend: str) -> None:
    assert_conforms(shape, mask, dtype, metric, backend)


@on_every_backend("distance_softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_layouts(metric: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    assert_conforms("ragged", "different", dtype, metric, backend, layout)


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
@pytest.mark.parametrize("tile", [(8, 16), (67, 3), (5, 200)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", METRICS)
def test_many_tiles(metric: str, mask: str, tile: tuple[int, int], monkeypatch: Any) -> None:
    """The state carried between tiles, on shapes where every mask has been checked above."""
    from fastcontrast.backends.native import distance_softmax as module

    monkeypatch.setattr(module, "TILE_ROWS", tile[0])
    monkeypatch.setattr(module, "TILE_COLUMNS", tile[1])
    assert_conforms("ragged", mask, torch.float32, metric, "native")


@on_every_backend("distance_softmax")
def test_expanded_operands_and_gradients(backend: str) -> None:
    """Stride-0 inputs, and the stride-0 gradient that ``.sum()`` sends."""
    x = torch.randn(1, 6, dtype=torch.float64).expand(5, 6).requires_grad_()
    y = torch.randn(4, 6, dtype=torch.float64)[:1].expand(4, 6).requires_grad_()
    r = distance_softmax(x, y, backend=backend)
    dx, dy = torch.autograd.grad(r.lse.sum(), [x, y])
    xc, yc = (t.detach().contiguous().requires_grad_() for t in (x, y))
    ex, ey = torch.autograd.grad(torch.logsumexp(-torch.cdist(xc, yc), 1).sum(), [xc, yc])
    torch.testing.assert_close(dx, ex)
    torch.testing.assert_close(dy, ey)


@on_every_backend("distance_softmax")
@pytest.mark.parametrize("frozen", ["x", "y", "scale", "x and y", "nothing"])
def test_frozen_inputs_get_no_gradient(frozen: str, backend: str) -> None:
    c = case("vector plus one", "all", torch.float64)
    scale = torch.tensor(0.9, dtype=torch.float64)
    inputs = {"x": c.x.clone(), "y": c.y.clone(), "scale": scale}
    wanted = [n for n in inputs if n not in frozen.split(" and ")]
    for name in wanted:
        inputs[name].requires_grad_()
    lse = distance_softmax(inputs["x"], inputs["y"], scale=inputs["scale"], backend=backend).lse
    lse.sum().backward()
    every = {n: v.detach().clone().requires_grad_() for n, v in inputs.items()}
    distance_softmax(
        every["x"], every["y"], scale=every["scale"], backend=backend
    ).lse.sum().backward()
    for name, value in inputs.items():
        if name in wanted:
            torch.testing.assert_close(value.grad, every[name].grad, rtol=1e-12, atol=1e-12)
        else:
            assert value.grad is None


@on_every_backend("distance_softmax")
def test_one_tensor_on_both_sides_sums_its_gradients(backend: str) -> None:
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    others = torch.arange(9)
    (shared,) = torch.autograd.grad(
        distance_softmax(x, x, exclude=others, backend=backend).lse.sum(), x
    )
    a, b = (x.detach().clone().requires_grad_() for _ in range(2))
    da, db = torch.autograd.grad(
        distance_softmax(a, b, exclude=others, backend=backend).lse.sum(), [a, b]
    )
    torch.testing.assert_close(shared, da + db)


@on_every_backend("distance_softmax")
def test_backward_twice_with_retain_graph(backend: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    lse = distance_softmax(x, torch.randn(7, 3), backend=backend).lse
    (first,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(lse.sum(), x)
    assert torch.equal(first, second)


@on_every_backend("distance_softmax")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mask", ["all", "different and diagonal"])
def test_gradcheck(mask: str, metric: str, backend: str) -> None:
    c = case("few", mask, torch.float64)
    x, y = c.x.clone().requires_grad_(), c.y.clone().requires_grad_()
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def statistics(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        r = distance_softmax(
            x, y, metric=metric, scale=scale, score_sum=True, backend=backend, **c.options
        )
        return torch.where(torch.isinf(r.lse), 0.0, r.lse), r.entropy, r.score_sum

    assert torch.autograd.gradcheck(statistics, (x, y, scale))
