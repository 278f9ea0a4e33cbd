"""Triplets mined in class-balanced batches, in place of uniform ones; for the triplet recipe.

A batch has as many images as the uniform triplets it replaces, 3B, so that steps cost the network
the same. All of it is a function of (seed, step) and the embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcontrast import mining
from fastcontrast.losses.triplet_ratio import triplet_ratio_loss


class MinedBatches:
    """Class-balanced batches of P·K = 3B images.

    Args:
        labels: Class of every training image, int64 [N].
        kept: Which of them to draw from, int64 [M].
        triplets: B.
        seed: The run's seed.

    Raises:
        ValueError: If 3B is no product of 2 classes or more, and 2 images or more of each.
    """

    def __init__(self, labels: Tensor, kept: np.ndarray, triplets: int, seed: int):
        self._kept = torch.from_numpy(kept)
        own, images = labels[self._kept], 3 * triplets
        classes = classes_of(images, len(own.unique()))
        self._sampler = mining.ClassBalancedSampler(own, classes, images // classes, seed=seed)

    def at(self, step: int) -> Tensor:
        """Indices of the training images of a step, int64 [3B], class after class."""
        return self._kept[torch.tensor(self._sampler.batch(step))]


def classes_of(images: int, classes: int) -> int:
    """P: the most classes that share so many images evenly, with two of each at least.

    Raises:
        ValueError: If no number of classes does.
    """
    fits = [p for p in range(2, classes + 1) if images % p == 0 and images >= 2 * p]
    if not fits:
        raise ValueError(
            f"batch_size is {images // 3}; wanted one whose {images} images 2 to {classes} classes "
            "share evenly, two or more each: mining draws class-balanced batches"
        )
    return fits[-1]


class Mined(NamedTuple):
    """What triplets are mined by.

    Attributes:
        labels: Class of each image of the batch, int64 [3B].
        step: Number of steps before this one.
    """

    labels: Tensor
    step: int


def mine(embeddings: Tensor, batch: Mined, how: str, seed: int) -> mining.Triplets:
    """Choose triplets of a batch.

    Args:
        embeddings: [3B, D].
        batch: Their classes and the step.
        how: ``--mining``, but not ``"uniform"``.
        seed: Of what is drawn.

    Returns:
        Indices into the batch.
    """
    points, labels, step = embeddings.detach(), batch.labels, batch.step
    if how == "semi-hard":
        return mining.semi_hard_triplets(points, labels)
    if how == "batch-hard":
        return mining.batch_hard_triplets(points, labels)
    if how == "distance-weighted":
        return mining.distance_weighted_triplets(points, labels, seed=seed, step=step)
    return mining.inverse_distance_triplets(points, labels, seed=seed, step=step)


def mined_loss(
    embeddings: Tensor, batch: Mined, how: str, objective: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one step over the triplets mined in it; 0 if there are none.

    Args:
        embeddings: [3B, D].
        batch: See :func:`mine`.
        how: See :func:`mine`.
        objective: ``"mse"`` or ``"nll"``.
        seed: See :func:`mine`.

    Returns:
        The loss, and it with the fraction of mined triplets in error, [2].
    """
    anchors, positives, negatives = mine(embeddings, batch, how, seed).take(embeddings)
    loss = triplet_ratio_loss(anchors, positives, negatives, objective=objective)
    with torch.no_grad():
        near = (anchors - positives).square().sum(1)
        wrong = (near >= (anchors - negatives).square().sum(1)).sum() / max(1, len(near))
    return loss, torch.stack([loss.detach(), wrong.to(loss.dtype)])
