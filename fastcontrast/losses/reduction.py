"""What every loss shares after its rows are computed, and the checks of arguments they share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or the rows themselves [M]. The mean of no rows is 0, with gradient 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / max(1, loss.shape[0]) if reduction == "mean" else total


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless ``reduction`` is one of :data:`REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_indices(
    name: str, value: Tensor, rows: Tensor, lowest: int, count: int, of: str
) -> Tensor:
    """Return ``value`` as int64 [M], or raise if it is not a valid index for every row.

    The range is checked on CPU only; on a GPU that would wait for the device.
    """
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {kind}")
    if value.shape != (rows.shape[0],):
        raise ValueError(f"{name} must have shape [{rows.shape[0]}], got {list(value.shape)}")
    if value.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device}, got {value.device}")
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        least, most = int(value.min()), int(value.max())
        if least < lowest or most >= count:
            raise ValueError(
                f"{name} must lie in {lowest}..{count - 1} ({of}), got {least}..{most}"
            )
    return value.to(torch.int64)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact over the whole range of float64 (PyTorch's default cuts off at 20)."""
    return F.softplus(x, threshold=50.0)
