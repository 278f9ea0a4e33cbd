"""`open_clip`: ``ClipLoss`` with its arguments.

``from fastcontrast.compat.open_clip import ClipLoss``. The library itself is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcontrast.distributed import gather
from fastcontrast.losses.clip import clip_loss
from fastcontrast.losses.info_nce import info_nce_loss


class ClipLoss(nn.Module):
    """CLIP's loss, on features of length 1 and a logit scale that is not a logarithm.

    Args:
        local_loss: Contrast this process's rows with the rows of all, rather than all with all.
        gather_with_grad: Let gradients flow back to the processes that rows came from.
        cache_labels: Accepted; there is nothing to cache.
        rank: This process.
        world_size: Number of processes; above 1, features are gathered.
        use_horovod: Must be False.

    Raises:
        ValueError: For ``use_horovod``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False; torch.distributed gathers the features")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of images [M, D] and texts [M, D]; ``{"contrastive_loss": loss}`` on request.

        A bias is common to all logits, and so changes nothing; its gradient is 0.
        """
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale)
        else:
            own = "none" if self.local_loss else "own"
            gradients = "all" if self.gather_with_grad else own
            images, texts = (
                gather(features, gradients=gradients, even=True)
                for features in (image_features, text_features)
            )
            if self.local_loss:
                target = torch.arange(image_features.shape[0], device=images.device)
                target = target + self.rank * image_features.shape[0]
                scaled = {"metric": "dot", "temperature": 1.0 / logit_scale}
                loss = info_nce_loss(image_features, texts, target, **scaled)
                loss = (loss + info_nce_loss(text_features, images, target, **scaled)) / 2
            else:
                loss = clip_loss(images, texts, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss
