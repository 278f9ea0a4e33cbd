"""`distance_softmax` on CPU: GEMMs of tiles by torch, one C++ pass over each tile while it is warm.

The pass is csrc/cpu/distance_softmax.cpp. The M×N matrix exists one tile at a time, so memory is
O((M+N)·D). The backward pass computes the tiles anew (8MND operations in all); `softmax_loss`, with
one number as upstream gradient, takes the gradients while the scores are there (6MND).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastcontrast import _C
from fastcontrast.backends.scores import (
    KEEPS,
    METRICS,
    LossGradients,
    LossRows,
    RowGradients,
    Scores,
    Statistics,
    accumulator_dtype,
    column_mean,
    empty_statistics,
)

# A tile of 512 × 2048 float32 takes 4 MiB, which a shared last-level cache holds; its 512 rows
# are enough for the GEMMs W·Y and Wᵀ·X to run at full speed.
TILE_ROWS = 512
TILE_COLUMNS = 2048
# Scores of a block of rows in `softmax_loss`, 16 MiB in float32.
LOSS_BLOCK = 1 << 22
# Waking the other threads costs some microseconds: the C++ pass over this many scores.
ELEMENTS_PER_THREAD = 1 << 13


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    dtype = accumulator_dtype(x.dtype)
    m = x.shape[0]
    operands = _Operands(x, y, scores, dtype)
    out = empty_statistics(x, score_sum=score_sum, rank=threshold is not None)
    if y.shape[0] == 0:
        for value in out:
            value.zero_()
        out.lse.fill_(-torch.inf)
        return out
    limit = None if threshold is None else threshold.to(dtype).contiguous()
    state = torch.empty(min(m, TILE_ROWS), 4, dtype=torch.float64)
    entry = getattr(_C, f"distance_softmax_forward_{operands.suffix}")
    with _ieee_products():
        for rows, columns, tile in operands.tiles():
            entry(
                **tile,
                state=state.data_ptr(),
                first=columns.start == 0,
                last=columns.stop == y.shape[0],
                lse=_address(out.lse, rows),
                lse_residual=_address(out.lse_residual, rows),
                entropy=_address(out.entropy, rows),
                score_sum=_address(out.score_sum, rows) if score_sum else 0,
                count=_address(out.column_count, rows) if score_sum else 0,
                threshold=_address(limit, rows),
                rank=_address(out.rank, rows) if threshold is not None else 0,
            )
    return out


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale from (lse, lse_residual, entropy); empty where not needed.

    ``dx_i = Σ_j w_ij (x_i - y_j)`` is taken as ``x_i Σ_j w_ij - (W Y)_i``, and dy alike.
    """
    dtype = accumulator_dtype(x.dtype)
    (m, dim), n = x.shape, y.shape[0]
    operands = _Operands(x, y, scores, dtype)
    # Products W·Y and Wᵀ·X; near pairs are added to them by the C++ pass.
    wy = x.new_zeros((m, dim) if needs[0] else (0,), dtype=dtype)
    wx = y.new_zeros((n, dim) if needs[1] else (0,), dtype=dtype)
    row_sum, score_product = torch.zeros(2, m, dtype=torch.float64)
    column_sum = torch.zeros(n, dtype=torch.float64)
    lse, lse_residual, entropy = statistics
    grad_lse, grad_entropy, grad_sum = (
        None if grad is None else grad.to(dtype).contiguous() for grad in grads
    )
    entry = getattr(_C, f"distance_softmax_backward_{operands.suffix}")
    with _ieee_products():
        for rows, columns, tile in operands.tiles():
            entry(
                **tile,
                lse=_address(lse, rows),
                lse_residual=_address(lse_residual, rows),
                entropy=_address(entropy, rows),
                grad_lse=_address(grad_lse, rows),
                grad_entropy=_address(grad_entropy, rows),
                grad_sum=_address(grad_sum, rows),
                row_sum=_address(row_sum, rows),
                column_sum=_address(column_sum, columns),
                score_product=_address(score_product, rows),
                grad_x=_address(wy, rows) if needs[0] else 0,
                grad_y=_address(wx, columns) if needs[1] else 0,
            )
            weights = operands.tile_values(rows, columns)
            if needs[0]:
                wy[rows].addmm_(weights, operands.y[columns])
            if needs[1]:
                wx[columns].addmm_(weights.T, operands.x[rows])
    wy, wx = _from_products(operands, scores, wy, wx, row_sum, column_sum, needs)
    dscale = score_product.sum() / float(scores.scale) if needs[2] else score_product.new_empty(0)
    return wy.to(x.dtype), wx.to(y.dtype), dscale.to(dtype)


def softmax_loss(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    rows: LossRows,
    needs: tuple[bool, bool, bool],
) -> LossGradients:
    """Loss of every row and all gradients in one pass: 6MND operations, scores computed once.

    A block of rows holds all its columns, LOSS_BLOCK scores or 64 rows, whichever is more.
    """
    dtype = accumulator_dtype(x.dtype)
    (m, dim), n = x.shape, y.shape[0]
    block = max(64, min(TILE_ROWS, LOSS_BLOCK // max(1, n)))
    operands = _Operands(x, y, scores, dtype, tile=(block, max(1, n)))
    wy = x.new_empty((m, dim) if needs[0] else (0,), dtype=dtype)
    wx = y.new_zeros((n, dim) if needs[1] else (0,), dtype=dtype)
    near_x = x.new_zeros((min(m, block), dim) if needs[0] else (0,), dtype=dtype)
    row_sum, score_product = torch.zeros(2, m, dtype=torch.float64)
    column_sum = torch.zeros(n, dtype=torch.float64)
    loss, grad_positive = x.new_empty(m, dtype=dtype), x.new_empty(m, dtype=dtype)
    positive, ce_weight, entropy_weight = (
        None if value is None else value.detach().to(dtype).contiguous() for value in rows
    )
    entry = getattr(_C, f"softmax_loss_{operands.suffix}")
    with _ieee_products():
        for span, _, tile in operands.tiles():
            entry(
                **tile,
                positive_score=_address(positive, span),
                cross_entropy_weight=_address(ce_weight, span),
                entropy_weight=_address(entropy_weight, span),
                loss=_address(loss, span),
                grad_positive=_address(grad_positive, span),
                row_sum=_address(row_sum, span),
                column_sum=column_sum.data_ptr(),
                score_product=_address(score_product, span),
                grad_x=near_x.data_ptr() if needs[0] else 0,
                grad_y=wx.data_ptr() if needs[1] else 0,
            )
            weights = operands.tile_values(span, slice(0, n))
            if needs[0]:
                part = near_x[: span.stop - span.start]
                torch.addmm(part, weights, operands.y, out=wy[span])
                part.zero_()
            if needs[1]:
                wx.addmm_(weights.T, operands.x[span])
    dx, dy = _from_products(operands, scores, wy, wx, row_sum, column_sum, needs)
    dscale = score_product.sum() / float(scores.scale) if needs[2] else score_product.new_empty(0)
    return LossGradients(loss, grad_positive, dx, dy, dscale.to(dtype))


def _from_products(
    operands: _Operands,
    scores: Scores,
    wy: Tensor,
    wx: Tensor,
    row_sum: Tensor,
    column_sum: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of both sides from W·Y and Wᵀ·X: ``x Σ w - W·Y`` for distances."""
    if scores.metric == "dot":
        return wy, wx
    if needs[0]:
        wy = torch.addcmul(wy.neg_(), operands.x, row_sum.to(wy.dtype)[:, None], out=wy)
    if needs[1]:
        wx = torch.addcmul(wx.neg_(), operands.y, column_sum.to(wx.dtype)[:, None], out=wx)
    return wy, wx


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
        self.given_x = x.detach().to(dtype).contiguous()
        self.given_y = y.detach().to(dtype).contiguous()
        self.x, self.y = self.given_x, self.given_y
        self.x_sqnorm = self.y_sqnorm = None
        if scores.metric != "dot":
            mean = column_mean(self.y)
            self.x, self.y = self.given_x - mean, self.given_y - mean
            self.x_sqnorm = self.x.square().sum(1)
            self.y_sqnorm = self.y.square().sum(1)
        self.suffix = "float64" if dtype == torch.float64 else "float32"
        self.exclude = None
        if scores.exclude is not None:
            self.exclude = scores.exclude.to(torch.int64).contiguous()
        self.row_ids, self.column_ids = _narrow_ids(scores.row_ids, scores.column_ids)
        self.constants = {
            "metric": METRICS.index(scores.metric),
            "scale": float(scores.scale),
            "keep": KEEPS.index(scores.keep),
            "dim": x.shape[1],
            "exclude_count": 0 if self.exclude is None else self.exclude.shape[1],
        }
        size = min(x.shape[0], self.tile_rows) * min(y.shape[0], self.tile_columns)
        self.buffer = self.x.new_empty(size)

    def tile_values(self, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.buffer[: shape[0] * shape[1]].view(shape)

    def tiles(self) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        """Every tile with its dot products computed, row blocks outermost."""
        m, n = self.x.shape[0], self.y.shape[0]
        threads = torch.get_num_threads()
        for row in range(0, m, self.tile_rows):
            rows = slice(row, min(row + self.tile_rows, m))
            for column in range(0, n, self.tile_columns):
                columns = slice(column, min(column + self.tile_columns, n))
                values = self.tile_values(rows, columns)
                torch.mm(self.x[rows], self.y[columns].T, out=values)
                yield (
                    rows,
                    columns,
                    {
                        **self.constants,
                        "values": values.data_ptr(),
                        "rows": values.shape[0],
                        "columns": values.shape[1],
                        "threads": min(threads, 1 + values.numel() // ELEMENTS_PER_THREAD),
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


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Full float32 products, whatever torch.set_float32_matmul_precision() allows.

    Norms and dot products must come from operands rounded alike, and on CPU nothing is gained yet
    by rounding them.
    """
    setting = torch.get_float32_matmul_precision()
    if setting == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)
