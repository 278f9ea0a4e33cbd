"""`nearest` in Triton: products find the candidates of a row, direct differences rank them.

Maths: per row i the k columns of smallest key d²_ij or -x_i·y_j (or of its opposite), by direct
    difference in float64, the lower column first where keys are equal, NaN last. A product holds a
    key within error·size + floor, size = ‖x‖²+‖y‖² or ‖x‖·‖y‖ (_bounds). The first pass deals the
    columns to groups; the k-th smallest of the groups' smallest upper bounds is a limit that at
    least k columns do not pass. The second lists the columns whose lower bound does not pass it.
Tiling: a program owns BLOCK_M rows and streams tiles of BLOCK_N columns of one split of them. A
    group is a place in the tile and a split, so that the first pass takes minima in registers.
Memory: points once per block of the other side, from the L2 cache; per row some 4k minima, and a
    list of 2k + ROOM candidates for each split, BLOCK_ELEMENTS at a time. Nothing of size M×N.
Numerics: float32 points are centred and rounded to TF32, which the bounds allow for: the products
    only decide which pairs are taken directly. What is not finite always is. A list has one writer
    and is in the order of columns. One that overflows (data that products cannot tell apart) is
    made anew, GROWTH times as long; to see whether one did waits for the GPU, once per block of
    rows.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.scores import Scores, accumulator_dtype, padding
from fastcontrast.backends.triton.call import capability, given_or, splits_of, widths
from fastcontrast.backends.triton.launch import launch
from fastcontrast.backends.triton.mask import Mask
from fastcontrast.backends.triton.operands import Operands, prepare
from fastcontrast.backends.triton.pairs import pair_values
from fastcontrast.backends.triton.tiles import DOT, counted, load_excluded, load_rows, products

# Groups of columns per neighbour: of 4k groups the k smallest minima hold 1.15k columns.
GROUPS_PER_NEIGHBOR = 4
# Candidates that a list holds beyond 2k.
ROOM = 32
# How much longer a list gets that has overflowed.
GROWTH = 8
# Minima or candidates of a block of rows, at most 16 bytes each.
BLOCK_ELEMENTS = 1 << 22
# Relative error of a coordinate rounded to TF32, with some room for the square of it.
TF32_ROUNDING = 1.01 * 2.0**-11
LARGEST_KEY = torch.iinfo(torch.int64).max


@triton.jit
def nearest_kernel(
    x, y, x_bound, y_bound, exclude, row_ids, column_ids, limit, least, columns, count,
    m, n, dim, split_columns, splits, capacity, x_stride, y_stride,
    COLLECT: tl.constexpr, FARTHEST: tl.constexpr, METRIC: tl.constexpr, EXCLUDE: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Minima [M, splits, BLOCK_N] of upper bounds; with COLLECT lists [M, splits, capacity].

    ``count`` [M, splits] is what the lists would hold if they were long enough. ``x_bound`` and
    ``y_bound`` are what a point adds to the bound of a key (for "dot" multiplies), the upper one in
    the first pass and the lower one with COLLECT.
    """
    split = tl.program_id(0) % splits
    start_m = tl.program_id(0) // splits * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)
    in_rows = row < m
    if BLOCK_K == BLOCK_D:
        x_tile = load_rows(x, start_m, x_stride, m, 0, dim, BLOCK_M, BLOCK_D, UPCAST)
    xs = tl.load(x_bound + row, mask=in_rows, other=0.0)
    first = tl.full([BLOCK_M], -1, dtype=tl.int32)
    second = first
    if EXCLUDE > 0:
        first = load_excluded(exclude, row, in_rows, n, 0, EXCLUDE)
    if EXCLUDE > 1:
        second = load_excluded(exclude, row, in_rows, n, 1, EXCLUDE)
    row_id = first
    if KEEP != 0:
        row_id = tl.load(row_ids + row, mask=in_rows, other=0)
    group = row.to(tl.int64) * splits + split
    highest = xs
    listed = tl.zeros([BLOCK_M], dtype=tl.int32)
    minima = tl.full([BLOCK_M, BLOCK_N], float("inf"), dtype=ACC)
    if COLLECT:
        highest = tl.load(limit + row, mask=in_rows, other=0.0)
    begin = split * split_columns
    for start_n in range(begin, tl.minimum(begin + split_columns, n), BLOCK_N):
        column = start_n + tl.arange(0, BLOCK_N)
        in_columns = column < n
        dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        if BLOCK_K == BLOCK_D:
            y_tile = load_rows(y, start_n, y_stride, n, 0, dim, BLOCK_N, BLOCK_D, UPCAST)
            dots = products(x_tile, x_tile, y_tile, y_tile, dots, METRIC, False, PRECISION, ACC)
        else:
            for k in range(0, dim, BLOCK_K):
                x_part = load_rows(x, start_m, x_stride, m, k, dim, BLOCK_M, BLOCK_K, UPCAST)
                y_part = load_rows(y, start_n, y_stride, n, k, dim, BLOCK_N, BLOCK_K, UPCAST)
                dots = products(x_part, x_part, y_part, y_part, dots, METRIC, False, PRECISION, ACC)
        ys = tl.load(y_bound + column, mask=in_columns, other=0.0)
        if METRIC == DOT:
            bounds = xs[:, None] * ys[None, :]
            bounds = bounds + dots if FARTHEST else bounds - dots
        else:
            bounds = xs[:, None] + ys[None, :]
            bounds = bounds + 2.0 * dots if FARTHEST else bounds - 2.0 * dots
        column_id = column
        if KEEP != 0:
            column_id = tl.load(column_ids + column, mask=in_columns, other=0)
        counts = counted(
            in_rows[:, None] & in_columns[None, :], column[None, :], row_id[:, None],
            column_id[None, :], first[:, None], second[:, None], EXCLUDE, KEEP,
        )  # fmt: skip
        if COLLECT:
            # NaN and inf are not far: only a direct difference knows the key.
            far = (bounds > highest[:, None]) & (bounds < float("inf"))
            passes = tl.where(far, 0, counts.to(tl.int32))
            number = tl.sum(passes, 1)
            if tl.max(number, 0) > 0:
                place = listed[:, None] + tl.cumsum(passes, 1) - 1
                at = columns + group[:, None] * capacity + place
                named = tl.broadcast_to(column[None, :], [BLOCK_M, BLOCK_N])
                tl.store(at, named, mask=(passes > 0) & (place < capacity))
                listed += number
        else:
            known = counts & (tl.abs(bounds) < float("inf"))
            minima = tl.minimum(minima, tl.where(known, bounds, float("inf")))
    if COLLECT:
        tl.store(count + group, listed, mask=in_rows)
    else:
        at = least + group[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(at, minima, mask=in_rows[:, None])


def nearest_columns(
    x: Tensor, y: Tensor, k: int, scores: Scores, farthest: bool
) -> tuple[Tensor, Tensor]:
    """Values [M, k] and columns [M, k] of the k nearest of every row."""
    m, n = x.shape[0], y.shape[0]
    end = padding(scores.metric, farthest)
    values = x.new_full((m, k), end, dtype=accumulator_dtype(x.dtype))
    indices = x.new_full((m, k), -1, dtype=torch.int64)
    if m > 0 and n > 0:
        search = _Search(x, y, min(k, n), scores, farthest)
        for start in range(0, m, search.block):
            rows = slice(start, min(start + search.block, m))
            search.take_limits(rows)
            search.fill(rows, search.capacity, values, indices)
    return values, indices


class _Side(NamedTuple):
    """Points of one side.

    Attributes:
        given: As given, for direct differences.
        values: As the products take them.
        lower: What they add to lower bounds of keys.
        upper: What they add to upper bounds.
        norm: Norms in float64 for "cosine"; any tensor otherwise.
        exclude: Columns left out of each row, [M, E], or None.
        ids: Integer ids, or None.
    """

    given: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    norm: Tensor
    exclude: Tensor | None
    ids: Tensor | None

    def of(self, rows: slice | Tensor) -> _Side:
        """The points of these rows."""
        return _Side(*(None if value is None else value[rows] for value in self))


class _Search:
    """One call: both sides, a limit for every row, and how the kernel is launched."""

    def __init__(self, x: Tensor, y: Tensor, k: int, scores: Scores, farthest: bool) -> None:
        self.k, self.metric, self.farthest = k, scores.metric, farthest
        x, y = x.detach().resolve_neg(), y.detach().resolve_neg()
        x_norm, y_norm, points = x, y, (x, y)
        if scores.metric == "cosine":
            x_norm, y_norm = _norms(x), _norms(y)
            points = (_unit_rows(x, x_norm), _unit_rows(y, y_norm))
            scores = scores._replace(metric="dot")
        operands = prepare(*points, scores._replace(precision="tf32"))
        mask = Mask(scores)
        x_bounds, y_bounds = _bounds(operands, scores.metric, farthest)
        self.x = _Side(x, operands.x.values, *x_bounds, x_norm, mask.exclude, mask.row_ids)
        self.y = _Side(y, operands.y.values, *y_bounds, y_norm, None, mask.column_ids)
        (m, dim), n = x.shape, y.shape[0]
        self.device = x.device
        self.every_row = torch.arange(m, device=x.device)
        self.limits = torch.full((m,), torch.inf, dtype=self.x.upper.dtype, device=x.device)
        sizes = launch("nearest", operands.kind, dim, capability(self.device))
        self.options = {
            **mask.options, **operands.product_options, **widths(dim, sizes),
            "FARTHEST": farthest, "BLOCK_M": sizes.block, "BLOCK_N": sizes.other,
            "num_warps": sizes.warps, "num_stages": sizes.stages,
        }  # fmt: skip
        del self.options["SPLIT"]
        self.sizes = sizes
        self.groups = triton.cdiv(GROUPS_PER_NEIGHBOR * k, sizes.other)
        self.capacity = min(2 * k + ROOM, n)
        longest = max(self.capacity, self.groups * sizes.other)
        self.block = max(1, BLOCK_ELEMENTS // longest)

    def take_limits(self, rows: slice) -> None:
        """Find for each of these rows a key that at least k columns do not pass, or inf."""
        some = self.x.of(rows)
        count, n, width = some.given.shape[0], self.y.given.shape[0], self.sizes.other
        splits, part = splits_of(count, n, self.sizes, some.given.device)
        if splits < self.groups:
            tiles = triton.cdiv(n, width)
            part = triton.cdiv(tiles, min(tiles, self.groups)) * width
            splits = triton.cdiv(n, part)
        least = some.upper.new_empty(count, splits * width)
        self.launch(some, splits, part, least=least)
        if least.shape[1] >= self.k:
            smallest = least.topk(self.k, dim=1, largest=False, sorted=False).values
            self.limits[rows] = smallest.amax(1)

    def fill(self, rows: slice | Tensor, capacity: int, values: Tensor, indices: Tensor) -> None:
        """Write the results of ``rows``, with lists of ``capacity`` and of more where needed."""
        some, n = self.x.of(rows), self.y.given.shape[0]
        count = some.given.shape[0]
        splits, part = splits_of(count, n, self.sizes, some.given.device)
        capacity = min(capacity, part)
        columns = torch.full((count, splits, capacity), n, dtype=torch.int32, device=self.device)
        listed = torch.empty(count, splits, dtype=torch.int32, device=self.device)
        self.launch(some, splits, part, limit=self.limits[rows], columns=columns, count=listed)
        best, order = self.ranked(some, columns.flatten(1).long())
        width = order.shape[1]
        values[rows, :width], indices[rows, :width] = best.to(values.dtype), order
        if capacity < part:
            overflowed = self.every_row[rows][(listed > capacity).any(1)]  # waits for the GPU
            longer = GROWTH * capacity
            for some_rows in overflowed.split(max(1, BLOCK_ELEMENTS // min(longer, n))):
                if some_rows.numel():
                    self.fill(some_rows, longer, values, indices)

    def launch(
        self,
        rows: _Side,
        splits: int,
        part: int,
        *,
        least: Tensor | None = None,
        limit: Tensor | None = None,
        columns: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        """Fill ``least``, or ``columns`` and ``count``, whichever is given."""
        collects, y = columns is not None, self.y
        bounds = (rows.lower, y.lower) if collects else (rows.upper, y.upper)
        stand_in = rows.upper
        (m, dim), n = rows.given.shape, y.given.shape[0]
        nearest_kernel[(triton.cdiv(m, self.sizes.block) * splits,)](
            rows.values, y.values, *bounds, given_or(rows.exclude, stand_in),
            given_or(rows.ids, stand_in), given_or(y.ids, stand_in),
            given_or(limit, stand_in), given_or(least, stand_in),
            given_or(columns, stand_in), given_or(count, stand_in), m, n, dim, part, splits,
            0 if columns is None else columns.shape[2], rows.values.stride(0), y.values.stride(0),
            COLLECT=collects, **self.options,
        )  # fmt: skip

    def ranked(self, rows: _Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Values, float64, and columns of the nearest candidates in order, [R, min(k, C)].

        ``columns`` [R, C] names them, the lower before the higher, and N none.
        """
        n, metric = self.y.given.shape[0], self.metric
        absent = columns == n
        of_pairs = "dot" if metric == "cosine" else metric
        pairs = pair_values(
            rows.given, self.y.given, columns.masked_fill(absent, -1), of_pairs, torch.float64
        )
        if metric == "cosine":
            norms = rows.norm[:, None] * self.y.norm[columns.masked_fill(absent, 0)]
            pairs = torch.where(norms == 0, 0.0, pairs / norms)
        keys = pairs if _is_product(metric) == self.farthest else -pairs
        # As in csrc/common/ranking.h: -0 equal to 0, and NaN after all numbers.
        keys = (keys + 0.0).view(torch.int64)
        keys = keys ^ ((keys >> 63) & LARGEST_KEY)
        keys = keys.masked_fill(pairs.isnan(), LARGEST_KEY - 1).masked_fill(absent, LARGEST_KEY)
        order = keys.sort(dim=1, stable=True).indices[:, : self.k]
        absent, columns, pairs = (v.gather(1, order) for v in (absent, columns, pairs))
        if metric == "l2":
            pairs = pairs.sqrt()
        end = padding(metric, self.farthest)
        return pairs.masked_fill(absent, end), columns.masked_fill(absent, -1)


def _is_product(metric: str) -> bool:
    return metric in ("dot", "cosine")


def _bounds(
    operands: Operands, metric: str, farthest: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What the points of either side add to bounds of their keys: (lower, upper) of x, and of y.

    A key by products is off by no more than error·size + floor. As in csrc/common/ranking.h, with
    eps for eps/2, because matrix units may truncate where a processor rounds; and with points that
    are rounded, each coordinate by ρ, by 2ρ‖x‖‖y‖ for products and 2ρ(‖x‖+‖y‖)² <= 4ρ·size for
    squared distances. For products size·error is one product, with norms so large that
    error·‖x‖·‖y‖ covers the floor, and what is denormal in one of the points.
    """
    dtype, dim = operands.scale.dtype, operands.x.values.shape[1]
    limits = torch.finfo(dtype)
    error = 4 * (dim + 8) * limits.eps / (1 - min(0.5, dim * limits.eps))
    floor = 4 * (dim + 1) * limits.tiny
    rounding = TF32_ROUNDING if operands.kind == "tf32" else 0.0
    if _is_product(metric):
        error += 2 * rounding
        least = math.sqrt(floor / error)
        x, y = (_norms(side.values).to(dtype) + least for side in (operands.x, operands.y))
        return (-error * x, error * x), (y, y)
    error += 4 * rounding
    x, y = operands.x.norms, operands.y.norms
    x_error, y_error = error * x + floor, error * y
    if farthest:
        x, y = -x, -y
    return (x - x_error, x + x_error), (y - y_error, y + y_error)


def _norms(points: Tensor) -> Tensor:
    """Norms of the rows in float64, where the squares of float32 numbers do not overflow."""
    return torch.linalg.vector_norm(points, dim=1, dtype=torch.float64)


def _unit_rows(points: Tensor, norms: Tensor) -> Tensor:
    """The points over their norms in the accumulator dtype; zero vectors stay."""
    unit = points.double() / torch.where(norms == 0, 1.0, norms)[:, None]
    return unit.to(accumulator_dtype(points.dtype))
