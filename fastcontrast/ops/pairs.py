"""Values of given pairs by direct difference, for losses, retrieval and miners: on every backend.

``row_chunks`` cuts the rows of an M×N problem into blocks, for what is streamed in plain PyTorch.
"""

from fastcontrast.backends.reference.blocks import CHUNK_ELEMENTS, row_chunks
from fastcontrast.backends.reference.pairs import paired_distance, paired_scores, values_between

__all__ = ["CHUNK_ELEMENTS", "paired_distance", "paired_scores", "row_chunks", "values_between"]
