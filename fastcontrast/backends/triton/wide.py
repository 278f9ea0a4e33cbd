"""`distance_softmax` beyond LARGEST_FUSED dimensions: PyTorch's GEMMs, one pass over their results.

Maths: as in row_statistics.py and point_gradients.py, on dot products that a GEMM has written.
Tiling: blocks of whole rows, BLOCK_SCORES scores. A program owns BLOCK_M rows of the block and goes
    through their columns; for near pairs of the columns' gradient, a program owns BLOCK_N columns.
Memory: one block of scores and of weights at a time; scores are read once for statistics and once
    for weights, which are written once.
Numerics: as there. Weights of near pairs are 0 in the products; the pass leaves them in the scores'
    place, and flags the tile, so that the columns' gradient finds them. One writer per row.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.float32_products import float32_products
from fastcontrast.backends.scores import DISTANCES
from fastcontrast.backends.triton.launch import WIDE, Launch
from fastcontrast.backends.triton.operands import Operands, Points
from fastcontrast.backends.triton.point_gradients import (
    add_differences,
    load_column_gradients,
    load_row_gradients,
)
from fastcontrast.backends.triton.tiles import (
    ABSENT_SQUARE,
    COSINE,
    DOT,
    L2,
    LOG2_E,
    SMALLEST_SQUARE,
    absent,
    best_of,
    counted,
    inverse_distance,
    load_excluded,
    log2_probability,
    near_length,
    next_near,
    pair_squared_distances,
    pair_weight,
    round_to_tf32,
    score_gradient,
    scores_of,
    slope_of,
)

# Scores of a block of rows: 128 MiB in float32, and weights beside them. And its least rows: with
# fewer, the columns' gradient would be read and written for longer than it is multiplied (16 bytes
# and 6 operations a row for each of its elements; GPUs have about 150 operations for a byte).
BLOCK_SCORES = 1 << 25
LEAST_ROWS = 512


@triton.jit
def weigh_scores_kernel(
    dots, weights, weights_low, flags, x_norm, y_norm, given_x, given_y, scale,
    exclude, row_ids, column_ids, table, column_table, grad_x, weight_sum, product,
    first_row, m, table_stride, n, column_table_stride, dim,
    given_x_row, given_x_column, given_y_row, given_y_column,
    METRIC: tl.constexpr, EXCLUDE: tl.constexpr, KEEP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_COLUMNS: tl.constexpr, SPLIT: tl.constexpr, ROUND: tl.constexpr,
    NEEDS_X: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights of BLOCK_M rows of a block [R, N], their sums and Σ ∂L/∂s · t; near pairs to x."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + place
    in_rows = row < m
    slope = slope_of(tl.load(scale) * LOG2_E, METRIC).to(ACC)
    xs = tl.zeros([BLOCK_M], dtype=ACC)
    if METRIC < DOT:
        xs = tl.load(x_norm + row, mask=in_rows, other=ABSENT_SQUARE)
    if METRIC == COSINE:
        xs = tl.load(x_norm + row, mask=in_rows, other=0.0)
        slope *= xs
    first = row.to(tl.int32)
    second = first
    if EXCLUDE > 0:
        first = load_excluded(exclude, row, in_rows, n, 0, EXCLUDE)
    if EXCLUDE > 1:
        second = load_excluded(exclude, row, in_rows, n, 1, EXCLUDE)
    row_id = first
    if KEEP != 0:
        row_id = tl.load(row_ids + row, mask=in_rows, other=0)
    lse, grad_lse, grad_entropy, entropy, grad_sum = load_row_gradients(
        table, row, in_rows, table_stride, HAS_ENTROPY, HAS_SUM
    )
    total = tl.zeros([BLOCK_M], dtype=tl.float64)
    exact_total = tl.zeros([BLOCK_M], dtype=tl.float64)
    score_product = tl.zeros([BLOCK_M], dtype=tl.float64)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        in_columns = column < n
        at = place[:, None] * n + column[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        values = tl.load(dots + at, mask=mask, other=0.0)
        column_id = column
        if KEEP != 0:
            column_id = tl.load(column_ids + column, mask=in_columns, other=0)
        counts = counted(
            mask, column[None, :], row_id[:, None], column_id[None, :], first[:, None],
            second[:, None], EXCLUDE, KEEP,
        )  # fmt: skip
        inverse = values
        if METRIC == COSINE:
            ys = tl.load(y_norm + column, mask=in_columns, other=0.0)
            values *= ys[None, :]
            inverse = xs[:, None] * ys[None, :]
        if METRIC < DOT:
            ys = tl.load(y_norm + column, mask=in_columns, other=0.0)
            values = tl.maximum(xs[:, None] + ys[None, :] - 2.0 * values, SMALLEST_SQUARE)
        if METRIC == L2:  # d²·rsqrt(d²) would have no value for infinity
            inverse = inverse_distance(values, ACC)
            values = tl.sqrt(values)
        values = tl.where(counts, values, absent(METRIC))
        if HAS_COLUMNS:
            c_lse, c_grad_lse = load_column_gradients(
                column_table, column, in_columns, column_table_stride
            )
        if METRIC < DOT:
            limit = near_length(xs, tl.max(ys, 0), METRIC, ACC)
            if tl.max((best_of(values, METRIC) < limit).to(tl.int32), 0) > 0:
                near_weights = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
                previous = tl.full([BLOCK_M], -1, dtype=tl.int32)
                remain = True
                while remain:  # one pair of every row at a time
                    previous = next_near(values, limit, previous, BLOCK_N)
                    found = (previous < BLOCK_N) & in_rows
                    partner = start + previous
                    direct = pair_squared_distances(
                        given_x, row, given_x_row, given_x_column, given_y, partner,
                        given_y_row, given_y_column, found, dim, ACC, BLOCK_M, 32,
                    )  # fmt: skip
                    exact = slope * (tl.sqrt(direct) if METRIC == L2 else direct)
                    g = score_gradient(
                        exact, lse, grad_lse, grad_entropy, entropy, grad_sum,
                        HAS_ENTROPY, HAS_SUM, True,
                    )  # fmt: skip
                    if HAS_COLUMNS:
                        d_lse, d_grad_lse = load_column_gradients(
                            column_table, partner, found, column_table_stride
                        )
                        g += tl.exp2(log2_probability(exact, d_lse, True)) * d_grad_lse
                    apart = found & (direct != 0.0)  # the subgradient 0 at coincident points
                    nearness = inverse_distance(tl.where(apart, direct, 1.0), ACC)
                    w = tl.where(apart, pair_weight(g, nearness, METRIC), 0.0)
                    if NEEDS_X:
                        add_differences(
                            grad_x + row * dim, given_x, row, given_x_row, given_x_column,
                            given_y, partner, given_y_row, given_y_column, w, apart, dim, ACC, 32,
                        )  # fmt: skip
                    score_product += tl.where(found, g * exact, 0.0).to(tl.float64)
                    taken = tl.arange(0, BLOCK_N)[None, :] == previous[:, None]
                    near_weights = tl.where(taken, w[:, None], near_weights)
                    values = tl.where(taken, absent(METRIC), values)
                    remain = tl.max(found.to(tl.int32), 0) > 0
                tl.store(dots + at, near_weights, mask=mask)
                tile = tl.program_id(0).to(tl.int64) * tl.cdiv(n, BLOCK_N) + start // BLOCK_N
                tl.store(flags + tile, 1)
        t = scores_of(values, slope, METRIC)
        g = score_gradient(
            t, lse[:, None], grad_lse[:, None], grad_entropy[:, None],
            entropy[:, None], grad_sum[:, None], HAS_ENTROPY, HAS_SUM, True,
        )  # fmt: skip
        if HAS_COLUMNS:
            g += tl.exp2(log2_probability(t, c_lse[None, :], True)) * c_grad_lse[None, :]
        score_product += tl.sum(g * tl.maximum(t, -1e30), 1).to(tl.float64)
        w = pair_weight(g, inverse, METRIC)
        w = tl.where(counts, w, 0.0)
        exact_total += tl.sum(w, 1).to(tl.float64)
        if SPLIT:  # what is left over goes to a second product
            rounded = w.to(tl.bfloat16).to(ACC)
            rest = (w - rounded).to(tl.bfloat16)
            tl.store(weights_low + at, rest, mask=mask)
            w = rounded + rest.to(ACC)
            tl.store(weights + at, rounded, mask=mask)
        else:
            if ROUND == "tf32":
                w = round_to_tf32(w)
            elif ROUND == "bf16":
                w = w.to(tl.bfloat16).to(ACC)
            tl.store(weights + at, w, mask=mask)
        total += tl.sum(w, 1).to(tl.float64)
    tl.store(weight_sum + row, total, mask=in_rows)
    tl.store(weight_sum + table_stride + row, exact_total, mask=in_rows)
    tl.store(product + row, score_product, mask=in_rows)


@triton.jit
def near_columns_kernel(
    near_weights, flags, given_x, given_y, grad_y, first_row, rows, n, dim,
    given_x_row, given_x_column, given_y_row, given_y_column,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Near pairs of BLOCK_N columns, from the flagged tiles of a block: grad_y += c (x - y)."""
    start = tl.program_id(0) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    in_columns = column < n
    tiles = tl.num_programs(0)
    for block in range(0, tl.cdiv(rows, BLOCK_M)):
        if tl.load(flags + tl.cast(block, tl.int64) * tiles + tl.program_id(0)) != 0:
            for k in range(0, BLOCK_M):
                place = tl.full([BLOCK_N], 0, dtype=tl.int32) + (block * BLOCK_M + k)
                inside = in_columns & (place < rows)
                at = near_weights + place.to(tl.int64) * n + column
                c = tl.load(at, mask=inside, other=0.0)
                row = first_row + place
                add_differences(
                    grad_y + column.to(tl.int64) * dim, given_y, column, given_y_row,
                    given_y_column, given_x, row, given_x_row, given_x_column,
                    c, c != 0.0, dim, ACC, 32,
                )  # fmt: skip


class Weights:
    """Gradients in the making over blocks of rows: products with the weights, and their sums."""

    def __init__(
        self,
        operands: Operands,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: dict[str, int],
        tables: tuple[Tensor, Tensor | None],
        signs_mix: tuple[bool, bool],
        needs: tuple[bool, bool, bool],
        sizes: Launch,
    ) -> None:
        self.operands, self.tensors, self.options = operands, tensors, options
        self.tables, self.needs, self.sizes = tables, needs, sizes
        self.has_entropy, self.has_sum = signs_mix
        (m, dim), n = operands.x.given.shape, operands.y.given.shape[0]
        self.x = tables[0].new_zeros((m, dim) if needs[0] else (0,))
        self.y = tables[0].new_zeros((n, dim) if needs[1] else (0,))
        self.row_sums = tables[0].new_zeros(
            2, tables[0].shape[1], dtype=torch.float64
        )  # rounded, exact
        self.product = self.row_sums.new_zeros(m)
        self.column_sum = self.row_sums.new_zeros(n)

    def add_block(self, rows: slice, dots: Tensor) -> None:
        """Turn the dot products of a block into weights, and apply them; ``dots`` is spent."""
        operands, (table, columns), sizes = self.operands, self.tables, self.sizes
        x, y, kind = operands.x, operands.y, operands.kind
        count, n = dots.shape
        two = kind == "bf16x3" or (kind == "bfloat16" and (self.has_entropy or self.has_sum))
        half = kind in ("bf16x3", "bfloat16")
        weights = torch.empty_like(dots, dtype=torch.bfloat16 if half else dots.dtype)
        low = torch.empty_like(weights) if two else weights
        blocks, tiles = triton.cdiv(count, sizes.block), triton.cdiv(n, sizes.other)
        flags = torch.zeros(blocks * tiles, dtype=torch.int8, device=dots.device)
        weigh_scores_kernel[(blocks,)](
            dots, weights, low, flags, x.norms, y.norms, x.given, y.given, operands.scale,
            *self.tensors, table, table if columns is None else columns, self.x, self.row_sums,
            self.product, rows.start, rows.stop, table.shape[1], n,
            0 if columns is None else columns.shape[1], x.given.shape[1],
            *x.given.stride(), *y.given.stride(),
            **self.options, HAS_ENTROPY=self.has_entropy, HAS_SUM=self.has_sum,
            HAS_COLUMNS=columns is not None, SPLIT=two, ROUND=operands.weight_rounding,
            NEEDS_X=self.needs[0], ACC=operands.acc, BLOCK_M=sizes.block, BLOCK_N=sizes.other,
            num_warps=sizes.warps,
        )  # fmt: skip
        parts = (weights, low) if two else (weights,)
        distances = self.options["METRIC"] < DOT.value
        if self.needs[0]:
            found = sum_of(product(part, side, kind) for part, side in _terms(parts, _sides(y)))
            rounded, exact = self.row_sums[:, rows]
            if distances:
                found = found - _points(x, rows) * rounded.to(found.dtype)[:, None]
            if self.options["METRIC"] != DOT.value:
                close = (exact - rounded).abs() <= 2.0**-7 * rounded.abs()
                ratio = torch.where(close & (rounded != 0), exact / rounded, 1.0)
                found = found * ratio.to(found.dtype)[:, None]
            self.x[rows] += found
        if self.needs[1]:
            for part, side in _terms(parts, _sides(x)):
                add_product(self.y, part.T, side[rows], kind)
            for part in parts:
                self.column_sum += part.sum(0, dtype=torch.float64)
            if distances:
                near_columns_kernel[(tiles,)](
                    dots, flags, x.given, y.given, self.y, rows.start, count, n, x.given.shape[1],
                    *x.given.stride(), *y.given.stride(),
                    ACC=operands.acc, BLOCK_M=sizes.block, BLOCK_N=sizes.other,
                    num_warps=sizes.warps,
                )  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x and y, and Σ ∂L/∂s · t of every row."""
        if self.needs[1] and self.options["METRIC"] < DOT.value:
            points = _points(self.operands.y, slice(None))
            self.y -= points * self.column_sum.to(self.y.dtype)[:, None]
        return self.x, self.y, self.product


def rows_of_block(n: int) -> int:
    """Rows whose products with n columns are in memory at a time."""
    return max(LEAST_ROWS, BLOCK_SCORES // n // WIDE.block * WIDE.block)


def blocks_of_products(operands: Operands, metric: str) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows with their dot products [R, N] in the accumulator dtype."""
    m, n = operands.x.given.shape[0], operands.y.given.shape[0]
    step = rows_of_block(n)
    # Low with low only where norms are subtracted, as in tiles.products.
    pairs = _terms(_sides(operands.x), _sides(operands.y), every=metric in DISTANCES)
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        yield rows, sum_of(product(a[rows], b.T, operands.kind) for a, b in pairs)


def product(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Matrix product in the accumulator dtype, of operands that are rounded already."""
    wanted = torch.float64 if kind == "float64" else torch.float32
    if a.is_cuda and a.dtype == b.dtype != wanted and _HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=wanted)
    # bfloat16 and float16 numbers are exact in TF32, and so are those rounded to it.
    with _products_like(a, kind):
        return a.to(wanted) @ b.to(wanted)


def add_product(total: Tensor, a: Tensor, b: Tensor, kind: str) -> None:
    """Add it to ``total`` by the same GEMM, which reads and writes that once."""
    if a.is_cuda and a.dtype == b.dtype != total.dtype and _HAS_OUT_DTYPE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    with _products_like(a, kind):
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _products_like(a: Tensor, kind: str) -> AbstractContextManager[None]:
    """How torch is to multiply operands that were widened to float32."""
    return float32_products("ieee" if kind == "ieee" or not a.is_cuda else "tf32", cuda=a.is_cuda)


_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """Sum of tensors, in their order."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _terms(
    left: tuple[Tensor, ...], right: tuple[Tensor, ...], *, every: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of bfloat16 parts to multiply, small products first; low with low if ``every``."""
    pairs = [(a, b) for a in left[::-1] for b in right[::-1]]
    return pairs[1:] if len(left) == len(right) == 2 and not every else pairs


def _sides(points: Points) -> tuple[Tensor, ...]:
    return (points.values,) if points.low is points.values else (points.values, points.low)


def _points(points: Points, rows: slice) -> Tensor:
    dtype = torch.float64 if points.values.dtype == torch.float64 else torch.float32
    return sum_of(side[rows].to(dtype) for side in _sides(points))
