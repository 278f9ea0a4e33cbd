"""Half points for "cosine": multiplied as they come, with their inverse norms in the scores.

Maths: cos = f_x f_y x·y with f = 1/‖x‖. The kernels take Σ w y with w = scale f_x f_y ∂L/∂s; with
    x̂ = f_x x the gradient of x is what is left of that without its part along x: u - x̂ (x̂·u).
    Points are multiplied by powers of two, p, that bring their largest number to between 1 and 2:
    no square overflows or vanishes, and no bit is lost that the norm has. The gradient is p times
    that of the multiplied point.
Tiling: a program owns BLOCK points and goes through their columns in parts.
Memory: points are read three times by their strides, and written once with adjacent columns;
    gradients are read twice and written once, in place.
Numerics: norms and sums in float32. A zero vector has the inverse norm 1 and the power 0: its
    products are 0, and so is its gradient.
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

BLOCK = 32
CHUNK = 64


@triton.jit
def stretch_kernel(
    points, out, inverse_norms, powers, count, dim, row_stride, column_stride, out_stride,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK points times their powers of two, these, and the inverse norms of the results."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < count
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (k < dim)[None, :]
        at = points + row[:, None] * row_stride + k.to(tl.int64)[None, :] * column_stride
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
    # 2^-e of 2^e <= largest < 2^(e+1), by the exponent's bits; up to 2^127, and 2^-126 at least.
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (k < dim)[None, :]
        at = points + row[:, None] * row_stride + k.to(tl.int64)[None, :] * column_stride
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32) * power[:, None]
        narrow = value.to(out.dtype.element_ty)
        tl.store(out + row[:, None] * out_stride + k[None, :], narrow, mask=mask)
        value = narrow.to(tl.float32)
        total += tl.sum(value * value, 1)
    is_zero = total == 0.0
    inverse = tl.where(is_zero, 1.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, total)))
    tl.store(inverse_norms + row, tl.where(in_rows, inverse, 0.0))  # 0 beyond the last point
    tl.store(powers + row, tl.where(is_zero, 0.0, power), mask=in_rows)


@triton.jit
def turn_kernel(
    grad, points, inverse_norms, powers, count, dim, stride,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grad of BLOCK points: less its part along the point, times the power; in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < count
    inverse = tl.load(inverse_norms + row, mask=in_rows, other=0.0)
    power = tl.load(powers + row, mask=in_rows, other=0.0)
    along = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (k < dim)[None, :]
        at = points + row[:, None] * stride + k[None, :]
        unit = tl.load(at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        value = tl.load(grad + row[:, None] * dim + k[None, :], mask=mask, other=0.0)
        along += tl.sum(unit * value, 1)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (k < dim)[None, :]
        at = points + row[:, None] * stride + k[None, :]
        unit = tl.load(at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        at_grad = grad + row[:, None] * dim + k[None, :]
        value = tl.load(at_grad, mask=mask, other=0.0) - along[:, None] * unit
        tl.store(at_grad, tl.where(power[:, None] == 0.0, 0.0, value * power[:, None]), mask=mask)


def stretched(points: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half points [K, D] times powers of two, their inverse norms [K], and the powers [K].

    The inverse norms lie in memory that goes on with zeros, up to ``room`` numbers.
    """
    count, dim = points.shape
    width = -(-dim // 16) * 16  # rows that start on 16 bytes load faster
    out = torch.empty(count, width, dtype=points.dtype, device=points.device)[:, :dim]
    inverse_norms = torch.empty(room, dtype=torch.float32, device=points.device)
    powers = torch.empty(count, dtype=torch.float32, device=points.device)
    stretch_kernel[(triton.cdiv(room, BLOCK),)](
        points, out, inverse_norms, powers, count, dim, *points.stride(), out.stride(0),
        BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
    return out, inverse_norms[:count], powers


def turn(grad: Tensor, points: Tensor, inverse_norms: Tensor, powers: Tensor) -> None:
    """Make of Σ w y [K, D], float32, the gradients of the points before they were stretched."""
    turn_kernel[(triton.cdiv(grad.shape[0], BLOCK),)](
        grad, points, inverse_norms, powers, *grad.shape, points.stride(0),
        BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
