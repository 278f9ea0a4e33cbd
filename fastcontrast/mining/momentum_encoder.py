"""An encoder that follows another slowly, whose keys a memory queue can keep."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    r"""A copy of an encoder that moves towards it by a small part at every update.

    .. math:: \theta_k \leftarrow m\, \theta_k + (1 - m)\, \theta_q

    Eq. 2 of He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020,
    arXiv 1911.05722. As in its code, buffers are not averaged: in training mode the copy's batch
    norms see its own batches. Deviation: batches are not shuffled between GPUs.

    .. code-block:: python

        momentum_encoder = MomentumEncoder(encoder)
        for view1, view2 in loader:
            momentum_encoder.update(encoder)
            query, key = encoder(view1), momentum_encoder(view2)
            loss = info_nce_loss(query, key, queue=queue, in_batch=False, metric="cosine",
                                 temperature=0.07)
            queue.enqueue(key)

    Its parameters need no gradient and are saved in its ``state_dict``; the encoder itself is not
    kept. Do not give them to an optimiser.

    Args:
        encoder: Any module; parameters float32 or float64, because a thousandth of a difference
            is lost in half precision (autocast does no harm).
        momentum: m, in [0, 1].

    Raises:
        ValueError: If the momentum is out of range.
        TypeError: If the encoder is no module, or has half parameters.

    Example:
        >>> import torch
        >>> encoder = torch.nn.Linear(1, 1, bias=False)
        >>> follower = MomentumEncoder(encoder, 0.75)
        >>> _ = torch.nn.init.constant_(encoder.weight, 1.0)
        >>> _ = torch.nn.init.constant_(follower.encoder.weight, 5.0)
        >>> follower.update(encoder)
        >>> follower(torch.ones(1, 1))
        tensor([[4.]])
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        for name, parameter in encoder.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(
                    f"encoder must have float32 or float64 parameters, got {parameter.dtype} "
                    f"in {name}"
                )
        self.momentum = _checked(momentum)
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy makes of its arguments, without a graph."""
        return self.encoder(*args, **kwargs)

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float | None = None) -> None:
        """Move towards ``encoder``, by a momentum of this step if one is given.

        Raises:
            ValueError: If its parameters are not those of the encoder copied, by name and shape, or
                the momentum is out of range.
        """
        m = self.momentum if momentum is None else _checked(momentum)
        ours, theirs = dict(self.encoder.named_parameters()), dict(encoder.named_parameters())
        for name in ours.keys() | theirs.keys():
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                shapes = [list(p[name].shape) if name in p else None for p in (ours, theirs)]
                raise ValueError(
                    f"encoder must have the parameters of the one copied: {name} was {shapes[0]} "
                    f"and is {shapes[1]}"
                )
        for name, parameter in ours.items():
            parameter.lerp_(theirs[name].to(parameter), 1 - m)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"momentum={self.momentum}"


def _checked(momentum: float) -> float:
    if not isinstance(momentum, (int, float)) or isinstance(momentum, bool):
        raise TypeError(f"momentum must be a number, got {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be at least 0 and at most 1, got {momentum}")
    return momentum
