"""`distance_softmax` on CUDA in C++: row statistics, gradients of either side, losses with both.

The kernels are csrc/cuda/distance_softmax.cu and csrc/cuda/softmax_loss.cu. They take the points
where they lie, in any layout, and every distance as the norm of a difference: nothing is centred or
prepared, so that a loss with its gradients is four launches. Memory is O((M+N)·D). Called by
distance_softmax.py of this folder.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.backends.native import devices
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
    transposed,
)

# Of csrc/cuda/point_tiles.h: points that a block owns, and points of the other side in a tile.
OWNERS = 32
OTHERS = {torch.float32: 64, torch.float64: 32}
# Coordinates of a gradient that one block takes (distance_softmax.cu).
PART = {torch.float32: 256, torch.float64: 128}
# Blocks per multiprocessor that a launch should have; fewer owners share out the other side.
BLOCKS_PER_PROCESSOR = 3
# Tiles that a block should at least have to do: more splits would cost more than they bring.
TILES_PER_SPLIT = 2


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
    rows = _statistics(pairs, None, False)
    a, b, c = (None if w is None else w.detach().to(acc).contiguous() for w in weights)
    columns = column_grad = None
    if c is not None:  # the other direction of a symmetric loss
        columns = _statistics(_Pairs(y, x, transposed(scores, n)), None, False)
        column_grad = x.new_zeros(n, dtype=acc)
    loss, grad_lse, grad_positive = x.new_empty(3, m, dtype=acc)
    column_lse = (None, None) if columns is None else columns[:2]
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


class _Pairs:
    """Points and mask of a call, as the C++ functions take them."""

    def __init__(self, x: Tensor, y: Tensor, scores: Scores) -> None:
        self.x, self.y = x.detach().resolve_neg(), y.detach().resolve_neg()
        self.acc = accumulator_dtype(x.dtype)
        self.scale = scores.scale
        if isinstance(self.scale, Tensor):
            self.scale = self.scale.detach().to(device=x.device, dtype=self.acc)
        # Named here for as long as kernels are being launched on them.
        self.exclude, self.row_ids, self.column_ids = (
            None if value is None else value.to(torch.int64).contiguous()
            for value in (scores.exclude, scores.row_ids, scores.column_ids)
        )
        self.kernels = devices.kernels(x)
        self.workers = devices.workers(x, 1)
        on_device = isinstance(self.scale, Tensor)
        self.arguments = (
            (self.x.data_ptr(), x.shape[0], *self.x.stride()),
            (self.y.data_ptr(), y.shape[0], *self.y.stride()),
            SCALARS[x.dtype],
            x.shape[1],
            METRICS.index(scores.metric),
            KEEPS.index(scores.keep),
            self.scale.data_ptr() if on_device else 0,
            0.0 if on_device else float(self.scale),
            _address(self.exclude),
            0 if self.exclude is None else self.exclude.shape[1],
            _address(self.row_ids),
            _address(self.column_ids),
        )

    def splits(self, owners: int, others: int, parts: int) -> tuple[int, int]:
        """Parts of the other side for which blocks of their own run, and the size of one."""
        tile = OTHERS[self.acc]
        tiles = -(-others // tile)
        wanted = BLOCKS_PER_PROCESSOR * devices.processors(self.x)
        blocks = -(-owners // OWNERS) * parts
        count = max(1, min(wanted // blocks, tiles // TILES_PER_SPLIT))
        size = -(-tiles // count) * tile
        return -(-others // size), size


def _statistics(pairs: _Pairs, threshold: Tensor | None, score_sum: bool) -> Statistics:
    x = pairs.x
    m = x.shape[0]
    out = empty_statistics(x, score_sum=score_sum, rank=threshold is not None)
    limit = None if threshold is None else threshold.detach().to(pairs.acc).contiguous()
    splits = pairs.splits(m, pairs.y.shape[0], 1)
    state = counts = None
    if splits[0] > 1:
        state = x.new_empty(splits[0], 4, m, dtype=torch.float64)
        counts = x.new_empty(splits[0], 2, m, dtype=torch.int64)
    pairs.kernels.distance_softmax_statistics(
        pairs.arguments,
        pairs.workers,
        splits,
        tuple(map(_address, out)),
        _address(limit),
        _address(state),
        _address(counts),
    )
    return out


def _gradients(
    pairs: _Pairs, terms: _Terms, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the accumulator dtype; the scale's comes with the first side computed."""
    nothing = pairs.x.new_empty(0, dtype=pairs.acc)
    dx = dy = dscale = nothing
    terms = _Terms(*(None if t is None else t.to(pairs.acc).contiguous() for t in terms))
    product = None
    if needs[0] or (needs[2] and not needs[1]):
        dx, product = _side(pairs, terms, True, needs[0], needs[2])
    if needs[1]:
        first = needs[2] and product is None
        dy, of_columns = _side(pairs, terms, False, True, first)
        product = of_columns if first else product
    if needs[2] and product is not None:
        dscale = (product.sum() * math.log(2) / pairs.scale).to(pairs.acc)
    return dx, dy, dscale


def _side(
    pairs: _Pairs, terms: _Terms, rows: bool, needs_points: bool, needs_product: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the rows or of the columns, and Σ ∂L/∂s · t of each if asked for."""
    own, other = (pairs.x, pairs.y) if rows else (pairs.y, pairs.x)
    count, dim = own.shape
    parts = max(1, -(-dim // PART[pairs.acc])) if needs_points else 1
    splits = pairs.splits(count, other.shape[0], parts)
    shape = (splits[0], count, dim) if needs_points else (0,)
    grad = own.new_empty(shape, dtype=pairs.acc)
    product = own.new_empty(splits[0], count, dtype=torch.float64) if needs_product else None
    pairs.kernels.distance_softmax_gradients(
        pairs.arguments,
        pairs.workers,
        splits,
        tuple(map(_address, terms)),
        rows,
        _address(grad),
        _address(product),
    )
    if not needs_points:
        return grad, product
    return grad[0] if splits[0] == 1 else grad.sum(0), product


def _address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
