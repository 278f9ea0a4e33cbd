"""The oracle: every op in plain PyTorch, on any device, exact in float64.

Runs in chunks, so that it also serves where nothing faster can. The tests hold it to the equations
themselves and to PyTorch's autograd, and every other backend to it.
"""

from __future__ import annotations

from torch import Tensor

from fastcontrast.backends.reference.distance_softmax import (
    distance_softmax_backward,
    distance_softmax_forward,
    softmax_loss,
)
from fastcontrast.backends.reference.extract_patches import (
    extract_patches_backward,
    extract_patches_forward,
    first_invalid_box,
)
from fastcontrast.backends.reference.nearest import nearest_columns
from fastcontrast.backends.reference.sample_coords import sample_coords
from fastcontrast.backends.reference.triplet_distances import (
    triplet_difference_backward,
    triplet_difference_forward,
    triplet_distances_backward,
    triplet_distances_forward,
)

__all__ = [
    "distance_softmax_backward",
    "distance_softmax_forward",
    "extract_patches_backward",
    "extract_patches_forward",
    "first_invalid_box",
    "nearest_columns",
    "sample_coords",
    "softmax_loss",
    "triplet_difference_backward",
    "triplet_difference_forward",
    "triplet_distances_backward",
    "triplet_distances_forward",
    "why_not",
]


def why_not(op: str, tensor: Tensor) -> str | None:
    """None: the reference runs every op everywhere."""
    del op, tensor
    return None
