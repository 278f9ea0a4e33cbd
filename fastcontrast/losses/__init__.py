"""One file per loss: the function, the Module, and the paper's equation in the docstring."""

from fastcontrast.losses.clip import ClipLoss, clip_loss
from fastcontrast.losses.info_nce import InfoNCELoss, info_nce_loss
from fastcontrast.losses.memory_queue import MemoryQueue
from fastcontrast.losses.metric_embedding import MetricEmbeddingLoss, metric_embedding_loss
from fastcontrast.losses.multiple_negatives_ranking import (
    MultipleNegativesRankingLoss,
    multiple_negatives_ranking_loss,
)
from fastcontrast.losses.nca import NCALoss, nca_loss
from fastcontrast.losses.nt_xent import NTXentLoss, nt_xent_loss
from fastcontrast.losses.proxy_nca import ProxyNCALoss, proxy_nca_loss
from fastcontrast.losses.siamese_contrastive import SiameseContrastiveLoss, siamese_contrastive_loss
from fastcontrast.losses.spatial_contrasting import SpatialContrastingLoss, spatial_contrasting_loss
from fastcontrast.losses.supcon import SupConLoss, supcon_loss
from fastcontrast.losses.triplet_margin import TripletMarginLoss, triplet_margin_loss
from fastcontrast.losses.triplet_ratio import TripletRatioLoss, triplet_ratio_loss

__all__ = [
    "ClipLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "MetricEmbeddingLoss",
    "MultipleNegativesRankingLoss",
    "NCALoss",
    "NTXentLoss",
    "ProxyNCALoss",
    "SiameseContrastiveLoss",
    "SpatialContrastingLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletRatioLoss",
    "clip_loss",
    "info_nce_loss",
    "metric_embedding_loss",
    "multiple_negatives_ranking_loss",
    "nca_loss",
    "nt_xent_loss",
    "proxy_nca_loss",
    "siamese_contrastive_loss",
    "spatial_contrasting_loss",
    "supcon_loss",
    "triplet_margin_loss",
    "triplet_ratio_loss",
]
