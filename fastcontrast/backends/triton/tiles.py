"""Device functions that the kernels of `distance_softmax` share: what becomes of a tile of scores.

Scores are kept in units of log2, ``t = s log2(e)``, as in csrc/common/scores.h. A tile has rows of
one side on axis 0 (the owner, whose results the program writes) and of the other side on axis 1.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# METRICS of mask.py, by position: the distances, which are below DOT, and the similarities.
L2 = tl.constexpr(0)
SQEUCLIDEAN = tl.constexpr(1)
DOT = tl.constexpr(2)
COSINE = tl.constexpr(3)
# KEEPS of backends/scores.py, by position.
KEEP_ALL = tl.constexpr(0)
KEEP_SAME = tl.constexpr(1)
# Rule 2: squared distances below this part of ‖x‖²+‖y‖² are taken by direct difference.
NEAR_32 = tl.constexpr(1024 * 2.0**-23)
NEAR_64 = tl.constexpr(2.0**26 * 2.0**-52)
# Squared distances are kept above the first, so that 1/d stays finite; what is below the second is
# taken for near, and so is computed directly, whatever the norms.
SMALLEST_SQUARE = tl.constexpr(1e-37)
NEAR_SQUARE = tl.constexpr(1e-35)
# Squared norm of what is not there: far from everything, and its square root is no infinity.
ABSENT_SQUARE = tl.constexpr(1e30)


@triton.jit
def load_rows(
    pointer, start, stride, count, first_column, dim,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Part of a matrix with adjacent columns, [BLOCK, BLOCK_D]; 0 outside."""
    row = tl.arange(0, BLOCK)
    column = first_column + tl.arange(0, BLOCK_D)
    mask = (start + row < count)[:, None] & (column < dim)[None, :]
    # The base is 64-bit and moves; the offsets inside the tile are 32-bit and stay.
    base = pointer + tl.cast(start, tl.int64) * stride
    tile = tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def products(
    a, a_low, b, b_low, dots,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``dots`` and the dot products of the rows of two tiles, [BLOCK, BLOCK_OTHER].

    SPLIT: operands are sums of two bfloat16 parts. Where norms are subtracted, all four products
    are taken, so that they belong to the same rounded points as the norms do.
    """
    if SPLIT:
        # The small ones first: they would be lost in a large sum.
        dots = tl.dot(a, tl.trans(b_low), dots, out_dtype=ACC)
        dots = tl.dot(a_low, tl.trans(b), dots, out_dtype=ACC)
        if METRIC < DOT:
            dots = tl.dot(a_low, tl.trans(b_low), dots, out_dtype=ACC)
    return tl.dot(a, tl.trans(b), dots, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def slope_of(scale2, METRIC: tl.constexpr):
    """What a distance, a squared one or a dot product is multiplied by to become t."""
    return -scale2 if METRIC < DOT else scale2


@triton.jit
def scores_of(values, slope, METRIC: tl.constexpr):
    """T of a tile; for "cosine" the slopes are those of its rows, their inverse norms in them."""
    return slope[:, None] * values if METRIC == COSINE else slope * values


@triton.jit
def absent(METRIC: tl.constexpr):
    """What a pair that does not count has in the place of its distance or product."""
    return float("inf") if METRIC < DOT else float("-inf")


@triton.jit
def best_of(values, METRIC: tl.constexpr):
    """Of each row of a tile of distances or dot products, the one with the largest score."""
    return tl.min(values, 1) if METRIC < DOT else tl.max(values, 1)


@triton.jit
def inverse_distance(squared, ACC: tl.constexpr):
    """1/d of d²: one instruction in float32, whose approximation would not do in float64."""
    return 1.0 / tl.sqrt(squared) if tl.float64 == ACC else tl.rsqrt(squared)


@triton.jit
def counted(
    counts, column, row_id, column_id, first, second, EXCLUDE: tl.constexpr, KEEP: tl.constexpr
):
    """Pairs of ``counts`` that are not excluded, and by whose ids they count; all broadcast."""
    if EXCLUDE > 0:
        counts = counts & (column != first)
    if EXCLUDE > 1:
        counts = counts & (column != second)
    if KEEP == KEEP_SAME:
        counts = counts & (row_id == column_id)
    elif KEEP != KEEP_ALL:
        counts = counts & (row_id != column_id)
    return counts


@triton.jit
def load_excluded(exclude, row, mask, n, e: tl.constexpr, EXCLUDE: tl.constexpr):
    """Excluded column e of each row as int32; -1 where it names none."""
    value = tl.load(exclude + row.to(tl.int64) * EXCLUDE + e, mask=mask, other=-1)
    return tl.where((value >= 0) & (value < n), value, -1).to(tl.int32)


@triton.jit
def near_fraction(ACC: tl.constexpr):
    """k·eps of rule 2 for the dtype that the distances are taken in."""
    return NEAR_64 if tl.float64 == ACC else NEAR_32


@triton.jit
def holds(index, start, BLOCK: tl.constexpr):
    """Whether an index is one of the BLOCK from ``start`` on."""
    return (index >= start) & (index < start + BLOCK)


@triton.jit
def largest_sqnorm(largest, start, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The largest of the BLOCK squared norms from ``start`` on, of those of groups of GROUP."""
    if BLOCK > GROUP:
        found = tl.max(tl.load(largest + start // GROUP + tl.arange(0, BLOCK // GROUP)), 0)
    else:
        found = tl.load(largest + start // GROUP)
    return found


@triton.jit
def near_length(own_sqnorm, largest, METRIC: tl.constexpr, ACC: tl.constexpr):
    """Distance (or its square) of each row of the tile below which a pair may be near.

    From the largest squared norm of the other side. Infinite where a norm is, so that all is taken
    directly. (A distance that is not a number has become SMALLEST_SQUARE, which is near.)
    """
    squared = tl.maximum(near_fraction(ACC) * (own_sqnorm + largest), NEAR_SQUARE)
    return tl.sqrt(squared) if METRIC == L2 else squared


@triton.jit
def next_near(lengths, limit, previous, BLOCK_OTHER: tl.constexpr):
    """First near pair of each row of the tile after its ``previous``; BLOCK_OTHER if none."""
    place = tl.arange(0, BLOCK_OTHER)[None, :]
    near = (lengths < limit[:, None]) & (place > previous[:, None])
    return tl.min(tl.where(near, place, BLOCK_OTHER), 1)


@triton.jit
def pair_squared_distances(
    own, own_row, own_stride_row, own_stride_column,
    other, other_row, other_stride_row, other_stride_column, mask, dim,
    ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Σ_k (x_k - y_k)² of one pair per row of the tile, from the points as they were given."""
    own_at = own + own_row.to(tl.int64) * own_stride_row
    other_at = other + other_row.to(tl.int64) * other_stride_row
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = mask[:, None] & (k < dim)[None, :]
        k = k.to(tl.int64)[None, :]
        a = tl.load(own_at[:, None] + k * own_stride_column, mask=inside, other=0.0)
        b = tl.load(other_at[:, None] + k * other_stride_column, mask=inside, other=0.0)
        difference = a.to(ACC) - b.to(ACC)
        total += tl.sum(difference * difference, 1)
    return total


@triton.jit
def round_to_tf32(x):
    """``x`` float32 with 10 bits of mantissa, ties away from zero; what is not finite stays."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def cut_to_bfloat16(x):
    """``x`` float32 less the bits that bfloat16 has not; what is not finite stays so."""
    bits = x.to(tl.int32, bitcast=True) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def log2_probability(t, lse, BOUND: tl.constexpr):
    """log2 p of pairs, from their ``t`` and the table's ``lse``.

    BOUND: at most 0. Where the statistics summed a pair's products in another order, float32's
    rounding of a score of 1e10 makes p infinite. One product of a matrix unit has one order.
    """
    u = t - lse
    return tl.minimum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) if BOUND else u


@triton.jit
def score_gradient(
    t, lse, grad_lse, grad_entropy, entropy, grad_sum,
    HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """∂L/∂s of pairs: p (g_lse - g_H (log p + H)) + g_sum, 0 where a column does not count.

    From the numbers of row_table.py: times what they hold, and with what was left over of ``lse``.
    """
    u = log2_probability(t, lse, BOUND)
    p = tl.exp2(u)
    g = p * grad_lse
    if HAS_ENTROPY:  # the floor keeps 0·(-inf) out
        g = p * (grad_lse - grad_entropy * (tl.maximum(u, -1100.0) * LN_2 + entropy))
    if HAS_SUM:
        g = tl.where(t == float("-inf"), 0.0, g + grad_sum)
    return g


@triton.jit
def pair_weight(g, inverse, METRIC: tl.constexpr):
    """C of csrc/common/scores.h: what y - x (for dot: y) is multiplied by in the gradient of x.

    From ∂L/∂s times the scale, for "sqeuclidean" twice the scale (row_table.py), and 1/d or, for
    "cosine", the inverse norms.
    """
    return g * inverse if METRIC == L2 or METRIC == COSINE else g  # noqa: SIM109


@triton.jit
def weighted_rows(
    weight, other, other_low, total, METRIC: tl.constexpr, SPLIT: tl.constexpr,
    ROUND: tl.constexpr, TWICE: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``total`` + weight @ other, and the weights as the product saw them.

    Sums of weights must be those of the rounded ones: what is left of Σ c (y - x) after two sums
    are subtracted is then the same weighted difference. What all weights lose in common is put
    right there, so that bits may be cut off where sums are taken: one instruction gives the weight
    that the sum needs, another two for the product. TWICE: what rounding left over is multiplied as
    well, for weights of both signs, which may cancel.
    """
    # One return at the end: Triton compiles what stands after an earlier one too.
    used = weight
    if SPLIT:
        high = weight.to(tl.bfloat16)
        low = (weight - high.to(tl.float32)).to(tl.bfloat16)
        used = high.to(tl.float32) + low.to(tl.float32)
        if UPCAST:
            high, low = high.to(tl.float32), low.to(tl.float32)
        total = tl.dot(high, other_low, total, out_dtype=ACC)
        total = tl.dot(low, other, total, out_dtype=ACC)
        total = tl.dot(high, other, total, out_dtype=ACC)
    elif ROUND == "bf16":
        if METRIC != DOT:
            used = cut_to_bfloat16(weight)
        narrow = used.to(tl.bfloat16)
        if METRIC == DOT:
            used = narrow.to(tl.float32)
        total = tl.dot(used if UPCAST else narrow, other, total, out_dtype=ACC)
        if TWICE:
            narrow = (weight - used).to(tl.bfloat16)
            rest = narrow.to(tl.float32)
            total = tl.dot(rest if UPCAST else narrow, other, total, out_dtype=ACC)
            used += rest
    elif ROUND == "tf32":  # float16 operands too: the weights would leave the range of float16
        wide = other.to(tl.float32)
        used = round_to_tf32(weight)
        total = tl.dot(used, wide, total, input_precision="tf32", out_dtype=ACC)
        if TWICE:
            rest = round_to_tf32(weight - used)
            total = tl.dot(rest, wide, total, input_precision="tf32", out_dtype=ACC)
            used += rest
    else:
        total = tl.dot(weight, other, total, input_precision="ieee", out_dtype=ACC)
    return total, used
