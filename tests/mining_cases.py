"""Points with classes, and all their distances, for the tests of miners."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcontrast import mining

METRICS = ("l2", "sqeuclidean", "dot", "cosine")


def farness(x: Tensor, y: Tensor, metric: str) -> np.ndarray:
    """Distances, or similarities with the sign turned, of every pair by difference in float64."""
    a, b = x.double().numpy()[:, None], y.double().numpy()[None]
    if metric in ("dot", "cosine"):
        norms = 1.0
        if metric == "cosine":
            norms = np.linalg.norm(a, axis=2) * np.linalg.norm(b, axis=2)
        return -(a * b).sum(2) / norms
    d2 = np.square(a - b).sum(2)
    return d2 if metric == "sqeuclidean" else np.sqrt(d2)


def same_class(labels: Tensor, others: Tensor) -> np.ndarray:
    return labels.numpy()[:, None] == others.numpy()[None]


def listed(found: mining.Triplets) -> list[tuple[int, ...]]:
    return list(zip(*(part.tolist() for part in found), strict=True))


def grid(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on a grid without the origin, so that distances tie, and a class with one member."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.integers(1, 5, (rows, 2)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, classes, rows))
    labels[0] = classes + 5
    return x, labels


def cloud(rows: int = 70, classes: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 8, dtype=torch.float64)
    return x, torch.arange(rows) % classes
