"""How good an embedding is: nearest-neighbour error against a few labelled examples.

Called by the recipes during and after training, on embeddings and on raw pixels alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcontrast.retrieval import knn_classify
from fastcontrast.train.models import normalise_pixels

NEIGHBOURS = (1, 3, 5)  # the k that the paper evaluates


@torch.no_grad()
def embed(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Embed images with the model in evaluation mode, and leave its mode as it was.

    Args:
        model: Maps float [M, C, H, W] to float [M, D].
        images: uint8 [N, C, H, W], N at least 1, on the model's device.
        batch_size: Images a pass; it bounds the memory and does not change the result.

    Returns:
        Embeddings [N, D] on the same device.
    """
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(normalise_pixels(batch)) for batch in images.split(batch_size)])
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
