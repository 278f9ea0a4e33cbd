"""One file per loss: the function, the Module, and the paper's equation in the docstring."""

from fastcontrast.losses.info_nce import InfoNCELoss, info_nce_loss
from fastcontrast.losses.metric_embedding import MetricEmbeddingLoss, metric_embedding_loss
from fastcontrast.losses.spatial_contrasting import (
    SpatialContrastingLoss,
    spatial_contrasting_loss,
)
from fastcontrast.losses.triplet_margin import TripletMarginLoss, triplet_margin_loss
from fastcontrast.losses.triplet_ratio import TripletRatioLoss, triplet_ratio_loss

__all__ = [
    "InfoNCELoss",
    "MetricEmbeddingLoss",
    "SpatialContrastingLoss",
    "TripletMarginLoss",
    "TripletRatioLoss",
    "info_nce_loss",
    "metric_embedding_loss",
    "spatial_contrasting_loss",
    "triplet_margin_loss",
    "triplet_ratio_loss",
]
