"""Numbers of the rows, or columns, from which the gradient kernels take the weights of pairs.

Maths: ∂L/∂s = p (g_lse - g_H (log p + H)) + g_sum with p = 2^(t - lse2). What rounding lse2 leaves
    over, δ, multiplies p by 2^-δ: g_lse and g_H are multiplied by it, and H is less δ ln 2. All
    gradients are multiplied by the scale as well, for "sqeuclidean" by twice the scale: what comes
    of them is the weight c of a pair, but for 1/d.
Tiling: a program owns BLOCK rows.
Memory: a row of the table for each number, up to a multiple of PADDING, so that a tile may be read
    without a mask. Beyond the last point there are zeros, and no column is excluded.
Numerics: lse2 and what is left over in float64.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.scores import RowGradients
from fastcontrast.backends.triton.operands import padded
from fastcontrast.backends.triton.tiles import LN_2, LOG2_E, load_excluded

BLOCK = 128
NUMBERS = 5  # lse2, g_lse, g_H, H, g_sum


@triton.jit
def row_table_kernel(
    lse, lse_residual, entropy, grad_lse, grad_entropy, grad_sum, scale, exclude, table, left_out,
    m, n, table_stride, stored,
    TIMES: tl.constexpr, HAS_LSE: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr,
    EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of a table [NUMBERS, table_stride], and excluded columns as int32, of that stride."""
    ACC: tl.constexpr = table.dtype.element_ty
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < m
    in_table = row < stored
    value = tl.load(lse + row, mask=mask, other=0.0)
    exact = value.to(tl.float64) + tl.load(lse_residual + row, mask=mask, other=0.0).to(tl.float64)
    exact = tl.where(value == float("-inf"), 0.0, exact * LOG2_E)
    rounded = exact.to(ACC)
    # Of an infinite one nothing is left over. 2^126 is a factor that float32 still holds.
    rest = tl.where(tl.abs(rounded) < float("inf"), exact - rounded.to(tl.float64), 0.0)
    rest = tl.minimum(tl.maximum(rest, -126.0), 126.0).to(ACC)
    factor = (tl.load(scale) * TIMES).to(ACC)
    of_probabilities = factor * tl.exp2(-rest)
    at = table + row
    tl.store(at, rounded, mask=in_table)
    g = tl.zeros([BLOCK], dtype=ACC)
    if HAS_LSE:
        g = tl.load(grad_lse + row, mask=mask, other=0.0).to(ACC) * of_probabilities
    tl.store(at + table_stride, g, mask=in_table)
    if HAS_ENTROPY:
        g = tl.load(grad_entropy + row, mask=mask, other=0.0).to(ACC) * of_probabilities
        tl.store(at + 2 * table_stride, g, mask=in_table)
        h = tl.load(entropy + row, mask=mask, other=0.0).to(ACC) - rest * LN_2
        tl.store(at + 3 * table_stride, h, mask=in_table)
    if HAS_SUM:
        g = tl.load(grad_sum + row, mask=mask, other=0.0).to(ACC) * factor
        tl.store(at + 4 * table_stride, g, mask=in_table)
    if EXCLUDE > 0:
        tl.store(left_out + row, load_excluded(exclude, row, mask, n, 0, EXCLUDE), mask=in_table)
    if EXCLUDE > 1:
        second = load_excluded(exclude, row, mask, n, 1, EXCLUDE)
        tl.store(left_out + table_stride + row, second, mask=in_table)


def weight_times(metric: str) -> float:
    """What ∂L/∂s times the scale is multiplied by in the weight of a pair, but for 1/d."""
    return 2.0 if metric == "sqeuclidean" else 1.0


def empty_table(like: Tensor) -> Tensor:
    """A table for as many rows as ``like`` has, in its dtype, of padded length."""
    return like.new_empty(NUMBERS, padded(like.shape[0]))


def row_table(
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    scale: Tensor,
    metric: str,
    exclude: Tensor | None = None,
    columns: int = 0,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The table of rows from (lse, lse_residual, entropy) and what multiplies.

    Args:
        statistics: Log-sum-exp, what rounding it left over, and entropies [M].
        grads: Gradients of the statistics.
        scale: On the device.
        metric: "l2", "sqeuclidean" or "dot".
        exclude: Excluded columns [M, E], int64.
        columns: N.
        out: A view of a table to fill instead, of at least as many columns as there are rows.

    Returns:
        The table, all of whose columns are filled, and the excluded columns [E, its columns] as
        int32, -1 where there is none.
    """
    lse, lse_residual, entropy = statistics
    table = empty_table(lse) if out is None else out
    count = 0 if exclude is None else exclude.shape[1]
    left_out = torch.empty(count, table.shape[1], dtype=torch.int32, device=table.device)
    of_lse, of_entropy, of_sum = (table if g is None else g.contiguous() for g in grads)
    row_table_kernel[(triton.cdiv(table.shape[1], BLOCK),)](
        lse, lse_residual, entropy, of_lse, of_entropy, of_sum, scale,
        table if exclude is None else exclude, table, left_out,
        lse.shape[0], columns, table.stride(0), table.shape[1],
        TIMES=weight_times(metric), HAS_LSE=grads.lse is not None,
        HAS_ENTROPY=grads.entropy is not None, HAS_SUM=grads.score_sum is not None,
        EXCLUDE=count, BLOCK=BLOCK,
    )  # fmt: skip
    return table, left_out
