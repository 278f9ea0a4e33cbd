"""`distance_softmax` by definition: direct differences, masks, PyTorch's own gradients.

Rows go in chunks of at most CHUNK_ELEMENTS scores. :func:`differentiable_statistics` is the same
computation left open to autograd: double backward goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcontrast.backends.scores import Scores, accumulator_dtype, column_mean

CHUNK_ELEMENTS = 1 << 22


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row statistics (lse, mean_score, score_sum, count, rank); what is not asked for is empty."""
    dtype = accumulator_dtype(x.dtype)
    m = x.shape[0]
    lse, mean = x.new_empty(m, dtype=dtype), x.new_empty(m, dtype=dtype)
    total = x.new_empty(m if score_sum else 0, dtype=dtype)
    count = x.new_empty(m if score_sum else 0, dtype=torch.int64)
    rank = x.new_empty(0 if threshold is None else m, dtype=torch.int64)
    for rows in _row_chunks(x, y):
        s, counts = _score_matrix(x[rows], y, _of_rows(scores, rows), twice=False)
        lse[rows], mean[rows], row_total = _softmax_statistics(s, counts)
        if score_sum:
            total[rows], count[rows] = row_total, counts.sum(1)
        if threshold is not None:
            rank[rows] = (s > threshold[rows][:, None]).sum(1)
    return lse, mean, total, count, rank


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    lse: Tensor,
    mean_score: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale from those of (lse, mean_score, score_sum); empty if not needed."""
    del lse, mean_score  # recomputed: autograd differentiates the definition
    dtype = accumulator_dtype(x.dtype)
    dx = torch.zeros_like(x, dtype=dtype) if needs[0] else x.new_empty(0)
    dy = torch.zeros_like(y, dtype=dtype) if needs[1] else y.new_empty(0)
    scale = torch.as_tensor(scores.scale, dtype=dtype, device=x.device).detach()
    dscale = torch.zeros_like(scale) if needs[2] else scale.new_empty(0)
    for rows in _row_chunks(x, y):
        with torch.enable_grad():
            leaves = [
                x[rows].detach().to(dtype).requires_grad_(needs[0]),
                y.detach().to(dtype).requires_grad_(needs[1]),
                scale.clone().requires_grad_(needs[2]),
            ]
            part = _of_rows(scores, rows)._replace(scale=leaves[2])
            s, counts = _score_matrix(leaves[0], leaves[1], part, twice=False)
            outputs = _softmax_statistics(s, counts)
            pairs = [
                (output, grad[rows].to(dtype))
                for output, grad in zip(outputs, grads, strict=True)
                if grad is not None
            ]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            if not pairs or not wanted:
                continue
            result = iter(
                torch.autograd.grad(
                    [output for output, _ in pairs],
                    wanted,
                    [grad for _, grad in pairs],
                    materialize_grads=True,
                )
            )
        if needs[0]:
            dx[rows] = next(result)
        if needs[1]:
            dy += next(result)
        if needs[2]:
            dscale += next(result)
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def differentiable_statistics(
    x: Tensor, y: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, mean_score, score_sum) as a graph that can be differentiated any number of times.

    Takes O(M·N·D) memory.
    """
    dtype = accumulator_dtype(x.dtype)
    s, counts = _score_matrix(x.to(dtype), y.to(dtype), scores, twice=True)
    return _softmax_statistics(s, counts)


def _row_chunks(x: Tensor, y: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, y.shape[0]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _of_rows(scores: Scores, rows: slice) -> Scores:
    return scores._replace(
        exclude=None if scores.exclude is None else scores.exclude[rows],
        row_ids=None if scores.row_ids is None else scores.row_ids[rows],
    )


def _score_matrix(x: Tensor, y: Tensor, scores: Scores, *, twice: bool) -> tuple[Tensor, Tensor]:
    """Scores [M, N], -inf where a column does not count, and which columns count [M, N]."""
    dtype = accumulator_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if scores.metric == "dot":
        s = _rounded(x, scores.precision) @ _rounded(y, scores.precision).T
    else:
        mean = column_mean(y)
        x, y = _rounded(x - mean, scores.precision), _rounded(y - mean, scores.precision)
        distance = _distances_twice_differentiable(x, y) if twice else _distances(x, y)
        s = -distance if scores.metric == "l2" else -distance.square()
    s = s * scores.scale
    counts = torch.ones(s.shape, dtype=torch.bool, device=s.device)
    if scores.exclude is not None and s.shape[1] > 0:
        inside = (scores.exclude >= 0) & (scores.exclude < s.shape[1])
        for e in range(scores.exclude.shape[1]):
            rows = inside[:, e].nonzero()[:, 0]
            counts[rows, scores.exclude[rows, e]] = False
    if scores.row_ids is not None and scores.column_ids is not None:
        same = scores.row_ids[:, None] == scores.column_ids[None, :]
        counts &= same if scores.keep == "same" else ~same
    return s.masked_fill(~counts, -torch.inf), counts


def _softmax_statistics(s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if s.shape[1] == 0:
        zero = s.sum(1)
        return zero - torch.inf, zero, zero
    empty = ~counts.any(1)
    # -inf minus -inf must not be reached, not even by the gradient of a branch not taken.
    defined = torch.where(empty[:, None], 0.0, s)
    lse = torch.where(empty, -torch.inf, torch.logsumexp(defined, 1))
    finite = torch.where(s == -torch.inf, 0.0, s)
    mean = (torch.softmax(defined, 1) * finite).sum(1)
    return lse, mean, torch.where(counts, s, 0.0).sum(1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _distances_twice_differentiable(x: Tensor, y: Tensor) -> Tensor:
    squared = (x[:, None, :] - y[None, :, :]).square().sum(2)
    coincident = squared == 0
    return torch.where(coincident, 0.0, torch.where(coincident, 1.0, squared).sqrt())


def _rounded(x: Tensor, precision: str) -> Tensor:
    """``x`` as a matrix unit of that precision sees it; gradients pass straight through."""
    if precision == "ieee" or x.dtype == torch.float64:
        return x
    value = x.detach()
    if precision == "tf32":  # 10 bits of mantissa, ties away from zero as cvt.rna does
        bits = ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        rounded = torch.where(torch.isfinite(value), bits, value)
    else:
        rounded = value.to(torch.bfloat16).float()
        if precision == "bf16x3":  # high and low halves: 16 bits of mantissa
            rounded = rounded + (value - rounded).to(torch.bfloat16).float()
    return x + (rounded - value)
