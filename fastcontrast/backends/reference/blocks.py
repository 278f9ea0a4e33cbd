"""Blocks of rows of a pairwise call, and its dense mask: for every pairwise op of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcontrast.backends.scores import Scores

CHUNK_ELEMENTS = 1 << 22


def row_chunks(x: Tensor, y: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Consecutive rows of ``x`` that make at most so many scores, and at least one row.

    CHUNK_ELEMENTS, if nothing else is said.
    """
    step = max(1, (CHUNK_ELEMENTS if elements is None else elements) // max(1, y.shape[0]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def of_rows(scores: Scores, rows: slice) -> Scores:
    """The part of ``scores`` that concerns these rows."""
    return scores._replace(
        exclude=None if scores.exclude is None else scores.exclude[rows],
        row_ids=None if scores.row_ids is None else scores.row_ids[rows],
    )


def columns_that_count(s: Tensor, scores: Scores) -> Tensor:
    """Which columns count for each row of a matrix like ``s``, bool [M, N]."""
    counts = torch.ones(s.shape, dtype=torch.bool, device=s.device)
    if scores.exclude is not None and s.shape[1] > 0:
        inside = (scores.exclude >= 0) & (scores.exclude < s.shape[1])
        for e in range(scores.exclude.shape[1]):
            rows = inside[:, e].nonzero()[:, 0]
            counts[rows, scores.exclude[rows, e].to(torch.int64)] = False
    if scores.row_ids is not None and scores.column_ids is not None:
        same = scores.row_ids[:, None] == scores.column_ids[None, :]
        counts &= same if scores.keep == "same" else ~same
    return counts
