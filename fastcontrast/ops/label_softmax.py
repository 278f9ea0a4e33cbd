r"""Softmax statistics of a row's own class and of the others, for losses by class ids.

With :math:`P_i` the columns of row i's class, itself left out, and :math:`N_i` those of the others,
two passes of ``distance_softmax`` give :math:`\log\sum_{P_i} e^s`, :math:`\sum_{P_i} s`,
:math:`|P_i|` and :math:`\log\sum_{N_i} e^s`; no mask is written. Called by ``fastcontrast/losses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.distance_softmax import RowStatistics
from fastcontrast.ops.nearest import nearest
from fastcontrast.ops.normalized import normalized, of_unit_rows
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.ranks import Ranks, several, total
from fastcontrast.ops.sharded_softmax import columns_of_all, sharded_softmax
from fastcontrast.ops.softmax_loss import log_add, softplus
from fastcontrast.ops.statistics import (
    Wanted,
    check_statistics,
    joined_entropy,
    mean_potential,
    with_statistics,
)


class ClassStatistics(NamedTuple):
    """Per row [M]; differentiable but for the count and who pays.

    Attributes:
        gap: Log-sum-exp of the others minus that of the class, nats; 0 in a row without positives.
        positive_lse: Log-sum-exp of the class; 0 in a row without positives.
        positive_sum: Sum of the scores of the class.
        positive_count: Number of positives, at least 1, in the dtype of the loss.
        pays: Whether the row has a positive.
        passes: Both passes, for figures beside the loss.
        wanted: Those asked for.
        ranks: Whose rows the loss is taken over, or None for those of this process.
    """

    gap: Tensor
    positive_lse: Tensor
    positive_sum: Tensor
    positive_count: Tensor
    pays: Tensor
    passes: _Passes
    wanted: Wanted | None
    ranks: Ranks | None

    @property
    def share_loss(self) -> Tensor:
        """-log of the share of the class in the softmax, [M]: softplus of the gap."""
        return softplus(self.gap)

    def reduced(self, loss: Tensor, reduction: str) -> Any:
        """Mean of the losses [M] of rows that pay (of none, 0), their sum, or the rows, others 0.

        With the figures asked for beside it.
        """
        loss = torch.where(self.pays, loss, 0.0)
        if reduction == "mean":
            loss = loss.sum() / total(self.pays.sum(), self.ranks).clamp(min=1)
        elif reduction == "sum":
            loss = loss.sum()
        loss = loss if self.ranks is None else self.ranks.loss(loss, reduction)
        return with_statistics(loss, self.passes, self.wanted, self.ranks)


def class_statistics(
    x: Tensor,
    y: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    own: Tensor | None,
    *,
    metric: str,
    scale: float | Tensor,
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    resident: int = 0,
    precision: str,
    backend: str | None,
) -> ClassStatistics:
    """Both passes; ``own`` [M] names each row's own column, which is left out.

    With ``ranks`` the columns are those of all ranks, but the last ``resident`` ones of each, which
    count for its own rows alone.
    """
    ranks = several(ranks)
    wanted = check_statistics(return_stats)
    if torch.promote_types(x.dtype, y.dtype) in (torch.float16, torch.bfloat16):
        # Two passes, two gradients: added before they are rounded.
        precision = of_widened(precision, x, y)
        same = y is x
        x = x.float()
        y = x if same else y.float()
    x, y, metric = of_unit_rows(x, y, metric)
    shards = ranks
    if ranks is not None and ranks.strategy == "gather":  # once for both passes
        columns = columns_of_all(ranks, y, resident, column_ids)
        assert columns.ids is not None
        y, column_ids, shards = columns.y, columns.ids, None
        own = None if own is None else columns.shifted(own)
    ids = {"row_ids": row_ids, "column_ids": column_ids}
    options = {"ranks": shards, "resident": resident, "precision": precision, "backend": backend}
    passes = _Passes(x, y, ids, own, options, ranks)
    scores = {"metric": metric, "scale": scale}
    passes.same = passes.of("same", x, y, score_sum=True, **scores)
    best = passes.best_scores(**scores) if wanted is not None and wanted.rank else None
    passes.other = passes.of("different", x, y, threshold=best, **scores)
    same, pays = passes.same, passes.pays()
    assert same.score_sum is not None
    assert same.column_count is not None
    lse = torch.where(pays, same.lse, 0.0)
    return ClassStatistics(
        gap=torch.where(pays, passes.other.lse, 0.0) - lse,
        positive_lse=lse,
        positive_sum=same.score_sum,
        positive_count=same.column_count.clamp(min=1).to(lse.dtype),
        pays=pays,
        passes=passes,
        wanted=wanted,
        ranks=ranks,
    )


class _Passes:
    """Statistics of each row's class and of the others, and the figures that follow from them."""

    same: RowStatistics
    other: RowStatistics

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        ids: dict,
        own: Tensor | None,
        options: dict,
        all_ranks: Ranks | None,
    ) -> None:
        self.x, self.y, self.ids, self.own, self.options = x, y, ids, own, options
        self.all_ranks = all_ranks

    def of(self, keep: str, x: Tensor, y: Tensor, **arguments: Any) -> RowStatistics:
        """Statistics over the columns of the ``"same"`` class, or of ``"different"`` ones."""
        exclude = self.own if keep == "same" else None
        return sharded_softmax(
            x=x, y=y, keep=keep, exclude=exclude, **self.ids, **arguments, **self.options
        )

    def best_scores(self, *, metric: str, scale: float | Tensor) -> Tensor:
        """Score of each row's best positive [M], a threshold; any where there is none."""
        # Not on the backend of the passes, which may have no such search.
        with torch.no_grad():
            y, own = self.y.detach(), self.own
            ids: dict = self.ids
            ranks = self.options["ranks"]
            if ranks is not None:  # a ring has no such search: for the figure, it gathers
                columns = columns_of_all(ranks, y, self.options["resident"], ids["column_ids"])
                y, ids = columns.y, {**ids, "column_ids": columns.ids}
                own = None if own is None else columns.shifted(own)
            found = nearest(self.x, y, metric=metric, keep="same", exclude=own, **ids)
            best = found.indices[:, 0].clamp(min=0)
            best = y[best] if y.shape[0] else self.x
            return paired_scores(self.x, best, metric=metric, scale=scale)

    # The figures of ops/statistics.py, called without gradients.

    def pays(self) -> Tensor:
        assert self.same.column_count is not None
        return self.same.column_count > 0

    def lse(self) -> Tensor:
        return log_add(self.same.lse, self.other.lse)

    def entropy(self) -> Tensor:
        same, other = self.same, self.other
        return joined_entropy(same.lse, same.entropy, other.lse, other.entropy)

    def rank(self) -> Tensor:
        assert self.other.rank is not None
        return self.other.rank

    def alignment(self) -> Tensor:
        rows = self._unit("same", 1.0)
        assert rows.score_sum is not None
        assert rows.column_count is not None
        ranks = self.all_ranks
        return -total(rows.score_sum.sum(), ranks) / total(rows.column_count.sum(), ranks)

    def uniformity(self) -> Tensor:
        rows = self._unit("different", 2.0)
        assert rows.column_count is not None
        return mean_potential(rows.lse, rows.column_count, self.all_ranks)

    def _unit(self, keep: str, scale: float) -> RowStatistics:
        """Statistics of squared distances between rows of length 1: a pass of its own."""
        x, y = normalized(self.x), normalized(self.y)
        return self.of(keep, x, y, metric="sqeuclidean", scale=scale, score_sum=True)
