"""Losses and statistics whose products are of bfloat16 operands: rules 2, 4, 5 of docs/design.md.

In a file of its own because it runs once per matrix unit, not per backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bf16_units import on_every_unit, on_threefold_units
from tolerances import GRADIENT_FLOOR, NEAR_PAIR, VALUE_FLOOR, assert_within_budget, relative_error
from torch import Tensor

from fastcontrast import distance_softmax, info_nce_loss, metric_embedding_loss
from fastcontrast.backends import native

if native.IMPORT_PROBLEM is None:
    from fastcontrast.backends.native import distance_softmax as module
    from fastcontrast.backends.native import products

METRICS = ("l2", "sqeuclidean", "dot")
# Largest relative error of the coordinates that a precision keeps, and of the product of two.
UNIT = {"bf16x3": 2.0**-17, "bf16": 2.0**-8}


def points(m: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(m, d).to(dtype), (torch.randn(n, d) + 0.5).to(dtype)
    y[3] = x[2]  # coincident points
    return x, y


def results(
    x: Tensor, y: Tensor, metric: str, backend: str, precision: str = "auto"
) -> dict[str, Tensor]:
    """Rows and a mean, which recompute scores and take gradients in the forward pass."""
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    options: dict[str, Any] = {"metric": metric, "backend": backend, "precision": precision}
    target = torch.arange(x.shape[0]) % y.shape[0]
    r = distance_softmax(x, y, scale=0.7, exclude=target, **options)
    loss = info_nce_loss(x, y, target, temperature=1.3, **options)
    entropy = metric_embedding_loss(
        x, y, target - 1, squared=metric != "l2", unlabelled_weight=0.7, backend=backend,
        precision=precision,
    )  # fmt: skip
    found = {"lse": r.lse, "entropy": r.entropy, "loss": loss, "embedding": entropy}
    m = min(x.shape[0], y.shape[0])
    found["symmetric"] = info_nce_loss(x[:m], y[:m], symmetric=True, **options)
    for name, value in (
        ("rows", (r.lse + 0.3 * r.entropy).sum()), ("loss", loss), ("embedding", entropy),
        ("symmetric", found["symmetric"]),
    ):  # fmt: skip
        for side, gradient in zip("xy", torch.autograd.grad(value, [x, y]), strict=True):
            found[f"{name} d{side}"] = gradient
    return {name: value.detach() for name, value in found.items()}


@on_every_unit
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(5, 17, 15), (67, 131, 50), (530, 2100, 20)])
def test_bf16_inputs_lose_nothing(shape: tuple[int, int, int], metric: str, unit: str) -> None:
    """The budgets of bfloat16 inputs are those of float32 products; gradients round once more."""
    x, y = points(*shape, torch.bfloat16)
    truth = results(x.double(), y.double(), metric, "reference")
    eager = results(x, y, metric, "reference")
    for name, value in results(x, y, metric, "native").items():
        floor = GRADIENT_FLOOR if " d" in name else VALUE_FLOOR
        assert_within_budget(name, value, truth[name], eager[name], floor[torch.bfloat16])


@on_every_unit
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("offset", [0.0, 0.5, 3.0, 100.0])
def test_bf16_inputs_with_an_offset(
    offset: float, metric: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are multiplied without centring where that costs little, else centred, in float32."""
    taken = []
    choose = products.choose_products
    monkeypatch.setattr(module, "choose_products", lambda *a: taken.append(choose(*a)) or taken[-1])
    x, y = torch.randn(40, 64) + offset, torch.randn(50, 64) + offset
    x, y = x.bfloat16(), y.bfloat16()
    r = distance_softmax(x, y, metric=metric, scale=0.1, backend="native")
    t = distance_softmax(x.double(), y.double(), metric=metric, scale=0.1, backend="reference")
    assert relative_error(r.lse, t.lse) < VALUE_FLOOR[torch.bfloat16]
    in_bf16 = [isinstance(p, products.Bf16Products) for p, _ in taken]
    assert in_bf16 == [offset < 1.0]


def score_errors(x: Tensor, y: Tensor, metric: str, precision: str) -> float:
    """Largest error of a score in nats that the precision allows, without near pairs.

    Points move by the unit times their coordinates; of two terms the product of the low ones is
    missing, at most 2^-16 of |x|·|y|, in d² twice that. Sums over D round a few eps.
    """
    x, y = x.double(), y.double()
    if metric != "dot":
        x, y = x - y.mean(0), y - y.mean(0)
    moved = UNIT[precision] * (x.norm(dim=1)[:, None] + y.norm(dim=1)[None])
    size = x.abs() @ y.abs().T
    product = (2 * UNIT[precision] + 2.0**-20) * size
    if precision == "bf16x3":
        product = product + 2.0**-16 * size
    if metric == "dot":
        return float(product.max())
    d = torch.cdist(x, y)
    left_out = (2.0**-15 if precision == "bf16x3" else 2.0**-20) * size
    far = d.square() > 2.0**-8 * (x.square().sum(1)[:, None] + y.square().sum(1)[None])
    error = torch.where(far, moved + left_out / (2 * d), 0.0)
    return float((error if metric == "l2" else 2 * d * error).max())


@on_every_unit
@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_precision_bounds_the_error(metric: str, precision: str, unit: str) -> None:
    x, y = points(67, 131, 50, torch.float32)
    scale = 0.01  # so that the exponential of the error is near 1
    r = distance_softmax(x, y, metric=metric, scale=scale, precision=precision, backend="native")
    t = distance_softmax(x.double(), y.double(), metric=metric, scale=scale, backend="reference")
    bound = scale * score_errors(x, y, metric, precision) + 8 * 2.0**-24 * float(t.lse.max())
    error = float((r.lse.double() - t.lse).abs().max())
    assert error < bound
    if precision == "bf16":  # rounded indeed, and not computed in full
        assert error > bound / 1000


@on_threefold_units
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
def test_two_terms_are_nearly_float32(precision: str, metric: str, unit: str) -> None:
    """A weight errs with its score, 5e-6 of the largest, and two terms hold it within 2^-17."""
    x, y = points(267, 400, 64, torch.float32)
    truth = results(x.double(), y.double(), metric, "reference")
    largest = float(-distance_softmax(x, y, metric=metric, backend="reference").lse.min())
    score = 5e-6 * max(1.0, abs(largest), 2 * 64)
    floor = score if metric != "l2" else 5e-6 * 16
    for name, value in results(x, y, metric, "native", precision).items():
        allowed = 2 * floor + 2.0**-15 if " d" in name else floor
        assert relative_error(value, truth[name]) < allowed, name


@on_threefold_units
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
@pytest.mark.parametrize("distance", [0.2, 0.1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_near_pairs_of_two_terms(distance: float, metric: str, unit: str) -> None:
    """The limit is 32 times that of float32, as the error is: what remains errs as much."""
    x = torch.randn(30, 96)
    y = torch.cat([x + distance * torch.randn(30, 96), torch.randn(11, 96)])
    x, y = x.requires_grad_(), y.requires_grad_()
    r = distance_softmax(x, y, metric=metric, precision="bf16x3", backend="native")
    xd, yd = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    t = distance_softmax(xd, yd, metric=metric, backend="reference")
    # Of d², the low products err by 2^-16 (‖x‖²+‖y‖²) at most; of d at the limit d² = 2^-8 of it.
    norms = 2 * 1.3 * 96
    squared = 2.0**-16 * norms
    bound = squared if metric == "sqeuclidean" else squared / 2 / (2.0**-8 * norms) ** 0.5
    assert float((r.lse.double() - t.lse).detach().abs().max()) < bound + 8 * 2.0**-23
    for mine, true in zip(
        torch.autograd.grad(r.lse.sum(), [x, y]),
        torch.autograd.grad(t.lse.sum(), [xd, yd]),
        strict=True,
    ):
        assert relative_error(mine, true) < NEAR_PAIR[torch.float32]


@on_every_unit
def test_float32_products_where_three_are_slower(unit: str) -> None:
    x, y = torch.randn(60, 40), torch.randn(70, 40)
    lse = {
        p: distance_softmax(x, y, precision=p, backend="native").lse
        for p in ("ieee", "tf32", "bf16x3", "bf16")
    }
    assert torch.equal(lse["tf32"], lse["bf16x3"])
    assert torch.equal(lse["ieee"], lse["bf16x3"]) == (unit == "avx512_bf16")
    assert not torch.equal(lse["ieee"], lse["bf16"])
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(setting)
            assert torch.equal(distance_softmax(x, y, backend="native").lse, lse[precision])
    finally:
        torch.set_float32_matmul_precision(before)


@on_every_unit
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_not_rounded(dtype: torch.dtype, unit: str) -> None:
    x, y = torch.randn(60, 40).to(dtype), torch.randn(70, 40).to(dtype)
    lse = distance_softmax(x, y, precision="bf16", backend="native").lse
    t = distance_softmax(x.double(), y.double(), backend="reference").lse
    assert relative_error(lse, t) < VALUE_FLOOR[dtype]


@on_every_unit
@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_inputs_show(
    dtype: torch.dtype, value: float, metric: str, precision: str, unit: str
) -> None:
    """As float32 products show them: rule 7."""
    x, y = points(20, 30, 40, dtype)
    x[4, 1] = value
    y[5, 2] = value
    options: dict[str, Any] = {"metric": metric, "backend": "native"}
    lse = distance_softmax(x, y, precision=precision, **options).lse
    full = distance_softmax(x.float(), y.float(), precision="ieee", **options).lse
    assert torch.equal(torch.isnan(lse), torch.isnan(full))
    assert torch.equal(torch.isinf(lse), torch.isinf(full))


@on_every_unit
def test_tiles_are_aligned_to_panels(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(67, 131, 50, torch.bfloat16)
    whole = results(x, y, "l2", "native")
    monkeypatch.setattr(module, "TILE_ROWS", 5)
    monkeypatch.setattr(module, "TILE_COLUMNS", 33)
    monkeypatch.setattr(module, "LOSS_BLOCK", 1)
    for name, value in results(x, y, "l2", "native").items():
        floor = GRADIENT_FLOOR if " d" in name else VALUE_FLOOR
        assert relative_error(value, whole[name].double()) < floor[torch.bfloat16], name
