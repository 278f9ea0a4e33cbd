"""How good an embedding is: neighbours that vote, and errors of triplets.

Called by the recipes during and after training, on embeddings and on raw pixels alike; the linear
classifiers are in :mod:`fastcontrast.train.probes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcontrast.retrieval import knn_classify
from fastcontrast.train.batches import BYTES, Pixels

NEIGHBOURS = (1, 3, 5)  # the k that the paper on semi-supervised embedding evaluates
_BLOCK = 1 << 16  # triplets whose distances are taken at a time


@dataclass(frozen=True)
class Figure:
    """One number that a run is judged by.

    Attributes:
        name: What was measured of what.
        value: Fraction, 0 to 1.
        protocol: How: trained on which labels, chosen how, tested on what.
    """

    name: str
    value: float
    protocol: str


@torch.no_grad()
def embed(
    model: nn.Module, images: Tensor, pixels: Pixels = BYTES, batch_size: int = 500
) -> Tensor:
    """Embed images with the model in evaluation mode, and leave its mode as it was.

    Args:
        model: Maps float [M, C, H, W] to float [M, ...].
        images: uint8 [N, C, H, W], N at least 1, anywhere; taken to the model's device in batches.
        pixels: The normalisation.
        batch_size: Images a pass; it bounds the memory and does not change the result.

    Returns:
        Outputs [N, ...] on the model's device.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        parts = images.split(batch_size)
        return torch.cat([model(pixels.cut(part.to(device))) for part in parts])
    finally:
        model.train(was_training)


def neighbour_errors(
    references: Tensor,
    reference_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> dict[int, float]:
    """Fraction of queries that :func:`~fastcontrast.knn_classify` labels wrongly, for each k.

    Args:
        references: Labelled points [R, D], floating point.
        reference_labels: int64 [R].
        queries: Points to classify [Q, D].
        query_labels: Their true labels, int64 [Q].
        neighbours: The values of k.

    Returns:
        k to error, from 0 to 1.
    """
    return {
        k: (knn_classify(queries, references, reference_labels, k) != query_labels)
        .double()
        .mean()
        .item()
        for k in neighbours
    }


def pixel_errors(
    references: Tensor, reference_labels: Tensor, queries: Tensor, query_labels: Tensor
) -> dict[int, float]:
    """Return the same errors for raw pixels: what there was before any training.

    Args:
        references: Labelled images, uint8 [R, C, H, W].
        reference_labels: int64 [R].
        queries: Images to classify, uint8 [Q, C, H, W].
        query_labels: Their true labels, int64 [Q].

    Returns:
        k to error, from 0 to 1.
    """
    # Bytes are exact in float32, and must not be subtracted as bytes.
    references, queries = references.flatten(1).float(), queries.flatten(1).float()
    return neighbour_errors(references, reference_labels, queries, query_labels)


def triplet_error(embeddings: Tensor, triplets: Tensor) -> float:
    """Fraction of triplets whose positive is not nearer than the negative: a tie is an error.

    Args:
        embeddings: [N, D].
        triplets: Indices of anchor, positive and negative, int64 [T, 3], on the same device.

    Returns:
        The error, from 0 to 1.
    """
    wrong = torch.zeros((), dtype=torch.int64, device=embeddings.device)
    for part in triplets.split(_BLOCK):
        anchors, positives, negatives = (embeddings[part[:, k]] for k in range(3))
        near = (anchors - positives).square().sum(1)
        wrong += (near >= (anchors - negatives).square().sum(1)).sum()
    return wrong.item() / len(triplets)
