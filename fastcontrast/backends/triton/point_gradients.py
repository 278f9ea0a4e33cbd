"""Backward kernel of `distance_softmax`: gradients of the rows, or of the columns, recomputed.

Maths: for an owner point o and the others q, c = pair weight of ∂L/∂s (tiles.py), and
    do = Σ c (q - o) = (C Q) - o Σ c, for "dot" Σ c q. Rows own first, then columns: the pairs of
    both launches are the same, with the sides exchanged.
Tiling: a program owns BLOCK points of one side, with their gradient [BLOCK, D] in registers, and
    streams tiles of BLOCK_OTHER points of one split of the other side. One-dimensional grid.
Memory: owners once, others once per block, from the L2 cache; the gradient is read (near pairs are
    in it) and written once. Nothing of size M×N.
Numerics: weights are rounded to c̃ as the matrix unit needs them, and Σ c̃ (q - o) is formed with
    the rounded ones on both sides, then scaled by Σ c / Σ c̃: what all pairs of an owner have in
    common is as exact as if nothing had been rounded. Sums over a tile in float32, of weights over
    tiles in float64. A near pair leaves its tile and adds c (q - o) to the gradient in memory,
    which this program alone writes: deterministic.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from fastcontrast.backends.triton.tiles import (
    ABSENT_SQUARE,
    DOT,
    L2,
    LOG2_E,
    SMALLEST_SQUARE,
    counted,
    inverse_distance,
    load_excluded,
    load_rows,
    near_limit,
    next_near,
    pair_squared_distances,
    pair_weight,
    products,
    score_gradient,
    scores_of,
    weighted_rows,
)


@triton.jit
def load_row_gradients(table, row, mask, m, HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr):
    """Columns of the table [6, M] of a row: lse2 high and low, g_lse, g_entropy, entropy, g_sum."""
    at = table + row
    high = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + m, mask=mask, other=0.0)
    grad_lse = tl.load(at + 2 * m, mask=mask, other=0.0)
    grad_entropy = grad_lse
    entropy = grad_lse
    grad_sum = grad_lse
    if HAS_ENTROPY:
        grad_entropy = tl.load(at + 3 * m, mask=mask, other=0.0)
        entropy = tl.load(at + 4 * m, mask=mask, other=0.0)
    if HAS_SUM:
        grad_sum = tl.load(at + 5 * m, mask=mask, other=0.0)
    return high, low, grad_lse, grad_entropy, entropy, grad_sum


@triton.jit
def load_column_gradients(table, column, mask, n):
    """Columns of the table [3, N] of a column: lse2 high and low, g_lse."""
    at = table + column
    high = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + n, mask=mask, other=0.0)
    return high, low, tl.load(at + 2 * n, mask=mask, other=0.0)


@triton.jit
def rounding_ratio(exact, rounded):
    """exact/rounded, where rounding moved the sum little, as it does if all have one sign."""
    close = tl.abs(exact - rounded) <= 0.0078125 * tl.abs(rounded)
    return tl.where(close & (rounded != 0.0), exact / rounded, 1.0)


@triton.jit
def point_gradients_kernel(
    own, own_low, own_sqnorm, other, other_low, other_sqnorm, given_own, given_other, scale,
    exclude, own_ids, other_ids, table, column_table, grad, product,
    count, other_count, dim, split_others, splits, own_stride, other_stride, m,
    given_own_row, given_own_column, given_other_row, given_other_column,
    OWNS_ROWS: tl.constexpr, METRIC: tl.constexpr, EXCLUDE: tl.constexpr, KEEP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient [splits, count, D] of one side; product [splits, count] float64: Σ ∂L/∂s · t."""
    split = tl.program_id(0) % splits
    start = tl.program_id(0) // splits * BLOCK
    place = tl.arange(0, BLOCK)
    here = start + place
    inside = here < count
    scale_value = tl.load(scale).to(ACC)
    scale2 = scale_value * LOG2_E
    own_tile = load_rows(own, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST)
    own_low_tile = own_tile
    if SPLIT:
        own_low_tile = load_rows(own_low, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST)
    own_norm = tl.zeros([BLOCK], dtype=ACC)
    if METRIC != DOT:
        own_norm = tl.load(own_sqnorm + here, mask=inside, other=ABSENT_SQUARE)
    own_id = here
    if KEEP != 0:
        own_id = tl.load(own_ids + here, mask=inside, other=0)
    first = here
    second = here
    high = own_norm
    low = own_norm
    grad_lse = own_norm
    grad_entropy = own_norm
    entropy = own_norm
    grad_sum = own_norm
    if OWNS_ROWS:
        if EXCLUDE > 0:
            first = load_excluded(exclude, here, inside, other_count, 0, EXCLUDE)
        if EXCLUDE > 1:
            second = load_excluded(exclude, here, inside, other_count, 1, EXCLUDE)
        high, low, grad_lse, grad_entropy, entropy, grad_sum = load_row_gradients(
            table, here, inside, m, HAS_ENTROPY, HAS_SUM
        )
    elif HAS_COLUMNS:
        high, low, grad_lse = load_column_gradients(column_table, here, inside, count)
    total = tl.zeros([BLOCK, BLOCK_D], dtype=ACC)
    weight_sum = tl.zeros([BLOCK], dtype=tl.float64)
    exact_sum = tl.zeros([BLOCK], dtype=tl.float64)
    score_product = tl.zeros([BLOCK], dtype=tl.float64)
    # The split's own part of the gradient and of the products.
    grad_rows = grad + (tl.cast(split, tl.int64) * count + here) * dim
    begin = split * split_others
    for start_other in range(begin, tl.minimum(begin + split_others, other_count), BLOCK_OTHER):
        there = start_other + tl.arange(0, BLOCK_OTHER)
        in_others = there < other_count
        other_tile = load_rows(
            other, start_other, other_stride, other_count, 0, dim, BLOCK_OTHER, BLOCK_D, UPCAST
        )
        other_low_tile = other_tile
        if SPLIT:
            other_low_tile = load_rows(
                other_low, start_other, other_stride, other_count, 0, dim,
                BLOCK_OTHER, BLOCK_D, UPCAST,
            )  # fmt: skip
        dots = tl.zeros([BLOCK, BLOCK_OTHER], dtype=ACC)
        if BLOCK_K == BLOCK_D:
            dots = products(
                own_tile, own_low_tile, other_tile, other_low_tile, dots,
                METRIC, SPLIT, PRECISION, ACC,
            )  # fmt: skip
        else:
            for k in range(0, dim, BLOCK_K):
                a = load_rows(own, start, own_stride, count, k, dim, BLOCK, BLOCK_K, UPCAST)
                b = load_rows(
                    other, start_other, other_stride, other_count, k, dim,
                    BLOCK_OTHER, BLOCK_K, UPCAST,
                )  # fmt: skip
                dots = products(a, a, b, b, dots, METRIC, False, PRECISION, ACC)
        other_id = there
        if KEEP != 0:
            other_id = tl.load(other_ids + there, mask=in_others, other=0)
        # What belongs to rows lies along axis 0 of the tile, or along axis 1.
        if OWNS_ROWS:
            tile_first, tile_second, column = first[:, None], second[:, None], there[None, :]
            tile_high, tile_low, tile_lse = high[:, None], low[:, None], grad_lse[:, None]
            tile_grad_entropy, tile_entropy = grad_entropy[:, None], entropy[:, None]
            tile_sum = grad_sum[:, None]
        else:
            tile_first = there[None, :]
            tile_second = tile_first
            if EXCLUDE > 0:
                tile_first = load_excluded(exclude, there, in_others, count, 0, EXCLUDE)[None, :]
            if EXCLUDE > 1:
                tile_second = load_excluded(exclude, there, in_others, count, 1, EXCLUDE)[None, :]
            column = here[:, None]
            a_high, a_low, a_lse, a_grad_entropy, a_entropy, a_sum = load_row_gradients(
                table, there, in_others, m, HAS_ENTROPY, HAS_SUM
            )
            tile_high, tile_low, tile_lse = a_high[None, :], a_low[None, :], a_lse[None, :]
            tile_grad_entropy, tile_entropy = a_grad_entropy[None, :], a_entropy[None, :]
            tile_sum = a_sum[None, :]
        if HAS_COLUMNS:
            if OWNS_ROWS:
                c_high, c_low, c_lse = load_column_gradients(
                    column_table, there, in_others, other_count
                )
                column_high, column_low, column_lse = (
                    c_high[None, :],
                    c_low[None, :],
                    c_lse[None, :],
                )
            else:
                column_high, column_low, column_lse = high[:, None], low[:, None], grad_lse[:, None]
        counts = counted(
            in_others[None, :], column, own_id[:, None], other_id[None, :], tile_first,
            tile_second, EXCLUDE, KEEP,
        )  # fmt: skip
        if METRIC == DOT:
            inverse = dots
            t = tl.where(counts, scores_of(dots, scale2, METRIC), float("-inf"))
        else:
            norms = tl.load(other_sqnorm + there, mask=in_others, other=0.0)
            squared = tl.maximum(own_norm[:, None] + norms[None, :] - 2.0 * dots, SMALLEST_SQUARE)
            if METRIC == L2:  # one instruction for d and 1/d
                inverse = inverse_distance(squared, ACC)
                t = -scale2 * (squared * inverse)
            else:
                inverse = squared
                t = scores_of(squared, scale2, METRIC)
            t = tl.where(counts, t, float("-inf"))
            limit = near_limit(own_norm, norms, scale2, METRIC, ACC)
            if tl.max((tl.max(t, 1) > limit).to(tl.int32), 0) > 0:
                previous = tl.full([BLOCK], -1, dtype=tl.int32)
                remain = True
                while remain:  # one pair of every owner at a time
                    previous = next_near(t, limit, previous, BLOCK_OTHER)
                    found = (previous < BLOCK_OTHER) & inside
                    partner = start_other + previous
                    direct = pair_squared_distances(
                        given_own, here, given_own_row, given_own_column,
                        given_other, partner, given_other_row, given_other_column,
                        found, dim, ACC, BLOCK, 4,
                    )  # fmt: skip
                    exact = scores_of(direct, scale2, METRIC)
                    if OWNS_ROWS:
                        g = score_gradient(
                            exact, high, low, grad_lse, grad_entropy, entropy, grad_sum,
                            HAS_ENTROPY, HAS_SUM,
                        )  # fmt: skip
                    else:
                        b_high, b_low, b_lse, b_grad_entropy, b_entropy, b_sum = load_row_gradients(
                            table, partner, found, m, HAS_ENTROPY, HAS_SUM
                        )
                        g = score_gradient(
                            exact, b_high, b_low, b_lse, b_grad_entropy, b_entropy, b_sum,
                            HAS_ENTROPY, HAS_SUM,
                        )  # fmt: skip
                    if HAS_COLUMNS:
                        if OWNS_ROWS:
                            d_high, d_low, d_lse = load_column_gradients(
                                column_table, partner, found, other_count
                            )
                            g += tl.exp2((exact - d_high) - d_low) * d_lse
                        else:
                            g += tl.exp2((exact - high) - low) * grad_lse
                    apart = found & (direct != 0.0)  # the subgradient 0 at coincident points
                    w = pair_weight(
                        g, inverse_distance(tl.where(apart, direct, 1.0), ACC), scale_value, METRIC
                    )
                    add_differences(
                        grad_rows, given_own, here, given_own_row, given_own_column,
                        given_other, partner, given_other_row, given_other_column,
                        w, apart, dim, ACC, 4,
                    )  # fmt: skip
                    if PRODUCT:
                        score_product += tl.where(found, g * exact, 0.0).to(tl.float64)
                    taken = tl.arange(0, BLOCK_OTHER)[None, :] == previous[:, None]
                    t = tl.where(taken, float("-inf"), t)
                    remain = tl.max(found.to(tl.int32), 0) > 0
        g = score_gradient(
            t, tile_high, tile_low, tile_lse, tile_grad_entropy, tile_entropy, tile_sum,
            HAS_ENTROPY, HAS_SUM,
        )  # fmt: skip
        if HAS_COLUMNS:  # the other direction of a symmetric loss
            g += tl.exp2((t - column_high) - column_low) * column_lse
        if PRODUCT:  # g is 0 where t is -inf
            score_product += tl.sum(g * tl.maximum(t, -1e30), 1).to(tl.float64)
        weights = pair_weight(g, inverse, scale_value, METRIC)
        total, used = weighted_rows(
            weights,
            other_tile,
            other_low_tile,
            total,
            SPLIT,
            ROUND,
            HAS_ENTROPY or HAS_SUM,
            UPCAST,
            ACC,
        )
        weight_sum += tl.sum(used, 1).to(tl.float64)
        if ROUND != "none":
            exact_sum += tl.sum(weights, 1).to(tl.float64)
    k = tl.arange(0, BLOCK_D)
    at = grad_rows[:, None] + k[None, :]
    mask = inside[:, None] & (k < dim)[None, :]
    if METRIC != DOT:
        tl.debug_barrier()  # near pairs were added by other threads of this program
        own_last = load_rows(own, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST).to(ACC)
        if SPLIT:
            own_last += load_rows(
                own_low, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST
            ).to(ACC)
        total -= own_last * weight_sum.to(ACC)[:, None]
        if ROUND != "none":
            total *= rounding_ratio(exact_sum, weight_sum).to(ACC)[:, None]
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total, mask=mask)
    if PRODUCT:
        tl.store(product + tl.cast(split, tl.int64) * count + here, score_product, mask=inside)


@triton.jit
def add_differences(
    target, own, own_row, own_stride_row, own_stride_column,
    other, other_row, other_stride_row, other_stride_column, weight, mask, dim,
    ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """target[i] += weight_i (other_i - own_i): one pair per row, rows of memory of this program."""
    own_at = own + own_row.to(tl.int64) * own_stride_row
    other_at = other + other_row.to(tl.int64) * other_stride_row
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = mask[:, None] & (k < dim)[None, :]
        at = target[:, None] + k[None, :]
        k = k.to(tl.int64)[None, :]
        a = tl.load(own_at[:, None] + k * own_stride_column, mask=inside, other=0.0).to(ACC)
        b = tl.load(other_at[:, None] + k * other_stride_column, mask=inside, other=0.0).to(ACC)
        sum_so_far = tl.load(at, mask=inside, other=0.0)
        tl.store(at, sum_so_far + weight[:, None] * (b - a), mask=inside)
