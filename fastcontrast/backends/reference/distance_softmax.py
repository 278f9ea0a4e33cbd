"""`distance_softmax` by definition: direct differences, dense masks, PyTorch's own softmax.

Rows go in chunks. :func:`differentiable_statistics` is the same
computation left open to autograd: double backward goes through it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.backends.reference.blocks import columns_that_count, of_rows, row_chunks
from fastcontrast.backends.reference.pairs import paired_scores
from fastcontrast.backends.scores import (
    LossGradients,
    LossWeights,
    RowGradients,
    Scores,
    Statistics,
    accumulator_dtype,
    empty_statistics,
    transposed,
)


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    out = empty_statistics(x, score_sum=score_sum, rank=threshold is not None)
    for rows in row_chunks(x, y):
        part = of_rows(scores, rows)
        s, counts = _masked(
            _similarity(*_operands(x[rows], y, part), part.metric) * part.scale, part
        )
        lse, out.entropy[rows], row_sum = _softmax_statistics(s, counts)
        out.lse[rows], out.lse_residual[rows] = lse, _left_over(s, lse)
        if score_sum:
            out.score_sum[rows], out.column_count[rows] = row_sum, counts.sum(1)
        if threshold is not None:
            out.rank[rows] = (s > threshold[rows][:, None]).sum(1)
    return out


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale from (lse, lse_residual, entropy); empty where not needed."""
    dtype = accumulator_dtype(x.dtype)
    dx = torch.zeros_like(x, dtype=dtype) if needs[0] else x.new_empty(0)
    dy = torch.zeros_like(y, dtype=dtype) if needs[1] else y.new_empty(0)
    dscale = x.new_zeros((), dtype=dtype) if needs[2] else x.new_empty(0, dtype=dtype)
    for rows in row_chunks(x, y):
        part = of_rows(scores, rows)
        a, b = _operands(x[rows], y, part)
        similarity = _similarity(a, b, part.metric)
        s, counts = _masked(similarity * part.scale, part)
        row_state = [v[rows] for v in statistics]
        row_grads = [None if v is None else v[rows].to(dtype) for v in grads]
        g = _score_gradient(s, counts, *row_state, *row_grads)
        if needs[2]:
            dscale += torch.where(counts, g * similarity, 0.0).sum()
        g = g * part.scale
        if part.metric == "dot":
            da, db = g @ b, g.T @ a
        else:
            distance = similarity.abs() if part.metric == "l2" else similarity.abs().sqrt()
            g = -g if part.metric == "l2" else -2.0 * g * distance
            da = torch.ops.aten._cdist_backward(g, a, b, 2.0, distance)
            db = torch.ops.aten._cdist_backward(g.T.contiguous(), b, a, 2.0, distance.T)
        if needs[0]:
            dx[rows] = da
        if needs[1]:
            dy += db
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def softmax_loss(
    x: Tensor, y: Tensor, scores: Scores, weights: LossWeights, needs: tuple[bool, bool, bool]
) -> LossGradients:
    """Loss of every row and all gradients of their sum, by the two passes above."""
    dtype = accumulator_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    rows = distance_softmax_forward(x, y, scores, None, False)
    turned, columns = transposed(scores, y.shape[0]), None
    if weights.column_cross_entropy is not None:
        columns = distance_softmax_forward(y, x, turned, None, False)

    def gradients(
        grad_lse: Tensor, grad_entropy: Tensor | None, grad_column_lse: Tensor | None
    ) -> tuple[Tensor, ...]:
        grads = RowGradients(grad_lse, grad_entropy, None)
        found = distance_softmax_backward(x, y, scores, rows[:3], grads, needs)
        if columns is None:
            return found
        grads = RowGradients(grad_column_lse, None, None)
        swapped = (needs[1], needs[0], needs[2])
        dy, dx, dscale = distance_softmax_backward(y, x, turned, columns[:3], grads, swapped)
        return tuple(a + b for a, b in zip(found, (dx, dy, dscale), strict=True))

    column_lse = None if columns is None else columns.lse
    return loss_by_two_passes(
        x, y, scores, weights, needs, rows.lse, rows.entropy, column_lse, gradients
    )


def loss_by_two_passes(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    weights: LossWeights,
    needs: tuple[bool, bool, bool],
    lse: Tensor,
    entropy: Tensor,
    column_lse: Tensor | None,
    gradients: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]],
) -> LossGradients:
    """What the entry ``softmax_loss`` returns, from statistics that are there already.

    ``gradients(grad_lse, grad_entropy, grad_column_lse)`` gives those of x, y and scale through
    the statistics; the positives are added here. ``x`` and ``y`` are in the accumulator dtype.
    """
    leaves = [
        x.detach().requires_grad_(needs[0]),
        y.detach().requires_grad_(needs[1]),
        torch.as_tensor(scores.scale, dtype=x.dtype, device=x.device).detach().clone(),
    ]
    leaves[2].requires_grad_(needs[2])
    with torch.enable_grad():
        positive = positive_scores(leaves[0], leaves[1], scores._replace(scale=leaves[2]))
    fixed = positive.detach()
    a, b, c = weights
    grad_lse = sigmoid_weights(a, lse, fixed)
    grad_column_lse, paired_lse, grad_pair = None, None, grad_lse
    if column_lse is not None:
        paired_lse = of_positive(column_lse, scores)
        grad_paired = sigmoid_weights(c, paired_lse, fixed)
        grad_pair = grad_lse + grad_paired
        grad_column_lse = at_positives(grad_paired, scores, y.shape[0])
    found = gradients(grad_lse, b, grad_column_lse)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if wanted:
        part = iter(torch.autograd.grad(positive, wanted, -grad_pair, materialize_grads=True))
        found = tuple(g + next(part) if need else g for g, need in zip(found, needs, strict=True))
    return LossGradients(row_losses(lse, entropy, paired_lse, fixed, weights), *found)


def sigmoid_weights(weight: Tensor | None, lse: Tensor, positive: Tensor) -> Tensor:
    """Derivative of ``weight softplus(lse - positive)`` by lse, [M]."""
    if weight is None:
        return torch.zeros_like(positive)
    return torch.where(weight == 0, 0.0, weight * torch.sigmoid(lse - positive))


def differentiable_loss(x: Tensor, y: Tensor, scores: Scores, weights: LossWeights) -> Tensor:
    """Sum of the row losses, as a graph that can be differentiated any number of times."""
    lse, entropy, _ = differentiable_statistics(x, y, scores)
    paired_lse = None
    if weights.column_cross_entropy is not None:
        column_lse, *_ = differentiable_statistics(y, x, transposed(scores, y.shape[0]))
        paired_lse = of_positive(column_lse, scores)
    return row_losses(lse, entropy, paired_lse, positive_scores(x, y, scores), weights).sum()


def row_losses(
    lse: Tensor,
    entropy: Tensor,
    paired_lse: Tensor | None,
    positive: Tensor,
    weights: LossWeights,
) -> Tensor:
    """Loss of every row [M] of :class:`LossWeights`; a term of weight 0 is 0.

    ``paired_lse`` is the log-sum-exp of the column of each row's positive.
    """
    loss = torch.zeros_like(lse)
    a, b, c = weights
    if a is not None:
        loss = loss + torch.where(a == 0, 0.0, a * softplus(lse - positive))
    if b is not None:
        loss = loss + torch.where(b == 0, 0.0, b * entropy)
    if c is not None and paired_lse is not None:
        loss = loss + torch.where(c == 0, 0.0, c * softplus(paired_lse - positive))
    return loss


def of_positive(values: Tensor, scores: Scores) -> Tensor:
    """Of values per column [N], that of each row's positive [M]; any where there is none."""
    # Not a fresh tensor: a rank without rows must go through the backward pass with the others.
    return values[_positive_columns(scores)] if values.shape[0] else values


def at_positives(values: Tensor, scores: Scores, columns: int) -> Tensor:
    """Of values per row [M], each at the column of its positive [N]; no two rows share one."""
    # One slot more takes the rows without a positive, whose value is 0.
    slots = torch.where(values == 0, columns, _positive_columns(scores))
    return values.new_zeros(columns + 1).scatter(0, slots, values)[:-1]


def _positive_columns(scores: Scores) -> Tensor:
    if scores.exclude is None:
        raise ValueError("a loss needs the column of each row's positive")
    return scores.exclude[:, 0].clamp(min=0).to(torch.int64)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact over the whole range of float64 (PyTorch's default cuts off at 20)."""
    return F.softplus(x, threshold=50.0)


def positive_scores(x: Tensor, y: Tensor, scores: Scores) -> Tensor:
    """Score of each row's positive [M], the first of its ``exclude``; any where there is none."""
    # F.embedding, because the gradient of y[target] is not deterministic on two threads.
    positives = F.embedding(_positive_columns(scores), y)
    return paired_scores(x, positives, metric=scores.metric, scale=scores.scale)


def differentiable_statistics(
    x: Tensor, y: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, entropy, score_sum) as a graph that can be differentiated any number of times.

    Takes O(M·N·D) memory.
    """
    a, b = _operands(x, y, scores)
    if scores.metric == "dot":
        similarity = a @ b.T
    else:
        squared = (a[:, None, :] - b[None, :, :]).square().sum(2)
        coincident = squared == 0
        distance = torch.where(coincident, 0.0, torch.where(coincident, 1.0, squared).sqrt())
        similarity = -distance if scores.metric == "l2" else -squared
    return _softmax_statistics(*_masked(similarity * scores.scale, scores))


def _operands(x: Tensor, y: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Both sides in the accumulator dtype, rounded as the precision allows."""
    dtype = accumulator_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if scores.precision == "ieee":
        return x.contiguous(), y.contiguous()
    if scores.metric != "dot":  # centred before rounding, as where the rounding is in hardware
        mean = y.detach().mean(0) if y.shape[0] else y.new_zeros(y.shape[1])
        mean = torch.where(torch.isfinite(mean), mean, 0.0)
        x, y = x - mean, y - mean
    return _rounded(x, scores.precision), _rounded(y, scores.precision)


def _similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Scores [M, N] before the scale."""
    if metric == "dot":
        return a @ b.T
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return -distance if metric == "l2" else -distance.square()


def _masked(s: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Scores with -inf where a column does not count, and which columns count, both [M, N]."""
    counts = columns_that_count(s, scores)
    return s.masked_fill(~counts, -torch.inf), counts


def _softmax_statistics(s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if s.shape[1] == 0:
        zero = s.sum(1)
        return zero - torch.inf, zero, zero  # lse, entropy, score_sum
    empty = ~counts.any(1)
    # -inf minus -inf must not be reached, not even by the gradient of a branch not taken.
    defined = torch.where(empty[:, None], 0.0, s)
    lse = torch.where(empty, -torch.inf, torch.logsumexp(defined, 1))
    log_p = torch.log_softmax(defined, 1)
    finite = torch.where((s == -torch.inf) | empty[:, None], 0.0, log_p)
    entropy = -(log_p.exp() * finite).sum(1)
    return lse, entropy, torch.where(counts, s, 0.0).sum(1)


def _left_over(s: Tensor, lse: Tensor) -> Tensor:
    """What the rounding of ``lse`` left over: the logarithm of the sum of the probabilities."""
    finite = torch.isfinite(lse)
    residual = torch.logsumexp(s - torch.where(finite, lse, 0.0)[:, None], 1)
    return torch.where(finite, residual, 0.0)


def _score_gradient(
    s: Tensor,
    counts: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    entropy: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum: Tensor | None,
) -> Tensor:
    """∂L/∂s = p (g_lse - g_entropy (log p + H)) + g_sum, 0 where a column does not count."""
    lse = torch.where(torch.isneginf(lse), 0.0, lse)  # nothing counts
    log_p = (s - lse[:, None]) - lse_residual[:, None]
    p = log_p.exp()
    log_p = torch.where(p == 0, 0.0, log_p)
    factor = torch.zeros_like(p)
    if grad_lse is not None:
        factor = factor + grad_lse[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
    g = p * factor
    if grad_sum is not None:
        g = g + grad_sum[:, None]
    return torch.where(counts, g, 0.0)


def _rounded(x: Tensor, precision: str) -> Tensor:
    """``x`` as a matrix unit of that precision sees it; gradients pass straight through."""
    if precision == "ieee" or x.dtype == torch.float64:
        return x
    value = x.detach()
    if precision == "tf32":  # 10 bits of mantissa, ties away from zero as cvt.rna does
        bits = value.contiguous().view(torch.int32)
        rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    else:
        rounded = value.to(torch.bfloat16).float()
        if precision == "bf16x3":  # high and low halves: 16 bits of mantissa
            rounded = rounded + (value - rounded).to(torch.bfloat16).float()
    return torch.where(torch.isfinite(value), x + (rounded - value), x)
