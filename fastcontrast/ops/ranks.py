"""Processes that share a batch: who they are, what they agree on, sums over them, their rows.

Called by losses that take ``ranks=``, through ``fastcontrast/distributed.py``, which documents the
conventions. Outside a process group there is one rank and nothing is sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast.ops.checks import check_choice
from fastcontrast.ops.eager_function import EagerFunction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STRATEGIES = ("gather", "ring")
GRADIENTS = ("all", "own", "none")


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks in a process group, None for the default one; 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """Number of this process in a process group; 0 where there is none."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


@dataclass(frozen=True)
class Ranks:
    """The ranks that a loss spans, and how their columns come together: ``ranks=`` of a loss.

    Attributes:
        strategy: ``"gather"`` copies the columns of all ranks to each; ``"ring"`` passes them from
            rank to rank while the ones at hand are used, in memory that does not grow with the
            number of ranks. Both give the same loss and gradients.
        group: A process group of ``torch.distributed``, or None for the default one.
        even: Promises that every rank brings as many rows and makes the same call. Nothing is
            compared then, which on a GPU saves waiting for the device; with uneven rows the result
            is undefined.

    Raises:
        ValueError: If the strategy is neither of the two.

    Example:
        >>> import torch
        >>> from fastcontrast import info_nce_loss
        >>> info_nce_loss(torch.eye(3), torch.eye(3), metric="dot", ranks=Ranks("ring"))
        tensor(0.5514)
    """

    strategy: str = "gather"
    group: ProcessGroup | None = None
    even: bool = False

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return rank(self.group)

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, without gradient."""
        value = value.detach().clone()
        if self.size > 1:
            with self.answering("a sum over the ranks"):
                dist.all_reduce(value, group=self.group)
        return value

    def loss(self, value: Tensor, reduction: str) -> Tensor:
        """This rank's share of a loss as the loss of all ranks; or with "none" the rows given.

        In the backward pass the gradient is multiplied by the number of ranks, because the mean
        over ranks that data parallelism takes divides by it.
        """
        return value if self.size == 1 else _LossOfAll.apply(value, reduction, self)

    def rows_of_all(self, count: int, device: torch.device, call: str) -> list[int]:
        """How many rows every rank brings to a call that all of them describe alike."""
        if self.even or self.size == 1:
            return [count] * self.size
        header = torch.tensor([count, zlib.crc32(call.encode())], device=device)
        headers = header.new_empty(2 * self.size)
        with self.answering(call):
            _all_gather(headers, header, self.group)
            rows, calls = headers.view(-1, 2).T.tolist()
        other = next((r for r, crc in enumerate(calls) if crc != calls[self.rank]), None)
        if other is not None:
            raise ValueError(
                f"every rank must make the same call, but rank {other} made another one than "
                f"rank {self.rank}, which made: {call}"
            )
        return rows

    @contextmanager
    def answering(self, call: str) -> Iterator[None]:
        """Say what was waited for when the other ranks do not answer."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} had no answer from the other ranks to {call}: "
                f"one of them has stopped, or does not make the same calls ({error})"
            ) from error


def several(ranks: Ranks | None) -> Ranks | None:
    """``ranks`` if there are two or more of them, else None: the loss of one is the plain one."""
    if ranks is None:
        return None
    if not isinstance(ranks, Ranks):
        raise TypeError(
            f"ranks must be a fastcontrast.distributed.Ranks or None, got {type(ranks).__name__}"
        )
    if ranks.size == 1:
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError("a loss with ranks= cannot be compiled; compile the network instead")
    return ranks


def total(value: Tensor, ranks: Ranks | None) -> Tensor:
    """Sum over the ranks without gradient; the value itself where there are none."""
    return value if ranks is None else ranks.total(value)


def refuse_second_derivative() -> None:
    """Raise in a backward pass that somebody will differentiate again."""
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("what goes between ranks cannot be differentiated twice")


class _LossOfAll(EagerFunction):
    """Value and gradient of :meth:`Ranks.loss`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reduction: str, ranks: Ranks) -> Tensor:
        ctx.size = ranks.size
        return value.view_as(value) if reduction == "none" else ranks.total(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.size * upstream[0], None, None


def gather(
    x: Tensor,
    group: ProcessGroup | None = None,
    *,
    gradients: str = "all",
    even: bool = False,
) -> Tensor:
    """Rows of all ranks, in the order of the ranks; the ranks may bring different numbers of rows.

    Args:
        x: Rows of this rank [M, ...], any dtype.
        group: A process group, or None for the default one. Without one, ``x`` is returned.
        gradients: ``"all"``: this rank's rows receive the sum of the gradients that they have on
            every rank, so that the gradient of the sum of the ranks' losses is exact; all ranks
            must then go through the backward pass. ``"own"``: what they have on this rank alone.
            ``"none"``: nothing.
        even: Promises that every rank brings as many rows, which saves asking.

    Returns:
        Rows [sum of the ranks' M, ...].

    Raises:
        ValueError: If ``gradients`` is none of these, or the ranks do not fit together.
        TypeError: If ``x`` is not a tensor.
        RuntimeError: If a rank does not answer within the timeout of the group.

    Example:
        >>> import torch
        >>> gather(torch.tensor([1, 2]))  # of one rank
        tensor([1, 2])
    """
    check_choice("gradients", gradients, GRADIENTS)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x must have rows, got a 0-dim tensor")
    ranks = Ranks("gather", group, even)
    if ranks.size == 1:
        return x if gradients != "none" else x.detach()
    flows = gradients == "all" and x.requires_grad and torch.is_grad_enabled()
    call = f"gather of [*, {', '.join(map(str, x.shape[1:]))}] {x.dtype} (gradient: {flows})"
    rows = ranks.rows_of_all(x.shape[0], x.device, call)
    if gradients == "all":
        return gathered(x, rows, ranks)
    parts = list(_gathered(x.detach(), rows, ranks).split(rows))
    if gradients == "own":
        parts[ranks.rank] = x
    return torch.cat(parts)


def gathered(x: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
    """Rows of all ranks with exact gradients, given how many each of them brings."""
    return _Gather.apply(x, rows, ranks) if x.requires_grad else _gathered(x, rows, ranks)


def _gathered(x: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
    most = max(rows)
    if x.shape[0] < most:  # the collective wants as many rows of every rank
        x = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    out = x.new_empty(len(rows) * most, *x.shape[1:])
    if out.numel():
        with ranks.answering("gather"):
            _all_gather(out, x.contiguous(), ranks.group)
    if min(rows) == most:
        return out
    return torch.cat([part[:count] for part, count in zip(out.split(most), rows, strict=True)])


def _all_gather(out: Tensor, x: Tensor, group: ProcessGroup | None) -> None:
    """The collective under the name that this torch has for it."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out, x, group=group)


class _Gather(EagerFunction):
    """Rows of all ranks; backward the owner sums in the order of the ranks, always the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
        ctx.rows, ctx.ranks = rows, ranks
        return _gathered(x, rows, ranks)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = upstream
        rows, ranks = ctx.rows, ctx.ranks
        own = rows[ranks.rank]
        received = grad.new_empty(len(rows) * own, *grad.shape[1:])
        with ranks.answering("the gradients of gather"):
            dist.all_to_all_single(
                received, grad.contiguous(), [own] * len(rows), rows, group=ranks.group
            )
        return received.view(len(rows), own, *grad.shape[1:]).sum(0), None, None
