"""Contrastive and metric losses on distances, as fused kernels for PyTorch.

The public names; everything else is reached through its module. Documentation: docs/design.md.
"""

from typing import TYPE_CHECKING, Any

from fastcontrast.backends import available_backends
from fastcontrast.losses import (
    InfoNCELoss,
    MetricEmbeddingLoss,
    SpatialContrastingLoss,
    TripletMarginLoss,
    TripletRatioLoss,
    info_nce_loss,
    metric_embedding_loss,
    spatial_contrasting_loss,
    triplet_margin_loss,
    triplet_ratio_loss,
)
from fastcontrast.ops.distance_softmax import RowStatistics, distance_softmax
from fastcontrast.ops.nearest import Nearest, nearest
from fastcontrast.ops.triplet_distances import TripletDistances, triplet_distances
from fastcontrast.patch_draws import sample_coords
from fastcontrast.patch_modules import MultiCrop, PatchPair, RandomPatches
from fastcontrast.patch_records import Patches
from fastcontrast.patches import extract_patches, random_patches
from fastcontrast.retrieval import (
    alignment,
    knn_classify,
    mean_average_precision_at_r,
    nearest_neighbors,
    recall_at_k,
    uniformity,
)

if TYPE_CHECKING:
    __version__: str

__all__ = [
    "InfoNCELoss",
    "MetricEmbeddingLoss",
    "MultiCrop",
    "Nearest",
    "PatchPair",
    "Patches",
    "RandomPatches",
    "RowStatistics",
    "SpatialContrastingLoss",
    "TripletDistances",
    "TripletMarginLoss",
    "TripletRatioLoss",
    "__version__",
    "alignment",
    "available_backends",
    "distance_softmax",
    "extract_patches",
    "info_nce_loss",
    "knn_classify",
    "mean_average_precision_at_r",
    "metric_embedding_loss",
    "nearest",
    "nearest_neighbors",
    "random_patches",
    "recall_at_k",
    "sample_coords",
    "spatial_contrasting_loss",
    "triplet_distances",
    "triplet_margin_loss",
    "triplet_ratio_loss",
    "uniformity",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastcontrast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
