"""Distances of given pairs, for ``fastcontrast/losses``: one implementation serves every backend."""

from fastcontrast.backends.reference.pairs import paired_distance

__all__ = ["paired_distance"]
