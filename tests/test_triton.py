"""What is Triton's own: splits, wide points, addresses. The conformance suite is the other half.

Runs where kernels run: on a CUDA device, or under TRITON_INTERPRET=1 (tests/variants.py). bfloat16
is multiplied in float32 there, because the interpreter has no bfloat16 arithmetic: what that shows
is addresses, masks and the rounding of operands and weights, not a matrix unit's own sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import METRICS, Case, case
from test_distance_softmax import GRADIENTS, VALUES, evaluate
from tolerances import DTYPES, GRADIENT_FLOOR, VALUE_FLOOR, assert_within_budget, relative_error
from torch import Tensor
from variants import Variant, active, variants

import fastcontrast as fc
from fastcontrast.backends.triton import INTERPRETED

TRITON = next(v for v in variants("distance_softmax") if v.backend == "triton")
pytestmark = pytest.mark.skipif(TRITON.skip_reason is not None, reason=str(TRITON.skip_reason))


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with active(TRITON):
        yield


def assert_conforms(c: Case, dtype: torch.dtype, metric: str, layout: str = "contiguous") -> None:
    truth = evaluate(c, torch.float64, metric, "reference")
    eager = evaluate(c, dtype, metric, "reference")
    result = evaluate(c, dtype, metric, "triton", layout)
    for names, floor in ((VALUES, VALUE_FLOOR[dtype]), (GRADIENTS, GRADIENT_FLOOR[dtype])):
        for name in names:
            assert_within_budget(name, result[name], truth[name], eager[name], floor)
    assert torch.equal(result["count"], truth["count"])


@pytest.mark.parametrize("metric", METRICS)
def test_splits_of_the_other_side(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few owners: several programs share the other side, and their parts are merged."""
    from fastcontrast.backends.triton import call

    monkeypatch.setattr(call, "PROGRAMS_PER_PROCESSOR", 1000)
    monkeypatch.setattr(call, "TILES_PER_SPLIT", 1)
    assert_conforms(case("ragged", "different and diagonal", torch.float32), torch.float32, metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mask", ["two excluded", "same"])
def test_wide_points(
    mask: str, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of large D, on few dimensions, so that every shape of block occurs."""
    from fastcontrast.backends.triton import launch, wide

    monkeypatch.setattr(launch, "LARGEST_FUSED", 0)
    monkeypatch.setattr(wide, "BLOCK_SCORES", 131 * 24)  # three blocks of rows
    monkeypatch.setattr(wide, "LEAST_ROWS", 1)
    assert_conforms(case("ragged", mask, dtype), dtype, metric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_wide_losses(metric: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcontrast.backends.triton import launch, wide

    monkeypatch.setattr(wide, "BLOCK_SCORES", 30 * 8)  # three blocks of rows
    monkeypatch.setattr(wide, "LEAST_ROWS", 1)
    x, y = torch.randn(20, 40), torch.randn(30, 40)
    y[3:6] = x[4:7]  # near pairs that are nobody's positives
    results = []
    for limit in (0, 256):
        monkeypatch.setattr(launch, "LARGEST_FUSED", limit)
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        temperature = torch.tensor(0.7, requires_grad=True)
        loss = fc.info_nce_loss(
            a, b, metric=metric, symmetric=symmetric, temperature=temperature, backend="triton"
        )
        results.append([loss, *torch.autograd.grad(loss, [a, b, temperature])])
    for of_blocks, fused in zip(*results, strict=True):
        assert relative_error(of_blocks, fused) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize("squared", [False, True])
def test_wide_loss_with_entropies(squared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a cross-entropy, and rows with an entropy, in one block; against float64."""
    from fastcontrast.backends.triton import launch, wide

    monkeypatch.setattr(launch, "LARGEST_FUSED", 0)
    monkeypatch.setattr(wide, "BLOCK_SCORES", 10 * 8)  # three blocks of rows
    monkeypatch.setattr(wide, "LEAST_ROWS", 1)
    x, anchors = torch.randn(21, 40), torch.randn(10, 40)
    labels = torch.where(torch.rand(21) < 0.5, -1, torch.randint(0, 10, (21,)))
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        a, b = (v.to(dtype).requires_grad_() for v in (x, anchors))
        loss = fc.metric_embedding_loss(
            a, b, labels, squared=squared, unlabelled_weight=0.5, backend=backend
        )
        results.append([loss, *torch.autograd.grad(loss, [a, b])])
    for found, exact in zip(*results, strict=True):
        assert relative_error(found, exact) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("bytes_of_columns", [0, 1 << 20])
def test_both_directions(
    bytes_of_columns: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns from the rows' tiles, of three row blocks and several splits, or by themselves."""
    from fastcontrast.backends.triton import call
    from fastcontrast.backends.triton import distance_softmax as module

    launches: list[int] = []
    launch = module._launch_statistics

    def counted(*args: Any) -> None:
        launches.append(1)
        launch(*args)

    monkeypatch.setattr(module, "_launch_statistics", counted)
    monkeypatch.setattr(module, "COLUMN_BYTES", bytes_of_columns)
    monkeypatch.setattr(call, "PROGRAMS_PER_PROCESSOR", 1000)
    monkeypatch.setattr(call, "TILES_PER_SPLIT", 2)
    x, y = torch.randn(141, 20), torch.randn(150, 20)
    y[:4] = x[1:5] + 1e-4  # near pairs
    y[140] = 20.0  # no score of this column is near its rows' largest
    target = torch.randperm(150)[:141]
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        loss = fc.info_nce_loss(
            a, b, target, metric=metric, temperature=0.7, symmetric=True, backend=backend
        )
        found.append([loss, *torch.autograd.grad(loss, [a, b])])
    assert len(launches) == (1 if bytes_of_columns else 2)
    for mine, true in zip(*found, strict=True):
        assert relative_error(mine, true) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize("precision", ["tf32", "bf16x3", "bf16"])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_gradients_at_lower_precision(metric: str, precision: str) -> None:
    """Those of the rounded points, up to the rounding of the weights and of the points."""
    unit = {"tf32": 2.0**-11, "bf16x3": 2.0**-16, "bf16": 2.0**-8}[precision]
    x, y = torch.randn(30, 24), torch.randn(40, 24)
    found = []
    for backend, chosen in (("triton", precision), ("reference", "ieee")):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        r = fc.distance_softmax(a, b, metric=metric, precision=chosen, backend=backend)
        found.append(torch.autograd.grad((r.lse + 0.3 * r.entropy).sum(), [a, b]))
    # A score of size s moves by s·unit, and s reaches 60 for squares and products.
    limit = unit * (10 if metric == "l2" else 60)
    for mine, true in zip(*found, strict=True):
        assert relative_error(mine, true) < limit


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_strides_of_half_points(metric: str, layout: str) -> None:
    """Half points are read where they lie, unless their columns are apart."""
    c = case("ragged", "all", torch.float16)
    assert_conforms(c, torch.float16, metric, layout)


def test_an_offset_of_half_points_cancels() -> None:
    x = (0.2 * torch.randn(30, 16) + 30).half()
    y = (0.2 * torch.randn(40, 16) + 30).half()
    gradients: list[Tensor] = []
    for a, b, backend in ((x, y, "triton"), (x.double(), y.double(), "reference")):
        a.requires_grad_()
        loss = fc.info_nce_loss(a, b, temperature=0.1, backend=backend)
        gradients.append(torch.autograd.grad(1024 * loss, a)[0])
    assert relative_error(*gradients) < torch.finfo(torch.float16).eps


def test_a_row_stride_beyond_32_bits() -> None:
    if not INTERPRETED:
        pytest.skip("a carried storage keeps its size, but strides are read there as they are here")
    x = torch.zeros(8).as_strided((1, 4), (2**33, 1))
    lse = fc.distance_softmax(x, torch.ones(3, 4), backend="triton").lse
    assert lse.item() == pytest.approx(-2 + math.log(3), abs=1e-5)


@pytest.mark.parametrize("farthest", [False, True])
def test_blocks_of_rows_and_lists_that_overflow(
    farthest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances shared by many columns: lists grow twice, in blocks of a few rows each time."""
    from fastcontrast.backends.triton import nearest as module

    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(module, "ROOM", 0)
    x, y = torch.randint(-1, 2, (9, 3)).float(), torch.randint(-1, 2, (600, 3)).float()
    x[4, 1], y[5, 0] = torch.nan, torch.inf
    for k in (2, 150):
        found, truth = (
            fc.nearest(x, y, k, farthest=farthest, backend=b) for b in ("triton", "reference")
        )
        assert torch.equal(found.indices, truth.indices)
        torch.testing.assert_close(found.values, truth.values, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("farthest", [False, True])
def test_bounds_of_keys_hold(farthest: bool, metric: str, dtype: torch.dtype) -> None:
    """With products whose every term is off by eps, as by matrix units that truncate."""
    from fastcontrast.backends.scores import Scores
    from fastcontrast.backends.triton.nearest import _bounds, _norms, _unit_rows
    from fastcontrast.backends.triton.operands import prepare

    x = torch.randn(40, 30) * 10.0 ** torch.arange(-20, 20)[:, None].clamp(-4, 4)
    y = torch.cat([x[:20] * 1.001, 3 + torch.randn(40, 30), torch.zeros(1, 30)])
    a, b = given = x.to(dtype), y.to(dtype)
    if metric == "cosine":
        a, b = (_unit_rows(v, _norms(v)) for v in given)
    scores = Scores("dot" if metric == "cosine" else metric, 1.0, None, None, None, "all", "tf32")
    operands = prepare(a, b, scores)
    (x_low, x_high), (y_low, y_high) = _bounds(operands, metric, farthest)
    sides = operands.x.values.double(), operands.y.values.double()
    terms = sides[0][:, None] * sides[1]
    eps = torch.finfo(operands.scale.dtype).eps
    p, q = (v.double() for v in given)
    for drift in (-eps, eps):
        dots = (terms * (1 + drift * terms.sign())).sum(2)
        if metric in ("dot", "cosine"):
            direct = (p[:, None] * q).sum(2)
            if metric == "cosine":
                norms = p.norm(dim=1)[:, None] * q.norm(dim=1)
                direct = torch.where(norms == 0, 0.0, direct / norms)
            sign = 1.0 if farthest else -1.0
            low, high = x_low[:, None] * y_low, x_high[:, None] * y_high
            by_products = sign * dots
        else:
            sign = -1.0 if farthest else 1.0
            direct = (p[:, None] - q).square().sum(2)
            low, high = x_low[:, None] + y_low, x_high[:, None] + y_high
            by_products = -2 * sign * dots
        assert bool((low + by_products <= sign * direct).all())
        assert bool((high + by_products >= sign * direct).all())


@pytest.mark.parametrize("dim", [0, 1, 100, 5000])
@pytest.mark.parametrize("rows", [1, 600, 100_000])
def test_tiles_of_triplets_fill_the_device(rows: int, dim: int) -> None:
    from fastcontrast.backends.triton.triplet_distances import TILE_BYTES, triplet_tile

    block, chunk = triplet_tile(rows, dim, 4, processors=132)
    assert 16 <= chunk <= 256
    assert 4 * block * chunk <= TILE_BYTES
    assert math.ceil(rows / block) >= min(rows, 2 * 132)
    if rows == 100_000:  # enough for whole tiles, but of the narrowest points
        assert 4 * block * chunk == TILE_BYTES


def test_the_variant_is_the_one_that_runs() -> None:
    assert isinstance(TRITON, Variant)
    assert TRITON.device == ("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("metric", METRICS)
def test_numbers_of_rows_beside_float64(metric: str) -> None:
    """Large log-sum-exps in two parts, all factors that pairs share, and what lies beyond."""
    from fastcontrast.backends.scores import RowGradients
    from fastcontrast.backends.triton.row_table import row_table

    m, n, scale = 70, 9, torch.tensor(0.3)
    exact = 1e6 * torch.randn(m).double()
    exact[3] = -torch.inf  # no column counts
    lse = exact.float()
    residual = torch.where(lse.isinf(), 0.0, exact - lse).float()
    entropy, of_lse, of_entropy, of_sum = torch.randn(4, m)
    exclude = torch.randint(-3, n + 3, (m, 2))
    grads = RowGradients(of_lse, of_entropy, of_sum)
    table, left_out = row_table((lse, residual, entropy), grads, scale, metric, exclude, n)
    assert torch.equal(
        left_out[:, :m].T.long(), torch.where((exclude >= 0) & (exclude < n), exclude, -1)
    )
    assert (left_out[:, m:] == -1).all()
    assert (table[:, m:] == 0).all()

    factor = scale.double() * (2 if metric == "sqeuclidean" else 1)
    score = torch.where(exact.isinf(), 0.0, exact) - 3.0  # of a pair whose log p is -3
    log_p = score - torch.where(exact.isinf(), 0.0, exact)
    wanted = factor * (log_p.exp() * (of_lse - of_entropy * (log_p + entropy)) + of_sum)
    lse2, g_lse, g_entropy, h, g_sum = table[:, :m].double()
    u = score / math.log(2) - lse2
    found = u.exp2() * (g_lse - g_entropy * (u * math.log(2) + h)) + g_sum
    # One rounding of float32 in each of a few factors.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["fused", "wide"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Scores by a kernel, or by GEMMs in three blocks of rows."""
    from fastcontrast.backends.triton import launch, wide

    if request.param == "wide":
        monkeypatch.setattr(launch, "LARGEST_FUSED", 0)
        monkeypatch.setattr(wide, "BLOCK_SCORES", 131 * 24)
        monkeypatch.setattr(wide, "LEAST_ROWS", 1)
    return request.param


class TestCosinesOfHalfPoints:
    """Their norms are in the scores, not in the points."""

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("mask", ["two excluded", "same"])
    def test_the_op(self, mask: str, dtype: torch.dtype, way: str) -> None:
        assert_conforms(case("ragged", mask, dtype), dtype, "cosine")

    @pytest.mark.parametrize("layout", ["transposed", "sliced"])
    def test_strides(self, layout: str) -> None:
        assert_conforms(case("ragged", "all", torch.float16), torch.float16, "cosine", layout)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_points_with_much_in_common(
        self, symmetric: bool, dtype: torch.dtype, way: str
    ) -> None:
        """Of weights that were rounded, what all points have in common would be the error."""
        x, y = ((torch.randn(70, 40) + 10).to(dtype) for _ in range(2))
        found = []
        for kind, backend in ((dtype, "triton"), (torch.float64, "reference")):
            a, b = x.to(kind).requires_grad_(), y.to(kind).requires_grad_()
            t = torch.tensor(0.1, requires_grad=True)
            loss = fc.info_nce_loss(
                a, b, metric="cosine", symmetric=symmetric, temperature=t, backend=backend
            )
            found.append([loss, *torch.autograd.grad(loss, [a, b, t])])
        floors = (VALUE_FLOOR[dtype], GRADIENT_FLOOR[dtype], GRADIENT_FLOOR[dtype])
        for mine, true, floor in zip(*(f[:3] for f in found), floors, strict=True):
            assert relative_error(mine, true) < floor
        # Of the scale: Σ ∂L/∂s · s, in which all scores have as much in common.
        assert relative_error(found[0][3], found[1][3]) < 1e-2

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_any_size_of_point(self, size: float) -> None:
        """Squares would vanish or overflow; and the gradient is as large as the point is small."""
        x, y = (torch.randn(20, 24) * size).bfloat16(), torch.randn(20, 24).bfloat16()
        found = []
        for kind, backend in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
            a, b = x.to(kind).requires_grad_(), y.to(kind)
            loss = fc.info_nce_loss(a, b, metric="cosine", temperature=0.2, backend=backend)
            found.append([loss, *torch.autograd.grad(loss, [a])])
        assert relative_error(found[0][0], found[1][0]) < VALUE_FLOOR[torch.bfloat16]
        assert relative_error(found[0][1], found[1][1]) < GRADIENT_FLOOR[torch.bfloat16]

    def test_zero_vectors(self, way: str) -> None:
        """Their cosines and their gradients are 0, and nobody else's differ by that."""
        x, y = torch.randn(20, 24).half(), torch.randn(20, 24).half()
        x[3] = y[5] = 0
        found = []
        for kind, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
            a, b = x.to(kind).requires_grad_(), y.to(kind).requires_grad_()
            loss = fc.info_nce_loss(a, b, metric="cosine", temperature=0.2, backend=backend)
            found.append([loss, *torch.autograd.grad(loss, [a, b])])
        for mine, true in zip(*found, strict=True):
            assert relative_error(mine, true) < GRADIENT_FLOOR[torch.float16]
        assert not found[0][1][3].any()
        assert not found[0][2][5].any()

    def test_differentiated_twice(self) -> None:
        found = []
        for kind, backend in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
            torch.manual_seed(3)
            x, y = torch.randn(9, 8).bfloat16(), torch.randn(12, 8).bfloat16()
            a, b = x.to(kind).requires_grad_(), y.to(kind).requires_grad_()
            loss = fc.info_nce_loss(a, b, metric="cosine", temperature=0.5, backend=backend)
            (grad,) = torch.autograd.grad(loss, a, create_graph=True)
            found.append(torch.autograd.grad(grad.double().square().sum(), [a, b]))
        for mine, true in zip(*found, strict=True):
            # The first gradient is rounded, and so is what the second makes of it.
            assert relative_error(mine, true) < 2 * GRADIENT_FLOOR[torch.bfloat16]

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_of_rows_that_are_columns_too(self, dtype: torch.dtype) -> None:
        """The two gradients of a point are added before they are rounded."""
        views = torch.randn(2, 25, 16).to(dtype)
        found = []
        for kind, backend in ((dtype, "triton"), (torch.float64, "reference")):
            a = views.to(kind).requires_grad_()
            loss = fc.nt_xent_loss(*a, temperature=0.3, backend=backend)
            found.append([loss, *torch.autograd.grad(1024 * loss, a)])
        assert relative_error(found[0][0], found[1][0]) < VALUE_FLOOR[dtype]
        assert relative_error(found[0][1], found[1][1]) < GRADIENT_FLOOR[dtype]
