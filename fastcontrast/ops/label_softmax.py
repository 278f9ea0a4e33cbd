r"""Softmax statistics of a row's own class and of the others, for losses by class ids.

With :math:`P_i` the columns of row i's class, itself left out, and :math:`N_i` those of the others,
two passes of ``distance_softmax`` give :math:`\log\sum_{P_i} e^s`, :math:`\sum_{P_i} s`,
:math:`|P_i|` and :math:`\log\sum_{N_i} e^s`; no mask is written. Called by ``fastcontrast/losses``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.softmax_loss import softplus


class ClassStatistics(NamedTuple):
    """Per row [M]; differentiable but for the two last.

    Attributes:
        gap: Log-sum-exp of the others minus that of the class, nats; 0 in a row without positives.
        positive_lse: Log-sum-exp of the class; 0 in a row without positives.
        positive_sum: Sum of the scores of the class.
        positive_count: Number of positives, at least 1, in the dtype of the loss.
        pays: Whether the row has a positive.
    """

    gap: Tensor
    positive_lse: Tensor
    positive_sum: Tensor
    positive_count: Tensor
    pays: Tensor

    @property
    def share_loss(self) -> Tensor:
        """-log of the share of the class in the softmax, [M]: softplus of the gap."""
        return softplus(self.gap)


def class_statistics(
    x: Tensor,
    y: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    own: Tensor | None,
    *,
    metric: str,
    scale: float | Tensor,
    precision: str,
    backend: str | None,
) -> ClassStatistics:
    """Both passes; ``own`` [M] names each row's own column, which is left out."""
    if torch.promote_types(x.dtype, y.dtype) in (torch.float16, torch.bfloat16):
        # Two passes, two gradients: added before they are rounded.
        x, y, precision = x.float(), y.float(), "ieee"
    if metric == "cosine":
        same_operand = x is y
        x = normalized(x)
        y, metric = (x if same_operand else normalized(y)), "dot"
    options = {"metric": metric, "scale": scale, "precision": precision, "backend": backend}
    ids = {"row_ids": row_ids, "column_ids": column_ids}
    same = distance_softmax(x, y, keep="same", exclude=own, score_sum=True, **ids, **options)
    other = distance_softmax(x, y, keep="different", **ids, **options)
    assert same.score_sum is not None
    assert same.column_count is not None
    pays = same.column_count > 0
    lse = torch.where(pays, same.lse, 0.0)
    return ClassStatistics(
        gap=torch.where(pays, other.lse, 0.0) - lse,
        positive_lse=lse,
        positive_sum=same.score_sum,
        positive_count=same.column_count.clamp(min=1).to(lse.dtype),
        pays=pays,
    )


def reduce_paying(loss: Tensor, pays: Tensor, reduction: str) -> Tensor:
    """Mean over the rows that pay (of none, 0), sum, or the rows [M] with 0 for the others."""
    loss = torch.where(pays, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / pays.sum().clamp(min=1) if reduction == "mean" else loss.sum()
