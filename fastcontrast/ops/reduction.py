"""The reduction of a loss's rows."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or the rows themselves [M]. The mean of no rows is 0, with gradient 0."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" and loss.shape[0] else loss.sum()
