"""Which columns of a call count, as the kernels want it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastcontrast.backends.scores import DISTANCES, KEEPS, SIMILARITIES, Scores

# As the kernels number them (tiles.py).
METRICS = (*DISTANCES, *SIMILARITIES)


class Mask:
    """Which columns count, and the metric, as the kernels want them."""

    def __init__(self, scores: Scores) -> None:
        self.metric = scores.metric
        self.exclude = None
        if scores.exclude is not None:
            self.exclude = scores.exclude.to(torch.int64).contiguous()
        self.row_ids, self.column_ids = _narrow_ids(scores.row_ids, scores.column_ids)
        self.options = {
            "METRIC": METRICS.index(scores.metric),
            "KEEP": KEEPS.index(scores.keep),
            "EXCLUDE": 0 if self.exclude is None else self.exclude.shape[1],
        }

    def of_rows(self, rows: slice) -> Mask:
        """The same for some of the rows."""
        part = copy.copy(self)
        part.exclude = None if self.exclude is None else self.exclude[rows]
        part.row_ids = None if self.row_ids is None else self.row_ids[rows]
        return part


def _narrow_ids(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32, renumbered in order: half the registers, no wait for a device."""
    if rows is None or columns is None:
        return None, None
    if rows.dtype == columns.dtype == torch.int32:
        return rows.contiguous(), columns.contiguous()
    ordered, order = torch.cat([rows.to(torch.int64), columns.to(torch.int64)]).sort()
    new = torch.zeros_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    numbers = torch.empty_like(new).scatter_(0, order, new).to(torch.int32)
    first, second = numbers.split([rows.shape[0], columns.shape[0]])
    return first.contiguous(), second.contiguous()
