"""How the scores of a call are formed: what every backend of a pairwise op is handed.

Filled by ``fastcontrast/ops``, which has checked it; read by the backends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DISTANCES = ("l2", "sqeuclidean")
SIMILARITIES = ("dot", "cosine")
METRICS = (*DISTANCES, "dot")
KEEPS = ("all", "same", "different")
PRECISIONS = ("ieee", "tf32", "bf16x3", "bf16")


class Scores(NamedTuple):
    """Metric, scale, mask and precision of one call.

    Attributes:
        metric: One of :data:`METRICS`; ``s = -scale d``, ``-scale d²`` or ``scale x·y``. Or
            "cosine", which `nearest` is handed, and a backend that :func:`takes_cosine` of such
            points.
        scale: Positive number or 0-dim tensor.
        exclude: Columns left out of each row, [M, E] with E <= 2; values outside 0..N-1 name none.
        row_ids: Integers [M], or None when ``keep`` is "all".
        column_ids: Integers [N], or None when ``keep`` is "all".
        keep: Which columns count by their id: all, those of the row's id, or the others.
        precision: How the operands of matrix products may be rounded, at the worst: a backend may
            be more exact. float64 inputs are never rounded.
    """

    metric: str
    scale: float | Tensor
    exclude: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None
    keep: str
    precision: str


class Statistics(NamedTuple):
    """What the forward kernels return, in the accumulator dtype; what is not asked for is empty.

    Attributes:
        lse: Log-sum-exp [M], nats; -inf where no column counts.
        lse_residual: What rounding ``lse`` left over [M]: the backward kernels add it, because an
            error of ``lse`` is a relative error of every probability of the row.
        entropy: Entropy of the softmax [M], nats; 0 where no column counts.
        score_sum: Sum of the scores that count [M].
        column_count: Number of columns that count, int64 [M].
        rank: Number of columns that score above the threshold, int64 [M].
    """

    lse: Tensor
    lse_residual: Tensor
    entropy: Tensor
    score_sum: Tensor
    column_count: Tensor
    rank: Tensor


def empty_statistics(x: Tensor, *, score_sum: bool, rank: bool) -> Statistics:
    """Uninitialised :class:`Statistics` for the rows of ``x``."""
    m, dtype = x.shape[0], accumulator_dtype(x.dtype)
    return Statistics(
        lse=x.new_empty(m, dtype=dtype),
        lse_residual=x.new_empty(m, dtype=dtype),
        entropy=x.new_empty(m, dtype=dtype),
        score_sum=x.new_empty(m if score_sum else 0, dtype=dtype),
        column_count=x.new_empty(m if score_sum else 0, dtype=torch.int64),
        rank=x.new_empty(m if rank else 0, dtype=torch.int64),
    )


def statistics_of_nothing(x: Tensor, *, score_sum: bool, rank: bool) -> Statistics:
    """What the rows of ``x`` have where there is no column."""
    out = empty_statistics(x, score_sum=score_sum, rank=rank)
    for value in out:
        value.zero_()
    out.lse.fill_(-torch.inf)
    return out


def gradients_of_nothing(
    x: Tensor, y: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale where there is no pair; empty where not needed."""
    dtype = accumulator_dtype(x.dtype)
    shapes: tuple[Any, ...] = (x.shape, y.shape, ())
    dx, dy, dscale = (
        x.new_zeros(shape if need else 0, dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dy, dscale


class RowGradients(NamedTuple):
    """Gradients of the differentiable statistics, each [M] or None."""

    lse: Tensor | None
    entropy: Tensor | None
    score_sum: Tensor | None


class LossWeights(NamedTuple):
    """Weights a, b and c of a loss, each [M] or None for 0.

    ``Σ_i a_i softplus(lse_i - s_i) + b_i entropy_i + c_i softplus(column_lse_i - s_i)``, with s_i
    the score of row i's positive, the first column of its ``exclude``, and column_lse_i the
    log-sum-exp over the rows of that column. Where a row has no positive a and c are 0. With c, no
    two rows share a positive.
    """

    cross_entropy: Tensor | None
    entropy: Tensor | None
    column_cross_entropy: Tensor | None = None


class LossGradients(NamedTuple):
    """The loss of every row [M], and the gradients of its sum; empty where not needed.

    In the accumulator dtype, also for half inputs.
    """

    loss: Tensor
    x: Tensor
    y: Tensor
    scale: Tensor


def transposed(scores: Scores, columns: int) -> Scores:
    """The scores of y against x, given those of x against y [columns, D] with E = 1."""
    exclude = None
    if scores.exclude is not None:
        rows = torch.arange(scores.exclude.shape[0], device=scores.exclude.device)
        inside = (scores.exclude[:, 0] >= 0) & (scores.exclude[:, 0] < columns)
        # One slot more takes the rows without an excluded column.
        exclude = torch.full((columns + 1, 1), -1, device=rows.device)
        exclude[torch.where(inside, scores.exclude[:, 0], columns), 0] = rows
        exclude = exclude[:columns]
    return scores._replace(exclude=exclude, row_ids=scores.column_ids, column_ids=scores.row_ids)


def padding(metric: str, farthest: bool) -> float:
    """Value of `nearest` where a row has fewer than k columns: the end of the order."""
    is_similarity = metric in ("dot", "cosine")
    return float("inf") if is_similarity == farthest else -float("inf")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: dtype of sums, statistics and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32
