"""How good an embedding is: nearest-neighbour error against a few labelled examples.

Called by the recipes during and after training, on embeddings and on raw pixels alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def nearest_labels(
    references: Tensor, reference_labels: Tensor, queries: Tensor, k: int, *, chunk: int = 2048
) -> Tensor:
    """Label each query by the majority of its k nearest references, in Euclidean distance.

    Ties are settled the same way everywhere: of two references at the same distance the one with
    the lower index is nearer, and of two labels with as many votes the one whose nearest voter is
    nearer wins. Distances are taken by direct difference in float64.

    Args:
        references: Points [R, D], any real dtype.
        reference_labels: int64 [R].
        queries: Points [Q, D].
        k: Number of neighbours that vote, 1 to R.
        chunk: Queries worked on at once.

    Returns:
        int64 [Q].

    Raises:
        ValueError: If k is not within 1 to R.
    """
    if not 1 <= k <= len(references):
        raise ValueError(f"k is {k}; wanted 1 to the number of references, {len(references)}")
    references = references.double()
    position = torch.arange(k, device=references.device)
    predictions = []
    for part in queries.split(chunk):
        distances = torch.cdist(
            part.double(), references, compute_mode="donot_use_mm_for_euclid_dist"
        )  # [q, R]
        nearest = distances.sort(dim=1, stable=True).indices[:, :k]
        voters = reference_labels[nearest]  # [q, k], nearest first
        votes = (voters[:, :, None] == voters[:, None, :]).sum(
            dim=2
        )  # votes for each voter's label
        winner = (votes * k - position).argmax(dim=1, keepdim=True)  # most votes, then nearest
        predictions.append(voters.gather(1, winner).squeeze(1))
    return torch.cat(predictions)


def neighbour_errors(
    references: Tensor,
    reference_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> dict[int, float]:
    """Fraction of queries that k-nearest-neighbour voting labels wrongly, for each k.

    Args:
        references: Labelled points [R, D].
        reference_labels: int64 [R].
        queries: Points to classify [Q, D].
        query_labels: Their true labels, int64 [Q].
        neighbours: The values of k.

    Returns:
        k to error, from 0 to 1.
    """
    return {
        k: (nearest_labels(references, reference_labels, queries, k) != query_labels)
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
    return neighbour_errors(
        references.flatten(1), reference_labels, queries.flatten(1), query_labels
    )
