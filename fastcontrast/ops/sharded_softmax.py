r"""`distance_softmax` of a rank's rows against the columns of all ranks.

Columns are sharded: each rank holds some, and every row counts all of them. A softmax over shards
follows from the statistics of each shard k,

.. math::
    \mathrm{lse} = \log \sum_k e^{\mathrm{lse}_k}, \qquad
    H = \sum_k P_k H_k - \sum_k P_k \log P_k, \qquad P_k = e^{\mathrm{lse}_k - \mathrm{lse}}

and sums of scores and counts add, so that a rank needs one shard at a time. In the ring a shard
goes from rank to rank, each sending one on while it works on it. Backward the shards go round again
with their gradients: every rank adds its rows' part, and the last one hands the sum to the owner.

Memory: two shards, and backward two of their gradients, whatever the number of ranks.
Numerics: log-sum-exps are joined in float64 and kept in two parts, as by the kernels; the backward
kernels of a shard are handed those of all columns. Sums are in the order of the ring, always the
same. Called by ``fastcontrast/ops`` for losses with ``ranks=``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.scores import RowGradients, Scores, Statistics, accumulator_dtype
from fastcontrast.ops.checks import PRECISION_CHOICES, check_choice
from fastcontrast.ops.distance_softmax import (
    RowStatistics,
    distance_softmax,
    with_tensors,
    without_tensors,
)
from fastcontrast.ops.eager_function import EagerFunction
from fastcontrast.ops.precision import effective_precision
from fastcontrast.ops.ranks import Ranks, gathered, refuse_second_derivative
from fastcontrast.ops.statistics import joined_entropy


def sharded_softmax(
    ranks: Ranks | None,
    x: Tensor,
    y: Tensor,
    *,
    resident: int = 0,
    metric: str,
    scale: float | Tensor,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    keep: str = "all",
    threshold: Tensor | None = None,
    score_sum: bool = False,
    precision: str,
    backend: str | None,
) -> RowStatistics:
    """:func:`~fastcontrast.distance_softmax` of x against the columns of all ranks.

    Args:
        ranks: Two ranks or more, or None for the plain op.
        x: Rows of this rank [M, D], checked.
        y: Its columns [N, D], checked.
        resident: How many of them, the last ones, count for the rows of this rank alone: a queue
            that every rank holds.
        metric: ``"l2"``, ``"sqeuclidean"`` or ``"dot"``.
        scale: As for the op; a tensor receives the gradient of this rank's rows.
        exclude: Columns of this rank left out of its rows, integer [M] or [M, E].
        row_ids: As for the op.
        column_ids: As for the op, [N].
        keep: As for the op.
        threshold: As for the op.
        score_sum: As for the op.
        precision: As for the op.
        backend: As for the op.
    """
    if ranks is None or ranks.strategy == "gather":
        if ranks is not None:
            columns = columns_of_all(ranks, y, resident, column_ids)
            y, column_ids = columns.y, columns.ids
            exclude = None if exclude is None else columns.shifted(exclude)
        return distance_softmax(
            x, y, metric=metric, scale=scale, exclude=exclude, row_ids=row_ids,
            column_ids=column_ids, keep=keep, threshold=threshold, score_sum=score_sum,
            precision=precision, backend=backend,
        )  # fmt: skip
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    check_choice("precision", precision, PRECISION_CHOICES)
    precision = effective_precision(precision, x)
    backend = backends.resolve("distance_softmax", x, backend, others=y, precision=precision)
    if exclude is not None and exclude.dim() == 1:
        exclude = exclude[:, None]
    scores = Scores(metric, scale, exclude, row_ids, column_ids, keep, precision)
    scale_input = scale if isinstance(scale, Tensor) else None
    rows = _rows_of_all(ranks, x, y, resident, f"{metric}, {keep}")
    lse, _, entropy, total, count, rank = _RingSoftmax.apply(
        x, y, scale_input, exclude, row_ids, column_ids, scores, threshold, score_sum, backend,
        _Ring(ranks, rows),
    )  # fmt: skip
    return RowStatistics(
        lse,
        entropy,
        rank if threshold is not None else None,
        total if score_sum else None,
        count if score_sum else None,
    )


class GatheredColumns(NamedTuple):
    """Columns of all ranks [N', D], their ids, and where this rank's begin."""

    y: Tensor
    ids: Tensor | None
    first: int

    def shifted(self, index: Tensor) -> Tensor:
        """Indices of this rank's own columns as indices of all; negative ones name none."""
        return torch.where(index < 0, index, index + self.first)


def columns_of_all(
    ranks: Ranks, y: Tensor, resident: int = 0, ids: Tensor | None = None
) -> GatheredColumns:
    """Columns of all ranks, and then the resident ones of this rank."""
    own = y.shape[0] - resident
    rows = _rows_of_all(ranks, y, y, resident, "ids" if ids is not None else "no ids")
    found = torch.cat([gathered(y[:own], rows, ranks), y[own:]])
    if ids is not None:
        ids = ids.to(torch.int64)
        ids = torch.cat([gathered(ids[:own], rows, ranks), ids[own:]])
    return GatheredColumns(found, ids, sum(rows[: ranks.rank]))


def _rows_of_all(ranks: Ranks, x: Tensor, y: Tensor, resident: int, options: str) -> list[int]:
    """How many columns every rank brings; raises where their calls do not fit together."""
    flows = torch.is_grad_enabled()
    call = (
        f"{ranks.strategy} of columns [*, {y.shape[1]}] in {y.dtype}, {options}, gradients of rows "
        f"{flows and x.requires_grad} and of columns {flows and y.requires_grad}"
    )
    return ranks.rows_of_all(y.shape[0] - resident, y.device, call)


class _Exchange(NamedTuple):
    """Tensors under way from the rank before, and those sent to the rank after."""

    received: list[Tensor]
    sent: list[Tensor]  # must live until they have left
    works: list[Any]


class _Ring:
    """The way of the shards: in step k a rank holds the one of the rank k places before it."""

    def __init__(self, ranks: Ranks, rows: list[int]) -> None:
        self.ranks, self.rows = ranks, rows
        self.size, self.rank = ranks.size, ranks.rank

    def shards(self, columns: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Step and shard; the next one is on its way while the caller works on this one."""
        for step in range(self.size):
            more = step + 1 < self.size
            under_way = self.start(step, columns) if more else None
            yield step, columns
            if under_way is not None:
                columns = self.finish(under_way)

    def start(self, step: int, tensors: list[Tensor]) -> _Exchange:
        """Send what belongs to the shard of this step on, and await the same of the next shard."""
        count = self.rows[(self.rank - step - 1) % self.size]
        sent = [t.contiguous() for t in tensors]
        received = [t.new_empty(count, *t.shape[1:]) for t in tensors]
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        group = self.ranks.group
        calls = [
            dist.P2POp(call, t, group=group, group_peer=peer)
            for call, peer, parts in ((dist.isend, after, sent), (dist.irecv, before, received))
            for t in parts
            if t.numel()
        ]
        with self.ranks.answering("the ring of columns"):
            works = dist.batch_isend_irecv(calls) if calls else []
        return _Exchange(received, sent, works)

    def finish(self, exchange: _Exchange) -> list[Tensor]:
        """What has come in."""
        with self.ranks.answering("the ring of columns"):
            for work in exchange.works:
                work.wait()
        return exchange.received


class _RingSoftmax(EagerFunction):
    """Both trips of the ring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor | None,
        exclude: Tensor | None,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        scores: Scores,
        threshold: Tensor | None,
        score_sum: bool,
        backend: str,
        ring: _Ring,
    ) -> tuple[Tensor, ...]:
        found = None
        for columns, part in _parts(ring, y, scores):
            out = backends.run(
                backend, "distance_softmax_forward", x, columns, part, threshold, score_sum
            )
            found = _in_float64(out) if found is None else _joined(found, _in_float64(out))
        assert found is not None
        result = _rounded(found, accumulator_dtype(x.dtype))
        ctx.save_for_backward(x, y, scale, exclude, row_ids, column_ids, *result[:3])
        ctx.scores, ctx.backend, ctx.ring = without_tensors(scores), backend, ring
        ctx.mark_non_differentiable(result.lse_residual, result.column_count, result.rank)
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, y, scale, exclude, row_ids, column_ids, *statistics = ctx.saved_tensors
        scores = with_tensors(ctx.scores, scale, exclude, row_ids, column_ids)
        needs, ring = tuple(ctx.needs_input_grad[:3]), ctx.ring
        row_gradients = RowGradients(grads[0], grads[2], grads[3])
        own = ring.rows[ring.rank]
        dx = dscale = resident = under_way = None
        for step, (columns, part) in enumerate(_parts(ring, y, scores)):
            parts = backends.run(
                ctx.backend, "distance_softmax_backward", x, columns, part, tuple(statistics),
                row_gradients, needs,
            )  # fmt: skip
            if needs[0]:
                dx = _sum(dx, parts[0])
            if needs[2]:
                dscale = _sum(dscale, parts[2])
            if not needs[1]:
                continue
            grad = parts[1].to(accumulator_dtype(y.dtype))
            if step == 0:
                grad, resident = grad[:own], grad[own:]
            if under_way is not None:  # what the ranks before have added for this shard
                grad = ring.finish(under_way)[0] + grad
            under_way = ring.start(step, [grad])
        dy = None
        if under_way is not None and resident is not None:
            dy = torch.cat([ring.finish(under_way)[0], resident]).to(y.dtype)
        if scale is not None and dscale is not None:
            dscale = dscale.to(scale.dtype).to(scale.device)
        return (None if dx is None else dx.to(x.dtype), dy, dscale, *[None] * 8)


def _parts(ring: _Ring, y: Tensor, scores: Scores) -> Iterator[tuple[Tensor, Scores]]:
    """The columns at hand in each step, and how they count: first this rank's own."""
    own, ids = ring.rows[ring.rank], scores.column_ids
    shard = [y.detach()[:own]]
    if ids is not None:
        shard.append(ids.to(torch.int64)[:own])
    for step, columns in ring.shards(shard):
        if step == 0:
            yield y, scores
        else:
            foreign_ids = None if ids is None else columns[1]
            yield columns[0], scores._replace(exclude=None, column_ids=foreign_ids)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """Running sum in the accumulator dtype."""
    part = part.to(accumulator_dtype(part.dtype))
    return part if total is None else total + part


def _in_float64(out: Statistics) -> Statistics:
    """Statistics with log-sum-exp in one part again."""
    return out._replace(
        lse=out.lse.double() + out.lse_residual.double(),
        entropy=out.entropy.double(),
        score_sum=out.score_sum.double(),
    )


def _joined(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union of two sets of columns."""
    return Statistics(
        lse=torch.logaddexp(a.lse, b.lse),
        lse_residual=a.lse_residual,
        entropy=joined_entropy(a.lse, a.entropy, b.lse, b.entropy),
        score_sum=a.score_sum + b.score_sum,
        column_count=a.column_count + b.column_count,
        rank=a.rank + b.rank,
    )


def _rounded(found: Statistics, dtype: torch.dtype) -> Statistics:
    """Statistics as a kernel returns them, log-sum-exp in two parts."""
    lse = found.lse.to(dtype)
    residual = torch.where(torch.isfinite(lse), found.lse - lse.double(), 0.0).to(dtype)
    return found._replace(
        lse=lse,
        lse_residual=residual,
        entropy=found.entropy.to(dtype),
        score_sum=found.score_sum.to(dtype),
    )
