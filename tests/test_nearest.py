"""`nearest` on every backend: against loops, against the reference in float64, and its rules."""

from __future__ import annotations

import importlib

import oracle
import pytest
import torch
from cases import LAYOUTS, MASKS, METRICS, SHAPES, SMALL, case, in_layout, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DTYPES, relative_error
from torch import Tensor
from variants import active, on_every_backend, variants

from fastcontrast import Nearest, nearest
from fastcontrast.backends import native
from fastcontrast.ops.pairs import paired_distance

every_backend = on_every_backend("nearest")

# Values are taken in float64 and rounded once; in float64 itself both sides sum some hundred terms.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 1e-13}
for _half in (torch.bfloat16, torch.float16):  # values of half inputs are float32
    ROUNDING[_half] = ROUNDING[torch.float32]


def assert_same(found: Nearest, truth: Nearest, rounding: float) -> None:
    assert torch.equal(found.indices, truth.indices)
    torch.testing.assert_close(
        found.values.double(), truth.values.double(), rtol=rounding, atol=1e-30, equal_nan=True
    )


@every_backend
@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", ["one by one", "one column", "vector plus one"])
def test_the_equation(shape: str, metric: str, mask: str, farthest: bool, backend: str) -> None:
    c = case(shape, mask, torch.float64)
    k = 6
    exclude = c.options.get("exclude")
    if exclude is not None:
        exclude = exclude.reshape(c.x.shape[0], -1).tolist()
    ids = [c.options[name].tolist() if name in c.options else None
           for name in ("row_ids", "column_ids")]  # fmt: skip

    def counting(row: int) -> list[int]:
        return oracle.columns_that_count(
            row, c.y.shape[0], exclude, *ids, c.options.get("keep", "all")
        )

    truth = oracle.nearest(c.x.tolist(), c.y.tolist(), k, metric, farthest, counting)
    found = nearest(c.x, c.y, k, metric=metric, farthest=farthest, backend=backend, **c.options)
    assert found.indices.tolist() == [[j for _, j in row] for row in truth]
    for values, row in zip(found.values.tolist(), truth, strict=True):
        assert values == pytest.approx([v for v, _ in row], rel=1e-13, abs=1e-13)


# The shapes around a tile are large for the reference: the mask that uses everything.
SHAPES_AND_MASKS = [
    (shape, mask)
    for shape in SHAPES
    for mask in (MASKS if not shape.startswith("tile") else ("different and diagonal",))
]


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("shape", "mask"), SHAPES_AND_MASKS)
def test_every_shape_and_mask(shape: str, metric: str, mask: str, backend: str) -> None:
    c = case(shape, mask, torch.float32)
    x, y = c.x.float(), c.y.float()
    for k, farthest in ((1, False), (7, True), (40, False)):
        options = {"metric": metric, "farthest": farthest, **c.options}
        truth = nearest(x.double(), y.double(), k, backend="reference", **options)
        found = nearest(x, y, k, backend=backend, **options)
        assert found.values.dtype == torch.float32
        assert found.indices.dtype == torch.int64
        assert found.values.shape == found.indices.shape == (x.shape[0], k)
        assert_same(found, truth, ROUNDING[torch.float32])


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_and_layouts(metric: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    for shape in SMALL:
        x, y = operands(SHAPES[shape], dtype)
        truth = nearest(x, y, 3, metric=metric, backend="reference")
        a, b = (in_layout(v.to(dtype), layout) for v in (x, y))
        assert_same(nearest(a, b, 3, metric=metric, backend=backend), truth, ROUNDING[dtype])


@every_backend
def test_mixed_dtypes_are_promoted(backend: str) -> None:
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(6, 8)
    assert_same(
        nearest(x, y, 2, backend=backend), nearest(x.float(), y, 2, backend="reference"), 2.0**-24
    )
    assert nearest(x, y.double(), 2, backend=backend).values.dtype == torch.float64


@every_backend
@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_column(
    dtype: torch.dtype, metric: str, farthest: bool, backend: str
) -> None:
    """Small integers: every distance is exact and shared by hundreds of columns."""
    x, y = torch.randint(-2, 3, (30, 2)), torch.randint(-2, 3, (3000, 2))
    s = x @ y.T if metric == "dot" else -(x[:, None] - y).square().sum(2)
    order = s.sort(dim=1, descending=not farthest, stable=True).indices
    for k in (1, 9, 300, 2999):
        found = nearest(
            x.to(dtype), y.to(dtype), k, metric=metric, farthest=farthest, backend=backend
        )
        assert torch.equal(found.indices, order[:, :k])


@every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_copies_of_a_column_tie(metric: str, backend: str) -> None:
    """Wherever they stand in a matrix product, whose rounding may depend on that."""
    y = torch.randn(2500, 37)
    copies = torch.tensor([3, 4, 511, 2047, 2048, 2499])
    y[copies] = y[3].clone()
    x = y[3] + 0.01 * torch.randn(5, 37)
    found = nearest(x, y, 6, metric=metric, backend=backend)
    assert torch.equal(found.indices, copies.expand(5, 6))
    assert torch.equal(found.values, found.values[:, :1].expand(5, 6))


# Data that a product cannot tell apart: what is kept must go by direct differences.
HARD = {
    "far from the origin": lambda x: 100 + x,
    "collapsed": lambda x: 100 + 1e-4 * x,
    "two tight clusters": lambda x: 1e-3 * x + 10.0 * (torch.arange(x.shape[0]) % 2)[:, None],
    "one far outlier": lambda x: torch.cat([x[:-1], x[-1:] + 1e6]),
    "squares overflow": lambda x: 1e25 * x,
    "squares underflow": lambda x: 1e-25 * x,
    "denormal": lambda x: 1e-40 * x,
    "scales apart": lambda x: x * 10.0 ** (torch.arange(x.shape[0]) % 9 - 4.0)[:, None],
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("data", HARD)
def test_hard_data(data: str, metric: str, backend: str) -> None:
    x, y = HARD[data](torch.randn(12, 20)), HARD[data](torch.randn(2300, 20))
    y[1000:1010] = x[:10] * (1 + 1e-6)
    for farthest in (False, True):
        options = {"metric": metric, "farthest": farthest}
        found = nearest(x, y, 20, backend=backend, **options)
        truth = nearest(x.double(), y.double(), 20, backend="reference", **options)
        if metric == "cosine":  # cosines closer than float64 tells apart come in either order
            a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))
            pairs = (a[:, None] * b[found.indices]).sum(2)
            torch.testing.assert_close(pairs, truth.values, rtol=0, atol=1e-15)
        else:
            assert torch.equal(found.indices, truth.indices)
        # Beyond the range of float32 a value is inf or, where denormal, off by its spacing.
        expected = truth.values.float()
        torch.testing.assert_close(found.values, expected, rtol=2.0**-22, atol=2.0**-149)


@every_backend
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_near_duplicates_keep_their_order(distance: float, backend: str) -> None:
    """Distances far below the rounding of ‖x‖²+‖y‖²-2x·y, which eager PyTorch cannot order."""
    x = 3 + torch.randn(50, 64)
    y = (x[:, None] + distance * torch.rand(50, 8, 1) * torch.randn(50, 8, 64)).flatten(0, 1)
    found = nearest(x, y, 8, backend=backend)
    d = (x.double()[:, None] - y.double().view(50, 8, 64)).norm(dim=2)
    values, order = d.sort(1)
    assert torch.equal(found.indices, order + 8 * torch.arange(50)[:, None])
    assert relative_error(found.values, values) < ROUNDING[torch.float32]


@every_backend
@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_with_too_few_columns_are_filled(metric: str, farthest: bool, backend: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    found = nearest(
        x, y, 4, metric=metric, farthest=farthest, keep="same", row_ids=torch.tensor([0, 1, 7]),
        column_ids=torch.tensor([0, 0, 0, 1, 2]), exclude=torch.tensor([1, -1, 0]), backend=backend,
    )  # fmt: skip
    assert (found.indices >= 0).sum(1).tolist() == [2, 1, 0]
    assert set(found.indices[0, :2].tolist()) == {0, 2}
    end = torch.inf if (metric in ("dot", "cosine")) == farthest else -torch.inf
    assert bool((found.values[found.indices < 0] == end).all())
    assert bool(torch.isfinite(found.values[found.indices >= 0]).all())


@every_backend
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0, 0), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    m, n, d = shape
    found = nearest(torch.empty(m, d), torch.empty(n, d), 2, backend=backend)
    assert found.indices.tolist() == [[0, 1] if n else [-1, -1]] * m
    assert found.values.tolist() == [[0.0, 0.0] if n else [torch.inf, torch.inf]] * m


@every_backend
@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_comes_last(metric: str, farthest: bool, backend: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(300, 3)
    x[2, 1] = torch.nan
    y[[1, 200], 0] = torch.nan
    found = nearest(x, y, 300, metric=metric, farthest=farthest, backend=backend)
    for i in (0, 1, 3):
        assert found.indices[i, -2:].tolist() == [1, 200]
        assert torch.isnan(found.values[i]).tolist() == [False] * 298 + [True] * 2
    assert found.indices[2].tolist() == list(range(300))
    assert bool(torch.isnan(found.values[2]).all())
    few = nearest(x, y, 5, metric=metric, farthest=farthest, backend=backend)
    assert torch.equal(few.indices, found.indices[:, :5])


@every_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("farthest", [False, True])
def test_infinite_coordinates(farthest: bool, metric: str, backend: str) -> None:
    x, y = torch.randn(6, 3), torch.randn(400, 3)
    x[2, 1], y[7, 0], y[300, 2] = torch.inf, torch.inf, -torch.inf
    found = nearest(x, y, 400, metric=metric, farthest=farthest, backend=backend)
    truth = nearest(
        x.double(), y.double(), 400, metric=metric, farthest=farthest, backend="reference"
    )
    assert_same(found, truth, ROUNDING[torch.float32])
    if metric == "l2" and not farthest:
        assert found.indices[0, -2:].tolist() == [7, 300]
        assert found.values[0, -2:].tolist() == [torch.inf] * 2


@every_backend
def test_runs_and_thread_counts_are_bit_equal(backend: str) -> None:
    x, y = torch.randn(700, 33), torch.randn(5000, 33)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(nearest(x, y, 25, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].indices, other.indices)
        assert torch.equal(results[0].values, other.values)


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
@pytest.mark.parametrize("tile", [(512, 2048), (5, 7), (64, 300), (1, 1)])
def test_tiles_change_nothing(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastcontrast.backends.native.nearest")
    monkeypatch.setattr(module, "TILE_ROWS", tile[0])
    monkeypatch.setattr(module, "TILE_COLUMNS", tile[1])
    x, y = torch.randn(40, 9), torch.randn(900, 9)
    for k in (1, 30, 400):
        truth = nearest(x, y, k, backend="reference")
        assert_same(nearest(x, y, k, backend="native"), truth, ROUNDING[torch.float32])


@every_backend
def test_a_very_large_k(backend: str) -> None:
    x, y = torch.randn(7, 5), torch.randn(6000, 5)
    found = nearest(x, y, 5000, backend=backend)
    assert_same(found, nearest(x, y, 5000, backend="reference"), ROUNDING[torch.float32])
    assert torch.equal(nearest(x, y, 100, backend=backend).indices, found.indices[:, :100])


@given(
    m=st.integers(1, 6), n=st.integers(1, 70), d=st.integers(1, 5), k=st.integers(1, 80),
    seed=st.integers(0, 2**16), metric=st.sampled_from(["l2", "sqeuclidean", "dot"]),
    farthest=st.booleans(), offset=st.sampled_from([0, 1000]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_integers_are_ranked_exactly(m, n, d, k, seed, metric, farthest, offset) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-3, 4, (r, d), generator=generator) + offset for r in (m, n))
    truth = oracle.nearest(x.tolist(), y.tolist(), k, metric, farthest, lambda _: list(range(n)))
    columns = [[j for _, j in row] for row in truth]
    for variant in variants("nearest"):
        if variant.skip_reason is None:
            with active(variant):
                found = nearest(
                    x.float(), y.float(), k, metric=metric, farthest=farthest,
                    backend=variant.backend,
                )  # fmt: skip
                assert found.indices.tolist() == columns, variant


# As PyTorch sees it.


@every_backend
def test_values_carry_no_gradient_and_pairs_do(backend: str) -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    found = nearest(x, y, 2, backend=backend)
    assert not found.values.requires_grad
    hardest = paired_distance(x, y[found.indices[:, 0]])
    torch.testing.assert_close(hardest, found.values[:, 0])
    assert torch.autograd.grad(hardest.sum(), x)[0].norm(dim=1).tolist() == pytest.approx([1.0] * 5)


@every_backend
@pytest.mark.parametrize("mask", MASKS)
def test_opcheck(mask: str, backend: str) -> None:
    c = case("vector plus one", mask, torch.float32)
    exclude = c.options.get("exclude")
    if exclude is not None:
        exclude = exclude.reshape(c.x.shape[0], -1)
    arguments = (
        c.x.float(), c.y.float(), 3, "l2", False, exclude, c.options.get("row_ids"),
        c.options.get("column_ids"), c.options.get("keep", "all"), backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastcontrast.nearest, arguments)


@every_backend
@pytest.mark.parametrize("metric", METRICS)
def test_compiled_equals_eager(metric: str, backend: str) -> None:
    torch._dynamo.reset()

    def search(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = nearest(x, y, 3, metric=metric, exclude=torch.arange(x.shape[0]), backend=backend)
        return found.values * 2, found.indices

    x, y = torch.randn(20, 6, requires_grad=True), torch.randn(30, 6)
    fast = torch.compile(search, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(search(x, y), fast(x, y), strict=True):
        assert torch.equal(a, b)


@every_backend
def test_autocast_does_not_lower_the_products(backend: str) -> None:
    x, y = torch.randn(30, 64), torch.randn(31, 64)
    plain = nearest(x, y, 4, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nearest(x, y, 4, backend=backend)
    assert torch.equal(plain.values, inside.values)
    assert torch.equal(plain.indices, inside.indices)


BAD_CALLS = {
    "k zero": ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    "k float": ({"k": 2.0}, TypeError, "k must be an integer, got float"),
    "k bool": ({"k": True}, TypeError, "k must be an integer, got bool"),
    "metric": ({"metric": "l1"}, ValueError, "metric must be one of l2, sqeuclidean"),
    "integers": ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "x must be float16"),
    "different D": ({"y": torch.randn(5, 4)}, ValueError, "same number of columns D"),
    "exclude": ({"exclude": torch.arange(3)}, ValueError, r"exclude must have shape \[4, 1\]"),
    "keep": ({"keep": "some"}, ValueError, "keep must be one of"),
    "ids": ({"keep": "same"}, ValueError, r"needs row_ids, an integer tensor \[4\]"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be None or one of native"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    change, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        nearest(**({"x": torch.randn(4, 3), "y": torch.randn(5, 3)} | change))
