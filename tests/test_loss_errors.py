"""What a user's mistake in calling a loss reads like."""

from __future__ import annotations

import pytest
import torch

import fastcontrast as fc

X, Y = torch.randn(4, 3), torch.randn(6, 3)


def filled(embeddings: torch.Tensor) -> fc.MemoryQueue:
    queue = fc.MemoryQueue(4)
    queue.enqueue(embeddings)
    return queue


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
    "ignored index": (
        lambda: fc.info_nce_loss(X, Y, torch.arange(4), ignore_index="-100"),
        TypeError,
        "ignore_index must be an integer, got str",
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
    "temperature device": (
        lambda: fc.supcon_loss(X, torch.arange(4), temperature=torch.ones((), device="meta")),
        ValueError,
        "temperature must be on cpu .* got meta",
    ),
    "target device": (
        lambda: fc.info_nce_loss(X, Y, torch.arange(4, device="meta")),
        ValueError,
        "target must be on cpu with the operands, got meta",
    ),
    "labels device": (
        lambda: fc.supcon_loss(X, torch.arange(4, device="meta")),
        ValueError,
        "labels must be on cpu with the operands, got meta",
    ),
    "row weight device": (
        lambda: fc.info_nce_loss(X, Y, row_weight=torch.ones(4, device="meta")),
        ValueError,
        "row_weight must be on cpu, got meta",
    ),
    "negatives device": (
        lambda: fc.info_nce_loss(X, Y, negatives=torch.ones(4, 2, 3, device="meta")),
        ValueError,
        "negatives and query must be on one device, got meta and cpu",
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
    "infinite weight": (
        lambda: fc.metric_embedding_loss(X, Y, torch.arange(4), unlabelled_weight=float("inf")),
        ValueError,
        "unlabelled_weight must be finite, got inf",
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
    "anchors of other rows": (
        lambda: fc.metric_embedding_loss(X, Y[None], torch.zeros(4, dtype=torch.int64)),
        ValueError,
        r"anchors must have shape \[C, D\] or \[M, C, D\] with M=4, got \[1, 6, 3\]",
    ),
    "figures of own anchors": (
        lambda: fc.metric_embedding_loss(
            X, Y.expand(4, 6, 3), torch.zeros(4, dtype=torch.int64), return_stats=("top1",)
        ),
        ValueError,
        "take neither queue nor return_stats",
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
    "ignored targets": (
        lambda: fc.info_nce_loss(X, Y, torch.tensor([-100, 1, 2, 6])),
        ValueError,
        r"target must lie in 0\.\.5 \(a key's index\), got 1\.\.6",
    ),
    "row weight": (
        lambda: fc.info_nce_loss(X, Y, row_weight=torch.ones(6)),
        ValueError,
        r"row_weight must have shape \[4\], got \[6\]",
    ),
    "row weight list": (
        lambda: fc.info_nce_loss(X, Y, row_weight=[1.0]),
        TypeError,
        "row_weight must be a floating-point tensor, got list",
    ),
    "smoothing": (
        lambda: fc.info_nce_loss(X, Y, label_smoothing=1.0),
        ValueError,
        "label_smoothing must be at least 0 and below 1, got 1.0",
    ),
    "tau plus": (lambda: fc.nt_xent_loss(X, X, tau_plus=-0.1), ValueError, "tau_plus must be at"),
    "hardness": (
        lambda: fc.nt_xent_loss(X, X, hardness=-1.0),
        ValueError,
        "hardness must be at least 0 and finite, got -1.0",
    ),
    "smoothing and hardness": (
        lambda: fc.nt_xent_loss(X, X, hardness=1.0, label_smoothing=0.1),
        ValueError,
        "label_smoothing does not go together with tau_plus or hardness",
    ),
    "statistics": (
        lambda: fc.info_nce_loss(X, Y, return_stats=("recall@0",)),
        ValueError,
        "return_stats must name some of lse, .* got 'recall@0'",
    ),
    "statistics text": (
        lambda: fc.info_nce_loss(X, Y, return_stats="rank"),
        TypeError,
        "return_stats must be a sequence of names, got the text 'rank'",
    ),
    "negatives": (
        lambda: fc.info_nce_loss(X, Y, negatives=torch.randn(3, 2, 3)),
        ValueError,
        r"\[M, K, D\] with M=4, got \[3, 2, 3\]",
    ),
    "negatives list": (
        lambda: fc.info_nce_loss(X, Y, negatives=[1]),
        TypeError,
        "negatives must be a tensor, got list",
    ),
    "in_batch": (
        lambda: fc.info_nce_loss(X, Y, in_batch=False),
        ValueError,
        "in_batch=False pairs query i with key i and needs target=None and M = N, got M=4, N=6",
    ),
    "symmetric in_batch": (
        lambda: fc.info_nce_loss(X, X, in_batch=False, symmetric=True),
        ValueError,
        "symmetric needs in_batch=True",
    ),
    "queue": (
        lambda: fc.info_nce_loss(X, Y, queue=X),
        TypeError,
        "queue must be a MemoryQueue or None, got Tensor",
    ),
    "queue dim": (
        lambda: fc.info_nce_loss(X, Y, queue=filled(torch.randn(2, 5))),
        ValueError,
        r"queue must hold embeddings \[Q, 3\] on cpu, got \[2, 5\]",
    ),
    "queue size": (lambda: fc.MemoryQueue(0), ValueError, "size must be at least 1, got 0"),
    "queue labels": (
        lambda: fc.supcon_loss(X, torch.arange(4), queue=filled(X)),
        ValueError,
        r"queue must hold labels: enqueue\(embeddings, labels\)",
    ),
    "queue labels once": (
        lambda: filled(X).enqueue(X, torch.arange(4)),
        ValueError,
        "labels must be enqueued always or never",
    ),
    "queue entries": (
        lambda: filled(X).enqueue(torch.randn(4, 7)),
        ValueError,
        r"embeddings must have D=3 as before, got \[4, 7\]",
    ),
    "views": (
        lambda: fc.nt_xent_loss(X, Y),
        ValueError,
        "view1 and view2 must have the same shape",
    ),
    "features": (
        lambda: fc.clip_loss(X, Y, 1.0),
        ValueError,
        "image_features and text_features must have the same shape",
    ),
    "logit scale device": (
        lambda: fc.clip_loss(X, X, torch.ones((), device="meta")),
        ValueError,
        "logit_scale must be on cpu .* got meta",
    ),
    "logit scale": (
        lambda: fc.clip_loss(X, X, 0.0),
        ValueError,
        "logit_scale must be positive and finite, got 0",
    ),
    "pairs of anchors": (
        lambda: fc.multiple_negatives_ranking_loss(X, Y),
        ValueError,
        "anchor and positive must have the same shape",
    ),
    "form": (
        lambda: fc.supcon_loss(X, torch.arange(4), form="both"),
        ValueError,
        "form must be one of out, in, got 'both'",
    ),
    "labels": (
        lambda: fc.nca_loss(X, torch.arange(3)),
        ValueError,
        r"labels must have shape \[4\], got \[3\]",
    ),
    "key labels": (
        lambda: fc.nca_loss(X, torch.arange(4), Y),
        ValueError,
        "key and key_labels must be given together",
    ),
    "proxies": (
        lambda: fc.proxy_nca_loss(X, torch.tensor([0, 1, 2, 6]), Y),
        ValueError,
        r"labels must lie in 0\.\.5 \(a class\), got 0\.\.6",
    ),
    "same": (
        lambda: fc.siamese_contrastive_loss(X, X, torch.ones(4)),
        TypeError,
        "same must be a bool tensor, got torch.float32",
    ),
    "siamese margin": (
        lambda: fc.siamese_contrastive_loss(X, X, torch.ones(4) > 0, margin=0.0),
        ValueError,
        "margin must be positive and finite, got 0",
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
