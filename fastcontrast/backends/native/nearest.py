"""`nearest` on CPU: GEMMs of tiles by torch, one C++ pass that keeps each row's candidates.

The pass is csrc/cpu/nearest.cpp. The products only say which pairs are worth a direct difference;
the M×N matrix exists one tile at a time, so memory is O((M+N)·D + M·k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends.native.distance_softmax import (
    TILE_COLUMNS,
    TILE_ROWS,
    _address,
    _Operands,
)
from fastcontrast.backends.native.products import ieee_products
from fastcontrast.backends.scores import Scores, accumulator_dtype, padding

# Candidates that a list holds beyond 2k; a full one is cut.
ROOM = 32
# Candidates of a block of rows, 16 bytes each: only a very large k has less than TILE_ROWS rows.
BLOCK_CANDIDATES = 1 << 22


def nearest_columns(
    x: Tensor, y: Tensor, k: int, scores: Scores, farthest: bool
) -> tuple[Tensor, Tensor]:
    """Values [M, k] and columns [M, k] of the k nearest of every row."""
    dtype = accumulator_dtype(x.dtype)
    m, n = x.shape[0], y.shape[0]
    values, indices = x.new_empty(m, k, dtype=dtype), x.new_empty(m, k, dtype=torch.int64)
    if n == 0:
        return values.fill_(padding(scores.metric, farthest)), indices.fill_(-1)
    capacity = min(2 * k + ROOM, n)
    block = max(1, min(TILE_ROWS, BLOCK_CANDIDATES // capacity))
    points = _Points(x, y, scores, dtype)
    operands = _Operands(*points.products, points.scores, dtype, tile=(block, TILE_COLUMNS))
    x_size, y_size = points.sizes(operands)
    lists = _lists(min(m, block), capacity, dtype)
    entry = getattr(_C, f"nearest_{operands.suffix}")
    with ieee_products():
        for rows, columns, tile in operands.tiles():
            tile["x"] = _address(points.x, rows)
            entry(
                **tile,
                k=k,
                farthest=farthest,
                first=columns.start == 0,
                last=columns.stop == n,
                x_size=_address(x_size, rows),
                y_size=_address(y_size, columns),
                points=points.y.data_ptr(),
                x_norm=_address(points.x_norm, rows),
                y_norm=0 if points.y_norm is None else points.y_norm.data_ptr(),
                capacity=capacity,
                **{name: tensor.data_ptr() for name, tensor in lists.items()},
                found=_address(values, rows),
                indices=_address(indices, rows),
            )
    return values, indices


class _Points:
    """The points as given, for direct differences, and what the products are taken of."""

    def __init__(self, x: Tensor, y: Tensor, scores: Scores, dtype: torch.dtype) -> None:
        self.x, self.y = (v.detach().to(dtype).resolve_neg().contiguous() for v in (x, y))
        self.products, self.scores = (self.x, self.y), scores
        self.x_norm = self.y_norm = None
        if scores.metric == "cosine":
            self.x_norm, self.y_norm = _norms(self.x), _norms(self.y)
            self.products = (_unit_rows(self.x, self.x_norm), _unit_rows(self.y, self.y_norm))
            self.scores = scores._replace(metric="dot")

    def sizes(self, operands: _Operands) -> tuple[Tensor, Tensor]:
        """What the error of a product is measured by, [M] and [N]; see csrc/common/ranking.h."""
        if operands.x_sqnorm is not None and operands.y_sqnorm is not None:
            return operands.x_sqnorm, operands.y_sqnorm
        x_norm, y_norm = (_norms(v).to(v.dtype) for v in self.products)
        return x_norm, y_norm


def _norms(points: Tensor) -> Tensor:
    """Norms of the rows in float64, where the squares of float32 numbers do not overflow."""
    return torch.linalg.vector_norm(points, dim=1, dtype=torch.float64)


def _unit_rows(points: Tensor, norms: Tensor) -> Tensor:
    inverse = torch.where(norms == 0, 0.0, 1.0 / norms)
    return points * inverse.to(points.dtype)[:, None]


def _lists(rows: int, capacity: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Candidates of a block of rows, and what each thread needs to rank those of one row."""
    threads = torch.get_num_threads()
    return {
        "lower": torch.empty(rows, capacity, dtype=dtype),
        "upper": torch.empty(rows, capacity, dtype=dtype),
        "column": torch.empty(rows, capacity, dtype=torch.int64),
        "count": torch.empty(rows, dtype=torch.int64),
        "limit": torch.empty(rows, dtype=dtype),
        "scratch": torch.empty(threads, capacity, 2, dtype=torch.int64),
    }
