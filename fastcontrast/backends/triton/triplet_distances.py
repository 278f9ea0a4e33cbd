"""`triplet_distances` in Triton: one read of the triplets forward, one read and one write backward.

Maths: per row, d = ‖x-y‖ or ‖x-y‖² of the pairs (a,p), (a,n) and on request (p,n), and on request
    d_ap - d_an or d_ap - min(d_an, d_pn). Backward, a pair with gradient g has the weight
    w = g/d or 2g, and the gradient of a point x with the other two y and z is
    w_xy (x-y) + w_xz (x-z).
Tiling: a program owns BLOCK rows and walks through the dimensions, CHUNK at a time. A warp's lanes
    lie along a row. BLOCK shrinks where few rows would leave multiprocessors idle.
Memory: points are read where they lie, by their strides, once in each direction; a gradient is
    written once. A row whose weights are 0 (an inactive hinge) is not read in the backward pass.
Numerics: direct differences. Sums over one chunk in the accumulator dtype, over chunks in float64;
    root and quotient, one per row, in float64 too, because Triton approximates those of float32. A
    gradient is rounded to a half type once. At distance 0 the subgradient is 0; NaN and inf
    propagate. One writer per number: two runs are bit-equal.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.scores import accumulator_dtype
from fastcontrast.backends.triton import processors
from fastcontrast.backends.triton.launch import padded_dimension

LARGEST_CHUNK = 256
# Bytes of one side's tile in the accumulator dtype: 16 float32 numbers a thread and side.
TILE_BYTES = 8192
# Programs per multiprocessor below which BLOCK shrinks.
PROGRAMS_PER_PROCESSOR = 2
WARPS = 4


@triton.jit
def load_points(points, row, mask, start, dim, row_stride, column_stride, CHUNK: tl.constexpr):
    """CHUNK columns from ``start`` on of the rows that ``mask`` names; 0 elsewhere."""
    k = start + tl.arange(0, CHUNK)
    at = points + row[:, None] * row_stride + k.to(tl.int64)[None, :] * column_stride
    return tl.load(at, mask=mask[:, None] & (k < dim)[None, :], other=0.0)


@triton.jit
def sum_of_squares(difference):
    """Of each row [BLOCK], float64."""
    return tl.sum(difference * difference, 1).to(tl.float64)


@triton.jit
def triplet_forward_kernel(
    a, p, n, difference, to_positive, to_negative, of_others, m, dim,
    a_row, a_column, p_row, p_column, n_row, n_column,
    L2: tl.constexpr, BETWEEN: tl.constexpr, DIFFERENCE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Distances of the pairs, [m] each; with DIFFERENCE also that of the first and the nearest."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < m
    d_ap = tl.zeros([BLOCK], dtype=tl.float64)
    d_an = tl.zeros([BLOCK], dtype=tl.float64)
    d_pn = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, dim, CHUNK):
        x = load_points(a, row, in_rows, start, dim, a_row, a_column, CHUNK).to(ACC)
        y = load_points(p, row, in_rows, start, dim, p_row, p_column, CHUNK).to(ACC)
        z = load_points(n, row, in_rows, start, dim, n_row, n_column, CHUNK).to(ACC)
        d_ap += sum_of_squares(x - y)
        d_an += sum_of_squares(x - z)
        if BETWEEN:
            d_pn += sum_of_squares(y - z)
    if L2:
        d_ap, d_an, d_pn = tl.sqrt(d_ap), tl.sqrt(d_an), tl.sqrt(d_pn)
    d_ap, d_an, d_pn = d_ap.to(ACC), d_an.to(ACC), d_pn.to(ACC)
    tl.store(to_positive + row, d_ap, mask=in_rows)
    tl.store(to_negative + row, d_an, mask=in_rows)
    nearest = d_an
    if BETWEEN:
        tl.store(of_others + row, d_pn, mask=in_rows)
        nearest = tl.where((d_pn < d_an) | (d_pn != d_pn), d_pn, d_an)  # NaN as in torch.minimum
    if DIFFERENCE:
        tl.store(difference + row, d_ap - nearest, mask=in_rows)


@triton.jit
def pair_weight(gradient, distance, L2: tl.constexpr, ACC: tl.constexpr):
    """Weight w of x-y, and whether the pair counts: 0 times a finite difference is left out.

    Where the distance is finite all differences are.
    """
    weight = 2.0 * gradient
    if L2:
        apart = distance != 0.0
        quotient = gradient.to(tl.float64) / tl.where(apart, distance, 1.0).to(tl.float64)
        weight = tl.where(apart, quotient.to(ACC), 0.0)
    return weight, (weight != 0.0) | (distance - distance != 0.0)


@triton.jit
def weighted(weight, counts, difference):
    """Chosen, not multiplied by 0: a pair that does not count may hold NaN."""
    return tl.where(counts[:, None], weight[:, None] * difference, 0.0)


@triton.jit
def triplet_backward_kernel(
    a, p, n, to_positive, to_negative, of_others, grad_positive, grad_negative, grad_others,
    slope, upstream, da, dp, dn, m, dim,
    a_row, a_column, p_row, p_column, n_row, n_column, upstream_stride,
    L2: tl.constexpr, BETWEEN: tl.constexpr, DIFFERENCE: tl.constexpr, HAS_POSITIVE: tl.constexpr,
    HAS_NEGATIVE: tl.constexpr, HAS_OTHERS: tl.constexpr, NEEDS_A: tl.constexpr,
    NEEDS_P: tl.constexpr, NEEDS_N: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of the points [m, dim] from those of the distances, which HAS_* says are there.

    With DIFFERENCE from slope·upstream, the gradient of d₊ - d₋.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < m
    d_ap = tl.load(to_positive + row, mask=in_rows, other=0.0)
    d_an = tl.load(to_negative + row, mask=in_rows, other=0.0)
    d_pn = d_an
    if BETWEEN:
        d_pn = tl.load(of_others + row, mask=in_rows, other=0.0)
    g_ap = tl.zeros([BLOCK], dtype=ACC)
    g_an = g_ap
    g_pn = g_ap
    if DIFFERENCE:
        g_ap = tl.load(slope + row, mask=in_rows, other=0.0)
        g_ap *= tl.load(upstream + row * upstream_stride, mask=in_rows, other=0.0)
        g_an = -g_ap
        if BETWEEN:  # equal distances of the negative take half each, as in torch.minimum
            share = tl.where(d_an < d_pn, 1.0, tl.where(d_an == d_pn, 0.5, 0.0)).to(ACC)
            g_an = -g_ap * share
            g_pn = -g_ap * (1.0 - share)
    if HAS_POSITIVE and not DIFFERENCE:
        g_ap = tl.load(grad_positive + row, mask=in_rows, other=0.0)
    if HAS_NEGATIVE and not DIFFERENCE:
        g_an = tl.load(grad_negative + row, mask=in_rows, other=0.0)
    if HAS_OTHERS and not DIFFERENCE:
        g_pn = tl.load(grad_others + row, mask=in_rows, other=0.0)
    w_ap, c_ap = pair_weight(g_ap, d_ap, L2, ACC)
    w_an, c_an = pair_weight(g_an, d_an, L2, ACC)
    w_pn, c_pn = pair_weight(g_pn, d_pn, L2, ACC)
    c_ap = c_ap & in_rows & HAS_POSITIVE
    c_an = c_an & in_rows & HAS_NEGATIVE
    c_pn = c_pn & in_rows & HAS_OTHERS
    for start in range(0, dim, CHUNK):
        x = load_points(a, row, c_ap | c_an, start, dim, a_row, a_column, CHUNK).to(ACC)
        y = load_points(p, row, c_ap | c_pn, start, dim, p_row, p_column, CHUNK).to(ACC)
        z = load_points(n, row, c_an | c_pn, start, dim, n_row, n_column, CHUNK).to(ACC)
        k = start + tl.arange(0, CHUNK)
        at = row[:, None] * dim + k[None, :]
        mask = in_rows[:, None] & (k < dim)[None, :]
        if NEEDS_A:
            total = weighted(w_ap, c_ap, x - y) + weighted(w_an, c_an, x - z)
            tl.store(da + at, total, mask=mask)
        if NEEDS_P:
            total = weighted(w_ap, c_ap, y - x) + weighted(w_pn, c_pn, y - z)
            tl.store(dp + at, total, mask=mask)
        if NEEDS_N:
            total = weighted(w_an, c_an, z - x) + weighted(w_pn, c_pn, z - y)
            tl.store(dn + at, total, mask=mask)


def triplet_distances_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, between: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of the three pairs, each [M]; the last is empty unless ``between``."""
    rows, dtype = anchor.shape[0], accumulator_dtype(anchor.dtype)
    to_positive = anchor.new_empty(rows, dtype=dtype)
    to_negative = anchor.new_empty(rows, dtype=dtype)
    of_others = anchor.new_empty(rows if between else 0, dtype=dtype)
    _forward(anchor, positive, negative, metric, None, (to_positive, to_negative, of_others))
    return to_positive, to_negative, of_others


def triplet_distances_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    distances: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, each [M, D], from those of the distances; empty where not needed.

    A distance whose gradient is None has none.
    """
    dtype = distances[0].dtype
    first, second, third = (None if g is None else g.to(dtype).contiguous() for g in grads)
    return _backward(
        anchor, positive, negative, distances, (first, second, third), None, metric, needs
    )


def triplet_difference_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, swap: bool
) -> Tensor:
    """Difference d₊ - d₋ and the distances that it came from, [3, M]; with ``swap`` [4, M]."""
    dtype = accumulator_dtype(anchor.dtype)
    out = anchor.new_empty((4 if swap else 3, anchor.shape[0]), dtype=dtype)
    _forward(anchor, positive, negative, metric, out[0], _distances(out))
    return out


def triplet_difference_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    found: Tensor,
    slope: Tensor,
    upstream: Tensor,
    factor: float,
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, from ``slope · factor · upstream`` [M], that of the difference.

    ``found`` is what the forward pass returned; ``upstream`` is [M], or one number.
    """
    if factor != 1.0:  # not in the kernel, whose numbers are float32 even where tensors are float64
        upstream = upstream * factor
    source = slope.contiguous(), upstream.contiguous()
    return _backward(
        anchor, positive, negative, _distances(found), (None, None, None), source, metric, needs
    )


def _forward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    metric: str,
    difference: Tensor | None,
    distances: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill ``distances``, the last of which may be empty, and ``difference`` where it is given."""
    rows, dim = anchor.shape
    if rows == 0:
        return
    options, between = _options(anchor, metric), distances[2].numel() > 0
    options["num_warps"] = forward_warps(anchor.dtype.itemsize, between)
    triplet_forward_kernel[(triton.cdiv(rows, options["BLOCK"]),)](
        anchor, positive, negative, difference, *distances, rows, dim,
        *anchor.stride(), *positive.stride(), *negative.stride(),
        BETWEEN=between, DIFFERENCE=difference is not None, **options,
    )  # fmt: skip


def _backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    distances: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    source: tuple[Tensor, Tensor] | None,
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``grads`` of the distances, or from (slope, upstream) of the difference."""
    rows, dim = anchor.shape
    da, dp, dn = (anchor.new_empty(anchor.shape if need else 0) for need in needs)
    if rows == 0:
        return da, dp, dn
    options = _options(anchor, metric)
    between = distances[2].numel() > 0
    slope, upstream = (None, None) if source is None else source
    has = (True, True, between) if source else tuple(g is not None for g in grads)
    triplet_backward_kernel[(triton.cdiv(rows, options["BLOCK"]),)](
        anchor, positive, negative, *distances, *grads, slope, upstream, da, dp, dn, rows, dim,
        *anchor.stride(), *positive.stride(), *negative.stride(),
        0 if upstream is None else upstream.dim(),  # stride of a contiguous [M], or of one number
        BETWEEN=between, DIFFERENCE=source is not None,
        HAS_POSITIVE=has[0], HAS_NEGATIVE=has[1], HAS_OTHERS=has[2],
        NEEDS_A=needs[0], NEEDS_P=needs[1], NEEDS_N=needs[2], **options,
    )  # fmt: skip
    return da, dp, dn


def _options(anchor: Tensor, metric: str) -> dict[str, Any]:
    """Constants that both kernels take, and warps."""
    dtype = accumulator_dtype(anchor.dtype)
    block, chunk = triplet_tile(*anchor.shape, dtype.itemsize, processors(anchor.device))
    return {
        "L2": metric == "l2",
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "CHUNK": chunk,
        "num_warps": WARPS,
    }


def triplet_tile(rows: int, dim: int, element_bytes: int, processors: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    chunk = min(LARGEST_CHUNK, padded_dimension(dim))
    block = TILE_BYTES // (element_bytes * chunk)
    if element_bytes == 8:  # products of float64 take registers beside their operands
        block //= 2
    while block > 1 and rows < block * PROGRAMS_PER_PROCESSOR * processors:
        block //= 2
    return block, chunk


def forward_warps(point_bytes: int, between: bool) -> int:
    """Twice as many, of half as many numbers, where half points are unpacked for three sums."""
    return 2 * WARPS if between and point_bytes == 2 else WARPS


def _distances(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In what :func:`triplet_difference_forward` returns; without ``swap`` the last is empty."""
    return found[1], found[2], found[3] if found.shape[0] == 4 else found[0, :0]
