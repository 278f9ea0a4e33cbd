"""`distance_softmax` in Triton: row statistics, gradients recomputed, and both for one loss.

The kernels are in row_statistics.py and point_gradients.py up to launch.LARGEST_FUSED dimensions,
and in wide.py, beside PyTorch's GEMMs, beyond. Memory is O((M+N)·D). 8MND operations would do for
forward and backward; with a kernel for each side, so that nothing is added by two programs, it is
10MND. Where GEMMs write the scores it is 8MND, and 6MND for a loss: its statistics, weights and
gradients are taken from the same block of whole rows.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastcontrast.backends.reference.distance_softmax import (
    at_positives,
    of_positive,
    row_losses,
    sigmoid_weights,
)
from fastcontrast.backends.scores import (
    LossGradients,
    LossWeights,
    RowGradients,
    Scores,
    Statistics,
    accumulator_dtype,
    empty_statistics,
    gradients_of_nothing,
    statistics_of_nothing,
    transposed,
)
from fastcontrast.backends.triton.call import capability, given_or, splits_of, widths
from fastcontrast.backends.triton.directions import turn
from fastcontrast.backends.triton.launch import Launch, is_fused, launch, wide_launch
from fastcontrast.backends.triton.mask import Mask
from fastcontrast.backends.triton.operands import BLOCK as POINTS_EACH
from fastcontrast.backends.triton.operands import Operands, Points, prepare
from fastcontrast.backends.triton.pairs import add_pairs, pair_scores
from fastcontrast.backends.triton.point_gradients import point_gradients_kernel
from fastcontrast.backends.triton.row_statistics import (
    PAIR_PART,
    merge_splits_kernel,
    row_statistics_kernel,
)
from fastcontrast.backends.triton.row_table import empty_table, row_table, weight_times
from fastcontrast.backends.triton.wide import Weights, blocks_of_products

LN_2 = 0.6931471805599453
MERGE_BLOCK = 128
# Bytes of what row blocks leave of columns, up to which columns are reduced from the rows' tiles.
COLUMN_BYTES = 128 << 20


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return statistics_of_nothing(x, score_sum=score_sum, rank=threshold is not None)
    return _statistics(prepare(x, y, scores), Mask(scores), threshold, score_sum)


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale from (lse, lse_residual, entropy); empty where not needed."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        dx, dy, dscale = gradients_of_nothing(x, y, needs)
    else:
        operands = prepare(x, y, scores)
        dx, dy, dscale = _gradients(operands, Mask(scores), statistics, grads, needs)
        _turn(operands, dx, dy, needs)
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def softmax_loss(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    weights: LossWeights,
    needs: tuple[bool, bool, bool],
) -> LossGradients:
    """Loss of every row and all gradients of their sum."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        loss = x.new_zeros(x.shape[0], dtype=accumulator_dtype(x.dtype))
        return LossGradients(loss, *gradients_of_nothing(x, y, needs))
    operands, mask = prepare(x, y, scores), Mask(scores)
    acc = accumulator_dtype(x.dtype)
    a, b, c = (None if w is None else w.detach().to(acc) for w in weights)
    assert mask.exclude is not None
    target = mask.exclude[:, 0].contiguous()
    positive, inverse = pair_scores(operands, target, mask.metric)
    positive = positive.double()
    columns, paired_lse, gradients = None, None, None
    if c is not None:  # both directions of a symmetric loss
        rows, columns = _both_statistics(operands, mask, scores)
        paired_lse = of_positive(_in_full(columns), scores)
    elif _is_fused("gradients", operands, mask.metric):
        rows = _statistics(operands, mask, None, False)
    else:
        rows, gradients = _statistics_and_gradients(operands, mask, positive, (a, b), needs)
    lse = _in_full(rows)
    loss = row_losses(lse, rows.entropy, paired_lse, positive, LossWeights(a, b, c))
    grad_lse = sigmoid_weights(a, lse, positive)
    grad_pair, grad_columns = grad_lse, None
    if columns is not None and paired_lse is not None:
        of_columns = sigmoid_weights(c, paired_lse, positive)
        grad_pair = grad_lse + of_columns
        grad_columns = ColumnGradients(columns, at_positives(of_columns, scores, y.shape[0]))
    if gradients is None:
        of_rows = RowGradients(grad_lse, b, None)
        gradients = _gradients(operands, mask, rows[:3], of_rows, needs, grad_columns)
    dx, dy, dscale = gradients
    if a is not None or c is not None:
        weight = (-grad_pair * inverse * operands.scale).to(acc)
        add_pairs(
            operands, target, weight, mask.metric,
            dx if needs[0] else None, dy if needs[1] else None,
        )  # fmt: skip
        if needs[2]:
            product = torch.where(grad_pair == 0, 0.0, grad_pair * positive).sum()
            dscale = dscale - (product / operands.scale).to(acc)
    _turn(operands, dx, dy, needs)
    return LossGradients(loss.to(acc), dx, dy, dscale)


class Tables(NamedTuple):
    """Of row_table.py: numbers of the rows, their excluded columns, numbers of the columns."""

    rows: Tensor
    left_out: Tensor
    columns: Tensor | None


class ColumnGradients(NamedTuple):
    """Statistics of the columns, and the gradient of their log-sum-exp [N]."""

    statistics: Statistics
    lse: Tensor


def _turn(operands: Operands, dx: Tensor, dy: Tensor, needs: tuple[bool, bool, bool]) -> None:
    """For "cosine", make the gradients those of the points whose products have been taken."""
    for points, grad, need in zip((operands.x, operands.y), (dx, dy), needs[:2], strict=True):
        if points.power is not None and need:
            turn(grad, points.values, points.norms, points.power)


def _in_full(statistics: Statistics) -> Tensor:
    return statistics.lse.double() + statistics.lse_residual.double()


def _statistics(
    operands: Operands, mask: Mask, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    rank = threshold is not None
    out = empty_statistics(operands.x.given, score_sum=score_sum, rank=rank)
    limit = out.lse if threshold is None else threshold.to(out.lse.dtype).contiguous()
    if not _is_fused("statistics", operands, mask.metric):
        sizes = _wide_sizes("statistics", operands)
        for rows, dots in blocks_of_products(operands, mask.metric):
            _launch_wide_statistics(operands, mask, rows, dots, out, limit, sizes)
    else:
        many = score_sum or rank or mask.row_ids is not None
        sizes = _sizes("statistics", operands, mask.metric, many=many)
        _launch_statistics(operands, mask, out, limit, score_sum, rank, sizes, None)
    return out


def _both_statistics(
    operands: Operands, mask: Mask, scores: Scores
) -> tuple[Statistics, Statistics]:
    """Statistics of every row, and of every column without entropies, from the same tiles.

    Where row blocks would leave more than COLUMN_BYTES, and for wide points, the columns' are those
    of the rows of the transposed problem, from a launch of their own.
    """
    n = operands.y.given.shape[0]
    if _is_fused("statistics", operands, mask.metric):
        many = mask.row_ids is not None
        sizes = _sizes("statistics", operands, mask.metric, many=many, symmetric=True)
        rows = empty_statistics(operands.x.given, score_sum=False, rank=False)
        columns = empty_statistics(operands.y.given, score_sum=False, rank=False)
        blocks = triton.cdiv(rows.lse.shape[0], sizes.block)
        if blocks * 2 * n * rows.lse.itemsize <= COLUMN_BYTES:
            state = rows.lse.new_empty(blocks, 2, n)
            _launch_statistics(operands, mask, rows, rows.lse, False, False, sizes, None, state)
            _launch_merge(state, state, columns, False, False)
            return rows, columns._replace(entropy=columns.entropy.zero_())
    exchanged = _statistics(operands.exchanged(), Mask(transposed(scores, n)), None, False)
    return _statistics(operands, mask, None, False), exchanged


def _launch_wide_statistics(
    operands: Operands,
    mask: Mask,
    rows: slice,
    dots: Tensor,
    out: Statistics,
    limit: Tensor,
    sizes: Launch,
) -> Statistics:
    """Fill some rows of ``out`` from their dot products with all columns, and return those."""
    part = Statistics(*(value[rows] for value in out))
    given, values, low, norms = (value[rows] for value in operands.x[:4])
    block = operands._replace(x=Points(given, values, low, norms, operands.x.largest))
    score_sum, rank = out.score_sum.numel() > 0, out.rank.numel() > 0
    of_rows = mask.of_rows(rows)
    _launch_statistics(block, of_rows, part, limit[rows], score_sum, rank, sizes, dots)
    return part


def _launch_statistics(
    operands: Operands,
    mask: Mask,
    out: Statistics,
    limit: Tensor,
    score_sum: bool,
    rank: bool,
    sizes: Launch,
    dots: Tensor | None,
    column_state: Tensor | None = None,
) -> None:
    """Fill ``out`` from the points, or from their dot products [M, N] where they are given.

    ``column_state`` [row blocks, 2, N], if given, takes what the row blocks find of the columns.
    """
    x, y = operands.x, operands.y
    m, dim, n = x.given.shape[0], x.given.shape[1], y.given.shape[0]
    splits, split_columns = splits_of(m, n, sizes, x.given.device)
    state = torch.empty(splits, 4, m, dtype=torch.float64, device=x.given.device)
    counts = state
    if score_sum or rank:
        counts = torch.empty(splits, 2, m, dtype=torch.int64, device=x.given.device)
    row_statistics_kernel[(triton.cdiv(m, sizes.block) * splits,)](
        x.values if dots is None else dots, x.low, x.norms, y.values, y.low, y.norms,
        y.largest, x.given, y.given, operands.scale,
        given_or(mask.exclude, state), given_or(mask.row_ids, state),
        given_or(mask.column_ids, state), limit, state, counts, given_or(column_state, state),
        m, n, dim, split_columns, splits,
        x.values.stride(0), y.values.stride(0),
        *x.given.stride(), *y.given.stride(),
        **mask.options, **operands.product_options, SCORE_SUM=score_sum, RANK=rank,
        BLOCK_M=sizes.block, BLOCK_N=sizes.other, **widths(dim, sizes),
        FROM_DOTS=dots is not None, COLUMNS=column_state is not None,
        GROUP=POINTS_EACH, PAIR_PART=PAIR_PART,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    _launch_merge(state, counts, out, score_sum, rank)


def _launch_merge(
    state: Tensor, counts: Tensor, out: Statistics, score_sum: bool, rank: bool
) -> None:
    """Fill ``out`` from ``state`` [parts, 4 or 2, M], what programs have found."""
    parts, numbers, m = state.shape
    merge_splits_kernel[(triton.cdiv(m, MERGE_BLOCK),)](
        state, counts, *(out.lse, out.lse_residual, out.entropy),
        out.score_sum, out.column_count, out.rank, m, parts,
        SCORE_SUM=score_sum, RANK=rank, NUMBERS=numbers, BLOCK=MERGE_BLOCK,
    )  # fmt: skip


def _gradients(
    operands: Operands,
    mask: Mask,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
    columns: ColumnGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the accumulator dtype; the scale's comes with the first side computed."""
    scale, metric, n = operands.scale, mask.metric, operands.y.given.shape[0]
    table, left_out = row_table(statistics, grads, scale, metric, mask.exclude, n)
    column_table = None
    if columns is not None:
        of_columns = RowGradients(columns.lse, None, None)
        column_table, _ = row_table(columns.statistics[:3], of_columns, scale, metric)
    if not _is_fused("gradients", operands, mask.metric):
        weights = _weights(operands, mask, (table, column_table), grads, needs)
        for rows, dots in blocks_of_products(operands, mask.metric):
            weights.add_block(rows, dots)
        return _with_scale(weights.result(), operands, mask, needs)
    tables = Tables(table, left_out, column_table)
    found = _fused_gradients(operands, mask, tables, grads, needs)
    return _with_scale(found, operands, mask, needs)


def _statistics_and_gradients(
    operands: Operands,
    mask: Mask,
    positive: Tensor,
    of_losses: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Statistics, tuple[Tensor, Tensor, Tensor]]:
    """Of a loss in one direction with weights a and b, from scores that a GEMM writes once."""
    a, b = of_losses
    out = empty_statistics(operands.x.given, score_sum=False, rank=False)
    table = empty_table(out.lse)
    weights = _weights(operands, mask, (table, None), RowGradients(None, b, None), needs)
    sizes = _wide_sizes("statistics", operands)
    for rows, dots in blocks_of_products(operands, mask.metric):
        part = _launch_wide_statistics(operands, mask, rows, dots, out, out.lse, sizes)
        weight, entropy = (None if w is None else w[rows] for w in (a, b))
        grad_lse = sigmoid_weights(weight, _in_full(part), positive[rows])
        grads = RowGradients(grad_lse, entropy, None)
        row_table(part[:3], grads, operands.scale, mask.metric, out=table[:, rows])
        weights.add_block(rows, dots)
    return out, _with_scale(weights.result(), operands, mask, needs)


def _weights(
    operands: Operands,
    mask: Mask,
    tables: tuple[Tensor, Tensor | None],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> Weights:
    ids = (given_or(mask.row_ids, tables[0]), given_or(mask.column_ids, tables[0]))
    tensors = (given_or(mask.exclude, tables[0]), *ids)
    extras = (grads.entropy is not None, grads.score_sum is not None)
    sizes = _wide_sizes("weights", operands)
    return Weights(operands, tensors, mask.options, tables, extras, needs, sizes)


def _with_scale(
    found: tuple[Tensor, Tensor, Tensor],
    operands: Operands,
    mask: Mask,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and the scale from those of x and y and Σ c' t, as row_table has c'."""
    dx, dy, product = found
    if not needs[2]:
        return dx, dy, operands.scale.new_empty(0)
    scale = operands.scale.double()
    of_scores = product.sum() * LN_2 / (scale * weight_times(mask.metric))
    return dx, dy, (of_scores / scale).to(operands.scale.dtype)


def _fused_gradients(
    operands: Operands,
    mask: Mask,
    tables: Tables,
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sides that need one, and Σ c' t, which comes with the first of them."""
    dx = dy = product = tables.rows.new_empty(0)
    if needs[0] or not needs[1]:
        dx, product = _side(operands, mask, tables, grads, rows=True, product=needs[2])
    if needs[1]:
        first = needs[2] and product.numel() == 0
        dy, of_columns = _side(operands, mask, tables, grads, rows=False, product=first)
        product = of_columns if first else product
    return dx if needs[0] else tables.rows.new_empty(0), dy, product


def _side(
    operands: Operands,
    mask: Mask,
    tables: Tables,
    grads: RowGradients,
    *,
    rows: bool,
    product: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows or of the columns, and Σ c' t of each if ``product``."""
    table, left_out, column_table = tables
    own, other = (operands.x, operands.y) if rows else (operands.y, operands.x)
    count, dim = own.given.shape
    others = other.given.shape[0]
    extras = (grads.entropy, grads.score_sum, mask.row_ids)
    many = product or any(extra is not None for extra in extras)
    symmetric = column_table is not None
    sizes = _sizes("gradients", operands, mask.metric, many=many, symmetric=symmetric)
    splits, split_others = splits_of(count, others, sizes, table.device)
    # Near pairs are added to it in memory, so it starts from 0.
    grad = table.new_zeros(splits, count, dim)
    products = torch.empty(splits, count, dtype=torch.float64, device=table.device)
    ids = (mask.row_ids, mask.column_ids)
    own_ids, other_ids = ids if rows else ids[::-1]
    point_gradients_kernel[(triton.cdiv(count, sizes.block) * splits,)](
        own.values, own.low, own.norms, other.values, other.low, other.norms, other.largest,
        own.given, other.given, operands.scale, left_out, given_or(own_ids, table),
        given_or(other_ids, table), table, given_or(column_table, table), grad, products,
        count, others, dim, split_others, splits, own.values.stride(0), other.values.stride(0),
        table.shape[1], 0 if column_table is None else column_table.shape[1],
        *own.given.stride(), *other.given.stride(),
        OWNS_ROWS=rows, **mask.options, **operands.product_options,
        HAS_ENTROPY=grads.entropy is not None, HAS_SUM=grads.score_sum is not None,
        HAS_COLUMNS=column_table is not None, PRODUCT=product, ROUND=operands.weight_rounding,
        BLOCK=sizes.block, BLOCK_OTHER=sizes.other, **widths(dim, sizes), GROUP=POINTS_EACH,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return grad[0] if splits == 1 else grad.sum(0), products if product else products[:0]


def _is_fused(kernel: str, operands: Operands, metric: str) -> bool:
    dim = operands.x.given.shape[1]
    return is_fused(kernel, operands.kind, dim, capability(operands.x.given.device), metric)


def _sizes(
    kernel: str, operands: Operands, metric: str, *, many: bool, symmetric: bool = False
) -> Launch:
    return launch(
        kernel, operands.kind, operands.x.given.shape[1], capability(operands.x.given.device),
        metric=metric, many=many, symmetric=symmetric,
    )  # fmt: skip


def _wide_sizes(kernel: str, operands: Operands) -> Launch:
    return wide_launch(kernel, operands.kind, capability(operands.x.given.device))
