"""`triplet_distances` by definition: direct differences in PyTorch, on any device.

:func:`differentiable_distances` is the same computation left open to autograd: double backward goes
through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.reference.pairs import paired_distance
from fastcontrast.backends.scores import accumulator_dtype

# The pairs, as indices of anchor, positive and negative.
PAIRS = ((0, 1), (0, 2), (1, 2))


def triplet_distances_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, between: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of the three pairs, each [M]; the last is empty unless ``between``."""
    found = differentiable_distances(anchor, positive, negative, metric, between)
    if between:
        return found[0], found[1], found[2]
    return found[0], found[1], anchor.new_empty(0, dtype=found[0].dtype)


def triplet_distances_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    distances: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, each [M, D], from those of the distances; empty where not needed.

    A distance whose gradient is None has none.
    """
    dtype = accumulator_dtype(anchor.dtype)
    points = [point.to(dtype) for point in (anchor, positive, negative)]
    sums = [torch.zeros_like(point) for point in points]
    for (i, j), distance, grad in zip(PAIRS, distances, grads, strict=True):
        if grad is None:
            continue
        if metric == "sqeuclidean":
            weight = 2 * grad.to(dtype)
        else:
            coincident = distance == 0
            weight = torch.where(coincident, 0.0, grad / torch.where(coincident, 1.0, distance))
        pull = weight[:, None] * (points[i] - points[j])
        sums[i] += pull
        sums[j] -= pull
    a, p, n = (
        total.to(anchor.dtype) if need else anchor.new_empty(0)
        for total, need in zip(sums, needs, strict=True)
    )
    return a, p, n


def triplet_difference_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, swap: bool
) -> Tensor:
    """Difference d₊ - d₋ and the distances that it came from, [3, M]; with ``swap`` [4, M]."""
    distances = differentiable_distances(anchor, positive, negative, metric, swap)
    return torch.stack([difference(distances), *distances])


def triplet_difference_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    found: Tensor,
    slope: Tensor,
    upstream: Tensor,
    factor: float,
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, from ``slope · factor · upstream`` [M], that of the difference.

    ``found`` is what the forward pass returned; ``upstream`` is [M], or one number.
    """
    distances = found[1:]
    grad = slope * (upstream * factor)
    grads = (grad, -grad, None)
    if distances.shape[0] == 3:
        # 1 where positive and negative are nearer than anchor and negative, 1/2 where equal.
        of_others = -grad * torch.heaviside(distances[1] - distances[2], grad.new_tensor(0.5))
        grads = (grad, -grad - of_others, of_others)
    apart = (distances[0], distances[1], distances[-1])
    return triplet_distances_backward(anchor, positive, negative, apart, grads, metric, needs)


def difference(distances: list[Tensor]) -> Tensor:
    """d₊ - d₋ [M]; where there are three distances, d₋ is the smaller one of the negative."""
    nearest = torch.minimum(*distances[1:]) if len(distances) == 3 else distances[1]
    return distances[0] - nearest


def differentiable_distances(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, between: bool
) -> list[Tensor]:
    """Distances of two or three pairs, differentiable any number of times."""
    points = (anchor, positive, negative)
    return [
        paired_distance(points[i], points[j], squared=metric == "sqeuclidean")
        for i, j in PAIRS[: 3 if between else 2]
    ]
