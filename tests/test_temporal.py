"""Losses and triplets of ``fastcontrast.temporal`` against loops and dense masks in float64."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from cases import METRICS
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor
from variants import on_every_backend

from fastcontrast.temporal import (
    NeighborhoodDiscriminator,
    TemporalContrastingLoss,
    TemporalPredictionLoss,
    contrasting,
    slow_features,
    temporal_contrasting_loss,
    temporal_neighborhood_loss,
    temporal_prediction_loss,
    temporal_triplets,
)

every_backend = on_every_backend("distance_softmax")


def frames(m: int = 47, d: int = 5, span: int = 30, dtype=torch.float64) -> list[Tensor]:
    """Embeddings with duplicates, ids far from 0 and times with gaps, repeats and no order."""
    x = torch.randn(m, d, dtype=torch.float64)
    ids = torch.randint(0, 3, (m,)) * 2**40 - 5
    times = torch.randint(-span // 2, span // 2, (m,))
    if m > 9:
        x[4], x[7] = x[3], x[6]
        ids[4], times[4] = ids[3], times[3]  # one time, one place: a positive at distance 0
        ids[9] = 77  # a sequence of one frame
    return [x.to(dtype), ids, times]


def masks(ids: Tensor, times: Tensor, window: int, margin: int | None) -> tuple[Tensor, Tensor]:
    same = ids[:, None] == ids
    apart = (times[:, None] - times).abs()
    positive = same & (apart <= window)
    positive.fill_diagonal_(False)
    return positive, ~same if margin is None else ~same | (apart > margin)


def dense_loss(
    x: Tensor, ids: Tensor, times: Tensor, window: int, margin: int | None, metric: str, scale
) -> Tensor:
    """The equation with dense masks: rows [M], differentiable."""
    positive, negative = masks(ids, times, window, margin)
    if metric in ("cosine", "dot"):
        x = torch.nn.functional.normalize(x) if metric == "cosine" else x
        s = scale * x @ x.T
    else:
        d2 = (x[:, None] - x).square().sum(-1)
        zero = d2 == 0
        d = torch.where(zero, 0.0, torch.where(zero, 1.0, d2).sqrt())
        s = -scale * (d if metric == "l2" else d2)
    rows = []
    for i in range(x.shape[0]):
        losses = [
            torch.cat([s[i, p : p + 1], s[i, negative[i]]]).logsumexp(0) - s[i, p]
            for p in positive[i].nonzero().flatten().tolist()
        ]
        rows.append(torch.stack(losses).mean() if losses else 0 * x[i].sum())
    return torch.stack(rows)


def test_the_dense_form_is_the_equation() -> None:
    """Loops over numbers, from the docstring, against the masks that the other tests use."""
    x, ids, times = frames(17)
    window, margin = 3, 5
    expected = []
    for i in range(17):
        score = [oracle.score(x[i].tolist(), y, "l2", 2.0) for y in x.tolist()]
        near, far = [], []
        for j in range(17):
            together, apart = bool(ids[i] == ids[j]), abs(int(times[i] - times[j]))
            if j != i and together and apart <= window:
                near.append(score[j])
            if not together or apart > margin:
                far.append(score[j])
        losses = [oracle.cross_entropy([s, *far], 0) for s in near]
        expected.append(sum(losses) / len(losses) if losses else 0.0)
    rows = dense_loss(x, ids, times, window, margin, "l2", 2.0)
    assert rows.tolist() == pytest.approx(expected, rel=1e-12)  # float64, sums of 17


CASES = [
    # window, margin, span of times: buckets of 1 frame to 1 bucket, and windows over the ends.
    # Metrics and windows do not depend on each other: each metric once, and each window.
    (2, 4, 30, "l2"),
    (2, 4, 30, "sqeuclidean"),
    (2, 4, 30, "dot"),
    (2, 4, 30, "cosine"),
    (1, 1, 30, "l2"),
    (3, 7, 400, "sqeuclidean"),
    (5, 29, 30, "l2"),
    (50, 2**62, 30, "dot"),
    (2, None, 30, "l2"),
]
assert {metric for *_, metric in CASES} == set(METRICS)


@every_backend
@pytest.mark.parametrize(("window", "margin", "span", "metric"), CASES)
def test_values_and_gradients(
    window: int, margin: int | None, span: int, metric: str, backend: str
) -> None:
    x, ids, times = frames(span=span)
    x = x.float().double()
    exact_x, exact_t = x.clone().requires_grad_(), torch.tensor(0.7).double().requires_grad_()
    upstream = torch.rand(47, dtype=torch.float64)
    exact = dense_loss(exact_x, ids, times, window, margin, metric, 1 / exact_t)
    truth = torch.autograd.grad(exact, [exact_x, exact_t], upstream)
    assert truth[0].abs().max() > 0
    single = x.float().requires_grad_()
    temperature = torch.tensor(0.7).double().requires_grad_()
    loss = temporal_contrasting_loss(
        single, ids, times, window=window, margin=margin, metric=metric, temperature=temperature,
        reduction="none", backend=backend,
    )  # fmt: skip
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, [single, temperature], upstream.float())
    assert relative_error(loss, exact) < VALUE_FLOOR[torch.float32]
    for mine, true in zip(found, truth, strict=True):
        assert relative_error(mine, true) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize("gathered", [1, 300])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_taken_in_parts(reduction: str, gathered: int, monkeypatch) -> None:
    """A row at a time, and a few, with what is gathered once more in the backward pass."""
    x, ids, times = frames()
    x.requires_grad_()
    options: dict[str, Any] = {
        "window": 3,
        "margin": 6,
        "reduction": reduction,
        "backend": "reference",
    }
    whole = temporal_contrasting_loss(x, ids, times, **options)
    monkeypatch.setattr(contrasting, "_GATHERED", gathered)
    parts = temporal_contrasting_loss(x, ids, times, **options)
    rows = dense_loss(x, ids, times, 3, 6, "l2", 1.0)
    pays = masks(ids, times, 3, 6)[0].any(1).sum()
    true = {"mean": rows.sum() / pays, "sum": rows.sum(), "none": rows}[reduction]
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v in (whole, parts, true)]
    for value, gradient in ((whole, gradients[0]), (parts, gradients[1])):
        # Float64 against float64: the floors of the suite.
        assert relative_error(value, true) < VALUE_FLOOR[torch.float64]
        assert relative_error(gradient, gradients[2]) < GRADIENT_FLOOR[torch.float64]


@pytest.mark.parametrize(("window", "margin"), [(1, 2), (4, 4), (2, None)])
def test_first_and_second_derivatives(window: int, margin: int | None) -> None:
    """Also of rows without a rest, without a stream and without a positive."""
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    ids, times = torch.tensor([0, 0, 0, 0, 0, 1, 0]), torch.tensor([0, 1, 2, 4, 9, 3, 20])

    def loss(x: Tensor, temperature: Tensor) -> Tensor:
        return temporal_contrasting_loss(
            x, ids, times, window=window, margin=margin, temperature=temperature, reduction="none",
            backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, temperature))
    assert torch.autograd.gradgradcheck(loss, (x, temperature))
    alone = torch.zeros(7, dtype=torch.int64)  # one sequence: streams in which nothing counts

    def one(x: Tensor) -> Tensor:
        return temporal_contrasting_loss(x, alone, times, window=window, margin=margin)

    assert torch.autograd.gradcheck(one, (x,))
    assert torch.autograd.gradgradcheck(one, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    x, ids, times = frames()
    x = x.to(dtype).requires_grad_()
    loss = temporal_contrasting_loss(x, ids, times, window=2, margin=4)
    wide = x.detach().double().requires_grad_()
    true = dense_loss(wide, ids, times, 2, 4, "l2", 1.0).sum()
    true = true / masks(ids, times, 2, 4)[0].any(1).sum()
    assert loss.dtype == torch.float32
    assert relative_error(loss, true) < VALUE_FLOOR[dtype]
    mine, exact = torch.autograd.grad(loss, x)[0], torch.autograd.grad(true, wide)[0]
    assert relative_error(mine, exact) < torch.finfo(dtype).eps


def test_rows_that_have_nothing_pay_nothing() -> None:
    options: dict[str, Any] = {"window": 1, "margin": 2, "reduction": "none"}
    for m in (0, 1, 3):  # no frame, one, and three that are alone in their sequences
        x = torch.randn(m, 4, requires_grad=True)
        ids = torch.arange(m)
        loss = temporal_contrasting_loss(x, ids, torch.zeros_like(ids), **options)
        assert loss.shape == (m,)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), x)[0].eq(0).all()
        mean = temporal_contrasting_loss(x, ids, torch.zeros_like(ids), window=1, margin=None)
        assert mean.item() == 0.0
    # Positives without a negative: certain.
    x = torch.randn(3, 4, requires_grad=True)
    ids, times = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    loss = temporal_contrasting_loss(x, ids, times, window=2, margin=2).sum()
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_a_nan_frame_reaches_those_it_counts_for_alone() -> None:
    """Frame 2 is between window and margin for frames 0 and 4, and counts for the others."""
    x = torch.randn(7, 3)
    x[2] = torch.nan
    ids, times = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 4, 40, 41])
    loss = temporal_contrasting_loss(x, ids, times, window=1, margin=2, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True, False, True, True]


def test_options_that_are_wrong_are_named() -> None:
    x, ids, times = frames()
    good: dict[str, Any] = {"window": 2, "margin": 4}
    for changed, error, message in (
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 1.5}, TypeError, "window must be an integer, got float"),
        ({"margin": 1}, ValueError, "margin must be at least window"),
        ({"metric": "l1"}, ValueError, "metric must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ):
        with pytest.raises(error, match=message):
            temporal_contrasting_loss(x, ids, times, **{**good, **changed})
    with pytest.raises(ValueError, match="sequence_ids must have shape"):
        temporal_contrasting_loss(x, ids[1:], times, **good)
    with pytest.raises(TypeError, match="times must be an int64 or int32 tensor, got torch"):
        temporal_contrasting_loss(x, ids, times.float(), **good)
    far = times.clone()
    far[:2] = torch.tensor([-(2**62), 2**62])
    with pytest.raises(ValueError, match="times must span less than"):
        temporal_contrasting_loss(x, ids, far, **good)
    with pytest.raises(ValueError, match="margin must be at least window"):
        TemporalContrastingLoss(window=3, margin=2)


def test_modules_are_their_functions() -> None:
    x, ids, times = frames(dtype=torch.float32)
    learnt = torch.nn.Parameter(torch.tensor(0.5))
    options: dict[str, Any] = {"window": 2, "margin": 5, "metric": "cosine", "temperature": learnt}
    module = TemporalContrastingLoss(**options)
    assert list(module.parameters()) == [learnt]
    assert torch.equal(module(x, ids, times), temporal_contrasting_loss(x, ids, times, **options))
    context = torch.randn(47, 3)
    prediction = TemporalPredictionLoss(3, 5, 2)
    assert torch.equal(
        prediction(context, x, ids, times),
        temporal_prediction_loss(context, x, ids, times, prediction.weight),
    )


@pytest.mark.parametrize(
    ("margin", "negatives"), [(4, "all"), (4, "same"), (4, "other"), (None, "all")]
)
def test_triplets_are_of_the_equation_and_uniform(margin: int | None, negatives: str) -> None:
    _, ids, times = frames()
    positive, negative = masks(ids, times, 2, margin)
    same = ids[:, None] == ids
    negative &= {"all": torch.ones_like(same), "same": same, "other": ~same}[negatives]
    options: dict[str, Any] = {"window": 2, "margin": margin, "negatives": negatives, "seed": 5}
    found = temporal_triplets(ids, times, per_anchor=400, step=3, **options)
    assert positive[found.anchor, found.positive].all()
    assert negative[found.anchor, found.negative].all()
    anchors = (positive.any(1) & negative.any(1)).nonzero().flatten()
    assert len(anchors) > 10
    assert torch.equal(found.anchor, anchors.repeat_interleave(400))
    for mask, drawn in ((positive, found.positive), (negative, found.negative)):
        counts = torch.zeros(47, 47).index_put_(
            (found.anchor, drawn), torch.ones(()), accumulate=True
        )
        expected = 400 / mask.sum(1, keepdim=True)
        deviation = ((counts - expected).square() / expected)[anchors][mask[anchors]].sum()
        freedom = (mask.sum(1) - 1)[anchors].sum().clamp(min=1)
        # Chi-squared has mean f and variance 2f: five standard deviations.
        assert deviation < freedom + 5 * math.sqrt(2 * freedom)
    again = temporal_triplets(ids, times, per_anchor=400, step=3, **options)
    assert torch.equal(again.negative, found.negative)
    other = temporal_triplets(ids, times, per_anchor=400, step=4, **options)
    assert not torch.equal(other.negative, found.negative)
    first = temporal_triplets(ids, times, step=3, **options)
    assert torch.equal(first.positive, found.positive.view(-1, 400)[:, 0])


def test_triplets_of_nothing_and_mistakes() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert all(len(part) == 0 for part in temporal_triplets(none, none, window=1, margin=1, seed=0))
    with pytest.raises(ValueError, match='margin must be a number for negatives="same"'):
        temporal_triplets(none, none, window=1, margin=None, negatives="same", seed=0)
    with pytest.raises(ValueError, match="negatives must be one of all, same, other"):
        temporal_triplets(none, none, window=1, margin=1, negatives="far", seed=0)
    with pytest.raises(ValueError, match=r"seed must be at least -2\^63"):
        temporal_triplets(none, none, window=1, margin=1, seed=2**64)


@every_backend
def test_prediction_is_the_equation(backend: str) -> None:
    x, ids, times = frames(dtype=torch.float32)
    context, weight = torch.randn(47, 3), torch.randn(3, 5, 3)
    inputs = [value.requires_grad_() for value in (context, x, weight)]
    steps = temporal_prediction_loss(
        context, x, ids, times, weight, reduction="none", backend=backend
    )
    wide = [value.detach().double().requires_grad_() for value in inputs]
    exact = []
    for k in range(1, 4):
        losses = []
        for i in range(47):
            later = ((ids == ids[i]) & (times == times[i] + k)).nonzero().flatten()
            if len(later):
                s = wide[1] @ (wide[2][k - 1] @ wide[0][i])
                losses.append(s.logsumexp(0) - s[later[0]])
        assert losses
        exact.append(torch.stack(losses).mean())
    truth = torch.stack(exact)
    assert relative_error(steps, truth) < VALUE_FLOOR[torch.float32]
    found = torch.autograd.grad(steps.mean(), inputs)
    for mine, true in zip(found, torch.autograd.grad(truth.mean(), wide), strict=True):
        assert relative_error(mine, true) < GRADIENT_FLOOR[torch.float32]


def test_prediction_without_a_later_frame_is_zero_and_mistakes_are_named() -> None:
    x, ids, times = frames(dtype=torch.float32)
    weight = torch.randn(2, 5, 5, requires_grad=True)
    loss = temporal_prediction_loss(x, x, torch.arange(47), times, weight)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, weight)[0].eq(0).all()
    with pytest.raises(ValueError, match=r"weight must have shape \[K, 5, 4\]"):
        temporal_prediction_loss(x[:, :4], x, ids, times, weight)
    with pytest.raises(ValueError, match="context must have as many rows"):
        temporal_prediction_loss(x[1:], x, ids, times, weight)


def test_neighborhood_is_the_equation() -> None:
    near, far = 5 * torch.randn(9, dtype=torch.float64), 5 * torch.randn(9, dtype=torch.float64)
    found = temporal_neighborhood_loss(near, far, weight=0.1, reduction="none")
    for a, b, value in zip(near.tolist(), far.tolist(), found.tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        true = -(math.log(p) + 0.1 * math.log(q) + 0.9 * math.log(1 - q)) / 2
        assert value == pytest.approx(true, rel=1e-10)  # 1 - q loses digits, the loss does not
    sure = temporal_neighborhood_loss(torch.tensor([200.0]), torch.tensor([-200.0]), weight=0.0)
    assert sure.item() == 0.0
    discriminator = NeighborhoodDiscriminator(4).eval()
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    assert discriminator(x, y).shape == (6,)
    with pytest.raises(ValueError, match=r"near must have shape \[M\]"):
        temporal_neighborhood_loss(x, x)
    with pytest.raises(ValueError, match="weight must be at least 0 and below 1"):
        temporal_neighborhood_loss(near, far, weight=1.0)


def test_slow_features_solve_the_eigenproblem() -> None:
    t = torch.arange(200)
    ids, times = t // 60, t % 60  # the last sequence is shorter
    sources = torch.stack([(0.05 * t).sin(), (0.9 * t).cos(), torch.randn(200)], 1).double()
    x = sources @ torch.randn(3, 6, dtype=torch.float64) + 3.0  # three directions of six
    shuffled = torch.randperm(200)
    found = slow_features(x[shuffled], ids[shuffled], times[shuffled], 3)
    y = found.transform(x)
    eye = torch.eye(3, dtype=torch.float64)
    # Whitening divides by the smallest variance kept: float64 leaves at least 1e-8.
    assert torch.allclose(y.mean(0), torch.zeros(3).double(), atol=1e-8)
    assert torch.allclose(y.T @ y / 200, eye, atol=1e-8)
    change = (y[1:] - y[:-1])[ids[1:] == ids[:-1]]
    moved = change.T @ change / len(change)
    assert torch.allclose(moved, torch.diag(found.slowness), atol=1e-8)
    assert (found.slowness.diff() > 0).all()
    assert abs(torch.corrcoef(torch.stack([y[:, 0], sources[:, 0]]))[0, 1]) > 0.95
    with pytest.raises(ValueError, match="dim must be at most the 3 directions"):
        slow_features(x, ids, times, 4)
    with pytest.raises(ValueError, match="times must have two frames of a sequence"):
        slow_features(x, ids, 2 * times, 1)
