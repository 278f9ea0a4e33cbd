r"""Sum of row losses over `distance_softmax`, with the gradients taken in the forward pass.

.. math:: L = \sum_i a_i\, \mathrm{softplus}(\mathrm{lse}_i - s_{i t_i}) + b_i\, H_i

The upstream gradient of a mean or a sum is one number, so the gradients up to that factor can be
taken while the scores are in cache: 6MND operations instead of 8MND. Called by
``fastcontrast/losses``; the work is in ``fastcontrast/backends/<backend>/distance_softmax.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.reference.distance_softmax import differentiable_loss, row_losses
from fastcontrast.backends.scores import LossWeights, Scores
from fastcontrast.ops.distance_softmax import distance_softmax, effective_precision
from fastcontrast.ops.pairs import paired_scores


def softmax_loss(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    *,
    cross_entropy_weight: Tensor | None,
    entropy_weight: Tensor | None,
    metric: str,
    scale: float | Tensor,
    precision: str,
    backend: str | None,
) -> Tensor:
    """Sum over rows of weighted cross-entropy and entropy; a scalar.

    Args:
        x: Rows [M, D], checked.
        y: Columns [N, D], checked.
        target: Column of each row's positive, int64 [M]; -1 for a row without one, whose a is 0.
        cross_entropy_weight: a [M], or None for 0; carries no gradient.
        entropy_weight: b [M], or None for 0; carries no gradient.
        metric: ``"l2"``, ``"sqeuclidean"`` or ``"dot"``.
        scale: See :func:`~fastcontrast.distance_softmax`.
        precision: See :func:`~fastcontrast.distance_softmax`.
        backend: See :func:`~fastcontrast.distance_softmax`.

    Returns:
        The loss in nats, float32 (float64 for float64 inputs).
    """
    weights = LossWeights(cross_entropy_weight, entropy_weight)
    differentiates = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in (x, y, scale)
    )
    if torch.compiler.is_compiling() or not differentiates:
        rows = distance_softmax(
            x, y, metric=metric, scale=scale, exclude=target, precision=precision, backend=backend
        )
        positive = paired_scores(x, y[target.clamp(min=0)], metric=metric, scale=scale)
        return row_losses(rows.lse, rows.entropy, positive, weights).sum()
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    backend = backends.resolve("distance_softmax", x, backend)
    precision = effective_precision(precision, dtype)
    scores = Scores(metric, scale, target[:, None], None, None, "all", precision)
    scale_input = scale if isinstance(scale, Tensor) else None
    return _GradientsInForward.apply(x, y, scale_input, scores, weights, backend)


class _GradientsInForward(torch.autograd.Function):
    """Keeps the gradients of the loss until its upstream gradient, a number, is known."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor | None,
        scores: Scores,
        weights: LossWeights,
        backend: str,
    ) -> Tensor:
        needs = tuple(ctx.needs_input_grad[:3])
        out = backends.run(backend, "softmax_loss", x, y, scores, weights, needs)
        ctx.save_for_backward(x, y, scale, *out[1:])
        # A tensor scale is kept by save_for_backward alone.
        ctx.scores = scores if scale is None else scores._replace(scale=1.0)
        ctx.weights = weights
        return out.loss.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *gradients = ctx.saved_tensors
        (grad,) = upstream
        needs, inputs = ctx.needs_input_grad[:3], (x, y, scale)
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again
            scores = ctx.scores if scale is None else ctx.scores._replace(scale=scale)
            loss = differentiable_loss(x, y, scores, ctx.weights)
            wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None, None)
        # Scaled before they are rounded to a half input's dtype: a loss scaler relies on it.
        result = [
            (grad * d).to(device=value.device, dtype=value.dtype) if need else None
            for value, d, need in zip(inputs, gradients, needs, strict=True)
        ]
        return (*result, None, None, None)
