"""`triplet_distances` on every backend: values, gradients, layouts, dtypes, and its operators."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import LAYOUTS, in_layout
from tolerances import DTYPES, GRADIENT_FLOOR, VALUE_FLOOR, assert_within_budget
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("triplet_distances")
METRICS = ("l2", "sqeuclidean")
# Vectors are 16 float32 wide, sums run in chunks of 256 (csrc/cpu/triplet_distances.cpp); from
# 2¹⁸ elements on there is more than one thread (backends/native/triplet_distances.py).
SHAPES = {
    "no rows": (0, 5), "no dimensions": (3, 0), "one": (1, 1), "vector minus one": (5, 15),
    "vector": (4, 16), "vector plus one": (7, 17), "chunk": (3, 256), "chunk plus one": (6, 257),
    "wide": (9, 1031), "threads": (900, 101),
}  # fmt: skip


def points(shape: tuple[int, int], dtype: torch.dtype, *, coincident: bool = True) -> list[Tensor]:
    """Three random [M, D] whose float64 values are exact in ``dtype``; some points coincide."""
    m, d = shape
    found = [torch.randn(m, d, dtype=torch.float64).to(dtype).double() for _ in range(3)]
    if coincident and m > 2:
        found[1][0] = found[0][0]
        found[2][1] = found[0][1]
        found[2][2] = found[1][2]
    return found


def all_distances(
    a: Tensor, p: Tensor, n: Tensor, *, metric: str = "l2", backend: str
) -> list[Tensor]:
    found = fc.triplet_distances(a, p, n, metric=metric, between=True, backend=backend)
    return [distance for distance in found if distance is not None]


def evaluate(
    triplets: list[Tensor], dtype: torch.dtype, metric: str, backend: str, layout: str
) -> dict[str, Tensor]:
    """Distances, and gradients for fixed random gradients of all three."""
    inputs = [in_layout(x.to(dtype), layout).detach().requires_grad_() for x in triplets]
    found = all_distances(*inputs, metric=metric, backend=backend)
    generator = torch.Generator().manual_seed(3)
    upstream = [
        torch.randn(d.shape, generator=generator, dtype=torch.float64).to(d.dtype) for d in found
    ]
    grads = torch.autograd.grad(found, inputs, upstream)
    names = ("positive", "negative", "between", "da", "dp", "dn")
    return dict(zip(names, [*found, *grads], strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_is_the_equation(metric: str) -> None:
    a, p, n = points((6, 5), torch.float64)
    found = fc.triplet_distances(a, p, n, metric=metric, between=True, backend="reference")
    power = 1 if metric == "l2" else 2
    for distances, (x, y) in zip(found, itertools.combinations((a, p, n), 2), strict=True):
        assert distances is not None
        truth = [math.dist(u, v) ** power for u, v in zip(x.tolist(), y.tolist(), strict=True)]
        # Both in float64; five squares are summed in another order.
        assert distances.tolist() == pytest.approx(truth, rel=1e-14)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, metric: str, dtype: torch.dtype, backend: str) -> None:
    assert_conforms(SHAPES[shape], metric, dtype, backend, "contiguous")


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    assert_conforms((13, 37), "l2", dtype, backend, layout)


def assert_conforms(
    shape: tuple[int, int], metric: str, dtype: torch.dtype, backend: str, layout: str
) -> None:
    triplets = points(shape, dtype)
    truth = evaluate(triplets, torch.float64, metric, "reference", "contiguous")
    eager = evaluate(triplets, dtype, metric, "reference", "contiguous")
    result = evaluate(triplets, dtype, metric, backend, layout)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("positive", "negative", "between"):
        assert result[name].dtype == accumulator
        assert_within_budget(name, result[name], truth[name], eager[name], VALUE_FLOOR[dtype])
    for name in ("da", "dp", "dn"):
        assert result[name].dtype == dtype
        assert_within_budget(name, result[name], truth[name], eager[name], GRADIENT_FLOOR[dtype])


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("between", [False, True])
def test_gradcheck_twice(between: bool, metric: str, backend: str) -> None:
    triplets = [x.requires_grad_() for x in points((4, 3), torch.float64, coincident=False)]

    def distances(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = fc.triplet_distances(*inputs, metric=metric, between=between, backend=backend)
        return tuple(d for d in found if d is not None)

    assert torch.autograd.gradcheck(distances, triplets)
    assert torch.autograd.gradgradcheck(distances, triplets)


@every_backend
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("used", ["positive", "negative", "between"])
def test_frozen_points_and_unused_distances(
    used: str, wanted: tuple[bool, ...], backend: str
) -> None:
    """Each gradient alone is that of all; a distance that nobody uses adds nothing, nor NaN."""
    triplets = points((5, 19), torch.float32)
    if used != "between":
        other = 2 if used == "positive" else 1
        triplets[other][4] = torch.nan
    every = [x.clone().requires_grad_() for x in triplets]
    some = [x.clone().requires_grad_(need) for x, need in zip(triplets, wanted, strict=True)]
    for inputs in (every, some):
        found = fc.triplet_distances(*inputs, between=True, backend=backend)
        if getattr(found, used).requires_grad:
            getattr(found, used).sum().backward()
    for full, part, need in zip(every, some, wanted, strict=True):
        assert (part.grad is not None) == need
        if need:
            assert full.grad is not None
            assert bool(full.grad.isfinite().all())
            assert torch.equal(part.grad, full.grad)


@every_backend
def test_coincident_points_have_gradient_zero(backend: str) -> None:
    x = torch.ones(3, 5, requires_grad=True)
    found = all_distances(x, x, x, backend=backend)
    assert all(torch.equal(d, torch.zeros(3)) for d in found)
    (gradient,) = torch.autograd.grad(found, x, [torch.ones(3)] * 3)
    assert torch.equal(gradient, torch.zeros(3, 5))


@every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_values_stay_in_their_row_and_spread_as_in_eager(
    where: int, value: float, backend: str
) -> None:
    triplets = points((6, 20), torch.float32, coincident=False)
    triplets[where][3, 7] = value
    results = []
    for ours in (True, False):
        a, p, n = inputs = [x.float().requires_grad_() for x in triplets]
        if ours:
            found = fc.triplet_distances(a, p, n, backend=backend)[:2]
        else:
            found = (torch.linalg.vector_norm(a - p, dim=1), torch.linalg.vector_norm(a - n, dim=1))
        grads = torch.autograd.grad(found[0].sum() - found[1].sum(), inputs)
        results.append([*found, *grads])
    for mine, eager in zip(*results, strict=True):
        # Ours may differ by the rounding of sums over 20 columns.
        torch.testing.assert_close(mine, eager, equal_nan=True)


@every_backend
def test_mixed_dtypes_and_expanded_anchors(backend: str) -> None:
    a = torch.randn(1, 8, dtype=torch.bfloat16, requires_grad=True)
    p = torch.randn(6, 8, requires_grad=True)
    n = torch.randn(6, 16, dtype=torch.float16)[:, ::2].requires_grad_()
    found = fc.triplet_distances(a.expand(6, 8), p, n, backend=backend)
    assert found.positive.dtype == torch.float32
    truth = torch.linalg.vector_norm(a.double() - p.double(), dim=1)
    torch.testing.assert_close(found.positive, truth.float())
    grads = torch.autograd.grad(found.positive.sum() + found.negative.sum(), [a, p, n])
    assert [g.dtype for g in grads] == [a.dtype, p.dtype, n.dtype]
    assert [g.shape for g in grads] == [a.shape, p.shape, n.shape]


@every_backend
def test_results_do_not_depend_on_threads_or_runs(backend: str) -> None:
    triplets = points(SHAPES["threads"], torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(evaluate(triplets, torch.float32, "l2", backend, "contiguous"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@every_backend
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = [x.float().requires_grad_() for x in points((5, 33), torch.float32)]
    plain = fc.triplet_distances(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fc.triplet_distances(*inputs, backend=backend)
        ratio = fc.triplet_ratio_loss(*inputs, backend=backend)
    assert torch.equal(plain.positive, cast.positive)
    assert torch.equal(ratio, fc.triplet_ratio_loss(*inputs, backend=backend))


@every_backend
def test_a_saved_point_must_not_change_in_place(backend: str) -> None:
    a = torch.randn(4, 3, requires_grad=True)
    p, n = torch.randn(4, 3), torch.randn(4, 3)
    losses = [fc.triplet_distances(a, p, n, backend=backend).positive.sum()]
    losses.append(fc.triplet_ratio_loss(a, p, n, backend=backend))
    n.add_(1)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_backend
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, between: bool, backend: str) -> None:
    inputs = [x.requires_grad_(requires_grad) for x in points((5, 9), torch.float64)]
    op = torch.ops.fastcontrast.triplet_distances
    torch.library.opcheck(op, (*inputs, "l2", between, backend))
    inputs = [x.detach() for x in inputs]
    out = op(*inputs, "l2", between, backend)
    grads = [torch.randn(5, dtype=torch.float64), None, out[2].clone() if between else None]
    torch.library.opcheck(
        torch.ops.fastcontrast.triplet_distances_backward,
        (*inputs, *out, *grads, "l2", backend, [True, False, True]),
        test_utils=("test_schema", "test_faketensor"),  # no gradient of its own, and it says so
    )


@every_backend
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_equals_eager(reduction: str, swap: bool, backend: str) -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in points((7, 9), torch.float64)]
    options: dict[str, Any] = {"swap": swap, "reduction": reduction, "backend": backend}

    def loss(*inputs: Tensor) -> Tensor:
        return fc.triplet_margin_loss(*inputs, **options)

    results = []
    # aot_eager traces the operator and its gradient as Inductor does, without generating code.
    for f in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        value = f(*inputs)
        results.append([value, *torch.autograd.grad(value.sum(), inputs)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_double_backward_of_the_operator_raises() -> None:
    a, p, n = (x.requires_grad_() for x in points((3, 2), torch.float64))
    found = torch.ops.fastcontrast.triplet_distances(a, p, n, "l2", False, "reference")
    (da,) = torch.autograd.grad(found[0].sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward works in eager mode"):
        da.sum().backward()


X = torch.randn(4, 3)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "type": (lambda: fc.triplet_distances(X, None, X), TypeError, "positive must be a tensor"),  # type: ignore[arg-type]
    "dtype": (lambda: fc.triplet_distances(X, X, X.int()), TypeError, "negative must be float16"),
    "shape": (
        lambda: fc.triplet_distances(X, X, X[:3]), ValueError,
        r"anchor and negative must have the same shape \[M, D\], got \[4, 3\] and \[3, 3\]",
    ),
    "metric": (
        lambda: fc.triplet_distances(X, X, X, metric="dot"), ValueError,
        "metric must be one of l2, sqeuclidean, got 'dot'",
    ),
    "backend": (lambda: fc.triplet_distances(X, X, X, backend="gpu"), ValueError, "backend must"),
    "device": (
        lambda: fc.triplet_distances(X, X, X.to("meta")), ValueError,
        "anchor and negative must be on one device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
