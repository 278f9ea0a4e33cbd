r"""Sum of row losses over `distance_softmax`, with the gradients taken in the forward pass.

.. math::
    L = \sum_i a_i\, \mathrm{softplus}(\mathrm{lse}_i - s_{i t_i}) + b_i\, H_i
        + c_i\, \mathrm{softplus}(\mathrm{lse}'_{t_i} - s_{i t_i})

where :math:`\mathrm{lse}'` is taken over the rows of a column: the other direction of a symmetric
loss, from the same scores.

The upstream gradient of a mean or a sum is one number, so the gradients up to that factor can be
taken while the scores are in cache: 6MND operations instead of 8MND. Called by
``fastcontrast/losses``; the work is in ``fastcontrast/backends/<backend>/distance_softmax.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.reference.distance_softmax import (
    differentiable_loss,
    of_positive,
    positive_scores,
    row_losses,
    softplus,
)
from fastcontrast.backends.scores import LossWeights, Scores, accumulator_dtype, transposed
from fastcontrast.ops.checks import PRECISION_CHOICES, check_choice
from fastcontrast.ops.distance_softmax import (
    prepared,
    score_gradients,
    with_tensors,
    without_tensors,
)
from fastcontrast.ops.eager_function import EagerFunction
from fastcontrast.ops.normalized import of_unit_rows
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.ranks import Ranks
from fastcontrast.ops.sharded_softmax import sharded_softmax

__all__ = [
    "LossWeights", "log_add", "positive_scores", "row_losses_of", "softmax_loss", "softplus",
]  # fmt: skip


def softmax_loss(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    weights: LossWeights,
    *,
    metric: str,
    scale: float | Tensor,
    own: Tensor | None = None,
    precision: str,
    backend: str | None,
) -> Tensor:
    """Sum over rows of weighted cross-entropies and entropy; a scalar.

    Args:
        x: Rows [M, D], checked.
        y: Columns [N, D], checked. If it is ``x`` itself, its two gradients are added before they
            are rounded.
        target: Column of each row's positive, int64 [M]; -1 for a row without one, whose a and
            c are 0.
        weights: a, b and c, each [M] or None for 0; they carry no gradient. With c, no two rows
            share a positive.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        scale: See :func:`~fastcontrast.distance_softmax`.
        own: A further column left out of each row, int64 [M]: itself. Not together with c.
        precision: See :func:`~fastcontrast.distance_softmax`.
        backend: See :func:`~fastcontrast.distance_softmax`.

    Returns:
        The loss in nats, float32 (float64 for float64 inputs).
    """
    differentiates = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in (x, y, scale)
    )
    if torch.compiler.is_compiling() or not differentiates:
        return row_losses_of(
            x, y, target, weights, metric=metric, scale=scale, own=own, precision=precision,
            backend=backend,
        ).sum()  # fmt: skip
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    check_choice("precision", precision, PRECISION_CHOICES)
    x, y, metric, precision, backend = prepared(x, y, metric, precision, backend)
    exclude = _left_out(target, own)
    scores = Scores(metric, scale, exclude, None, None, "all", precision)
    scale_input = scale if isinstance(scale, Tensor) else None
    columns = None if y is x else y
    return _GradientsInForward.apply(x, columns, scale_input, exclude, *weights, scores, backend)


def row_losses_of(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    weights: LossWeights,
    *,
    metric: str,
    scale: float | Tensor,
    own: Tensor | None = None,
    ranks: Ranks | None = None,
    resident: int = 0,
    precision: str,
    backend: str | None,
) -> Tensor:
    """Loss of every row [M], each with an upstream gradient of its own; arguments as above.

    With ``ranks``, ``lse`` is taken over the columns of all ranks, the last ``resident`` ones of
    each counting for its own rows alone, and ``lse'`` over the rows of all; a target is a column of
    this rank.

    Operands reach the loss by two ways, through the op and as positives. Half ones are widened
    first, so that the two gradients are added before they are rounded.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    if dtype != accumulator_dtype(dtype):
        precision = of_widened(precision, x, y)
        same = y is x
        x = x.float()
        y = x if same else y.float()
    x, y, metric = of_unit_rows(x, y, metric)
    exclude = _left_out(target, own)
    rows = sharded_softmax(
        ranks, x, y, resident=resident, metric=metric, scale=scale, exclude=exclude,
        precision=precision, backend=backend,
    )  # fmt: skip
    scores = Scores(metric, scale, exclude, None, None, "all", precision)
    paired_lse = None
    if weights.column_cross_entropy is not None:
        columns = sharded_softmax(
            ranks, y, x, metric=metric, scale=scale, exclude=transposed(scores, y.shape[0]).exclude,
            precision=precision, backend=backend,
        )  # fmt: skip
        paired_lse = of_positive(columns.lse, scores)
    return row_losses(rows.lse, rows.entropy, paired_lse, positive_scores(x, y, scores), weights)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), -inf with gradient 0 where both are -inf (torch's has NaN there)."""
    nothing = torch.isneginf(a) & torch.isneginf(b)
    return torch.where(nothing, -torch.inf, torch.logaddexp(torch.where(nothing, 0.0, a), b))


def _left_out(target: Tensor, own: Tensor | None) -> Tensor:
    """Columns left out of each row [M, E]; the first is its positive."""
    return target[:, None] if own is None else torch.stack([target, own], 1)


class _GradientsInForward(EagerFunction):
    """Keeps the gradients of the loss until its upstream gradient, a number, is known."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor | None,
        exclude: Tensor,
        cross_entropy_weight: Tensor | None,
        entropy_weight: Tensor | None,
        column_weight: Tensor | None,
        scores: Scores,
        backend: str,
    ) -> Tensor:
        weights = LossWeights(cross_entropy_weight, entropy_weight, column_weight)
        of_x, of_y, of_scale = ctx.needs_input_grad[:3]
        columns, needs = (x, (of_x, of_x, of_scale)) if y is None else (y, (of_x, of_y, of_scale))
        out = backends.run(backend, "softmax_loss", x, columns, scores, weights, needs)
        dx, dy, dscale = out[1:]
        if y is None and of_x:
            dx, dy = dx.add_(dy), dscale  # in whose place nothing is read
        ctx.save_for_backward(x, y, scale, exclude, *weights, dx, dy, dscale)
        ctx.scores = without_tensors(scores)
        return out.loss.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, exclude, a, b, c, *gradients = ctx.saved_tensors
        (grad,) = upstream
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again
            scores = with_tensors(ctx.scores, scale, exclude, None, None)

            def loss(x: Tensor, y: Tensor, scores: Scores) -> list[Tensor]:
                return [differentiable_loss(x, y, scores, LossWeights(a, b, c))]

            if y is not None:
                return (*score_gradients(loss, x, y, scores, [grad], needs), *[None] * 6)
            twice = (needs[0], needs[0], needs[2])
            dx, dy, dscale = score_gradients(loss, x, x, scores, [grad], twice)
            dx = None if dx is None or dy is None else dx + dy
            return (dx, None, dscale, *[None] * 6)
        result = [
            _scaled(grad, d, value) if need else None
            for value, d, need in zip((x, y, scale), gradients, needs, strict=True)
        ]
        return (*result, *[None] * 6)


def _scaled(factor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """Times a number, then in the dtype and on the device of ``value``.

    Scaled before it is rounded to a half dtype: a loss scaler relies on it. A GPU does both in one
    pass, without a float32 tensor in between.
    """
    if gradient.dtype == value.dtype or gradient.device != value.device:
        return (factor * gradient).to(device=value.device, dtype=value.dtype)
    return torch.mul(factor, gradient, out=torch.empty_like(gradient, dtype=value.dtype))
