"""Given pairs by direct difference: positives of `softmax_loss`, candidates of `nearest`.

Maths: t_i = score of (x_i, y_target(i)); dx_i += c_i (y - x), dy_target += c_i (x - y), for "dot"
    and "cosine" c_i y and c_i x.
Tiling: values: a program owns BLOCK pairs. Gradients: a program owns OWNERS points and reads the
    pairs of these, which the host has sorted by owner, ENTRIES at a time.
Memory: both points of every pair are read by their strides; gradients are read and written once.
Numerics: sums in the accumulator dtype. One writer per gradient row, in a fixed order.
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

from fastcontrast.backends.scores import DISTANCES
from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton.operands import Operands, Points

# The interpreter takes as long for a program of few pairs as for one of many.
BLOCK = 1024 if INTERPRETED else 32
CHUNK = 32
OWNERS = 16
ENTRIES = 16


@triton.jit
def pair_values_kernel(
    x, y, target, values, count, targets, dim, x_row, x_column, y_row, y_column,
    IS_DOT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Dot product or squared distance of every row and its targets; 0 where there is none."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_pairs = place < count
    row = place // targets
    partner = tl.load(target + place, mask=in_pairs, other=-1)
    pair = partner >= 0
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, dim, CHUNK):
        k = (start + tl.arange(0, CHUNK)).to(tl.int64)
        mask = pair[:, None] & (k < dim)[None, :]
        a = tl.load(x + row[:, None] * x_row + k[None, :] * x_column, mask=mask, other=0.0)
        b = tl.load(y + partner[:, None] * y_row + k[None, :] * y_column, mask=mask, other=0.0)
        a, b = a.to(ACC), b.to(ACC)
        total += tl.sum(a * b if IS_DOT else (a - b) * (a - b), 1)
    tl.store(values + place, total, mask=in_pairs)


@triton.jit
def add_pairs_kernel(
    own, other, owner, partner, weight, offsets, grad, count, dim,
    own_row, own_column, other_row, other_column,
    IS_DOT: tl.constexpr, ACC: tl.constexpr, OWNERS: tl.constexpr, ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """grad[owner] += weight (other[partner] - own[owner]) over the pairs of OWNERS owners."""
    first = tl.program_id(0).to(tl.int64) * OWNERS
    here = first + tl.arange(0, OWNERS)
    begin = tl.load(offsets + first)
    end = tl.load(offsets + tl.minimum(first + OWNERS, count))
    for start_k in range(0, dim, CHUNK):
        k = (start_k + tl.arange(0, CHUNK)).to(tl.int64)
        total = tl.zeros([OWNERS, CHUNK], dtype=ACC)
        for start in range(begin, end, ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            inside = entry < end
            mine = tl.load(owner + entry, mask=inside, other=-1)
            theirs = tl.load(partner + entry, mask=inside, other=-1)
            w = tl.load(weight + entry, mask=inside, other=0.0)
            mask = (inside & (theirs >= 0) & (w != 0.0))[:, None] & (k < dim)[None, :]
            b = tl.load(
                other + theirs[:, None] * other_row + k[None, :] * other_column,
                mask=mask,
                other=0.0,
            ).to(ACC)
            if not IS_DOT:
                at = own + mine[:, None] * own_row + k[None, :] * own_column
                b -= tl.load(at, mask=mask, other=0.0).to(ACC)
            part = tl.where(mask, w[:, None] * b, 0.0)
            # Chosen, not multiplied by 0 and 1: a pair that is not finite stays alone.
            belongs = here[:, None] == mine[None, :]
            total += tl.sum(tl.where(belongs[:, :, None], part[None, :, :], 0.0), 1)
        at = grad + here[:, None] * dim + k[None, :]
        mask = (here < count)[:, None] & (k < dim)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def pair_values(x: Tensor, y: Tensor, target: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Squared distances of every row and its targets, int64 [M, T], or "dot" products; [M, T].

    Taken and summed in ``dtype``, float32 or float64; 0 where a target is negative.
    """
    values = torch.empty(target.shape, dtype=dtype, device=x.device)
    pair_values_kernel[(triton.cdiv(target.numel(), BLOCK),)](
        x, y, target.contiguous(), values, target.numel(), *target.shape[1:], x.shape[1],
        *x.stride(), *y.stride(), IS_DOT=metric not in DISTANCES,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
    return values


def pair_scores(operands: Operands, target: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Score s_it of every row [M], and what (·scale·∂L/∂s) turns into the weight c of the pair."""
    dtype = operands.scale.dtype
    values = pair_values(operands.x.given, operands.y.given, target[:, None], metric, dtype)[:, 0]
    if metric == "dot":
        return operands.scale * values, torch.ones_like(values)
    if metric == "cosine":
        factor = operands.x.norms * operands.y.norms[target.clamp(min=0)]
        return operands.scale * (values * factor), factor
    if metric == "sqeuclidean":
        return -operands.scale * values, torch.full_like(values, 2.0)
    distance = values.sqrt()
    # At coincident points the subgradient 0 is taken.
    inverse = torch.where(distance == 0, 0.0, 1.0 / torch.where(distance == 0, 1.0, distance))
    return -operands.scale * distance, inverse


def add_pairs(
    operands: Operands,
    target: Tensor,
    weight: Tensor,
    metric: str,
    dx: Tensor | None,
    dy: Tensor | None,
) -> None:
    """Add the gradients of the pairs (i, target_i) with weights c [M] to dx and dy, in place."""
    m, n = operands.x.given.shape[0], operands.y.given.shape[0]
    rows = torch.arange(m + 1, device=target.device)
    if dx is not None:
        _add(operands, operands.x, operands.y, rows[:m], target, weight, rows, metric, dx)
    if dy is not None:
        owner, order = target.sort(stable=True)
        offsets = torch.searchsorted(owner, torch.arange(n + 1, device=target.device))
        _add(operands, operands.y, operands.x, owner, order, weight[order], offsets, metric, dy)


def _add(
    operands: Operands,
    own: Points,
    other: Points,
    owner: Tensor,
    partner: Tensor,
    weight: Tensor,
    offsets: Tensor,
    metric: str,
    grad: Tensor,
) -> None:
    add_pairs_kernel[(triton.cdiv(grad.shape[0], OWNERS),)](
        own.given, other.given, owner, partner, weight.contiguous(), offsets, grad, *grad.shape,
        *own.given.stride(), *other.given.stride(),
        IS_DOT=metric not in DISTANCES, ACC=operands.acc, OWNERS=OWNERS, ENTRIES=ENTRIES,
        CHUNK=CHUNK,
    )  # fmt: skip
