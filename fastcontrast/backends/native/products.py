"""The three matrix products of the block algorithm on CPU: by torch, or of bfloat16 operands.

Scores X·Yᵀ of a tile, then C·Y and Cᵀ·X of its pair weights C. torch's float32 GEMM is the rule.
torch has no bfloat16 product with a float32 result on CPU, so where a processor multiplies bfloat16
faster, csrc/cpu/bf16_products.cpp does: for bfloat16 inputs, whose values it takes as they are, and
for float32 inputs as far as the precision allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcontrast import _C

if TYPE_CHECKING:
    from fastcontrast.backends.native.distance_softmax import _Operands

# As csrc/common/scores.h numbers them: how far operands are rounded.
ROUNDINGS = ("ieee", "bf16x3", "bf16")
# Units on which three bfloat16 products take less time than one of float32. AVX512_BF16 has twice
# the rate of float32, which is not enough.
THREEFOLD_UNITS = ("amx", "amx_emulated")
# bfloat16 inputs are multiplied as they are while that makes squared norms, on average, at most
# this many times those of centred ones; the rounding error of distances grows by as much.
OFFSET_LIMIT = 4.0
# Multiplications of a product below which packing costs more than it saves, by AVX512_BF16.
PACKING_MINIMUM = 1 << 24


def choose_products(
    operands: _Operands, dtype: torch.dtype, precision: str
) -> tuple[Products | Bf16Products, str]:
    """Products for operands centred where the metric wants it, and how they are rounded.

    Inputs in bfloat16 lose nothing ("ieee") and are taken without centring, if that makes norms
    little larger. What is rounded replaces ``operands.x`` and ``y``, and so do norms of it.
    """
    x, y = operands.x, operands.y
    unit = _C.active_bf16_unit()
    by_torch = Products(x, y), "ieee"
    if unit == "none" or x.shape[0] * y.shape[0] * x.shape[1] < PACKING_MINIMUM:
        return by_torch
    if dtype == torch.bfloat16:
        if operands.centred and not _take_as_given(operands):
            return by_torch
        return Bf16Products(operands.x, operands.y, 1), "ieee"
    if dtype != torch.float32 or precision == "ieee":
        return by_torch
    terms = 1 if precision == "bf16" else 2  # two are more exact than "tf32" asks for
    if terms == 2 and (unit not in THREEFOLD_UNITS or not _all_finite(x, y)):
        return by_torch  # low·inf would have a sign of its own
    for points, sqnorm in ((x, operands.x_sqnorm), (y, operands.y_sqnorm)):
        if sqnorm is not None:
            _round(points, sqnorm, terms)
    return Bf16Products(x, y, terms), "bf16" if terms == 1 else "bf16x3"


def _take_as_given(operands: _Operands) -> bool:
    """Undo the centring, unless norms would grow beyond OFFSET_LIMIT."""
    centred = sum(float(n.sum()) for n in (operands.x_sqnorm, operands.y_sqnorm) if n is not None)
    zero = operands.y.new_zeros(operands.y.shape[1])
    _, x_sqnorm = operands.centre(operands.given_x, zero)
    _, y_sqnorm = operands.centre(operands.given_y, zero)
    given = float(x_sqnorm.sum()) + float(y_sqnorm.sum())
    if not given <= OFFSET_LIMIT * centred:
        return False  # also where a point is not finite
    operands.x, operands.x_sqnorm = operands.given_x, x_sqnorm
    operands.y, operands.y_sqnorm = operands.given_y, y_sqnorm
    return True


def _all_finite(*values: Tensor) -> bool:
    # A sum over finite values may overflow; the cost of that is a slower product.
    return all(bool(torch.isfinite(value.sum())) for value in values)


def _round(points: Tensor, sqnorm: Tensor, terms: int) -> None:
    """Round points [M, D] in place to what the terms hold, and take their squared norms anew."""
    _C.bf16_round_to_terms(
        points=points.data_ptr(),
        rows=points.shape[0],
        dim=points.shape[1],
        terms=terms,
        threads=torch.get_num_threads(),
        sqnorm=sqnorm.data_ptr(),
    )


class Products:
    """Products in the operands' own dtype, by torch."""

    alignment = 1  # of the first row and column of a tile
    sums_weights = False  # whether row and column sums of the weights are taken here

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def scores(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Dot products of a tile into ``out``."""
        torch.mm(self.x[rows], self.y[columns].T, out=out)

    def add_gradients(
        self,
        weights: Tensor,
        rows: slice,
        columns: slice,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:
        """``grad_x[rows] += C Y`` and ``grad_y[columns] += Cᵀ X`` of a tile's pair weights."""
        if grad_x is not None:
            grad_x[rows].addmm_(weights, self.y[columns])
        if grad_y is not None:
            grad_y[columns].addmm_(weights.T, self.x[rows])

    def finish(self, grad_y: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What is left to add to ``grad_y``, nothing here; sums of the weights, taken elsewhere."""


class Bf16Products:
    """Products of operands in one or two bfloat16 terms, with float32 sums and results.

    Weights are rounded when they are packed, and their row and column sums are taken of what was
    rounded: then ``(C Y)_i - x_i Σ_j c_ij`` is a sum of rounded weights times differences.
    """

    alignment = _C.BF16_DEPTH_BLOCK
    sums_weights = True

    def __init__(self, x: Tensor, y: Tensor, terms: int) -> None:
        self.x, self.y, self.terms = x, y, terms
        self.x_rows = _Factor(x, terms, left=True)
        self.y_columns = _Factor(y, terms, left=False)
        self.gradients: _PackedGradients | None = None

    def scores(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Dot products of a tile into ``out``."""
        _C.bf16_score_product(
            left=self.x_rows.at(outer=rows.start),
            right=self.y_columns.at(outer=columns.start),
            rows=out.shape[0],
            columns=out.shape[1],
            dim=self.x.shape[1],
            threads=torch.get_num_threads(),
            scores=out.data_ptr(),
        )

    def add_gradients(
        self,
        weights: Tensor,
        rows: slice,
        columns: slice,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:
        """``grad_x[rows] += C Y``; ``Cᵀ X`` is kept transposed until :meth:`finish`."""
        if self.gradients is None:
            self.gradients = _PackedGradients(self.x, self.y, self.terms, weights.shape[0])
        packed = self.gradients
        _C.bf16_gradient_products(
            weights=weights.data_ptr(),
            rows=weights.shape[0],
            columns=weights.shape[1],
            dim=self.x.shape[1],
            y_right=packed.y_dims.at(depth=columns.start),
            x_left=packed.x_dims.at(depth=rows.start),
            weights_left=packed.weights_left,
            weights_right=packed.weights_right,
            grad_x=0 if grad_x is None else grad_x[rows].data_ptr(),
            grad_y_transposed=0 if grad_y is None else packed.grad_y[:, columns].data_ptr(),
            grad_y_stride=packed.grad_y.stride(0),
            row_sum=packed.row_sum[rows].data_ptr(),
            column_sum=packed.column_sum[columns].data_ptr(),
            threads=torch.get_num_threads(),
        )

    def finish(self, grad_y: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Add ``Cᵀ X`` to ``grad_y``; row and column sums of the rounded weights."""
        packed, self.gradients = self.gradients, None
        if packed is None:
            return None
        if grad_y is not None:
            grad_y += packed.grad_y[:, : grad_y.shape[0]].T
        return packed.row_sum, packed.column_sum


class _PackedGradients:
    """What the gradient products need beyond the scores: factors, sums and workspace."""

    def __init__(self, x: Tensor, y: Tensor, terms: int, tile_rows: int) -> None:
        m, n, dim = x.shape[0], y.shape[0], x.shape[1]
        self.y_dims = _Factor(y.T, terms, left=False)
        self.x_dims = _Factor(x.T, terms, left=True)
        # Lines of a power of two bytes would all fall on the same few sets of a cache.
        self.grad_y = x.new_zeros(dim, n + _C.BF16_PANEL)
        self.row_sum = torch.zeros(m, dtype=torch.float64)
        self.column_sum = torch.zeros(n, dtype=torch.float64)
        width = min(n, _C.BF16_WEIGHT_COLUMNS)
        self._workspace = [_empty(tile_rows, width, terms), _empty(width, tile_rows, terms)]
        self.weights_left = _addresses(self._workspace[0], 0)
        self.weights_right = _addresses(self._workspace[1], 0)


class _Factor:
    """A packed operand: ``matrix`` [outer, depth] as left factor, or its transpose as right one."""

    def __init__(self, matrix: Tensor, terms: int, *, left: bool) -> None:
        self.packed = _empty(matrix.shape[0], matrix.shape[1], terms)
        _C.bf16_pack_factor(
            data=matrix.data_ptr(),
            outer=matrix.shape[0],
            depth=matrix.shape[1],
            outer_stride=matrix.stride(0),
            depth_stride=matrix.stride(1),
            left=left,
            threads=torch.get_num_threads(),
            out=self.at(),
        )

    def at(self, outer: int = 0, depth: int = 0) -> tuple[int, int, int]:
        """Addresses from a row or column and a depth on, both multiples of the alignment."""
        stride = self.packed.stride(1)
        blocks = depth // _C.BF16_DEPTH_BLOCK * _C.BF16_DEPTH_BLOCK * _C.BF16_PANEL
        return _addresses(self.packed, outer // _C.BF16_PANEL * stride + blocks)


def _empty(outer: int, depth: int, terms: int) -> Tensor:
    """Room for a packed factor, bfloat16 [terms, panels, values of a panel]."""
    panels, blocks = -(-outer // _C.BF16_PANEL), -(-depth // _C.BF16_DEPTH_BLOCK)
    values = blocks * _C.BF16_DEPTH_BLOCK * _C.BF16_PANEL
    return torch.empty(terms, panels, values, dtype=torch.bfloat16)


def _addresses(packed: Tensor, offset: int) -> tuple[int, int, int]:
    """(high, low or 0, values from a panel to the next), as csrc/cpu/bf16_products.h has it."""
    high = packed.data_ptr() + offset * packed.element_size()
    low = high + packed.stride(0) * packed.element_size() if packed.shape[0] == 2 else 0
    return high, low, packed.stride(1)
