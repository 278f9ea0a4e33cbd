"""Batches of all processes, for the drop-ins that gather them as their libraries do."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn
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
        return torch.cat(torch.distributed.nn.all_gather(x.contiguous()))
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    if own_gradient:
        parts[dist.get_rank()] = x
    return torch.cat(parts)


def world() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 outside a process group."""
    return dist.get_rank() if world() > 1 else 0
