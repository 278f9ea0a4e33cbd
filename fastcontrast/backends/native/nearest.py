"""`nearest` on CPU: GEMMs of tiles by torch, one C++ pass that keeps each row's candidates.

The pass is csrc/cpu/nearest.cpp. The products only say which pairs are worth a direct difference;
the M×N matrix exists one tile at a time, so memory is O((M+N)·D + M·k). On CUDA one kernel does all
of it, csrc/cuda/nearest.cu, for MAX_K columns at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends.float32_products import float32_products
from fastcontrast.backends.native import devices
from fastcontrast.backends.native.distance_softmax import (
    TILE_COLUMNS,
    TILE_ROWS,
    _address,
    _Operands,
)
from fastcontrast.backends.native.extract_patches import SCALARS
from fastcontrast.backends.scores import KEEPS, METRICS, Scores, accumulator_dtype, padding

# Candidates that a list holds beyond 2k; a full one is cut.
ROOM = 32
# Candidates of a block of rows, 16 bytes each: only a very large k has less than TILE_ROWS rows.
BLOCK_CANDIDATES = 1 << 22
# As csrc/cuda/nearest.cu has them: rows of a block and columns of a tile, and the largest k.
CUDA_TILE = 64
MAX_K = 256
# Few rows share out their columns until every multiprocessor has so many blocks, each with at least
# so many columns: starting a list takes about k·log(columns/k) candidates.
BLOCKS_PER_PROCESSOR = 4
MINIMUM_COLUMNS = 512
MAX_SPLITS = 64
ALL = slice(0, None)


def nearest_columns(
    x: Tensor, y: Tensor, k: int, scores: Scores, farthest: bool
) -> tuple[Tensor, Tensor]:
    """Values [M, k] and columns [M, k] of the k nearest of every row."""
    dtype = accumulator_dtype(x.dtype)
    m, n = x.shape[0], y.shape[0]
    values, indices = x.new_empty(m, k, dtype=dtype), x.new_empty(m, k, dtype=torch.int64)
    if n == 0:
        return values.fill_(padding(scores.metric, farthest)), indices.fill_(-1)
    if devices.on_cuda(x):
        return _search_on_gpu(x, y, scores, farthest, values, indices)
    capacity = min(2 * k + ROOM, n)
    block = max(1, min(TILE_ROWS, BLOCK_CANDIDATES // capacity))
    points = _Points(x, y, scores, dtype)
    operands = _Operands(*points.products, points.scores, dtype, tile=(block, TILE_COLUMNS))
    x_size, y_size = points.sizes(operands)
    lists = _lists(min(m, block), capacity, dtype)
    entry = getattr(_C, f"nearest_{operands.suffix}")
    with float32_products("ieee"):
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


def _search_on_gpu(
    x: Tensor, y: Tensor, scores: Scores, farthest: bool, values: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill values and indices, a block of rows and up to MAX_K of their columns in one launch."""
    (m, k), n = values.shape, y.shape[0]
    x, y = (v.detach().resolve_neg() for v in (x, y))
    x, y = (v if v.stride(1) == 1 else v.contiguous() for v in (x, y))
    kernels, workers = devices.kernels(x), devices.workers(x, 1)
    x_norm = y_norm = None
    if scores.metric in ("dot", "cosine"):
        x_norm, y_norm = (_norms_on_gpu(v) for v in (x, y))
    exclude, row_ids, column_ids = (
        None if v is None else v.to(torch.int64).contiguous()
        for v in (scores.exclude, scores.row_ids, scores.column_ids)
    )
    capacity = 2 * min(k, MAX_K) + CUDA_TILE
    block = max(1, BLOCK_CANDIDATES // capacity // CUDA_TILE) * CUDA_TILE
    for begin in range(0, m, block):
        rows = slice(begin, min(begin + block, m))
        count = rows.stop - begin
        splits = _splits(count, n, capacity, devices.processors(x))
        shape = (splits, count, capacity)
        bounds = values.new_empty(*shape, 2)
        column = indices.new_empty(shape)
        ranked = indices.new_empty(*shape[:2], min(k, MAX_K), 2) if splits > 1 else None
        last = indices.new_empty(count, 2) if k > MAX_K else None
        for first in range(0, min(k, n), MAX_K):
            kernels.nearest(
                x=_address(x, rows),
                x_stride=x.stride(0),
                x_count=count,
                y=y.data_ptr(),
                y_stride=y.stride(0),
                y_count=n,
                type=SCALARS[x.dtype],
                dim=x.shape[1],
                metric=METRICS.index("dot" if scores.metric == "cosine" else scores.metric),
                farthest=farthest,
                cosine=scores.metric == "cosine",
                x_norm=_address(x_norm, rows),
                y_norm=_address(y_norm, ALL),
                exclude=_address(exclude, rows),
                exclude_count=0 if exclude is None else exclude.shape[1],
                row_ids=_address(row_ids, rows),
                column_ids=_address(column_ids, ALL),
                keep=KEEPS.index(scores.keep),
                k=min(k - first, MAX_K),
                after=_address(last if first else None, ALL),
                splits=splits,
                capacity=capacity,
                bounds=bounds.data_ptr(),
                column=column.data_ptr(),
                ranked=_address(ranked, ALL),
                values=_address(values[:, first:], rows),
                indices=_address(indices[:, first:], rows),
                out_stride=k,
                last=_address(last, ALL),
                workers=workers,
            )
    if k > MAX_K:  # the searches after which no column is left are not made
        searched = min(k, -(-n // MAX_K) * MAX_K)
        values[:, searched:] = padding(scores.metric, farthest)
        indices[:, searched:] = -1
    return values, indices


def _norms_on_gpu(points: Tensor) -> Tensor:
    """Norms of the rows in float64, without a copy of the points in float64."""
    norms = points.new_empty(points.shape[0], dtype=torch.float64)
    devices.kernels(points).row_norms(
        x=points.data_ptr(),
        x_stride=points.stride(0),
        x_count=points.shape[0],
        type=SCALARS[points.dtype],
        dim=points.shape[1],
        norms=norms.data_ptr(),
        workers=devices.workers(points, 1),
    )
    return norms


def _splits(rows: int, columns: int, capacity: int, processors: int) -> int:
    """Blocks that share out the columns of a row."""
    groups = -(-rows // CUDA_TILE)
    wanted = BLOCKS_PER_PROCESSOR * processors // groups
    room = BLOCK_CANDIDATES // (rows * capacity)
    return max(1, min(wanted, room, columns // MINIMUM_COLUMNS, MAX_SPLITS))
