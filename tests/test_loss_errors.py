"""What a user's mistake in calling a loss reads like."""

from __future__ import annotations

import pytest
import torch

import fastcontrast as fc

X, Y = torch.randn(4, 3), torch.randn(6, 3)
BAD_CALLS = {
    "target range": (
        lambda: fc.info_nce_loss(X, Y, torch.tensor([0, 1, 2, 6])),
        ValueError,
        r"target must lie in 0\.\.5 \(a key's index\), got 0\.\.6",
    ),
    "target dtype": (
        lambda: fc.info_nce_loss(X, Y, torch.ones(4)),
        TypeError,
        "target must be an int64 or int32 tensor",
    ),
    "target shape": (
        lambda: fc.info_nce_loss(X, Y, torch.arange(3)),
        ValueError,
        r"target must have shape \[4\], got \[3\]",
    ),
    "diagonal": (lambda: fc.info_nce_loss(Y, X), ValueError, "needs N >= M, got M=6, N=4"),
    "temperature": (
        lambda: fc.info_nce_loss(X, Y, temperature=0.0),
        ValueError,
        "temperature must be positive and finite, got 0",
    ),
    "reduction": (
        lambda: fc.info_nce_loss(X, Y, reduction="avg"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'avg'",
    ),
    "tiny temperature": (
        lambda: fc.info_nce_loss(X, Y, temperature=1e-39),
        ValueError,
        "temperature must not be so small",
    ),
    "precision": (
        lambda: fc.info_nce_loss(X.clone().requires_grad_(), Y, precision="fp8"),
        ValueError,
        "precision must be one of auto, ieee",
    ),
    "tensor weight": (
        lambda: fc.metric_embedding_loss(
            X, Y, torch.arange(4), unlabelled_weight=torch.tensor(1.0)
        ),
        TypeError,
        "unlabelled_weight must be a number, got Tensor",
    ),
    "3-D anchors": (
        lambda: fc.spatial_contrasting_loss(X[None], X[None]),
        ValueError,
        r"anchors must have shape \[rows, D\]",
    ),
    "metric": (
        lambda: fc.info_nce_loss(X, Y, metric="l3"),
        ValueError,
        "metric must be one of l2, sqeuclidean, dot, cosine, got 'l3'",
    ),
    "pair shapes": (
        lambda: fc.spatial_contrasting_loss(X, Y),
        ValueError,
        "anchors and positives must have the same shape",
    ),
    "pair type": (
        lambda: fc.spatial_contrasting_loss(X, None),
        TypeError,
        "positives must be a tensor, got NoneType",
    ),
    "class range": (
        lambda: fc.metric_embedding_loss(X, Y, torch.tensor([0, 1, 2, -2])),
        ValueError,
        r"targets must lie in -1\.\.5",
    ),
    "no anchors": (
        lambda: fc.metric_embedding_loss(X, Y[:0], torch.zeros(4, dtype=torch.int64)),
        ValueError,
        "anchors must hold at least one class",
    ),
    "triplet shapes": (
        lambda: fc.triplet_ratio_loss(X, X, Y),
        ValueError,
        "anchor and negative must have the same shape",
    ),
    "objective": (
        lambda: fc.triplet_ratio_loss(X, X, X, objective="l1"),
        ValueError,
        "objective must be one of mse, nll",
    ),
    "integer positive": (
        lambda: fc.triplet_ratio_loss(X, X.int(), X),
        TypeError,
        "positive must be float16",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
