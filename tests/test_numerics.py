"""The numbered rules of docs/design.md section 3, one group of tests each (6: test_determinism)."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, NEAR_MULTIPLE, NEAR_PAIR, VALUE_FLOOR, relative_error
from torch import Tensor
from variants import on_every_backend

from fastcontrast import distance_softmax, info_nce_loss
from fastcontrast.backends import native
from fastcontrast.backends.reference.distance_softmax import _rounded

every_backend = on_every_backend("distance_softmax")


def dense_loss(x: Tensor, y: Tensor, metric: str = "l2", temperature: float = 1.0) -> Tensor:
    """InfoNCE on the diagonal in float64, by direct differences and softplus over the others."""
    x, y = x.double(), y.double()
    if metric == "dot":
        s = x @ y.T / temperature
    else:
        d2 = (x[:, None] - y[None]).square().sum(2)
        d = torch.where(d2 == 0, 0.0, torch.where(d2 == 0, 1.0, d2).sqrt())
        s = -(d if metric == "l2" else d2) / temperature
    others = s.masked_fill(torch.eye(*s.shape, dtype=torch.bool), -torch.inf)
    return F.softplus(others.logsumexp(1) - s.diagonal(), threshold=700.0)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


# Rule 1: the positive by direct difference, softplus form.


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_near_positives_keep_their_gradient(distance: float, metric: str, backend: str) -> None:
    y = torch.randn(40, 128)
    x = (y + distance * torch.randn(40, 128)).requires_grad_()
    y.requires_grad_()
    (dx, dy) = gradients(info_nce_loss(x, y, metric=metric, backend=backend), x, y)
    (ex, ey) = gradients(dense_loss(x, y, metric).mean(), x, y)
    assert relative_error(dx, ex) < GRADIENT_FLOOR[torch.float32]
    assert relative_error(dy, ey) < GRADIENT_FLOOR[torch.float32]


@every_backend
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 90.0])
def test_confident_rows_keep_their_loss(gap: float, backend: str) -> None:
    """Losses down to e^-87, far below the eps of the scores that they are formed from."""
    y = gap * torch.eye(6, 8)
    x = (y + 0.01 * torch.randn(6, 8)).requires_grad_()
    loss = info_nce_loss(x, y, reduction="none", backend=backend)
    truth = dense_loss(x, y)
    assert float(truth.detach().max()) < 0.05
    # exp of a score of size |s| multiplies its rounding error by |s|: 2·sqrt(2)·gap·eps.
    floor = 4 * gap * torch.finfo(torch.float32).eps + VALUE_FLOOR[torch.float32]
    normal = truth > torch.finfo(torch.float32).tiny
    assert relative_error(loss[normal], truth[normal]) < floor
    (dx,) = gradients(loss.sum(), x)
    (ex,) = gradients(truth.sum(), x)
    assert relative_error(dx, ex) < 10 * floor or ex.norm().item() < torch.finfo(torch.float32).tiny


# Rule 2: centring, clamping, near pairs by direct difference.


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_an_offset_common_to_all_points_costs_nothing(
    offset: float, metric: str, backend: str
) -> None:
    x, y = torch.randn(40, 64) + offset, torch.randn(50, 64) + offset
    x, y = x.requires_grad_(), y.requires_grad_()
    r = distance_softmax(x, y, metric=metric, scale=0.1, backend=backend)
    t = distance_softmax(x.double(), y.double(), metric=metric, scale=0.1, backend="reference")
    assert relative_error(r.lse, t.lse) < VALUE_FLOOR[torch.float32]
    for mine, true in zip(gradients(r.lse.sum(), x, y), gradients(t.lse.sum(), x, y), strict=True):
        assert relative_error(mine, true) < GRADIENT_FLOOR[torch.float32]


def near_score_error(metric: str, dtype: torch.dtype, dim: int) -> float:
    """Largest error of a score by the Gram identity, in nats, for points of norm about sqrt(dim).

    d² is off by about 4 eps (‖x‖²+‖y‖²); for d the worst pair is the one just above the limit
    d² = NEAR_MULTIPLE eps (‖x‖²+‖y‖²), below which the difference is taken. Sums add eps.
    """
    eps, norms = torch.finfo(dtype).eps, 2 * 1.3 * dim
    squared = 4 * eps * norms
    if metric == "sqeuclidean":
        return 8 * eps + squared
    return 8 * eps + squared / 2 / (NEAR_MULTIPLE[dtype] * eps * norms) ** 0.5


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_near_pairs_in_the_stream(
    distance: float, metric: str, dtype: torch.dtype, backend: str
) -> None:
    """Columns that are near rows without being their positive."""
    x = torch.randn(30, 96, dtype=dtype)
    y = torch.cat(
        [x + distance * torch.randn(30, 96, dtype=dtype), torch.randn(11, 96, dtype=dtype)]
    )
    x, y = x.requires_grad_(), y.requires_grad_()
    r = distance_softmax(x, y, metric=metric, backend=backend)
    xd, yd = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    t = distance_softmax(xd, yd, metric=metric, backend="reference")
    assert float((r.lse.double() - t.lse).detach().abs().max()) < near_score_error(
        metric, dtype, 96
    )
    for mine, true in zip(
        gradients(r.lse.sum(), x, y), gradients(t.lse.sum(), xd, yd), strict=True
    ):
        assert relative_error(mine, true) < NEAR_PAIR[dtype]


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_coincident_points_have_gradient_zero(metric: str, backend: str) -> None:
    x = torch.full((5, 7), 0.3, requires_grad=True)
    y = torch.full((6, 7), 0.3, requires_grad=True)
    loss = info_nce_loss(x, y, metric=metric, backend=backend)
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
    if metric != "dot":
        for gradient in gradients(loss, x, y):
            assert torch.equal(gradient, torch.zeros_like(gradient))


# Rule 3: online maximum, masks before it, rows in which nothing counts.


@every_backend
@pytest.mark.parametrize("level", [300.0, -300.0, 3000.0, -3000.0])
@pytest.mark.parametrize("columns", [1, 15, 17, 70])
def test_scores_far_from_zero(columns: int, level: float, backend: str) -> None:
    """A padded column read as score 0 would win or drown these rows."""
    x = torch.cat([torch.full((3, 1), level), torch.randn(3, 2)], 1)
    y = torch.cat([torch.ones(columns, 1), torch.randn(columns, 2)], 1)
    r = distance_softmax(x, y, metric="dot", backend=backend)
    s = x.double() @ y.double().T
    assert relative_error(r.lse, s.logsumexp(1)) < VALUE_FLOOR[torch.float32]


@every_backend
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_temperatures_and_large_norms(metric: str, temperature: float, backend: str) -> None:
    x, y = 1e3 * torch.randn(20, 32), 1e3 * torch.randn(20, 32)
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = info_nce_loss(x, y, metric=metric, temperature=temperature, backend=backend)
    truth = dense_loss(x, y, metric, temperature).mean()
    assert relative_error(loss, truth) < VALUE_FLOOR[torch.float32]
    for gradient in gradients(loss, x, y):
        assert bool(torch.isfinite(gradient).all())


@every_backend
def test_rows_in_which_nothing_counts(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(5, 3, requires_grad=True)
    r = distance_softmax(
        x, y, keep="same", row_ids=torch.tensor([0, 9, 0, 9]), column_ids=torch.zeros(5, dtype=int),
        threshold=torch.full((4,), -100.0), score_sum=True, backend=backend,
    )  # fmt: skip
    assert torch.isinf(r.lse).tolist() == [False, True, False, True]
    assert r.entropy[1::2].tolist() == r.score_sum[1::2].tolist() == [0.0, 0.0]
    assert r.column_count.tolist() == r.rank.tolist() == [5, 0, 5, 0]
    dx, dy = gradients((F.softplus(r.lse) + r.entropy + r.score_sum).sum(), x, y)
    assert torch.equal(dx[1::2], torch.zeros(2, 3))
    assert bool(torch.isfinite(dx).all() and torch.isfinite(dy).all())


@every_backend
def test_a_lone_positive_costs_nothing(backend: str) -> None:
    x = torch.randn(1, 3, requires_grad=True)
    y = torch.randn(1, 3, requires_grad=True)
    loss = info_nce_loss(x, y, backend=backend)
    assert loss.item() == 0.0
    for gradient in gradients(loss, x, y):
        assert torch.equal(gradient, torch.zeros(1, 3))


@every_backend
def test_no_rows(backend: str) -> None:
    x = torch.empty(0, 3, requires_grad=True)
    y = torch.randn(4, 3, requires_grad=True)
    loss = info_nce_loss(x, y, backend=backend)
    assert loss.item() == 0.0
    for gradient, like in zip(gradients(loss, x, y), (x, y), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


# Rule 4: dtypes in and out, promotion, autocast.


@every_backend
@pytest.mark.parametrize(
    ("left", "right", "out"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted(
    left: torch.dtype, right: torch.dtype, out: torch.dtype, backend: str
) -> None:
    x = torch.randn(5, 8).to(left).requires_grad_()
    y = torch.randn(6, 8).to(right).requires_grad_()
    loss = info_nce_loss(x, y, backend=backend)
    assert loss.dtype == out
    dx, dy = gradients(loss, x, y)
    assert (dx.dtype, dy.dtype) == (left, right)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_lower_the_products(dtype: torch.dtype, backend: str) -> None:
    x, y = torch.randn(30, 64, requires_grad=True), torch.randn(31, 64)
    plain = info_nce_loss(x, y, backend=backend)
    (expected,) = gradients(plain, x)
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce_loss(x, y, backend=backend)
        (gradient,) = gradients(loss, x)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient, expected)


# Rule 5: precision.


def test_rounding_of_operands() -> None:
    """Largest relative rounding error: half a unit in the last place of the mantissa kept."""
    x = torch.randn(10_000).abs() + 0.01
    for precision, bits in (("tf32", 10), ("bf16", 7), ("bf16x3", 15)):
        error = ((_rounded(x, precision) - x).abs() / x).max().item()
        assert 2.0 ** -(bits + 3) < error <= 2.0 ** -(bits + 1), (precision, error)
    assert torch.equal(_rounded(x, "ieee"), x)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for precision in ("tf32", "bf16", "bf16x3"):
        assert torch.isinf(_rounded(special[:2], precision)).all()
        assert torch.isnan(_rounded(special, precision)[2])


@every_backend
@pytest.mark.parametrize(
    ("precision", "unit"),
    [("ieee", 2.0**-24), ("bf16x3", 2.0**-16), ("tf32", 2.0**-11), ("bf16", 2.0**-8)],
)
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_precision_bounds_the_error_of_scores(
    metric: str, precision: str, unit: float, backend: str
) -> None:
    x, y = torch.randn(30, 64), torch.randn(1, 64)  # one column: lse is the score
    r = distance_softmax(x, y, metric=metric, precision=precision, backend=backend)
    t = distance_softmax(x.double(), y.double(), metric=metric, backend="reference")
    # Rounded operands move the points by unit·‖x‖; for dot both sides are rounded.
    size = (x.norm(dim=1) + y.norm()) if metric == "l2" else 2 * x.norm(dim=1) * y.norm()
    error = (r.lse.double() - t.lse).abs() / size
    # The sums over 64 products and squares add a few eps.
    assert error.max().item() < 1.5 * unit + 8 * 2.0**-24


@every_backend
def test_auto_precision_follows_torch(backend: str) -> None:
    x, y = torch.randn(30, 64), torch.randn(31, 64)
    explicit = {
        p: distance_softmax(x, y, precision=p, backend=backend).lse
        for p in ("ieee", "tf32", "bf16")
    }
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(setting)
            lse = distance_softmax(x, y, backend=backend).lse
            assert torch.equal(lse, explicit[precision])
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("cuda.matmul", "tf32"), ("mkldnn.matmul", "bf16"), ("mkldnn.matmul", "ieee"),
     ("mkldnn", "bf16")],
)  # fmt: skip
def test_the_newer_precision_settings(setting: str, value: str) -> None:
    """Torch refuses to mix its two APIs; in a process of its own, because the state is global."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this torch has the older setting only")
    code = f"""
import torch, fastcontrast as fc
torch.manual_seed(0)
x, y = torch.randn(90, 300), torch.randn(90, 300)
expected = fc.info_nce_loss(x.double(), y.double())
torch.backends.{setting}.fp32_precision = "{value}"
before = torch.backends.mkldnn.matmul.fp32_precision
loss = fc.info_nce_loss(x.requires_grad_(), y, backend="native")
loss.backward()
assert abs(loss.item() - expected.item()) < 1e-5, (loss, expected)
assert torch.backends.mkldnn.matmul.fp32_precision == before
fc.info_nce_loss(x, y, backend="reference", precision="auto").backward()
"""
    if native.IMPORT_PROBLEM is not None:
        pytest.skip(native.IMPORT_PROBLEM)
    subprocess.run([sys.executable, "-c", code], check=True)


@every_backend
@pytest.mark.parametrize("precision", ["tf32", "bf16x3", "bf16"])
def test_float64_is_never_rounded(precision: str, backend: str) -> None:
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    lse = distance_softmax(x, y, precision=precision, backend=backend).lse
    assert torch.equal(lse, distance_softmax(x, y, precision="ieee", backend=backend).lse)


# Rule 7: NaN and inf.


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["row", "column"])
def test_non_finite_inputs_show(side: str, value: float, metric: str, backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(7, 4)
    (x if side == "row" else y)[2, 1] = value
    lse = distance_softmax(x, y, metric=metric, backend=backend).lse
    finite = torch.isfinite(lse)
    if side == "row":  # only its own row
        assert finite.tolist() == [i != 2 for i in range(6)]
    elif math.isnan(value):  # the sum of every row
        assert bool(torch.isnan(lse).all())
    elif metric == "dot":  # the score of row i is x_i1 · inf
        assert torch.equal(lse == torch.inf, x[:, 1] * value > 0)
        assert torch.equal(finite, x[:, 1] * value < 0)
    else:  # infinitely far from every row: it does not count
        others = torch.cat([y[:2], y[3:]])
        expected = distance_softmax(x, others, metric=metric, backend="reference").lse
        assert relative_error(lse, expected) < VALUE_FLOOR[torch.float32]


@every_backend
@pytest.mark.parametrize("dim", [5, 300])  # of Triton's, the fused kernel and the wide one
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_a_nan_column_shows_in_every_gradient(metric: str, dim: int, backend: str) -> None:
    """It is in every row's sum, and so in all probabilities: no bound may turn it into a number."""
    x, y = torch.randn(6, dim), torch.randn(7, dim)
    y[2, 1] = torch.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    r = distance_softmax(x, y, metric=metric, backend=backend)
    for gradient in gradients(r.lse.sum(), x, y):
        assert bool(gradient.isnan().any(1).all())


@every_backend
def test_an_excluded_nan_does_not_count(backend: str) -> None:
    x, y = torch.randn(5, 4), torch.randn(7, 4)
    y[2] = torch.nan
    lse = distance_softmax(x, y, exclude=torch.full((5,), 2), metric="dot", backend=backend).lse
    clean = torch.cat([y[:2], y[3:]])
    assert relative_error(lse, (x.double() @ clean.double().T).logsumexp(1)) < 2e-6


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_a_filled_column_that_is_excluded_leaves_gradients_alone(metric: str, backend: str) -> None:
    """What docs/numerics.md tells to do with a bad column: 0 · NaN is NaN in a matrix product."""
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    y[2] = torch.nan
    y.requires_grad_()
    bad = y.isnan().any(1)
    exclude = torch.full((5,), 2)
    filled = y.masked_fill(bad[:, None], 0.0)
    r = distance_softmax(x, filled, exclude=exclude, metric=metric, backend=backend)
    t = distance_softmax(x.double(), y[~bad].double(), metric=metric, backend="reference")
    assert relative_error(r.lse, t.lse) < VALUE_FLOOR[torch.float32]
    dx, dy = gradients(r.lse.sum(), x, y)
    ex, ey = gradients(t.lse.sum(), x, y)
    assert relative_error(dx, ex) < GRADIENT_FLOOR[torch.float32]
    assert relative_error(dy, ey) < GRADIENT_FLOOR[torch.float32]
    assert torch.equal(dy[2], torch.zeros(4))


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
def test_addresses_are_64_bit() -> None:
    from fastcontrast.backends.native.distance_softmax import _address

    matrix = torch.empty(1).expand(2**33, 2**20)  # strides 0, 0
    assert _address(matrix, slice(2**32, None)) == matrix.data_ptr()
    column = torch.empty(0, dtype=torch.float32).as_strided((0, 1), (2**21, 1))
    assert _address(column, slice(2**20, None)) - column.data_ptr() == 2**43
