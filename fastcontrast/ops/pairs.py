"""Scores of given pairs, for ``fastcontrast/losses``: one implementation serves every backend."""

from fastcontrast.backends.reference.pairs import paired_distance, paired_scores

__all__ = ["paired_distance", "paired_scores"]
