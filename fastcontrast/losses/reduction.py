"""What every loss does to its rows: softplus and the reduction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or the rows themselves [M]. The mean of no rows is 0, with gradient 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(1, loss.shape[0]) if reduction == "mean" else total


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact over the whole range of float64 (PyTorch's default cuts off at 20)."""
    return F.softplus(x, threshold=50.0)
