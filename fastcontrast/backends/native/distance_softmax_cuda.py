"""`distance_softmax` on CUDA in C++: row statistics, gradients of either side, losses with both.

The kernels of csrc/cuda/distance_softmax.cu and softmax_loss.cu take the points where they lie, in
any layout, and every distance as the norm of a difference: nothing is centred or prepared, so that
a loss with its gradients is four launches. With few columns a block keeps them in shared memory for
several groups of rows. Where rounded products are allowed and are many,
round_points.cu centres and rounds both sides, and distance_softmax_tensor.cu multiplies them in
matrix units. A symmetric loss takes the softmax of rows and of columns from the same scores, with
one launch more that merges those of columns. Memory is O((M+N)·D), and COLUMN_STATE_BYTES for
columns. Called by distance_softmax.py of this folder.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.backends.native import FEW_COLUMNS, TENSOR_MINIMUM, devices, may_round
from fastcontrast.backends.native.extract_patches import SCALARS
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
    gradients_of_nothing,
    statistics_of_nothing,
)

# Blocks per multiprocessor that a launch should have; fewer owners share out the other side.
BLOCKS_PER_PROCESSOR = 3
# Columns up to which blocks keep points in shared memory; as csrc/cuda/point_walk.h has it.
STAGED_COLUMNS = 1024
# Tiles that a block should at least have to do: more splits would cost more than they bring.
TILES_PER_SPLIT = 2
# Of what parts of the rows bring to the log-sum-exp of every column; never less than one part.
COLUMN_STATE_BYTES = 64 << 20


class _Tile(NamedTuple):
    """Of csrc/cuda: points that a block owns, others in a tile, coordinates of a gradient."""

    owners: int
    others: int
    part: int


TILES = {
    "float32": _Tile(32, 64, 256),
    "float64": _Tile(32, 32, 128),
    "bf16": _Tile(64, 64, 128),
    "tf32": _Tile(64, 64, 128),
    "bf16x3": _Tile(64, 32, 128),
}
OPERANDS = ("bf16", "tf32", "bf16x3")  # as csrc/cuda/distance_softmax.h numbers them


def distance_softmax_forward(
    x: Tensor, y: Tensor, scores: Scores, threshold: Tensor | None, score_sum: bool
) -> Statistics:
    """Statistics of every row."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return statistics_of_nothing(x, score_sum=score_sum, rank=threshold is not None)
    return _statistics(_Pairs(x, y, scores), threshold, score_sum)


def distance_softmax_backward(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    statistics: tuple[Tensor, Tensor, Tensor],
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale from (lse, lse_residual, entropy); empty where not needed."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        dx, dy, dscale = gradients_of_nothing(x, y, needs)
    else:
        terms = _Terms(*statistics, *grads)
        dx, dy, dscale = _gradients(_Pairs(x, y, scores), terms, needs)
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def softmax_loss(
    x: Tensor,
    y: Tensor,
    scores: Scores,
    weights: LossWeights,
    needs: tuple[bool, bool, bool],
) -> LossGradients:
    """Loss of every row and all gradients of their sum."""
    (m, _), n = x.shape, y.shape[0]
    acc = accumulator_dtype(x.dtype)
    if m == 0 or n == 0:
        return LossGradients(x.new_zeros(m, dtype=acc), *gradients_of_nothing(x, y, needs))
    pairs = _Pairs(x, y, scores)
    a, b, c = (None if w is None else w.detach().to(acc).contiguous() for w in weights)
    column_lse: tuple[Tensor | None, Tensor | None] = (None, None)
    column_grad = None
    if c is not None:  # the other direction of a symmetric loss
        column_lse = (x.new_empty(n, dtype=acc), x.new_empty(n, dtype=acc))
        column_grad = x.new_zeros(n, dtype=acc)
    rows = _statistics(pairs, None, False, column_lse)
    loss, grad_lse, grad_positive = x.new_empty(3, m, dtype=acc)
    pairs.kernels.distance_softmax_losses(
        pairs.arguments,
        pairs.workers,
        tuple(map(_address, (*rows[:3], a, b, c, *column_lse))),
        tuple(map(_address, (loss, grad_lse, grad_positive, column_grad))),
    )
    terms = _Terms(*rows[:3], grad_lse, b, None, grad_positive, *column_lse, column_grad)
    return LossGradients(loss, *_gradients(pairs, terms, needs))


class _Terms(NamedTuple):
    """What gradients by scores follow from: `ScoreGradients` of csrc/cuda/distance_softmax.h."""

    lse: Tensor
    lse_residual: Tensor
    entropy: Tensor
    grad_lse: Tensor | None
    grad_entropy: Tensor | None
    grad_sum: Tensor | None
    grad_positive: Tensor | None = None
    column_lse: Tensor | None = None
    column_residual: Tensor | None = None
    column_grad: Tensor | None = None


class _Rounded(NamedTuple):
    """One side as matrix units take it: `RoundedPoints` of csrc/cuda/distance_softmax.h."""

    values: Tensor
    low: Tensor | None
    sqnorm: Tensor

    @classmethod
    def empty(cls, points: Tensor, operand: str) -> _Rounded:
        """Memory for points [K, D]; rows are filled up to whole 128 bytes."""
        dtype = torch.float32 if operand == "tf32" else torch.bfloat16
        stage = 128 // dtype.itemsize
        shape = (points.shape[0], -(-points.shape[1] // stage) * stage)
        values = points.new_empty(shape, dtype=dtype)
        low = torch.empty_like(values) if operand == "bf16x3" else None
        return cls(values, low, points.new_empty(shape[0], dtype=torch.float32))

    @property
    def argument(self) -> tuple[int, int, int, int]:
        """As the C++ functions take it."""
        addresses = self.values.data_ptr(), _address(self.low), self.sqnorm.data_ptr()
        return (*addresses, self.values.shape[1])


def _operand(x: Tensor, y: Tensor, precision: str) -> str | None:
    """One of OPERANDS, or None for float32 and float64 without rounding.

    Half points lose nothing: float16 has no more bits than tf32, and the smaller exponent.
    """
    if x.shape[0] * y.shape[0] * x.shape[1] < TENSOR_MINIMUM or y.shape[0] <= FEW_COLUMNS:
        return None
    if not may_round(x.dtype, precision):
        return None
    if x.dtype in (torch.bfloat16, torch.float16):
        return "bf16" if x.dtype == torch.bfloat16 else "tf32"
    return precision


class _Pairs:
    """Points and mask of a call, as the C++ functions take them."""

    def __init__(self, x: Tensor, y: Tensor, scores: Scores) -> None:
        self.x, self.y = x.detach().resolve_neg(), y.detach().resolve_neg()
        self.acc = accumulator_dtype(x.dtype)
        number, scale = 0.0, None  # on the host, or on the device
        if isinstance(scores.scale, Tensor):
            scale = scores.scale.detach().to(device=x.device, dtype=self.acc)
        else:
            number = float(scores.scale)
        self.scale = number if scale is None else scale
        # Named here for as long as kernels are being launched on them.
        self.exclude, self.row_ids, self.column_ids = (
            None if value is None else value.to(torch.int64).contiguous()
            for value in (scores.exclude, scores.row_ids, scores.column_ids)
        )
        self.kernels = devices.kernels(x)
        self.workers = devices.workers(x, 1)
        operand = _operand(x, y, scores.precision)
        self.tile = TILES[operand or ("float64" if x.dtype == torch.float64 else "float32")]
        self.rounded = self.rounded_sides = None
        if operand is not None:
            self.rounded = self.round(operand, scores.metric)
            self.rounded_sides = (OPERANDS.index(operand), *(r.argument for r in self.rounded))
        self.arguments = (
            (self.x.data_ptr(), x.shape[0], *self.x.stride()),
            (self.y.data_ptr(), y.shape[0], *self.y.stride()),
            SCALARS[x.dtype],
            x.shape[1],
            METRICS.index(scores.metric),
            KEEPS.index(scores.keep),
            _address(scale),
            number,
            _address(self.exclude),
            0 if self.exclude is None else self.exclude.shape[1],
            _address(self.row_ids),
            _address(self.column_ids),
        )

    def round(self, operand: str, metric: str) -> list[_Rounded]:
        """Both sides, less the mean of the columns where float32 points have distances."""
        centred = metric != "dot" and self.x.dtype == torch.float32
        mean = self.y.mean(0) if centred else None
        found = []
        for side in (self.x, self.y):
            to = _Rounded.empty(side, operand)
            self.kernels.round_points(
                (side.data_ptr(), side.shape[0], *side.stride()), SCALARS[side.dtype],
                side.shape[1], _address(mean), OPERANDS.index(operand), to.argument, self.workers,
            )  # fmt: skip
            found.append(to)
        return found

    def blocks(self, owners: int) -> int:
        """Blocks that own so many points."""
        return -(-owners // self.tile.owners)

    def groups(self, blocks: int) -> int:
        """Groups of owners that a block goes through, so that it reads the others once for all."""
        if self.rounded is not None or self.y.shape[0] > STAGED_COLUMNS:
            return 1
        return max(1, blocks // (BLOCKS_PER_PROCESSOR * devices.processors(self.x)))

    def splits(self, blocks: int, others: int) -> tuple[int, int]:
        """Parts of the other side for which blocks of their own run, and the size of one."""
        tiles = -(-others // self.tile.others)
        wanted = BLOCKS_PER_PROCESSOR * devices.processors(self.x)
        count = max(1, min(wanted // blocks, tiles // TILES_PER_SPLIT))
        size = -(-tiles // count) * self.tile.others
        return -(-others // size), size


def _statistics(
    pairs: _Pairs,
    threshold: Tensor | None,
    score_sum: bool,
    column_lse: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Statistics:
    """Those of the rows; where given, fills log-sum-exp and residual of the columns, too."""
    x = pairs.x
    m, n = x.shape[0], pairs.y.shape[0]
    out = empty_statistics(x, score_sum=score_sum, rank=threshold is not None)
    limit = None if threshold is None else threshold.detach().to(pairs.acc).contiguous()
    blocks, column_state = pairs.blocks(m), None
    groups = pairs.groups(blocks)
    if column_lse[0] is not None:  # a block goes through several groups of rows
        most = max(1, COLUMN_STATE_BYTES // (2 * n * torch.float64.itemsize))
        groups = max(groups, -(-blocks // most))
        column_state = x.new_empty(-(-blocks // groups), 2, n, dtype=torch.float64)
    splits = pairs.splits(-(-blocks // groups), n)
    state = counts = None
    if splits[0] > 1:
        state = x.new_empty(splits[0], 4, m, dtype=torch.float64)
        counts = x.new_empty(splits[0], 2, m, dtype=torch.int64)
    pairs.kernels.distance_softmax_statistics(
        pairs.arguments,
        pairs.workers,
        splits,
        pairs.rounded_sides,
        tuple(map(_address, out)),
        _address(limit),
        _address(state),
        _address(counts),
        tuple(map(_address, (*column_lse, column_state))),
        groups,
    )
    return out


def _gradients(
    pairs: _Pairs, terms: _Terms, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the accumulator dtype; the scale's comes with the first side computed."""
    nothing = pairs.x.new_empty(0, dtype=pairs.acc)
    dx = dy = dscale = nothing
    given = [None if t is None else t.to(pairs.acc).contiguous() for t in terms]
    product = None
    if needs[0] or (needs[2] and not needs[1]):
        dx, product = _side(pairs, given, True, needs[0], needs[2])
    if needs[1]:
        first = needs[2] and product is None
        dy, of_columns = _side(pairs, given, False, True, first)
        product = of_columns if first else product
    if needs[2] and product is not None:
        dscale = (product.sum() * math.log(2) / pairs.scale).to(pairs.acc)
    return dx, dy, dscale


def _side(
    pairs: _Pairs, terms: list[Tensor | None], rows: bool, needs_points: bool, needs_product: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the rows or of the columns, and Σ ∂L/∂s · t of each if asked for."""
    own, other = (pairs.x, pairs.y) if rows else (pairs.y, pairs.x)
    count, dim = own.shape
    parts = max(1, -(-dim // pairs.tile.part)) if needs_points else 1
    blocks = pairs.blocks(count) * parts
    splits = pairs.splits(blocks, other.shape[0])
    shape = (splits[0], count, dim) if needs_points else (0,)
    # Matrix units add to what is there: near pairs come first.
    make = own.new_empty if pairs.rounded is None else own.new_zeros
    grad = make(shape, dtype=pairs.acc)
    product = own.new_empty(splits[0], count, dtype=torch.float64) if needs_product else None
    pairs.kernels.distance_softmax_gradients(
        pairs.arguments,
        pairs.workers,
        splits,
        pairs.rounded_sides,
        tuple(map(_address, terms)),
        rows,
        pairs.groups(blocks),
        _address(grad),
        _address(product),
    )
    if not needs_points:
        return grad, product
    return grad[0] if splits[0] == 1 else grad.sum(0), product


def _address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
