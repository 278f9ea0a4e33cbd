"""Contrastive and metric losses on distances, as fused kernels for PyTorch.

The public names; everything else is reached through its module. Documentation: docs/design.md.
"""

from typing import TYPE_CHECKING, Any

from fastcontrast import distributed, mining, temporal
from fastcontrast.backends import available_backends
from fastcontrast.losses import (
    ClipLoss,
    InfoNCELoss,
    MemoryQueue,
    MetricEmbeddingLoss,
    MultipleNegativesRankingLoss,
    NCALoss,
    NTXentLoss,
    ProxyNCALoss,
    SiameseContrastiveLoss,
    SpatialContrastingLoss,
    SupConLoss,
    TripletMarginLoss,
    TripletRatioLoss,
    clip_loss,
    info_nce_loss,
    metric_embedding_loss,
    multiple_negatives_ranking_loss,
    nca_loss,
    nt_xent_loss,
    proxy_nca_loss,
    siamese_contrastive_loss,
    spatial_contrasting_loss,
    supcon_loss,
    triplet_margin_loss,
    triplet_ratio_loss,
)
from fastcontrast.ops.distance_softmax import RowStatistics, distance_softmax
from fastcontrast.ops.nearest import Nearest, nearest
from fastcontrast.ops.statistics import LossStatistics, LossWithStatistics
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
    "ClipLoss",
    "InfoNCELoss",
    "LossStatistics",
    "LossWithStatistics",
    "MemoryQueue",
    "MetricEmbeddingLoss",
    "MultipleNegativesRankingLoss",
    "NCALoss",
    "NTXentLoss",
    "MultiCrop",
    "Nearest",
    "PatchPair",
    "Patches",
    "ProxyNCALoss",
    "RandomPatches",
    "RowStatistics",
    "SiameseContrastiveLoss",
    "SpatialContrastingLoss",
    "SupConLoss",
    "TripletDistances",
    "TripletMarginLoss",
    "TripletRatioLoss",
    "__version__",
    "alignment",
    "available_backends",
    "clip_loss",
    "distance_softmax",
    "distributed",
    "extract_patches",
    "info_nce_loss",
    "knn_classify",
    "mean_average_precision_at_r",
    "metric_embedding_loss",
    "mining",
    "multiple_negatives_ranking_loss",
    "nca_loss",
    "nearest",
    "nearest_neighbors",
    "nt_xent_loss",
    "proxy_nca_loss",
    "random_patches",
    "recall_at_k",
    "sample_coords",
    "siamese_contrastive_loss",
    "spatial_contrasting_loss",
    "supcon_loss",
    "temporal",
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
