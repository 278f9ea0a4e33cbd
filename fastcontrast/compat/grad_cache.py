"""`GradCache`: the contrastive losses that its ``loss_fn`` takes.

``from fastcontrast.compat.grad_cache import SimpleContrastiveLoss``. The library caches the
encoder's gradients, and this makes the loss over the large batch cheap. It is not needed itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast.distributed import gather
from fastcontrast.losses.info_nce import info_nce_loss


class SimpleContrastiveLoss:
    """Cross-entropy of dot products, each query followed by its hard negatives among the keys.

    Args:
        n_hard_negatives: How many keys follow each query's own.
        metric: Beyond the library: ``"dot"``, ``"cosine"``, ``"l2"`` or ``"sqeuclidean"``.
        temperature: Beyond the library: divides the scores.
    """

    def __init__(
        self,
        n_hard_negatives: int = 0,
        *,
        metric: str = "dot",
        temperature: float | Tensor = 1.0,
    ) -> None:
        self.n_hn = n_hard_negatives
        self.metric = metric
        self.temperature = temperature

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Loss of queries x [M, D] against keys y [N, D]; target [M] or every (n+1)-th key."""
        if target is None:
            target = torch.arange(x.shape[0], device=x.device) * (self.n_hn + 1)
        return info_nce_loss(
            x,
            y,
            target,
            metric=self.metric,
            temperature=self.temperature,
            reduction=reduction,
        )


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The same over the batches of all processes, without gradients to the other ones."""

    def __init__(
        self,
        n_hard_negatives: int = 0,
        *,
        metric: str = "dot",
        temperature: float | Tensor = 1.0,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed has not been initialised")
        super().__init__(n_hard_negatives, metric=metric, temperature=temperature)
        self.word_size = dist.get_world_size()
        self.rank = dist.get_rank()

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """As above, on the rows of all processes."""
        x, y = (gather(part, gradients="own", even=True) for part in (x, y))
        return super().__call__(x, y, target, reduction)
