"""What is the CUDA kernels' own in `distance_softmax`: splits, matrix units, the choice of kernels.

The conformance suite is the other half. In the emulation, which shows addresses, barriers, masks
and the rounding of operands and weights, not the sums of a matrix unit; and on a GPU, where one is.
"""

from __future__ import annotations

import cuda_emulation
import pytest
import torch
from cases import METRICS, Case, case, mask_options, operands
from test_distance_softmax import GRADIENTS, VALUES, evaluate
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, assert_within_budget, relative_error
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc
from fastcontrast.backends import native

pytestmark = on_every_backend("distance_softmax", ("emulated_cuda", "cuda"))
KERNELS = "fastcontrast.backends.native.distance_softmax_cuda"
# Half a unit in the last place of the mantissa kept.
ROUNDING = {"tf32": 2.0**-11, "bf16x3": 2.0**-16, "bf16": 2.0**-8}


@pytest.fixture(autouse=True)
def _on_cuda(backend: str) -> None:
    """Every test runs the CUDA kernels, wherever that is."""


@pytest.fixture
def is_emulated(request: pytest.FixtureRequest) -> bool:
    return request.node.callspec.params["backend"].device == "emulated_cuda"


@pytest.fixture
def emulated(is_emulated: bool) -> None:
    """Of copies, or of the order of threads: what a GPU does not tell."""
    if not is_emulated:
        pytest.skip("the emulation alone can tell")


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded products wherever they are allowed, as in large problems."""
    monkeypatch.setattr(KERNELS + ".TENSOR_MINIMUM", 0)


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few owners on a large GPU: blocks share out the other side, and their parts are merged."""
    monkeypatch.setattr(KERNELS + ".BLOCKS_PER_PROCESSOR", 1000)
    monkeypatch.setattr(KERNELS + ".TILES_PER_SPLIT", 1)


def assert_conforms(c: Case, dtype: torch.dtype, metric: str, layout: str = "contiguous") -> None:
    truth = evaluate(c, torch.float64, metric, "reference")
    eager = evaluate(c, dtype, metric, "reference")
    result = evaluate(c, dtype, metric, "native", layout)
    for names, floor in ((VALUES, VALUE_FLOOR[dtype]), (GRADIENTS, GRADIENT_FLOOR[dtype])):
        for name in names:
            assert_within_budget(name, result[name], truth[name], eager[name], floor)
    assert torch.equal(result["count"], truth["count"])
    assert (result["rank"] - truth["rank"]).abs().sum() <= 1  # a score at the threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_splits_of_the_other_side(metric: str, dtype: torch.dtype, many_blocks: None) -> None:
    assert_conforms(case("ragged", "different and diagonal", dtype), dtype, metric)


# What is in shared memory at a time, of 80 KiB; rows, columns and dimensions that come to it.
STAGED = {
    "all columns": (70, 100, 33),
    "the rows and a tile of columns": (34, 257, 98),
    "the rows": (34, 257, 161),
    "a part of the coordinates": (34, 65, 385),
    "as many columns as are staged": (65, 1024, 3),
    "one more": (65, 1025, 3),
}


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many owners on a small GPU: a block goes through several groups of them."""
    monkeypatch.setattr(KERNELS + ".BLOCKS_PER_PROCESSOR", 1)
    monkeypatch.setattr(native.devices, "processors", lambda tensor: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", STAGED)
def test_columns_in_shared_memory(shape: str, dtype: torch.dtype, one_block: None) -> None:
    metric = "dot" if shape == "the rows" else "l2"
    m, n, d = STAGED[shape]
    x, y = operands((m, n, d), dtype)
    c = Case(x, y, mask_options("different and diagonal", m, n))
    assert_conforms(c, dtype, metric, "sliced" if d == 33 else "contiguous")


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_few_columns_and_rows_are_read_once(side: str, one_block: None, emulated: None) -> None:
    """One block for all groups: every coordinate is copied once forward, and once backward."""
    x = torch.randn(100, 48, requires_grad=side == "rows")
    y = torch.randn(40, 48, requires_grad=side == "columns")
    once = 4 * (x.numel() + y.numel())
    module = cuda_emulation.module()
    module.copied_bytes()
    lse = fc.distance_softmax(x, y, backend="native").lse
    assert module.copied_bytes() == once
    (grad,) = torch.autograd.grad(lse.sum(), x if side == "rows" else y)
    assert module.copied_bytes() == once
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    exact = torch.autograd.grad(fc.distance_softmax(a, b, backend="reference").lse.sum(), [a, b])
    # Sums of up to 100 terms in float32.
    assert relative_error(grad, exact[side == "columns"]) < 100 * 2**-24


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_of_rows_change_no_bit(
    groups: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of threads: one that runs ahead meets the owners of the group before."""
    x, y = torch.randn(90, 70), torch.randn(70, 70)
    rows: list[list[Tensor]] = []
    for order, blocks in ((0, 100), (0, 3 // groups), (1, 3 // groups), (2, 3 // groups)):
        monkeypatch.setattr(KERNELS + ".BLOCKS_PER_PROCESSOR", blocks)
        monkeypatch.setattr(KERNELS + ".TILES_PER_SPLIT", 1 << 20)
        with cuda_emulation.active(order):
            rows.append([*symmetric_loss(x[:70], y, "l2", "native"), *one_way_loss(x, y)])
    for row in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], row, strict=True))


def one_way_loss(x: Tensor, y: Tensor) -> list[Tensor]:
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = fc.info_nce_loss(a, b, target=torch.arange(90) % 70, backend="native")
    return [loss.detach(), *torch.autograd.grad(loss, [a, b])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize("mask", ["two excluded", "same"])
def test_half_points_in_matrix_units(
    mask: str, metric: str, dtype: torch.dtype, matrix_units: None, many_blocks: None
) -> None:
    """Their products are exact, so only weights are rounded: the budget of every backend."""
    layout = "sliced" if mask == "same" else "contiguous"
    assert_conforms(case("ragged", mask, dtype), dtype, metric, layout)


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_gradients_at_lower_precision(metric: str, precision: str, matrix_units: None) -> None:
    """Those of the rounded points, up to the rounding of the weights and of the points."""
    x, y = torch.randn(70, 150), torch.randn(90, 150)  # two blocks of coordinates
    found = []
    for backend, chosen in (("native", precision), ("reference", "ieee")):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        r = fc.distance_softmax(a, b, metric=metric, scale=0.3, precision=chosen, backend=backend)
        found.append(torch.autograd.grad((r.lse + 0.3 * r.entropy).sum(), [a, b]))
    # A score of size s moves by s·unit, and s reaches 120 for squares and products.
    limit = ROUNDING[precision] * (10 if metric == "l2" else 120)
    for mine, true in zip(*found, strict=True):
        assert relative_error(mine, true) < limit


def symmetric_loss(x: Tensor, y: Tensor, metric: str, backend: str) -> list[Tensor]:
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = fc.info_nce_loss(
        a, b, metric=metric, temperature=0.7, symmetric=True, backend=backend,
        precision="bf16x3" if x.dtype == torch.float32 else "ieee",
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, [a, b])]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernels", ["differences", "matrix units", "double"])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_columns_of_symmetric_losses(
    metric: str,
    kernels: str,
    groups: int,
    is_emulated: bool,
    many_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the rows' scores, several groups of rows to a block, several blocks to a column."""
    m, n = 140, 150  # three groups of 64 rows, five of 32; tiles of 32 and 64 columns
    blocks = -(-m // (64 if kernels == "matrix units" else 32))
    parts = -(-blocks // groups)
    monkeypatch.setattr(KERNELS + ".COLUMN_STATE_BYTES", parts * n * 16)
    monkeypatch.setattr(KERNELS + ".TENSOR_MINIMUM", 0 if kernels == "matrix units" else 1 << 60)
    dtype = torch.float64 if kernels == "double" else torch.float32
    x, y = torch.randn(m, 21, dtype=dtype), torch.randn(n, 21, dtype=dtype)
    x[3], y[7] = x[3] * 40, y[7] * 40  # largest scores that do not come first
    launches = cuda_emulation.module().launches if is_emulated else lambda: 0
    launches()
    found = symmetric_loss(x, y, metric, "native")
    # Statistics, the merging of rows and of columns, losses, two gradients; and both sides rounded.
    assert launches() == (8 if kernels == "matrix units" else 6) * is_emulated
    truth = symmetric_loss(x.double(), y.double(), metric, "reference")
    # A score of size s moves by s units in the last place; s is about 20, and where it is 2000, one
    # score has all the mass. Float32's own units are 2^-24.
    limit = {"differences": 100 * 2**-24, "matrix units": 20 * ROUNDING["bf16x3"], "double": 1e-12}
    for mine, true in zip(found, truth, strict=True):
        assert relative_error(mine, true) < limit[kernels]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_losses_with_near_pairs(
    metric: str, precision: str, symmetric: bool, matrix_units: None
) -> None:
    """Positives, and pairs that are nobody's positives, at a distance that rounding would drown."""
    x = torch.randn(40, 24)
    y = torch.cat([x + 1e-4 * torch.randn(40, 24), torch.randn(33, 24)])
    y[50:60] = x[20:30] + 1e-3 * torch.randn(10, 24)
    found = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference")):
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        loss = fc.info_nce_loss(
            a, b, metric=metric, temperature=3.0, symmetric=symmetric, precision=precision,
            backend=backend,
        ) if dtype == torch.float32 else fc.info_nce_loss(
            a, b, metric=metric, temperature=3.0, symmetric=symmetric, backend=backend
        )  # fmt: skip
        found.append([loss, *torch.autograd.grad(loss, [a, b])])
    # Scores reach 20 here; near pairs, the largest part of the gradient, are not rounded.
    for mine, true in zip(*found, strict=True):
        assert relative_error(mine, true) < 20 * ROUNDING[precision]


def test_results_do_not_depend_on_the_order_of_threads(
    matrix_units: None, many_blocks: None, emulated: None
) -> None:
    x, y = torch.randn(40, 40), torch.randn(70, 40)
    y[5:30] = x[5:30] + 1e-4
    rows: list[list[Tensor]] = []
    for order in (0, 1, 2):
        row = []
        for precision in ("ieee", *ROUNDING):
            with cuda_emulation.active(order):
                a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
                loss = fc.info_nce_loss(a, b, symmetric=True, precision=precision, backend="native")
                row += [loss.detach(), *torch.autograd.grad(loss, [a, b])]
        rows.append(row)
    for row in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], row, strict=True))


def test_what_is_not_finite_stays_alone_in_matrix_units(matrix_units: None) -> None:
    x, y = torch.randn(70, 20), torch.randn(66, 20)
    x[3, 4], x[5, 6], y[7, 8] = torch.nan, torch.inf, torch.inf
    lse = fc.distance_softmax(x, y, precision="tf32", backend="native").lse
    finite = [i not in (3, 5) for i in range(70)]
    assert torch.isfinite(lse).tolist() == finite
    others = torch.cat([y[:7], y[8:]])
    truth = fc.distance_softmax(x[finite].double(), others.double(), backend="reference").lse
    assert relative_error(lse[finite], truth) < ROUNDING["tf32"]
