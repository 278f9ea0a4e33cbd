"""Scores of given pairs by direct difference: positives and triplets, O(M·D) in plain PyTorch.

The Gram identity loses near pairs, and a positive is a near pair when training goes well; so its
score never comes from the streamed matrix of ``distance_softmax``. Differentiable any number of
times. Called by the other files of this folder, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.reference.blocks import CHUNK_ELEMENTS
from fastcontrast.backends.scores import accumulator_dtype


def paired_distance(x: Tensor, y: Tensor, *, squared: bool = False) -> Tensor:
    """Euclidean distance of row i of ``x`` [M, D] to row i of ``y`` [M, D], or its square.

    Float32 (float64 for float64 inputs), [M], in embedding units. The gradient at distance 0 is 0,
    as in Torch7's ``PairwiseDistance``; no epsilon is added.
    """
    dtype = accumulator_dtype(torch.promote_types(x.dtype, y.dtype))
    d2 = (x.to(dtype) - y.to(dtype)).square().sum(-1)
    if squared:
        return d2
    coincident = d2 == 0
    return torch.where(coincident, 0.0, torch.where(coincident, 1.0, d2).sqrt())


def paired_scores(x: Tensor, y: Tensor, *, metric: str, scale: float | Tensor) -> Tensor:
    """Score of row i of ``x`` [M, D] with row i of ``y`` [M, D], under a metric of the op."""
    if metric == "dot":
        dtype = accumulator_dtype(torch.promote_types(x.dtype, y.dtype))
        return scale * (x.to(dtype) * y.to(dtype)).sum(-1)
    return -scale * paired_distance(x, y, squared=metric == "sqeuclidean")


def values_between(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distance, squared distance, product or cosine of every pair, [..., M, N].

    Of ``x`` [..., M, D] and ``y`` [..., N, D], in their dtype. Equal pairs have equal values,
    whichever call they are in.
    """
    if metric in ("dot", "cosine"):
        # Not by a matrix product: it may round equal columns differently, and they are to tie.
        step = max(1, CHUNK_ELEMENTS // max(1, y.numel()))
        parts = [(part[..., None, :] * y[..., None, :, :]).sum(-1) for part in x.split(step, -2)]
        products = torch.cat(parts, -2)
        if metric == "dot":
            return products
        norms = x.norm(dim=-1)[..., None] * y.norm(dim=-1)[..., None, :]
        return torch.where(norms == 0, 0.0, products / norms)
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if metric == "l2" else distance.square()
