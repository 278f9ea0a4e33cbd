"""`distance_softmax` on CPU: GEMMs of tiles by torch, one C++ pass over each tile while it is warm.

The pass is csrc/cpu/distance_softmax.cpp. The M×N matrix exists one tile at a time, so memory is
O((M+N)·D). The backward pass computes the tiles anew (8MND operations in all); `softmax_loss`, with
one number as upstream gradient, takes the gradients while the scores are there (6MND). CUDA tensors
go to distance_softmax_cuda.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends.float32_products import float32_products
from fastcontrast.backends.native import devices, distance_softmax_cuda
from fastcontrast.backends.native.products import ROUNDINGS, choose_products
from fastcontrast.backends.reference.distance_softmax import loss_by_two_passes
from fastcontrast.backends.scores import (
    KEEPS,
    METRICS,
    LossGradients,
    LossWeights,
    RowGradients,
    Scores,
    Statistics,
    accumulator_dtype,
    empty_statistics,
)

# A tile of 512 × 2048 float32 takes 4 MiB, which a shared last-level cache holds; its 512 rows
# are enough for the GEMMs C·Y and Cᵀ·X to run at full speed.
TILE_ROWS = 512
TILE_COLUMNS = 2048
# Scores of a block of rows in `softmax_loss`, 16 MiB in float32.
LOSS_BLOCK = 1 << 22
# Multiplications of a product, M·N·D, up to which one C++ call in one thread is faster than tiles
# and torch's GEMMs on two threads.
SMALL_PRODUCT = 1 << 23
# Waking the other threads costs some microseconds: the C++ pass over this many scores.
ELEMENTS_PER_THREAD = 1 << 13


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    if devices.on_cuda(x):
        return distance_softmax_cuda.distance_softmax_forward(x, y, scores, threshold, score_sum)
    dtype = accumulator_dtype(x.dtype)
    out = empty_statistics(x, score_sum=score_sum, rank=threshold is not None)
    limit = None if threshold is None else threshold.to(dtype).contiguous()
    _take_statistics(_Operands(x, y, scores, dtype), out, limit, None)
    return out


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale from (lse, lse_residual, entropy); empty where not needed."""
    if devices.on_cuda(x):
        return distance_softmax_cuda.distance_softmax_backward(
            x, y, scores, statistics, grads, needs
        )
    operands = _Operands(x, y, scores, accumulator_dtype(x.dtype))
    dx, dy, dscale = _gradients(operands, statistics, grads, None, needs)
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def softmax_loss(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    weights: LossWeights,
    needs: tuple[bool, bool, bool],
) -> LossGradients:
    """Loss of every row and all gradients in one pass: 6MND operations, scores computed once.

    A block of rows holds all its columns, LOSS_BLOCK scores or 64 rows, whichever is more. With
    the columns' cross-entropy the scores are computed twice, 8MND: no gradient can be taken before
    the last row has been seen.
    """
    if devices.on_cuda(x):
        return distance_softmax_cuda.softmax_loss(x, y, scores, weights, needs)
    dtype = accumulator_dtype(x.dtype)
    (m, dim), n = x.shape, y.shape[0]
    if 0 < m * n * dim <= SMALL_PRODUCT and _fits_small_loss(scores, weights):
        return _small_loss(x, y, scores, weights, needs)
    block = max(64, min(TILE_ROWS, LOSS_BLOCK // max(1, n)) // 32 * 32)
    operands = _Operands(x, y, scores, dtype, tile=(block, max(1, n)))
    if weights.column_cross_entropy is not None:
        return _symmetric_loss(operands, scores, weights, needs)
    gradients = _Gradients(operands, needs)
    loss = x.new_zeros(m, dtype=dtype)
    ce_weight, entropy_weight = (
        None if value is None else _plain(value.detach(), dtype) for value in weights[:2]
    )
    entry = getattr(_C, f"softmax_loss_{operands.suffix}")
    with float32_products("ieee"):
        for rows, columns, tile in operands.tiles():
            entry(
                **tile,
                **gradients.of_tile(rows, columns),
                cross_entropy_weight=_address(ce_weight, rows),
                entropy_weight=_address(entropy_weight, rows),
                loss=_address(loss, rows),
            )
            gradients.add_products(rows, columns)
    return LossGradients(loss, *gradients.result(float(scores.scale)))


def _fits_small_loss(scores: Scores, weights: LossWeights) -> bool:
    return (
        weights.column_cross_entropy is None
        and scores.keep == "all"
        and (scores.exclude is None or scores.exclude.shape[1] == 1)
    )


def _small_loss(
    x: Tensor, y: Tensor, scores: Scores, weights: LossWeights, needs: tuple[bool, bool, bool]
) -> LossGradients:
    """The whole of it in one C++ call."""
    dtype = accumulator_dtype(x.dtype)
    x, y = _plain(x, dtype), _plain(y, dtype)
    (m, dim), n = x.shape, y.shape[0]
    exclude = None if scores.exclude is None else _plain(scores.exclude, torch.int64)
    a = None if weights.cross_entropy is None else _plain(weights.cross_entropy, dtype)
    b = None if weights.entropy is None else _plain(weights.entropy, dtype)
    loss, dscale = x.new_empty(m), x.new_empty(() if needs[2] else 0)
    dx = torch.zeros_like(x) if needs[0] else x.new_empty(0)
    dy = torch.zeros_like(y) if needs[1] else x.new_empty(0)
    entry = (
        _C.small_softmax_loss_float64 if dtype == torch.float64 else _C.small_softmax_loss_float32
    )
    entry(
        x.data_ptr(), y.data_ptr(), m, n, dim,
        METRICS.index(scores.metric), float(scores.scale),
        0 if exclude is None else exclude.data_ptr(),
        0 if a is None else a.data_ptr(), 0 if b is None else b.data_ptr(),
        loss.data_ptr(), dx.data_ptr(), dy.data_ptr(), dscale.data_ptr(),
    )  # fmt: skip
    return LossGradients(loss, dx, dy, dscale)


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` contiguous in ``dtype``, itself where it is already."""
    return x.to(dtype).resolve_neg().contiguous()


def _symmetric_loss(
    operands: _Operands, scores: Scores, weights: LossWeights, needs: tuple[bool, bool, bool]
) -> LossGradients:
    """One pass over the scores for the statistics of rows and columns, one for the weights."""
    x, y = operands.given_x, operands.given_y
    out = empty_statistics(x, score_sum=False, rank=False)
    columns = _ColumnState(y)
    _take_statistics(operands, out, None, columns)
    lse2 = columns.lse2()

    def gradients(
        grad_lse: Tensor, grad_entropy: Tensor | None, grad_column_lse: Tensor | None
    ) -> tuple[Tensor, ...]:
        grads = RowGradients(grad_lse, grad_entropy, None)
        by_columns = None if grad_column_lse is None else (lse2, grad_column_lse)
        return _gradients(operands, out[:3], grads, by_columns, needs)

    column_lse = (lse2 * math.log(2)).to(x.dtype)
    return loss_by_two_passes(
        x, y, scores, weights, needs, out.lse, out.entropy, column_lse, gradients
    )


class _ColumnState:
    """Σ_i 2^(t_ij - max_j) of every column j, carried over blocks of rows; log2 units."""

    def __init__(self, y: Tensor) -> None:
        self.max = y.new_full((y.shape[0],), -torch.inf)
        self.sum = torch.zeros(y.shape[0], dtype=torch.float64)

    def lse2(self) -> Tensor:
        """log2 Σ_i 2^t_ij in float64 [N]; -inf where no row counts."""
        nothing = self.sum == 0
        return torch.where(nothing, -torch.inf, self.max + self.sum.log2())


def _take_statistics(
    operands: _Operands, out: Statistics, threshold: Tensor | None, columns: _ColumnState | None
) -> None:
    """Fill ``out``, and the column state if there is one."""
    n = operands.y.shape[0]
    if n == 0:
        for value in out:
            value.zero_()
        out.lse.fill_(-torch.inf)
        return
    score_sum = out.score_sum if out.score_sum.shape[0] else None
    state = torch.empty(min(operands.x.shape[0], operands.tile_rows), 4, dtype=torch.float64)
    entry = getattr(_C, f"distance_softmax_forward_{operands.suffix}")
    with float32_products("ieee"):
        for rows, span, tile in operands.tiles():
            entry(
                **tile,
                state=state.data_ptr(),
                first=span.start == 0,
                last=span.stop == n,
                lse=_address(out.lse, rows),
                lse_residual=_address(out.lse_residual, rows),
                entropy=_address(out.entropy, rows),
                score_sum=_address(score_sum, rows),
                count=0 if score_sum is None else _address(out.column_count, rows),
                threshold=_address(threshold, rows),
                rank=0 if threshold is None else _address(out.rank, rows),
                column_max=0 if columns is None else _address(columns.max, span),
                column_sum=0 if columns is None else _address(columns.sum, span),
            )


def _gradients(
    operands: _Operands,
    statistics: tuple[Tensor, ...],
    grads: RowGradients,
    by_columns: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from (lse, lse_residual, entropy) of rows and (lse2, its gradient) of columns."""
    gradients = _Gradients(operands, needs)
    lse, lse_residual, entropy = statistics
    grad_lse, grad_entropy, grad_sum = (
        None if grad is None else grad.to(lse.dtype).contiguous() for grad in grads
    )
    high = low = grad_column_lse = None
    if by_columns is not None:
        lse2 = torch.where(by_columns[0] == -torch.inf, 0.0, by_columns[0])
        high = lse2.to(lse.dtype)
        low = (lse2 - high).to(lse.dtype)
        grad_column_lse = by_columns[1].to(lse.dtype).contiguous()
    entry = getattr(_C, f"distance_softmax_backward_{operands.suffix}")
    with float32_products("ieee"):
        for rows, columns, tile in operands.tiles():
            entry(
                **tile,
                **gradients.of_tile(rows, columns),
                lse=_address(lse, rows),
                lse_residual=_address(lse_residual, rows),
                entropy=_address(entropy, rows),
                grad_lse=_address(grad_lse, rows),
                grad_entropy=_address(grad_entropy, rows),
                grad_sum=_address(grad_sum, rows),
                column_lse2_high=_address(high, columns),
                column_lse2_low=_address(low, columns),
                column_grad_lse=_address(grad_column_lse, columns),
            )
            gradients.add_products(rows, columns)
    return gradients.result(float(operands.constants["scale"]))


class _Gradients:
    """Gradients in the making: products C·Y and Cᵀ·X, row and column sums of the weights C.

    ``dx_i = Σ_j c_ij (y_j - x_i)`` is taken as ``(C Y)_i - x_i Σ_j c_ij``, and dy alike; for "dot"
    the products alone. Pairs that the C++ pass takes out of the products it adds to them.
    """

    def __init__(self, operands: _Operands, needs: tuple[bool, bool, bool]) -> None:
        self.operands, self.needs = operands, needs
        self.sums_columns = operands.centred and needs[1] and not operands.products.sums_weights
        (m, dim), n = operands.x.shape, operands.y.shape[0]
        self.x = operands.x.new_zeros((m, dim) if needs[0] else (0,))
        self.y = operands.y.new_zeros((n, dim) if needs[1] else (0,))
        sums = torch.zeros(2 * m + n, dtype=torch.float64)
        self.row_sum, self.score_product, self.column_sum = sums.split([m, m, n])

    def of_tile(self, rows: slice, columns: slice) -> dict[str, int]:
        """Addresses for the C++ pass over one tile."""
        return {
            "row_sum": _address(self.row_sum, rows),
            "column_sum": _address(self.column_sum, columns) if self.sums_columns else 0,
            "score_product": _address(self.score_product, rows),
            "grad_x": _address(self.x, rows) if self.needs[0] else 0,
            "grad_y": _address(self.y, columns) if self.needs[1] else 0,
        }

    def add_products(self, rows: slice, columns: slice) -> None:
        """Apply the pair weights that the C++ pass left in the tile."""
        self.operands.products.add_gradients(
            self.operands.tile_values(rows, columns),
            rows,
            columns,
            self.x if self.needs[0] else None,
            self.y if self.needs[1] else None,
        )

    def result(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, y and scale."""
        operands = self.operands
        sums = operands.products.finish(self.y if self.needs[1] else None)
        row_sum, column_sum = sums or (self.row_sum, self.column_sum)
        if operands.centred:
            subtract = getattr(_C, f"subtract_scaled_rows_{operands.suffix}")
            for need, points, sums, grad in (
                (self.needs[0], operands.x, row_sum, self.x),
                (self.needs[1], operands.y, column_sum, self.y),
            ):
                if need:
                    subtract(
                        points.data_ptr(), sums.data_ptr(), *points.shape, _threads(points.numel()),
                        grad.data_ptr(),
                    )  # fmt: skip
        if not self.needs[2]:
            return self.x, self.y, self.x.new_empty(0)
        return self.x, self.y, (self.score_product.sum() / scale).to(self.x.dtype)


class _Operands:
    """Operands of the products, and what the C++ pass needs to know of each tile."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scores: Scores,
        dtype: torch.dtype,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.tile_rows, self.tile_columns = tile or (TILE_ROWS, TILE_COLUMNS)
        self.given_x, self.given_y = _plain(x.detach(), dtype), _plain(y.detach(), dtype)
        self.x, self.y = self.given_x, self.given_y
        self.x_sqnorm = self.y_sqnorm = None
        self.suffix = "float64" if dtype == torch.float64 else "float32"
        self.centred = scores.metric != "dot"
        if self.centred and y.shape[0] > 0:
            mean = self.given_y.mean(0)
            self.x, self.x_sqnorm = self.centre(self.given_x, mean)
            self.y, self.y_sqnorm = self.centre(self.given_y, mean)
        self.products, self.rounding = choose_products(self, x.dtype, scores.precision)
        alignment = self.products.alignment
        self.tile_rows = -(-self.tile_rows // alignment) * alignment
        self.tile_columns = -(-self.tile_columns // alignment) * alignment
        self.exclude = None
        if scores.exclude is not None:
            self.exclude = _plain(scores.exclude, torch.int64)
        self.row_ids, self.column_ids = _narrow_ids(scores.row_ids, scores.column_ids)
        self.constants = {
            "metric": METRICS.index(scores.metric),
            "scale": float(scores.scale),
            "keep": KEEPS.index(scores.keep),
            "dim": x.shape[1],
            "rounding": ROUNDINGS.index(self.rounding),
            "exclude_count": 0 if self.exclude is None else self.exclude.shape[1],
        }
        size = min(x.shape[0], self.tile_rows) * min(y.shape[0], self.tile_columns)
        self.buffer = self.x.new_empty(size)

    def centre(self, points: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Points less the mean of the columns, and their squared norms.

        Distances do not change, and the rounding error of ``‖x‖²+‖y‖²-2x·y`` no longer grows with
        the offset of the data. Where the mean is not finite 0 is taken: a bad column stays alone.
        """
        out, sqnorm = torch.empty_like(points), points.new_empty(points.shape[0])
        threads = _threads(points.numel())
        getattr(_C, f"center_rows_{self.suffix}")(
            points.data_ptr(), mean.data_ptr(), *points.shape, threads, out.data_ptr(),
            sqnorm.data_ptr(),
        )  # fmt: skip
        return out, sqnorm

    def tile_values(self, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.buffer[: shape[0] * shape[1]].view(shape)

    def tiles(self) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        """Every tile with its dot products computed, row blocks outermost."""
        m, n = self.x.shape[0], self.y.shape[0]
        for row in range(0, m, self.tile_rows):
            rows = slice(row, min(row + self.tile_rows, m))
            for column in range(0, n, self.tile_columns):
                columns = slice(column, min(column + self.tile_columns, n))
                values = self.tile_values(rows, columns)
                self.products.scores(rows, columns, values)
                yield (
                    rows,
                    columns,
                    {
                        **self.constants,
                        "values": values.data_ptr(),
                        "rows": values.shape[0],
                        "columns": values.shape[1],
                        "threads": _threads(values.numel()),
                        "first_column": column,
                        "x_sqnorm": _address(self.x_sqnorm, rows),
                        "y_sqnorm": _address(self.y_sqnorm, columns),
                        "x": _address(self.given_x, rows),
                        "y": _address(self.given_y, columns),
                        "exclude": _address(self.exclude, rows),
                        "row_ids": _address(self.row_ids, rows),
                        "column_ids": _address(self.column_ids, columns),
                    },
                )


def _threads(elements: int) -> int:
    """Threads that a pass over so many elements is worth."""
    return min(torch.get_num_threads(), 1 + elements // ELEMENTS_PER_THREAD)


def _address(tensor: Tensor | None, span: slice) -> int:
    """Address of the first row of ``span``; 0 for None."""
    if tensor is None:
        return 0
    return tensor.data_ptr() + span.start * tensor.stride(0) * tensor.element_size()


def _narrow_ids(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ids as int32, renumbered if they do not fit: a vector then compares 16 at a time."""
    if rows is None or columns is None:
        return None, None
    if rows.dtype != torch.int32 or columns.dtype != torch.int32:
        both = torch.cat([rows, columns]).to(torch.int64)
        limits = torch.iinfo(torch.int32)
        if both.numel() and (both.min() < limits.min or both.max() > limits.max):
            both = torch.unique(both, return_inverse=True)[1]
        rows, columns = both.to(torch.int32).split([rows.shape[0], columns.shape[0]])
    return rows.contiguous(), columns.contiguous()
