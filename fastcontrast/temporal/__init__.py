"""Time as the comparison: losses, triplets and samplers by sequence ids and times.

Public names, by what they are of: contrasting (the loss of this project), triplets, prediction
(CPC), neighbourhoods (TNC), slow features, and clips. Documentation: docs/temporal.md.
"""

from fastcontrast.temporal.clips import Clips, ClipSampler
from fastcontrast.temporal.contrasting import TemporalContrastingLoss, temporal_contrasting_loss
from fastcontrast.temporal.neighborhood import NeighborhoodDiscriminator, temporal_neighborhood_loss
from fastcontrast.temporal.prediction import TemporalPredictionLoss, temporal_prediction_loss
from fastcontrast.temporal.slow_features import SlowFeatures, slow_features
from fastcontrast.temporal.triplets import TemporalTriplets, temporal_triplets

__all__ = [
    "ClipSampler",
    "Clips",
    "NeighborhoodDiscriminator",
    "SlowFeatures",
    "TemporalContrastingLoss",
    "TemporalPredictionLoss",
    "TemporalTriplets",
    "slow_features",
    "temporal_contrasting_loss",
    "temporal_neighborhood_loss",
    "temporal_prediction_loss",
    "temporal_triplets",
]
