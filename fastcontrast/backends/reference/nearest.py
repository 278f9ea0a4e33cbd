"""`nearest` by definition: all direct differences in float64, and a stable sort of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.reference.blocks import columns_that_count, of_rows, row_chunks
from fastcontrast.backends.reference.pairs import values_between
from fastcontrast.backends.scores import Scores, accumulator_dtype, padding


def nearest_columns(
    x: Tensor, y: Tensor, k: int, scores: Scores, farthest: bool
) -> tuple[Tensor, Tensor]:
    """Values [M, k] and columns [M, k] of the k nearest of every row."""
    m, n = x.shape[0], y.shape[0]
    end = padding(scores.metric, farthest)
    values = x.new_full((m, k), end, dtype=accumulator_dtype(x.dtype))
    indices = x.new_full((m, k), -1, dtype=torch.int64)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    x, y = x.to(dtype).contiguous(), y.to(dtype).contiguous()
    for rows in row_chunks(x, y):
        pairs = values_between(x[rows], y, scores.metric)
        counts = columns_that_count(pairs, of_rows(scores, rows))
        # Three classes, each in the order of its keys: numbers, NaN, what does not count. Sorts
        # are stable, so that equal keys stay in the order of columns.
        keys = pairs.nan_to_num(end, torch.inf, -torch.inf)
        order = keys.sort(dim=1, descending=end < 0, stable=True).indices
        place = (pairs.isnan().long() + 2 * (~counts).long()).gather(1, order)
        place, by_class = place.sort(dim=1, stable=True)
        order, width = order.gather(1, by_class)[:, :k], min(k, n)
        found = place[:, :k] < 2
        values[rows, :width] = torch.where(found, pairs.gather(1, order), end).to(values.dtype)
        indices[rows, :width] = torch.where(found, order, -1)
    return values, indices
