"""Forward kernel of `distance_softmax`: row statistics while column tiles stream by.

Maths: t_ij = s_ij log2(e), the slope times a distance, its square or a product, from dot products
    and norms (tiles.py); per row the running maximum of t, Σ 2^(t-max),
    Σ 2^(t-max)(t-max), on request Σ t, the number of columns that count, and #{t > threshold}.
    lse = (max + log2 Σ) ln 2, entropy = (log2 Σ - weighted/Σ) ln 2.
Tiling: a program owns BLOCK_M rows, which stay in shared memory, and streams tiles of BLOCK_N
    columns of one split of the columns (few rows do not fill a GPU). The grid is one-dimensional.
    A second kernel merges the splits. COLUMNS: each tile is reduced over its rows as well, for one
    more exp2 per score, and the same second kernel merges the row blocks of each column in order.
Memory: rows are read once, columns once per row block, from the L2 cache as all programs stream the
    same ones; 48 bytes per row and split are written. Nothing of size M×N. COLUMNS: two numbers per
    column and row block.
Numerics: exp2 of scores less the running maximum; what does not count is -inf before the maximum.
    Sums over one tile in float32, over tiles in float64. COLUMNS: less the largest score of the
    tile, or of the column where that leaves next to nothing to sum. A tile that may hold near
    pairs (tiles.py) takes them by direct difference, and one that holds excluded columns or
    reaches beyond the last is masked: branches that cost nothing per pair where not taken.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton.tiles import (
    ABSENT_SQUARE,
    COSINE,
    DOT,
    L2,
    LN_2,
    LOG2_E,
    SMALLEST_SQUARE,
    absent,
    best_of,
    counted,
    holds,
    largest_sqnorm,
    load_excluded,
    load_rows,
    near_length,
    next_near,
    pair_squared_distances,
    products,
    scores_of,
    slope_of,
)

# Columns that near pairs are read by. With more of them than threads the compiler would move tiles
# of scores to the layout in which points are read, through shared memory, near or not.
PAIR_PART = 32 if INTERPRETED else 1
# Exponents below this give 0; keeps 0·(-inf) out of the weighted sum.
FLOOR = tl.constexpr(-1100.0)
# Of a column's sum over a tile: what float32 cannot hold beside it is 2^-46 of it.
LEAST_SUM = tl.constexpr(2.0**-80)


@triton.jit
def tile_counts(
    column_ids, start_n, n, row_id, first, second,
    EXCLUDE: tl.constexpr, KEEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile count."""
    column = start_n + tl.arange(0, BLOCK_N)
    in_columns = column < n
    column_id = column
    if KEEP != 0:
        column_id = tl.load(column_ids + column, mask=in_columns, other=0)
    return counted(
        in_columns[None, :], column[None, :], row_id[:, None], column_id[None, :],
        first[:, None], second[:, None], EXCLUDE, KEEP,
    )  # fmt: skip


@triton.jit
def row_statistics_kernel(
    x, x_low, x_norm, y, y_low, y_norm, y_largest, given_x, given_y, scale,
    exclude, row_ids, column_ids, threshold, state, counts, column_state,
    m, n, dim, split_columns, splits, x_stride, y_stride,
    given_x_row, given_x_column, given_y_row, given_y_column,
    METRIC: tl.constexpr, EXCLUDE: tl.constexpr, KEEP: tl.constexpr, SCORE_SUM: tl.constexpr,
    RANK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, FROM_DOTS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PAIR_PART: tl.constexpr,
):  # fmt: skip
    """State [splits, 4, M] float64 (max, sum, weighted, total), counts [splits, 2, M] int64.

    COLUMNS: ``column_state`` [row blocks, 2, N] (max, sum) of the columns' scores.
    FROM_DOTS: ``x`` is a matrix [M, N] of dot products that have been computed (wide.py).
    """
    split = tl.program_id(0) % splits
    start_m = tl.program_id(0) // splits * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)
    in_rows = row < m
    slope = slope_of(tl.load(scale) * LOG2_E, METRIC).to(ACC)
    if BLOCK_K == BLOCK_D and not FROM_DOTS:
        x_tile = load_rows(x, start_m, x_stride, m, 0, dim, BLOCK_M, BLOCK_D, UPCAST)
        x_low_tile = x_tile
        if SPLIT:
            x_low_tile = load_rows(x_low, start_m, x_stride, m, 0, dim, BLOCK_M, BLOCK_D, UPCAST)
    xs = tl.zeros([BLOCK_M], dtype=ACC)
    if METRIC < DOT:
        xs = tl.load(x_norm + row, mask=in_rows, other=ABSENT_SQUARE)
    if METRIC == COSINE:
        slope *= tl.load(x_norm + row, mask=in_rows, other=0.0)
    first = tl.full([BLOCK_M], -1, dtype=tl.int32)
    second = first
    if EXCLUDE > 0:
        first = load_excluded(exclude, row, in_rows, n, 0, EXCLUDE)
    if EXCLUDE > 1:
        second = load_excluded(exclude, row, in_rows, n, 1, EXCLUDE)
    row_id = first
    if KEEP != 0:
        row_id = tl.load(row_ids + row, mask=in_rows, other=0)
    limit = tl.zeros([BLOCK_M], dtype=ACC)
    if RANK:
        limit = tl.load(threshold + row, mask=in_rows, other=0.0) * LOG2_E
    ALWAYS_MASKED: tl.constexpr = KEEP != 0 or SCORE_SUM
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float64)
    weighted = tl.zeros([BLOCK_M], dtype=tl.float64)
    total = tl.zeros([BLOCK_M], dtype=tl.float64)
    number = tl.zeros([BLOCK_M], dtype=tl.int64)
    above = tl.zeros([BLOCK_M], dtype=tl.int64)
    begin = split * split_columns
    for start_n in range(begin, tl.minimum(begin + split_columns, n), BLOCK_N):
        column = start_n + tl.arange(0, BLOCK_N)
        in_columns = column < n
        dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        if FROM_DOTS:
            at = x + row.to(tl.int64)[:, None] * n + column[None, :]
            dots = tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        elif BLOCK_K == BLOCK_D:
            y_tile = load_rows(y, start_n, y_stride, n, 0, dim, BLOCK_N, BLOCK_D, UPCAST)
            y_low_tile = y_tile
            if SPLIT:
                y_low_tile = load_rows(
                    y_low, start_n, y_stride, n, 0, dim, BLOCK_N, BLOCK_D, UPCAST
                )
            dots = products(
                x_tile, x_low_tile, y_tile, y_low_tile, dots, METRIC, SPLIT, PRECISION, ACC
            )
        else:
            for k in range(0, dim, BLOCK_K):
                x_part = load_rows(x, start_m, x_stride, m, k, dim, BLOCK_M, BLOCK_K, UPCAST)
                y_part = load_rows(y, start_n, y_stride, n, k, dim, BLOCK_N, BLOCK_K, UPCAST)
                dots = products(x_part, x_part, y_part, y_part, dots, METRIC, False, PRECISION, ACC)
        # Distances, their squares or dot products; scores are these times the slope.
        values = dots
        if METRIC == COSINE:
            values *= tl.load(y_norm + start_n + tl.arange(0, BLOCK_N))[None, :]
        if METRIC < DOT:
            ys = tl.load(y_norm + start_n + tl.arange(0, BLOCK_N))
            values = tl.maximum(xs[:, None] + ys[None, :] - 2.0 * dots, SMALLEST_SQUARE)
        if METRIC == L2:
            values = tl.sqrt(values)
        if ALWAYS_MASKED:
            counts_here = tile_counts(
                column_ids, start_n, n, row_id, first, second, EXCLUDE, KEEP, BLOCK_N
            )
            values = tl.where(counts_here, values, absent(METRIC))
        else:
            # The mask takes as long as the scores, and few tiles need one: those that reach beyond
            # the last column or hold an excluded one.
            masked = start_n + BLOCK_N > n
            if EXCLUDE > 0:
                excluded = holds(first, start_n, BLOCK_N)
                if EXCLUDE > 1:
                    excluded = excluded | holds(second, start_n, BLOCK_N)
                masked = masked | (tl.max(excluded.to(tl.int32), 0) > 0)
            if masked:
                counts_here = tile_counts(
                    column_ids, start_n, n, row_id, first, second, EXCLUDE, KEEP, BLOCK_N
                )
                values = tl.where(counts_here, values, absent(METRIC))
        best = best_of(values, METRIC)
        if METRIC < DOT:
            largest_norm = largest_sqnorm(y_largest, start_n, BLOCK_N, GROUP)
            near = near_length(xs, largest_norm, METRIC, ACC)
            if tl.max((best < near).to(tl.int32), 0) > 0:
                previous = tl.full([BLOCK_M], -1, dtype=tl.int32)
                remain = True
                while remain:  # one pair of every row at a time
                    previous = next_near(values, near, previous, BLOCK_N)
                    found = previous < BLOCK_N
                    exact = pair_squared_distances(
                        given_x, row, given_x_row, given_x_column, given_y, start_n + previous,
                        given_y_row, given_y_column, found & in_rows, dim, ACC, BLOCK_M, PAIR_PART,
                    )  # fmt: skip
                    if METRIC == L2:
                        exact = tl.sqrt(exact)
                    here = tl.arange(0, BLOCK_N)[None, :] == previous[:, None]
                    values = tl.where(here, exact[:, None], values)
                    remain = tl.max(found.to(tl.int32), 0) > 0
                best = best_of(values, METRIC)
        if SCORE_SUM or RANK:
            t = scores_of(values, slope, METRIC)
        if SCORE_SUM:
            # A column that counts and is infinitely far makes the sum -inf.
            total += tl.sum(tl.where(counts_here, t, 0.0), 1).to(tl.float64)
            number += tl.sum(counts_here.to(tl.int32), 1)
        if RANK:
            above += tl.sum((t > limit[:, None]).to(tl.int32), 1)
        if COLUMNS:
            # One base for the tile: a maximum over rows would take as long as all the rest.
            tile_max = tl.max(slope * best, 0)
            tile_base = tl.where(tile_max == float("-inf"), 0.0, tile_max)
            column_base = tl.full([BLOCK_N], 0.0, dtype=ACC) + tile_base
            column_sum = tl.sum(tl.exp2(scores_of(values, slope, METRIC) - tile_base), 0)
            alone = (start_m + BLOCK_M > m) | (tile_max == float("inf"))
            if alone | (tl.min(column_sum, 0) < LEAST_SUM):
                t = tl.where(in_rows[:, None], scores_of(values, slope, METRIC), float("-inf"))
                column_base = tl.max(t, 0)
                of_rows = t - tl.where(column_base == float("-inf"), 0.0, column_base)[None, :]
                if METRIC == DOT:
                    of_rows = tl.where(t == float("inf"), 0.0, of_rows)
                column_sum = tl.sum(tl.exp2(of_rows), 0)
            at_columns = column_state + tl.cast(start_m // BLOCK_M * 2, tl.int64) * n + column
            tl.store(at_columns, column_base, mask=in_columns)
            tl.store(at_columns + n, column_sum, mask=in_columns)
        new_max = tl.maximum(running_max, slope * best)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        u = scores_of(values, slope, METRIC) - base[:, None]
        if METRIC == DOT:  # the only scores that reach +inf, which then have all the mass
            u = tl.where(values == float("inf"), 0.0, u)
        e = tl.exp2(u)
        unchanged = running_max == base
        factor = tl.where(unchanged, 1.0, tl.exp2(running_max - base)).to(tl.float64)
        shift = tl.where(unchanged, 0.0, tl.maximum(running_max - base, FLOOR)).to(tl.float64)
        weighted = factor * (weighted + shift * running_sum)
        weighted += tl.sum(e * tl.maximum(u, FLOOR), 1).to(tl.float64)
        running_sum = factor * running_sum + tl.sum(e, 1).to(tl.float64)
        running_max = new_max
    at = state + tl.cast(split * 4, tl.int64) * m + row
    tl.store(at, running_max.to(tl.float64), mask=in_rows)
    at += m
    tl.store(at, running_sum, mask=in_rows)
    at += m
    tl.store(at, weighted, mask=in_rows)
    if SCORE_SUM:
        tl.store(at + m, total, mask=in_rows)
    at_counts = counts + tl.cast(split * 2, tl.int64) * m + row
    if SCORE_SUM:
        tl.store(at_counts, number, mask=in_rows)
    if RANK:
        tl.store(at_counts + m, above, mask=in_rows)


@triton.jit
def merge_splits_kernel(
    state, counts, lse, lse_residual, entropy, score_sum, column_count, rank, m, splits,
    SCORE_SUM: tl.constexpr, RANK: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK rows from the states of all splits, in float64.

    NUMBERS: of a state, 4 as row_statistics_kernel leaves it, or 2 without ``entropy``.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < m
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    for split in range(0, splits):
        at = state + tl.cast(split * NUMBERS, tl.int64) * m + row
        largest = tl.maximum(largest, tl.load(at, mask=mask, other=0.0).to(tl.float64))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    mass = tl.zeros([BLOCK], dtype=tl.float64)
    weighted = tl.zeros([BLOCK], dtype=tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    number = tl.zeros([BLOCK], dtype=tl.int64)
    above = tl.zeros([BLOCK], dtype=tl.int64)
    for split in range(0, splits):
        at = state + tl.cast(split * NUMBERS, tl.int64) * m + row
        at_counts = counts + tl.cast(split * 2, tl.int64) * m + row
        top = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        part = tl.load(at + m, mask=mask, other=0.0).to(tl.float64)
        part_weighted = part
        if NUMBERS > 2:
            part_weighted = tl.load(at + 2 * tl.cast(m, tl.int64), mask=mask, other=0.0)
        shift = tl.where(top == base, 0.0, tl.maximum(top - base, FLOOR))
        factor = tl.exp2(shift)
        mass += factor * part
        weighted += factor * (part_weighted + shift * part)
        if SCORE_SUM:
            total += tl.load(at + 3 * tl.cast(m, tl.int64), mask=mask, other=0.0)
            number += tl.load(at_counts, mask=mask, other=0)
        if RANK:
            above += tl.load(
                counts + tl.cast(split * 2 + 1, tl.int64) * m + row, mask=mask, other=0
            )
    empty = mass == 0.0
    logarithm = tl.log2(tl.where(empty, 1.0, mass))
    value = tl.where(empty, float("-inf"), (largest + logarithm) * LN_2)
    rounded = value.to(lse.dtype.element_ty)
    rest = value - rounded.to(tl.float64)
    infinite = tl.abs(value) == float("inf")
    tl.store(lse + row, rounded, mask=mask)
    tl.store(lse_residual + row, tl.where(infinite, 0.0, rest), mask=mask)
    if NUMBERS > 2:
        h = (logarithm - weighted / tl.where(empty, 1.0, mass)) * LN_2
        tl.store(entropy + row, tl.where(empty, 0.0, h), mask=mask)
    if SCORE_SUM:
        tl.store(score_sum + row, total * LN_2, mask=mask)
        tl.store(column_count + row, number, mask=mask)
    if RANK:
        tl.store(rank + row, above, mask=mask)
