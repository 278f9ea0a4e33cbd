"""Every loss against its equation, its invariants and its Module."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor, nn
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("distance_softmax")
# Both sides in float64; the oracle's sums are naive.
ORACLE = {"rel": 1e-11, "abs": 1e-12}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# InfoNCE


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("targets", ["diagonal", "given"])
def test_info_nce_is_the_equation(targets: str, metric: str, backend: str) -> None:
    x, y = random(6, 5), random(9, 5)
    target = None if targets == "diagonal" else torch.tensor([8, 0, 0, 3, 5, 3])
    loss = fc.info_nce_loss(
        x, y, target, metric=metric, temperature=0.7, reduction="none", backend=backend
    )
    for i in range(6):
        scores = [oracle.score(x[i].tolist(), y[j].tolist(), metric, 1 / 0.7) for j in range(9)]
        truth = oracle.cross_entropy(scores, i if target is None else int(target[i]))
        assert loss[i].item() == pytest.approx(truth, **ORACLE)


@every_backend
def test_the_swap_of_the_readme(backend: str) -> None:
    """F.cross_entropy(-torch.cdist(x, y), target) and its gradients."""
    x, y = torch.randn(90, 24, requires_grad=True), torch.randn(110, 24, requires_grad=True)
    target = torch.randint(110, (90,))
    a = F.cross_entropy(-torch.cdist(x, y), target)
    b = fc.info_nce_loss(x, y, target, backend=backend)
    assert relative_error(b, a) < 2 * VALUE_FLOOR[torch.float32]
    for left, right in zip(
        torch.autograd.grad(b, [x, y]), torch.autograd.grad(a, [x, y]), strict=True
    ):
        assert relative_error(left, right) < 2 * GRADIENT_FLOOR[torch.float32]


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine", "dot"])
def test_temperature_receives_its_gradient(metric: str, backend: str) -> None:
    x, y = random(4, 3), random(5, 3)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: fc.info_nce_loss(x, y, metric=metric, temperature=t, backend=backend), temperature
    )


def test_reductions_agree() -> None:
    x, y = random(7, 4), random(7, 4)
    rows = fc.info_nce_loss(x, y, reduction="none")
    assert rows.shape == (7,)
    torch.testing.assert_close(fc.info_nce_loss(x, y), rows.mean())
    torch.testing.assert_close(fc.info_nce_loss(x, y, reduction="sum"), rows.sum())


def test_rows_with_their_own_upstream_gradients() -> None:
    x, y = random(7, 4).requires_grad_(), random(8, 4)
    weights = random(7)
    (a,) = torch.autograd.grad((weights * fc.info_nce_loss(x, y, reduction="none")).sum(), x)
    dense = F.cross_entropy(-torch.cdist(x, y), torch.arange(7), reduction="none")
    (b,) = torch.autograd.grad((weights * dense).sum(), x)
    torch.testing.assert_close(a, b)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    m=st.integers(1, 12), extra=st.integers(0, 9), d=st.integers(1, 9),
    temperature=st.floats(0.05, 20.0), shift=st.floats(-50.0, 50.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_properties(
    m: int, extra: int, d: int, temperature: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m + extra, d, generator=generator, dtype=torch.float64)
    loss = fc.info_nce_loss(x, y, temperature=temperature)
    assert loss.item() >= 0.0
    close = {"rtol": 1e-9, "atol": 1e-10}
    # A shift of all points and a common factor of distances and temperature change nothing.
    torch.testing.assert_close(
        fc.info_nce_loss(x + shift, y + shift, temperature=temperature), loss, **close
    )
    torch.testing.assert_close(
        fc.info_nce_loss(3 * x, 3 * y, temperature=3 * temperature), loss, **close
    )
    # The order of the other keys does not matter; a key at a great distance does not count.
    order = torch.cat([torch.arange(m), m + torch.randperm(extra, generator=generator)])
    torch.testing.assert_close(
        fc.info_nce_loss(x, y[order], temperature=temperature), loss, **close
    )
    # It moves the mean that the points are centred by, so norms of up to 3e3 enter d²: their
    # squares times eps are 2e-9.
    far = torch.full((1, d), 1e3, dtype=torch.float64)
    torch.testing.assert_close(
        fc.info_nce_loss(x, torch.cat([y, far]), temperature=temperature),
        loss, rtol=1e-6, atol=1e-7,
    )  # fmt: skip
    r = fc.distance_softmax(x, y, scale=1 / temperature)
    assert bool((r.lse >= -torch.cdist(x, y).amin(1) / temperature - 1e-9).all())
    assert bool((r.entropy >= -1e-12).all() and (r.entropy <= math.log(m + extra) + 1e-12).all())


# Spatial contrasting


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
def test_spatial_contrasting_is_equation_4(symmetric: bool, backend: str) -> None:
    f1, f2 = random(7, 5), random(7, 5)
    total = 0.0
    for i in range(7):
        scores = [-math.dist(f1[i].tolist(), f2[j].tolist()) for j in range(7)]
        total += oracle.cross_entropy(scores, i) / 7
        if symmetric:
            back = [-math.dist(f2[i].tolist(), f1[j].tolist()) for j in range(7)]
            total += oracle.cross_entropy(back, i) / 7
    loss = fc.spatial_contrasting_loss(f1, f2, symmetric=symmetric, backend=backend)
    assert loss.item() == pytest.approx(total / (2 if symmetric else 1), **ORACLE)


@every_backend
def test_spatial_contrasting_gradient_is_the_papers(backend: str) -> None:
    """dL/dD_ij = (1[i=j] - P_ij) / N, and dD_ij/df_i = (f_i - g_j) / D_ij."""
    f, g = random(6, 4).requires_grad_(), random(6, 4)
    (gradient,) = torch.autograd.grad(fc.spatial_contrasting_loss(f, g, backend=backend), f)
    distance = torch.cdist(f, g, compute_mode="donot_use_mm_for_euclid_dist")
    weight = (torch.eye(6) - torch.softmax(-distance, 1)) / 6 / distance
    expected = (weight[..., None] * (f[:, None] - g[None])).sum(1)
    torch.testing.assert_close(gradient, expected.detach())


# Semi-supervised metric embedding


@every_backend
@pytest.mark.parametrize("squared", [True, False])
def test_metric_embedding_is_the_equation(squared: bool, backend: str) -> None:
    x, z = random(8, 5), random(4, 5)
    targets = torch.tensor([0, -1, 3, 3, -1, -1, 1, 2])
    metric = "sqeuclidean" if squared else "l2"
    options: dict[str, Any] = {"squared": squared, "unlabelled_weight": 0.3, "backend": backend}
    rows = []
    for i in range(8):
        scores = [oracle.score(x[i].tolist(), z[c].tolist(), metric, 1.0) for c in range(4)]
        c = int(targets[i])
        rows.append(oracle.cross_entropy(scores, c) if c >= 0 else 0.3 * oracle.entropy(scores))
    loss = fc.metric_embedding_loss(x, z, targets, reduction="none", **options)
    assert loss.tolist() == pytest.approx(rows, **ORACLE)
    labelled = [r for r, t in zip(rows, targets.tolist(), strict=True) if t >= 0]
    unlabelled = [r for r, t in zip(rows, targets.tolist(), strict=True) if t < 0]
    mean = fc.metric_embedding_loss(x, z, targets, **options).item()
    assert mean == pytest.approx(sum(labelled) / 5 + sum(unlabelled) / 3, **ORACLE)
    total = fc.metric_embedding_loss(x, z, targets, reduction="sum", **options).item()
    assert total == pytest.approx(sum(rows), **ORACLE)


@every_backend
@pytest.mark.parametrize("squared", [True, False])
def test_metric_embedding_gradcheck(squared: bool, backend: str) -> None:
    x, z = random(5, 3).requires_grad_(), random(4, 3).requires_grad_()
    targets = torch.tensor([0, -1, 3, -1, 1])
    assert torch.autograd.gradcheck(
        lambda x, z: fc.metric_embedding_loss(x, z, targets, squared=squared, backend=backend),
        (x, z),
        fast_mode=backend == "triton",  # along one direction: the interpreter is slow
    )


@every_backend
@pytest.mark.parametrize("targets", [[0, 2, 1], [-1, -1, -1], []])
def test_metric_embedding_of_one_kind_of_row(targets: list[int], backend: str) -> None:
    """All labelled, all unlabelled, no rows: the missing mean is 0. A constant F gives log c."""
    x = torch.zeros(len(targets), 2, requires_grad=True)
    z = torch.zeros(3, 2, requires_grad=True)
    loss = fc.metric_embedding_loss(x, z, torch.tensor(targets, dtype=torch.int64), backend=backend)
    assert loss.item() == pytest.approx(math.log(3) if targets else 0.0, rel=1e-6)
    for gradient in torch.autograd.grad(loss, [x, z]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_metric_embedding_with_anchors_of_each_row(reduction: str, squared: bool) -> None:
    """Alike for all rows they give what shared ones give; and each row uses its own."""
    x, z, other = random(6, 4).requires_grad_(), random(3, 4), random(3, 4)
    targets = torch.tensor([0, 2, -1, 1, -1, 1])
    options: dict[str, Any] = {"squared": squared, "unlabelled_weight": 0.3, "temperature": 0.7}
    loss = lambda z, **o: fc.metric_embedding_loss(x, z, targets, **options, **o)  # noqa: E731
    shared = loss(z, reduction=reduction)
    torch.testing.assert_close(loss(z.expand(6, 3, 4), reduction=reduction), shared)
    rows = loss(torch.stack([z, other] * 3), reduction="none")
    even = torch.arange(6) % 2 == 0
    expected = torch.where(even, loss(z, reduction="none"), loss(other, reduction="none"))
    torch.testing.assert_close(rows, expected)
    own = random(6, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, z: fc.metric_embedding_loss(x, z, targets, reduction=reduction), (x, own)
    )
    single = fc.metric_embedding_loss(x, own[:, :1], targets.clamp(max=0), squared=squared)
    for gradient in torch.autograd.grad(single, [x, own]):  # of one class nothing is to be learnt
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_metric_embedding_knows_no_order_of_classes() -> None:
    x, z = random(6, 4), random(5, 4)
    targets = torch.tensor([0, 4, -1, 2, -1, 1])
    order = torch.tensor([3, 1, 4, 0, 2])
    renamed = torch.where(targets < 0, -1, torch.argsort(order)[targets.clamp(min=0)])
    torch.testing.assert_close(
        fc.metric_embedding_loss(x, z[order], renamed), fc.metric_embedding_loss(x, z, targets)
    )


# Triplet ratio


@pytest.mark.parametrize("objective", ["mse", "nll"])
def test_triplet_ratio_is_the_equation(objective: str) -> None:
    a, p, n = random(6, 4), random(6, 4), random(6, 4)
    loss = fc.triplet_ratio_loss(a, p, n, objective=objective, reduction="none")
    truth = [
        oracle.triplet_ratio(a[i].tolist(), p[i].tolist(), n[i].tolist(), objective)
        for i in range(6)
    ]
    assert loss.tolist() == pytest.approx(truth, **ORACLE)
    inputs = tuple(t.requires_grad_() for t in (a, p, n))
    assert torch.autograd.gradcheck(
        lambda a, p, n: fc.triplet_ratio_loss(a, p, n, objective=objective), inputs
    )


def test_triplet_ratio_swaps_to_the_complement() -> None:
    """Exchanging x⁺ and x⁻ maps d₊ to 1 - d₊; at a constant F the loss is 1/4."""
    a, p, n = random(6, 4), random(6, 4), random(6, 4)
    one = fc.triplet_ratio_loss(a, p, n, reduction="none").sqrt()
    other = fc.triplet_ratio_loss(a, n, p, reduction="none").sqrt()
    torch.testing.assert_close(one + other, torch.ones_like(one))
    x = torch.ones(3, 2, requires_grad=True)
    loss = fc.triplet_ratio_loss(x, x, x)
    assert loss.item() == 0.25
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_triplet_nll_far_from_zero() -> None:
    """softplus(b) to full precision where exp(-b) is below eps."""
    a, p = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    n = torch.full((1, 1), 60.0, dtype=torch.float64)
    loss = fc.triplet_ratio_loss(a, p, n, objective="nll").item()
    assert loss == pytest.approx(math.exp(-60.0), rel=1e-12)


# Modules and dtypes


MODULES = [
    (fc.InfoNCELoss(metric="cosine", temperature=0.2), fc.info_nce_loss,
     {"metric": "cosine", "temperature": 0.2}, lambda: (random(4, 3), random(6, 3))),
    (fc.SpatialContrastingLoss(symmetric=True, temperature=0.5), fc.spatial_contrasting_loss,
     {"symmetric": True, "temperature": 0.5}, lambda: (random(4, 3), random(4, 3))),
    (fc.MetricEmbeddingLoss(squared=False, unlabelled_weight=2.0), fc.metric_embedding_loss,
     {"squared": False, "unlabelled_weight": 2.0},
     lambda: (random(4, 3), random(2, 3), torch.tensor([0, -1, 1, -1]))),
    (fc.TripletRatioLoss(objective="nll", reduction="sum"), fc.triplet_ratio_loss,
     {"objective": "nll", "reduction": "sum"}, lambda: (random(4, 3), random(4, 3), random(4, 3))),
    (fc.TripletMarginLoss(margin=0.3, swap=True), fc.triplet_margin_loss,
     {"margin": 0.3, "swap": True}, lambda: (random(4, 3), random(4, 3), random(4, 3))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "function", "options", "inputs"), MODULES, ids=lambda v: getattr(v, "__name__", "")
)
def test_modules_call_their_function(
    module: nn.Module, function: Any, options: dict, inputs: Any
) -> None:
    arguments = inputs()
    assert torch.equal(module(*arguments), function(*arguments, **options))
    assert type(module).__name__ in repr(module)
    assert function.__name__ in type(module).__doc__


def test_a_learnable_temperature_is_a_parameter_of_the_module() -> None:
    module = fc.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(torch.randn(4, 3), torch.randn(4, 3)).backward()
    assert module.temperature.grad is not None


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_lose_only_their_own_rounding(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(30, 16).to(dtype).requires_grad_()
    y = torch.randn(40, 16).to(dtype).requires_grad_()
    loss = fc.info_nce_loss(x, y, backend=backend)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(-torch.cdist(x.double(), y.double()), torch.arange(30))
    assert relative_error(loss, exact) < VALUE_FLOOR[dtype]
    for mine, true in zip(
        torch.autograd.grad(loss, [x, y]), torch.autograd.grad(exact, [x, y]), strict=True
    ):
        assert relative_error(mine, true) < GRADIENT_FLOOR[dtype]


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ["l2", "sqeuclidean", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_rounded_once(
    dtype: torch.dtype, loss: str, reduction: str, backend: str
) -> None:
    """Two gradients of the size of an offset, rounded before they are added, would leave noise."""
    x = (0.3 * torch.randn(30, 16) + 10).to(dtype)
    y = (0.3 * torch.randn(40, 16)).to(dtype)

    def gradient(x: Tensor, y: Tensor, backend: str) -> Tensor:
        x = x.requires_grad_()
        options = {"temperature": 20.0, "reduction": reduction, "backend": backend}
        if loss == "embedding":
            value = fc.metric_embedding_loss(x, y, torch.arange(30) - 1, **options)
        else:
            value = fc.info_nce_loss(x, y, metric=loss, **options)
        return torch.autograd.grad(1024 * value.sum(), x)[0]  # clear of float16's denormals

    truth = gradient(x.double(), y.double(), "reference")
    assert relative_error(gradient(x, y, backend), truth) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_temperature_is_inverted_in_the_accumulator_dtype(dtype: torch.dtype) -> None:
    x, y = random(5, 4), random(6, 4)
    temperature = torch.tensor(0.07).to(dtype).requires_grad_()
    loss = fc.info_nce_loss(x, y, temperature=temperature)
    truth = fc.info_nce_loss(x, y, temperature=float(temperature.detach().double()))
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert torch.autograd.grad(loss, temperature)[0].dtype == dtype


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_changed_in_place_is_noticed(reduction: str) -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3)
    target = torch.arange(5)
    loss = fc.info_nce_loss(x, y, target, reduction=reduction).sum()
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_columns_far_outside_name_none() -> None:
    """Also at the ends of int64, and beyond one tile."""
    x, y = torch.randn(3, 2), torch.randn(2100, 2)
    limits = torch.iinfo(torch.int64)
    exclude = torch.tensor([[limits.min, limits.max], [-1, 2100], [2**40, -(2**40)]])
    a, b = fc.distance_softmax(x, y, exclude=exclude), fc.distance_softmax(x, y)
    assert torch.equal(a.lse, b.lse)
