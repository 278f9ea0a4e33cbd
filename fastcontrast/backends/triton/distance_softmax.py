"""`distance_softmax` in Triton: row statistics, gradients recomputed, and both for one loss.

The kernels are in row_statistics.py and point_gradients.py up to launch.LARGEST_FUSED dimensions,
and in wide.py, beside PyTorch's GEMMs, beyond. Memory is O((M+N)·D). 8MND operations would do for
forward and backward; with a kernel for each side, so that nothing is added by two programs, it is
10MND, and 8MND where GEMMs write the scores: for statistics, and anew for weights.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import copy
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
    KEEPS,
    METRICS,
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
from fastcontrast.backends.triton import INTERPRETED, processors
from fastcontrast.backends.triton.launch import (
    Launch,
    is_fused,
    launch,
    padded_dimension,
    wide_launch,
)
from fastcontrast.backends.triton.operands import Operands, Points, prepare
from fastcontrast.backends.triton.pairs import add_pairs, pair_scores
from fastcontrast.backends.triton.point_gradients import point_gradients_kernel
from fastcontrast.backends.triton.row_statistics import merge_splits_kernel, row_statistics_kernel
from fastcontrast.backends.triton.wide import Weights, blocks_of_products

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MERGE_BLOCK = 128
# Programs per multiprocessor that a launch should have; fewer owners share out the other side.
PROGRAMS_PER_PROCESSOR = 2
# Bytes of what row blocks leave of columns, up to which columns are reduced from the rows' tiles.
COLUMN_BYTES = 128 << 20
# Tiles that a program should at least have to do: more splits would cost more than they bring.
TILES_PER_SPLIT = 8


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return statistics_of_nothing(x, score_sum=score_sum, rank=threshold is not None)
    return _statistics(prepare(x, y, scores), _Mask(scores), threshold, score_sum)


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
        dx, dy, dscale = _gradients(prepare(x, y, scores), _Mask(scores), statistics, grads, needs)
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
    operands, mask = prepare(x, y, scores), _Mask(scores)
    acc = accumulator_dtype(x.dtype)
    a, b, c = (None if w is None else w.detach().to(acc) for w in weights)
    columns, paired_lse = None, None
    if c is not None:  # both directions of a symmetric loss
        rows, columns = _both_statistics(operands, mask, scores)
        paired_lse = of_positive(_in_full(columns), scores)
    else:
        rows = _statistics(operands, mask, None, False)
    lse = _in_full(rows)
    assert mask.exclude is not None
    target = mask.exclude[:, 0].contiguous()
    positive, inverse = pair_scores(operands, target, mask.metric)
    positive = positive.double()
    loss = row_losses(lse, rows.entropy, paired_lse, positive, LossWeights(a, b, c))
    grad_lse = sigmoid_weights(a, lse, positive)
    grad_pair, grad_columns = grad_lse, None
    if columns is not None and paired_lse is not None:
        of_columns = sigmoid_weights(c, paired_lse, positive)
        grad_pair = grad_lse + of_columns
        grad_columns = ColumnGradients(columns, at_positives(of_columns, scores, y.shape[0]))
    dx, dy, dscale = _gradients(
        operands, mask, rows[:3], RowGradients(grad_lse, b, None), needs, grad_columns
    )
    if a is not None or c is not None:
        weight = (-grad_pair * inverse * operands.scale).to(acc)
        add_pairs(
            operands, target, weight, mask.metric,
            dx if needs[0] else None, dy if needs[1] else None,
        )  # fmt: skip
        if needs[2]:
            product = torch.where(grad_pair == 0, 0.0, grad_pair * positive).sum()
            dscale = dscale - (product / operands.scale).to(acc)
    return LossGradients(loss.to(acc), dx, dy, dscale)


class ColumnGradients(NamedTuple):
    """Statistics of the columns, and the gradient of their log-sum-exp [N]."""

    statistics: Statistics
    lse: Tensor


def _in_full(statistics: Statistics) -> Tensor:
    return statistics.lse.double() + statistics.lse_residual.double()


class _Mask:
    """Which columns count, and the metric, as the kernels want them."""

    def __init__(self, scores: Scores) -> None:
        self.metric = scores.metric
        self.exclude = None
        if scores.exclude is not None:
            self.exclude = scores.exclude.to(torch.int64).contiguous()
        self.row_ids, self.column_ids = _narrow_ids(scores.row_ids, scores.column_ids)
        self.options = {
            "METRIC": METRICS.index(scores.metric),
            "KEEP": KEEPS.index(scores.keep),
            "EXCLUDE": 0 if self.exclude is None else self.exclude.shape[1],
        }

    def of_rows(self, rows: slice) -> _Mask:
        """The same for some of the rows."""
        part = copy.copy(self)
        part.exclude = None if self.exclude is None else self.exclude[rows]
        part.row_ids = None if self.row_ids is None else self.row_ids[rows]
        return part


def _statistics(
    operands: Operands, mask: _Mask, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    x = operands.x
    out = empty_statistics(x.given, score_sum=score_sum, rank=threshold is not None)
    rank = threshold is not None
    limit = out.lse if threshold is None else threshold.to(out.lse.dtype).contiguous()
    if not _is_fused("statistics", operands):
        sizes = _wide_sizes("statistics", operands)
        for rows, dots in blocks_of_products(operands, mask.metric):
            part = Statistics(*(value[rows] for value in out))
            block = operands._replace(x=Points(*(value[rows] for value in x)))
            _launch_statistics(
                block, mask.of_rows(rows), part, limit[rows], score_sum, rank, sizes, dots
            )
    else:
        many = score_sum or rank or mask.row_ids is not None
        sizes = _sizes("statistics", operands, mask.metric, many=many)
        _launch_statistics(operands, mask, out, limit, score_sum, rank, sizes, None)
    return out


def _both_statistics(
    operands: Operands, mask: _Mask, scores: Scores
) -> tuple[Statistics, Statistics]:
    """Statistics of every row, and of every column without entropies, from the same tiles.

    Where row blocks would leave more than COLUMN_BYTES, and for wide points, the columns' are those
    of the rows of the transposed problem, from a launch of their own.
    """
    n = operands.y.given.shape[0]
    if _is_fused("statistics", operands):
        sizes = _sizes("statistics", operands, mask.metric, many=True)
        rows = empty_statistics(operands.x.given, score_sum=False, rank=False)
        columns = empty_statistics(operands.y.given, score_sum=False, rank=False)
        blocks = triton.cdiv(rows.lse.shape[0], sizes.block)
        if blocks * 2 * n * rows.lse.itemsize <= COLUMN_BYTES:
            state = rows.lse.new_empty(blocks, 2, n)
            _launch_statistics(operands, mask, rows, rows.lse, False, False, sizes, None, state)
            _launch_merge(state, state, columns, False, False)
            return rows, columns._replace(entropy=columns.entropy.zero_())
    exchanged = _statistics(operands.exchanged(), _Mask(transposed(scores, n)), None, False)
    return _statistics(operands, mask, None, False), exchanged


def _launch_statistics(
    operands: Operands,
    mask: _Mask,
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
    splits, split_columns = _splits(m, n, sizes, x.given.device)
    state = torch.empty(splits, 4, m, dtype=torch.float64, device=x.given.device)
    counts = state
    if score_sum or rank:
        counts = torch.empty(splits, 2, m, dtype=torch.int64, device=x.given.device)
    row_statistics_kernel[(triton.cdiv(m, sizes.block) * splits,)](
        x.values if dots is None else dots, x.low, x.sqnorm, y.values, y.low, y.sqnorm,
        x.given, y.given, operands.scale,
        _or(mask.exclude, state), _or(mask.row_ids, state), _or(mask.column_ids, state), limit,
        state, counts, _or(column_state, state), m, n, dim, split_columns, splits,
        x.values.stride(0), y.values.stride(0),
        *x.given.stride(), *y.given.stride(),
        **mask.options, **operands.product_options, SCORE_SUM=score_sum, RANK=rank,
        BLOCK_M=sizes.block, BLOCK_N=sizes.other, **_widths(dim, sizes),
        FROM_DOTS=dots is not None, COLUMNS=column_state is not None,
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
    mask: _Mask,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
    columns: ColumnGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the accumulator dtype; the scale's comes with the first side computed."""
    table = row_table(statistics, grads)
    column_table = None
    if columns is not None:
        column_table = row_table(columns.statistics[:3], RowGradients(columns.lse, None, None))[:3]
    if not _is_fused("gradients", operands):
        ids = (_or(mask.row_ids, table), _or(mask.column_ids, table))
        tensors = (_or(mask.exclude, table), *ids)
        extras = (grads.entropy is not None, grads.score_sum is not None)
        tables, sizes = (table, column_table), _wide_sizes("weights", operands)
        weights = Weights(operands, tensors, mask.options, tables, extras, needs, sizes)
        for rows, dots in blocks_of_products(operands, mask.metric):
            weights.add_block(rows, dots)
        dx, dy, product = weights.result()
    else:
        dx, dy, product = _fused_gradients(operands, mask, table, column_table, grads, needs)
    if not needs[2]:
        return dx, dy, table.new_empty(0)
    return dx, dy, (product.sum() * LN_2 / operands.scale).to(table.dtype)


def _fused_gradients(
    operands: Operands,
    mask: _Mask,
    table: Tensor,
    column_table: Tensor | None,
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sides that need one, and Σ ∂L/∂s · t, which comes with the first of them."""
    dx = dy = product = table.new_empty(0)
    if needs[0] or not needs[1]:
        dx, product = _side(operands, mask, table, column_table, grads, rows=True, product=needs[2])
    if needs[1]:
        first = needs[2] and product.numel() == 0
        dy, of_columns = _side(
            operands, mask, table, column_table, grads, rows=False, product=first
        )
        product = of_columns if first else product
    return dx if needs[0] else table.new_empty(0), dy, product


def _side(
    operands: Operands,
    mask: _Mask,
    table: Tensor,
    column_table: Tensor | None,
    grads: RowGradients,
    *,
    rows: bool,
    product: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows or of the columns, and Σ ∂L/∂s · t of each if ``product``."""
    own, other = (operands.x, operands.y) if rows else (operands.y, operands.x)
    count, dim = own.given.shape
    others = other.given.shape[0]
    extras = (grads.entropy, grads.score_sum, mask.row_ids, column_table)
    many = product or any(extra is not None for extra in extras)
    sizes = _sizes("gradients", operands, mask.metric, many=many)
    splits, split_others = _splits(count, others, sizes, table.device)
    # Near pairs are added to it in memory, so it starts from 0.
    grad = table.new_zeros(splits, count, dim)
    products = torch.empty(splits, count, dtype=torch.float64, device=table.device)
    ids = (mask.row_ids, mask.column_ids)
    own_ids, other_ids = ids if rows else ids[::-1]
    point_gradients_kernel[(triton.cdiv(count, sizes.block) * splits,)](
        own.values, own.low, own.sqnorm, other.values, other.low, other.sqnorm,
        own.given, other.given, operands.scale,
        _or(mask.exclude, table), _or(own_ids, table), _or(other_ids, table), table,
        _or(column_table, table), grad, products,
        count, others, dim, split_others, splits, own.values.stride(0), other.values.stride(0),
        table.shape[1], *own.given.stride(), *other.given.stride(),
        OWNS_ROWS=rows, **mask.options, **operands.product_options,
        HAS_ENTROPY=grads.entropy is not None, HAS_SUM=grads.score_sum is not None,
        HAS_COLUMNS=column_table is not None, PRODUCT=product, ROUND=operands.weight_rounding,
        BLOCK=sizes.block, BLOCK_OTHER=sizes.other, **_widths(dim, sizes),
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return grad[0] if splits == 1 else grad.sum(0), products if product else products[:0]


def row_table(statistics: tuple[Tensor, Tensor, Tensor], grads: RowGradients) -> Tensor:
    """What the weights of a row follow from, [6, M]: see load_row_gradients."""
    lse, lse_residual, entropy = statistics
    lse2 = (lse.double() + lse_residual.double()) * LOG2_E
    lse2 = torch.where(lse == -torch.inf, 0.0, lse2)
    table = lse.new_empty(6, lse.shape[0])
    table[0] = lse2
    table[1] = lse2 - table[0].double()
    for column, value in ((2, grads.lse), (3, grads.entropy), (4, entropy), (5, grads.score_sum)):
        table[column] = 0.0 if value is None else value
    return table


def _is_fused(kernel: str, operands: Operands) -> bool:
    return is_fused(kernel, operands.kind, operands.x.given.shape[1], _capability(operands))


def _sizes(kernel: str, operands: Operands, metric: str, *, many: bool) -> Launch:
    dim = operands.x.given.shape[1]
    return launch(kernel, operands.kind, dim, _capability(operands), metric=metric, many=many)


def _wide_sizes(kernel: str, operands: Operands) -> Launch:
    return wide_launch(kernel, operands.kind, _capability(operands))


def _capability(operands: Operands) -> tuple[int, int] | None:
    return None if INTERPRETED else torch.cuda.get_device_capability(operands.x.given.device)


def _widths(dim: int, sizes: Launch) -> dict[str, int]:
    width = padded_dimension(dim)
    return {"BLOCK_D": width, "BLOCK_K": min(sizes.part or width, width)}


def _splits(count: int, others: int, sizes: Launch, device: torch.device) -> tuple[int, int]:
    """Parts of the other side for which programs of their own run, and the size of one."""
    wanted = PROGRAMS_PER_PROCESSOR * processors(device)
    blocks, tiles = triton.cdiv(count, sizes.block), triton.cdiv(others, sizes.other)
    splits = max(1, min(wanted // blocks, tiles // TILES_PER_SPLIT))
    part = triton.cdiv(tiles, splits) * sizes.other
    return triton.cdiv(others, part), part


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A tensor for an argument that the kernel's constants say is not read."""
    return stand_in if tensor is None else tensor


def _narrow_ids(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32, renumbered in order: half the registers, no wait for a device."""
    if rows is None or columns is None:
        return None, None
    if rows.dtype == columns.dtype == torch.int32:
        return rows.contiguous(), columns.contiguous()
    ordered, order = torch.cat([rows.to(torch.int64), columns.to(torch.int64)]).sort()
    new = torch.zeros_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    numbers = torch.empty_like(new).scatter_(0, order, new).to(torch.int32)
    first, second = numbers.split([rows.shape[0], columns.shape[0]])
    return first.contiguous(), second.contiguous()
