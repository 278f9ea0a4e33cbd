"""Distances of given pairs, for losses, retrieval and miners: the same code for every backend."""

from fastcontrast.backends.reference.pairs import paired_distance, paired_scores

__all__ = ["paired_distance", "paired_scores"]
