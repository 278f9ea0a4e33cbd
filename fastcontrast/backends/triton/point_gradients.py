"""Backward kernel of `distance_softmax`: gradients of the rows, or of the columns, recomputed.

Maths: for an owner point o and the others q, c = pair weight of ∂L/∂s (tiles.py), and
    do = Σ c (q - o) = (C Q) - o Σ c, for "dot" and "cosine" Σ c q (which directions.py makes a
    gradient of the point). Rows own first, then columns: the pairs of
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
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

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
    holds,
    inverse_distance,
    largest_sqnorm,
    load_rows,
    log2_probability,
    near_length,
    next_near,
    pair_squared_distances,
    pair_weight,
    products,
    score_gradient,
    scores_of,
    slope_of,
    weighted_rows,
)


@triton.jit
def load_row_gradients(table, row, mask, m, HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr):
    """Numbers of a row in row_table.py's [5, m]: lse2, g_lse, g_entropy, entropy, g_sum."""
    at = table + row
    lse = tl.load(at, mask=mask, other=0.0)
    grad_lse = tl.load(at + m, mask=mask, other=0.0)
    grad_entropy = grad_lse
    entropy = grad_lse
    grad_sum = grad_lse
    if HAS_ENTROPY:
        grad_entropy = tl.load(at + 2 * m, mask=mask, other=0.0)
        entropy = tl.load(at + 3 * m, mask=mask, other=0.0)
    if HAS_SUM:
        grad_sum = tl.load(at + 4 * m, mask=mask, other=0.0)
    return lse, grad_lse, grad_entropy, entropy, grad_sum


@triton.jit
def load_column_gradients(table, column, mask, n):
    """The first two of a column: lse2 and g_lse."""
    at = table + column
    return tl.load(at, mask=mask, other=0.0), tl.load(at + n, mask=mask, other=0.0)


@triton.jit
def rounding_ratio(exact, rounded):
    """exact/rounded, where rounding moved the sum little, as it does if all have one sign."""
    close = tl.abs(exact - rounded) <= 0.0078125 * tl.abs(rounded)
    return tl.where(close & (rounded != 0.0), exact / rounded, 1.0)


@triton.jit
def point_gradients_kernel(
    own, own_low, own_norms, other, other_low, other_norms, other_largest, given_own, given_other,
    scale, left_out, own_ids, other_ids, table, column_table, grad, product,
    count, other_count, dim, split_others, splits, own_stride, other_stride, table_stride,
    column_table_stride,
    given_own_row, given_own_column, given_other_row, given_other_column,
    OWNS_ROWS: tl.constexpr, METRIC: tl.constexpr, EXCLUDE: tl.constexpr, KEEP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Gradient [splits, count, D] of one side; product [splits, count] float64: Σ ∂L/∂s · t."""
    BOUND: tl.constexpr = (SPLIT or ROUND == "none") and tl.float32 == ACC
    split = tl.program_id(0) % splits
    start = tl.program_id(0) // splits * BLOCK
    place = tl.arange(0, BLOCK)
    here = start + place
    inside = here < count
    slope = slope_of(tl.load(scale) * LOG2_E, METRIC).to(ACC)
    own_tile = load_rows(own, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST)
    own_low_tile = own_tile
    if SPLIT:
        own_low_tile = load_rows(own_low, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST)
    own_norm = tl.zeros([BLOCK], dtype=ACC)
    if METRIC < DOT:
        own_norm = tl.load(own_norms + here, mask=inside, other=ABSENT_SQUARE)
    if METRIC == COSINE:
        own_norm = tl.load(own_norms + here, mask=inside, other=0.0)
        slope *= own_norm
    own_id = here
    if KEEP != 0:
        own_id = tl.load(own_ids + here, mask=inside, other=0)
    first = here
    second = here
    lse = own_norm
    grad_lse = own_norm
    grad_entropy = own_norm
    entropy = own_norm
    grad_sum = own_norm
    if OWNS_ROWS:
        if EXCLUDE > 0:
            first = tl.load(left_out + here, mask=inside, other=-1)
        if EXCLUDE > 1:
            second = tl.load(left_out + table_stride + here, mask=inside, other=-1)
        lse, grad_lse, grad_entropy, entropy, grad_sum = load_row_gradients(
            table, here, inside, table_stride, HAS_ENTROPY, HAS_SUM
        )
    elif HAS_COLUMNS:
        lse, grad_lse = load_column_gradients(column_table, here, inside, column_table_stride)
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
        # What belongs to rows lies along axis 0 of the tile, or along axis 1. Tables reach beyond
        # the last point: nothing is masked that is read for a tile.
        every = tl.full([BLOCK_OTHER], 1, dtype=tl.int1)
        if OWNS_ROWS:
            tile_first, tile_second, column = first[:, None], second[:, None], there[None, :]
            tile_lse, tile_grad_lse = lse[:, None], grad_lse[:, None]
            tile_grad_entropy, tile_entropy = grad_entropy[:, None], entropy[:, None]
            tile_sum = grad_sum[:, None]
        else:
            b_first = there
            b_second = there
            if EXCLUDE > 0:
                b_first = tl.load(left_out + start_other + tl.arange(0, BLOCK_OTHER))
            if EXCLUDE > 1:
                b_second = tl.load(
                    left_out + table_stride + start_other + tl.arange(0, BLOCK_OTHER)
                )
            tile_first, tile_second, column = b_first[None, :], b_second[None, :], here[:, None]
            a_lse, a_grad_lse, a_grad_entropy, a_entropy, a_sum = load_row_gradients(
                table + start_other,
                tl.arange(0, BLOCK_OTHER),
                every,
                table_stride,
                HAS_ENTROPY,
                HAS_SUM,
            )
            tile_lse, tile_grad_lse = a_lse[None, :], a_grad_lse[None, :]
            tile_grad_entropy, tile_entropy = a_grad_entropy[None, :], a_entropy[None, :]
            tile_sum = a_sum[None, :]
        if HAS_COLUMNS:
            if OWNS_ROWS:
                c_lse, c_grad_lse = load_column_gradients(
                    column_table + start_other,
                    tl.arange(0, BLOCK_OTHER),
                    every,
                    column_table_stride,
                )
                column_lse, column_grad_lse = c_lse[None, :], c_grad_lse[None, :]
            else:
                column_lse, column_grad_lse = lse[:, None], grad_lse[:, None]
        # Distances, their squares or dot products; scores are these times the slope.
        values = dots
        inverse = dots
        if METRIC == COSINE:
            inverse = tl.load(other_norms + start_other + tl.arange(0, BLOCK_OTHER))[None, :]
            values *= inverse
        if METRIC < DOT:
            norms = tl.load(other_norms + start_other + tl.arange(0, BLOCK_OTHER))
            values = tl.maximum(own_norm[:, None] + norms[None, :] - 2.0 * dots, SMALLEST_SQUARE)
        if METRIC == L2:  # one instruction for d and 1/d
            inverse = inverse_distance(values, ACC)
            values *= inverse
        # Few tiles need a mask: those that reach beyond the last point or hold an excluded pair.
        masked = (KEEP != 0) | (start_other + BLOCK_OTHER > other_count)
        if EXCLUDE > 0:
            if OWNS_ROWS:
                excluded = holds(first, start_other, BLOCK_OTHER)
                if EXCLUDE > 1:
                    excluded = excluded | holds(second, start_other, BLOCK_OTHER)
            else:
                excluded = holds(b_first, start, BLOCK)
                if EXCLUDE > 1:
                    excluded = excluded | holds(b_second, start, BLOCK)
            masked = masked | (tl.max(excluded.to(tl.int32), 0) > 0)
        if masked:
            other_id = there
            if KEEP != 0:
                other_id = tl.load(other_ids + there, mask=in_others, other=0)
            counts = counted(
                in_others[None, :], column, own_id[:, None], other_id[None, :], tile_first,
                tile_second, EXCLUDE, KEEP,
            )  # fmt: skip
            values = tl.where(counts, values, absent(METRIC))
        if METRIC < DOT:
            limit = near_length(
                own_norm, largest_sqnorm(other_largest, start_other, BLOCK_OTHER, GROUP),
                METRIC, ACC,
            )  # fmt: skip
            if tl.max((best_of(values, METRIC) < limit).to(tl.int32), 0) > 0:
                previous = tl.full([BLOCK], -1, dtype=tl.int32)
                remain = True
                while remain:  # one pair of every owner at a time
                    previous = next_near(values, limit, previous, BLOCK_OTHER)
                    found = (previous < BLOCK_OTHER) & inside
                    partner = start_other + previous
                    direct = pair_squared_distances(
                        given_own, here, given_own_row, given_own_column,
                        given_other, partner, given_other_row, given_other_column,
                        found, dim, ACC, BLOCK, 4,
                    )  # fmt: skip
                    exact = slope * (tl.sqrt(direct) if METRIC == L2 else direct)
                    if OWNS_ROWS:
                        g = score_gradient(
                            exact, lse, grad_lse, grad_entropy, entropy, grad_sum,
                            HAS_ENTROPY, HAS_SUM, BOUND,
                        )  # fmt: skip
                    else:
                        b_lse, b_grad_lse, b_grad_entropy, b_entropy, b_sum = load_row_gradients(
                            table, partner, found, table_stride, HAS_ENTROPY, HAS_SUM
                        )
                        g = score_gradient(
                            exact, b_lse, b_grad_lse, b_grad_entropy, b_entropy, b_sum,
                            HAS_ENTROPY, HAS_SUM, BOUND,
                        )  # fmt: skip
                    if HAS_COLUMNS:
                        if OWNS_ROWS:
                            d_lse, d_grad_lse = load_column_gradients(
                                column_table, partner, found, column_table_stride
                            )
                            g += tl.exp2(log2_probability(exact, d_lse, BOUND)) * d_grad_lse
                        else:
                            g += tl.exp2(log2_probability(exact, lse, BOUND)) * grad_lse
                    apart = found & (direct != 0.0)  # the subgradient 0 at coincident points
                    w = pair_weight(g, inverse_distance(tl.where(apart, direct, 1.0), ACC), METRIC)
                    add_differences(
                        grad_rows, given_own, here, given_own_row, given_own_column,
                        given_other, partner, given_other_row, given_other_column,
                        w, apart, dim, ACC, 4,
                    )  # fmt: skip
                    if PRODUCT:
                        score_product += tl.where(found, g * exact, 0.0).to(tl.float64)
                    taken = tl.arange(0, BLOCK_OTHER)[None, :] == previous[:, None]
                    values = tl.where(taken, absent(METRIC), values)
                    remain = tl.max(found.to(tl.int32), 0) > 0
        t = scores_of(values, slope, METRIC)
        g = score_gradient(
            t, tile_lse, tile_grad_lse, tile_grad_entropy, tile_entropy, tile_sum,
            HAS_ENTROPY, HAS_SUM, BOUND,
        )  # fmt: skip
        if HAS_COLUMNS:  # the other direction of a symmetric loss
            g += tl.exp2(log2_probability(t, column_lse, BOUND)) * column_grad_lse
        if PRODUCT:  # g is 0 where t is -inf
            score_product += tl.sum(g * tl.maximum(t, -1e30), 1).to(tl.float64)
        weights = pair_weight(g, inverse, METRIC)
        total, used = weighted_rows(
            weights,
            other_tile,
            other_low_tile,
            total,
            METRIC,
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
    if METRIC < DOT:
        tl.debug_barrier()  # near pairs were added by other threads of this program
        own_last = load_rows(own, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST).to(ACC)
        if SPLIT:
            own_last += load_rows(
                own_low, start, own_stride, count, 0, dim, BLOCK, BLOCK_D, UPCAST
            ).to(ACC)
        total -= own_last * weight_sum.to(ACC)[:, None]
    if METRIC != DOT and ROUND != "none":
        total *= rounding_ratio(exact_sum, weight_sum).to(ACC)[:, None]
    if METRIC == COSINE:
        total *= own_norm[:, None]
    if METRIC < DOT:
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
