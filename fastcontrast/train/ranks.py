"""One run over several processes, started by torchrun: everything that differs between its ranks.

Every rank draws the indices of the whole batch and runs the network over its share of the images.
The outputs of all ranks are brought together, each rank takes the loss of the whole batch, and
goes back with the gradients of its own outputs; the weights' gradients are summed. Batch
normalisation has the statistics of all images, and dropout the masks that these images have in
the whole batch. A step is therefore that of one process, up to rounding. Rank 0 alone evaluates,
writes and prints. In one process nothing is sent and the functions hand on what they are given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops.eager_function import EagerFunction
from fastcontrast.ops.ranks import Ranks, gathered, rank, refuse_second_derivative, world_size

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another rank has stopped or does not answer; the last good checkpoint is kept."""


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[None]:
    """Join the ranks that torchrun started, if it did; inside, only rank 0 prints.

    Args:
        device: ``--device``. On GPUs a rank takes the one of its LOCAL_RANK, and NCCL.
        timeout: Seconds that a rank waits for the others before it gives up.

    Raises:
        ValueError: If torchrun's variables are incomplete, or there are too few GPUs.
        LostRankError: If the other ranks do not join.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or world_size() > 1:
        yield
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        backend, local = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {local}, but torch sees {torch.cuda.device_count()} GPUs; start as "
                "many ranks on this machine, or train with --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        number = os.environ.get("RANK")
        raise LostRankError(f"rank {number} could not join the others: {error}") from error
    try:
        with (
            open(os.devnull, "w") as nowhere,
            nullcontext() if is_first() else redirect_stdout(nowhere),
        ):
            yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process evaluates and writes: rank 0, or the only one."""
    return rank() == 0


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank. Asked on the host: a GPU is not waited for."""
    if world_size() == 1:
        return flag
    answer = torch.tensor(int(flag))
    with _answered("whether to stop"):
        dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; or the error that it meets, raised on every rank."""
    if world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = make()
        except (ValueError, OSError) as error:
            answer[1] = error
    with _answered("what rank 0 has to say"):
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    value, error = answer
    if error is not None:
        raise error
    return value


class Shares:
    """Who takes which images of a batch: each group of them is shared out evenly, in its order.

    Attributes:
        groups: Images of each group of the batch, group after group.
        total: Images of the batch.
        own_groups: The same of this rank's share.

    Raises:
        ValueError: If there are fewer images than ranks.
    """

    def __init__(self, *groups: int):
        self._world, self._rank = world_size(), rank()
        if max(groups) < self._world:
            raise ValueError(
                f"batch_size: {max(groups)} images cannot be shared out among {self._world} ranks; "
                "wanted one for each, or more"
            )
        self.groups, self.total = groups, sum(groups)
        ends = [[size * r // self._world for r in range(self._world + 1)] for size in groups]
        self._sizes = [[b - a for a, b in pairwise(e)] for e in ends]  # [G][W]
        self.own_groups = [sizes[self._rank] for sizes in self._sizes]

    def own(self, batch: Tensor) -> Tensor:
        """This rank's rows of a tensor that has a row for each image of the batch."""
        if self._world == 1:
            return batch
        parts = batch.split([size for sizes in self._sizes for size in sizes])
        return torch.cat(parts[self._rank :: self._world])

    @torch.no_grad()
    def whole(self, own: Tensor) -> Tensor:
        """Rows of the whole batch, in its order, from every rank's own; without gradients."""
        if self._world == 1:
            return own
        by_rank = list(zip(*self._sizes, strict=True))  # [W][G]
        with _answered("the network's outputs"):
            rows = gathered(own.detach(), [sum(sizes) for sizes in by_rank], Ranks())
        parts = rows.split([size for sizes in by_rank for size in sizes])
        count = len(self.groups)
        return torch.cat([part for group in range(count) for part in parts[group::count]])


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all ranks, in place and in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _answered("the sum of gradients"):
        dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


def spread_layers(model: nn.Module, shares: Shares, apart: nn.Module | None = None) -> None:
    """Make the layers that know more than one image, or draw, do so as over the whole batch.

    Args:
        model: Its batch normalisations and dropouts are changed in place; names and values of its
            parameters and buffers stay.
        shares: Of the batches that it will be trained on; they matter to dropout alone.
        apart: A part of it that sees the whole batch on every rank, and is left as it is.
    """
    if world_size() == 1:
        return
    left = set() if apart is None else set(apart.modules())
    for layer in model.modules():
        if layer in left:
            continue
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = NormOfAll
        elif isinstance(layer, nn.Dropout):
            layer.__class__ = DropoutOfAll
            assert isinstance(layer, DropoutOfAll)
            layer.shares = shares


class NormOfAll(nn.BatchNorm2d):
    """Batch normalisation that in training takes its statistics over the images of all ranks.

    ``nn.SyncBatchNorm`` is for GPUs alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise this rank's images, float [M, C, H, W]; M may be 0."""
        if not self.training:
            return super().forward(input)
        y, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return y


class DropoutOfAll(nn.Dropout):
    """Dropout that draws the masks of the whole batch, and takes those of this rank's images."""

    shares: Shares

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of this rank's images [M, ...]."""
        if not self.training:
            return input
        shape = (self.shares.total, *input.shape[1:])  # and the layout, the order of the draws
        ones = torch.empty_strided(
            shape, input.stride(), dtype=input.dtype, device=input.device
        ).fill_(1)
        return input * self.shares.own(F.dropout(ones, self.p))


class _Normalise(EagerFunction):
    """y = weight (x - mean) / sqrt(variance + eps) + bias, with the moments of all ranks' x.

    dx = weight / sqrt(variance + eps) * (g - mean(g) - n mean(g n)), n being the normalised x and
    the means again over all ranks; weight and bias receive what this rank's images have to say.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        moments = wide.new_zeros(1, 3, x.shape[1])  # count, mean, sum of squared deviations
        if x.numel():
            variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            pixels = wide.new_full(mean.shape, x.numel() // x.shape[1])
            moments = torch.stack([pixels, mean, variance * pixels])[None]
        with _answered("the statistics of batch normalisation"):
            of_all = gathered(moments, [1] * world_size(), Ranks())  # [W, 3, C]
        counts, means, squares = of_all.unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, mean, scale, count = ctx.saved_tensors
        mean, scale, count = (each[:, None, None] for each in (mean, scale, count))  # [C, 1, 1]
        g = upstream[0].to(mean.dtype)
        normalised = (x - mean) * scale
        own = torch.stack([g.sum((0, 2, 3)), (g * normalised).sum((0, 2, 3))])  # [2, C]
        with _answered("the gradients of batch normalisation"):
            g_mean, slope = Ranks().total(own)[:, :, None, None] / count
        dx = weight[:, None, None] * scale * (g - g_mean - normalised * slope)
        return dx.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


@contextmanager
def _answered(call: str) -> Iterator[None]:
    """Turn the failure of a collective into the error that the command line reports."""
    try:
        with Ranks().answering(call):
            yield
    except RuntimeError as error:
        raise LostRankError(
            " ".join(str(error).split()) + "; the last checkpoint is kept: --resume goes on from it"
        ) from error
