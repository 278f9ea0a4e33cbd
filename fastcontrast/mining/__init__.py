"""Choosing what to contrast: triplets, negatives and anchors by distance, batches by class.

Miners return indices; losses take what they index. Called by users; docs/contrast.md shows how.
"""

from fastcontrast.mining.anchors import class_means, nearest_anchors
from fastcontrast.mining.class_balanced import ClassBalancedSampler
from fastcontrast.mining.draw_triplets import (
    distance_weighted_triplets,
    inverse_distance_triplets,
)
from fastcontrast.mining.momentum_encoder import MomentumEncoder
from fastcontrast.mining.negatives import hard_negatives
from fastcontrast.mining.triplets import Triplets, batch_hard_triplets, semi_hard_triplets

__all__ = [
    "ClassBalancedSampler",
    "MomentumEncoder",
    "Triplets",
    "batch_hard_triplets",
    "class_means",
    "distance_weighted_triplets",
    "hard_negatives",
    "inverse_distance_triplets",
    "nearest_anchors",
    "semi_hard_triplets",
]
