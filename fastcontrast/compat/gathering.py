"""Batches of all processes, for the drop-ins that gather them as their libraries do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(x: Tensor, *, with_gradients: bool, own_gradient: bool = True) -> Tensor:
    """Rows of all processes, in the order of the ranks; every process must have as many.

    Args:
        x: Rows of this process [M, D].
        with_gradients: Whether gradients flow back to the other processes.
        own_gradient: Without those, whether they at least flow to this process's rows.

    Returns:
        [world size · M, D].
    """
    if with_gradients:
        return _Gathered.apply(x)
    parts = _parts(x)
    if own_gradient:
        parts[dist.get_rank()] = x
    return torch.cat(parts)


def _parts(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return parts


class _Gathered(torch.autograd.Function):
    """A row's gradient is the sum of those that every process has for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return torch.cat(_parts(x))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("gathered batches cannot be differentiated twice")
        total = upstream[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * ctx.rows :][: ctx.rows]


def world() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 outside a process group."""
    return dist.get_rank() if world() > 1 else 0
