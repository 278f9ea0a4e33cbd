"""Losses of other libraries that do the same job as `info_nce_loss`, one adapter each.

An adapter takes points x, y and the column of each row's positive, and imports its library when it
is made; ``available`` says which can be, and why the others cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECKPOINT_ROWS = 1024


def eager(metric: str) -> Loss:
    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        if metric == "l2":
            return F.cross_entropy(-torch.cdist(x, y), target)
        if metric == "sqeuclidean":
            scores = 2 * x @ y.T - x.square().sum(1, keepdim=True) - y.square().sum(1)
            return F.cross_entropy(scores, target)
        return F.cross_entropy(x @ y.T, target)

    return loss


def compiled(metric: str) -> Loss:
    return torch.compile(eager(metric))


def chunked(metric: str) -> Loss:
    """Torch's own chunked op, which takes dot products, and squared distances through a bias."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        if metric == "dot":
            return F.linear_cross_entropy(x, y, target, options=options)
        bias = -y.square().sum(1)
        return F.linear_cross_entropy(2 * x, y, target, linear_bias=bias, options=options)

    return loss


def checkpointed(metric: str) -> Loss:
    """Eager by blocks of rows that the backward pass computes again."""
    part: Any = eager(metric)

    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        total = x.new_zeros(())
        for rows in torch.arange(x.shape[0]).split(CHECKPOINT_ROWS):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            value = checkpoint(part, x[span], y, target[span], use_reentrant=False)
            total = total + value * len(rows)
        return total / x.shape[0]

    return loss


def metric_learning(metric: str) -> Loss:
    from pytorch_metric_learning import distances, losses

    distance = distances.LpDistance(normalize_embeddings=False, power=1)
    nca: Any = losses.NCALoss(softmax_scale=1, distance=distance)
    return lambda x, y, target: nca(x, target, ref_emb=y, ref_labels=torch.arange(y.shape[0]))


def liger(metric: str) -> Loss:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    function: Any = LigerFusedLinearScaledCrossEntropyFunction
    return lambda x, y, target: function.apply(x, y, target, 1.0, -100, 1, True)[0].mean()


def cut_cross_entropy(metric: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, y, target: linear_cross_entropy(x, y, target, impl="torch_compile")


# Name, the metrics that it has, and its maker.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[str], Loss]]] = {
    "torch eager": (("l2", "sqeuclidean", "dot"), eager),
    "torch.compile": (("l2", "sqeuclidean", "dot"), compiled),
    "torch linear_cross_entropy": (("sqeuclidean", "dot"), chunked),
    "torch checkpoint": (("l2", "sqeuclidean", "dot"), checkpointed),
    "pytorch-metric-learning NCA": (("l2",), metric_learning),
    "liger": (("dot",), liger),
    "cut-cross-entropy": (("dot",), cut_cross_entropy),
}


def available(metric: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Losses that run here, by name, and why the others with this metric do not."""
    losses: dict[str, Loss] = {}
    reasons: dict[str, str] = {}
    for name, (metrics, make) in PEERS.items():
        if metric not in metrics:
            continue
        try:
            losses[name] = make(metric)
        except ImportError as error:
            reasons[name] = f"does not import: {error}"
    return losses, reasons
