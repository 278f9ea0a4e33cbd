"""Operands of the products: both sides centred and rounded alike, with their squared norms.

Maths: distances do not change when the mean of the columns is taken from both sides; ‖x‖² and x·y
    come from the same rounded numbers, so that what their difference loses is bounded (rule 2).
Tiling: a program owns BLOCK points and goes through their columns in parts.
Memory: points read once by their strides, written once with adjacent columns, where something
    changes; float16 and bfloat16 points are used where they lie, and not centred: a half number
    less a mean is no half number, and their products are exact in float32.
Numerics: norms in the accumulator dtype.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcontrast.backends.scores import DISTANCES, Scores, accumulator_dtype
from fastcontrast.backends.triton import INTERPRETED
from fastcontrast.backends.triton.directions import stretched
from fastcontrast.backends.triton.tiles import round_to_tf32

BLOCK = 32
CHUNK = 64
# Numbers of points lie in memory that reaches up to a multiple of this, the largest tile, so that
# tiles of them are read without a mask.
PADDING = 256


@triton.jit
def prepare_points_kernel(
    points, mean, out, out_low, sqnorm, largest, count, dim, row_stride, column_stride, out_stride,
    CENTRE: tl.constexpr, STORE: tl.constexpr, NORM: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK points less the mean, rounded, their squared norms, and the largest of these."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < count
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, dim, CHUNK):
        k = start + tl.arange(0, CHUNK)
        mask = in_rows[:, None] & (k < dim)[None, :]
        at = points + row[:, None] * row_stride + k.to(tl.int64)[None, :] * column_stride
        value = tl.load(at, mask=mask, other=0.0).to(ACC)
        if CENTRE:
            m = tl.load(mean + k, mask=k < dim, other=0.0)
            # Where the mean is not finite nothing is taken: a bad column stays alone.
            value -= tl.where(tl.abs(m) < float("inf"), m, 0.0)[None, :]
        at_out = row[:, None] * out_stride + k[None, :]
        if ROUND == "tf32":
            value = round_to_tf32(value)
        elif ROUND == "bf16":
            narrow = value.to(tl.bfloat16)
            value = narrow.to(ACC)
        elif ROUND == "bf16x3":
            high = value.to(tl.bfloat16)
            rest = (value - high.to(ACC)).to(tl.bfloat16)
            rest = tl.where(tl.abs(value) < float("inf"), rest.to(ACC), 0.0)
            tl.store(out_low + at_out, rest.to(tl.bfloat16), mask=mask)
            tl.store(out + at_out, high, mask=mask)
            value = high.to(ACC) + rest
        if STORE:
            tl.store(out + at_out, value, mask=mask)
        if NORM:
            total += tl.sum(tl.where(mask, value * value, 0.0), 1)
    if NORM:
        tl.store(sqnorm + row, total)  # 0 beyond the last point
        tl.store(largest + tl.program_id(0), tl.max(total, 0))


class Points(NamedTuple):
    """One side: the points as given, and as the products take them.

    Attributes:
        given: [K, D] in the input dtype, any strides.
        values: [K, D] with adjacent columns, float64, float32, bfloat16 or float16.
        low: What bfloat16 left over of ``values``, bfloat16; ``values`` itself where not split.
        norms: Squared norms of ``values`` (+ ``low``) [K], for "cosine" their inverse norms
            (directions.py), in memory that goes on with zeros up to a multiple of PADDING; any
            tensor for "dot".
        largest: The largest of every BLOCK of squared norms; any tensor for similarities.
        power: For "cosine" what the points have been multiplied by [K].
    """

    given: Tensor
    values: Tensor
    low: Tensor
    norms: Tensor
    largest: Tensor
    power: Tensor | None = None


class Operands(NamedTuple):
    """Both sides of a call, how their products are taken, and the scale on the device."""

    x: Points
    y: Points
    kind: str
    scale: Tensor

    def exchanged(self) -> Operands:
        """The same with rows and columns exchanged."""
        return self._replace(x=self.y, y=self.x)

    @property
    def acc(self) -> tl.dtype:
        """Dtype of scores and sums."""
        return tl.float64 if self.kind == "float64" else tl.float32

    @property
    def product_options(self) -> dict[str, object]:
        """Constants of the kernels that follow from the kind."""
        return {
            "SPLIT": self.kind == "bf16x3",
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            # The interpreter has no arithmetic in bfloat16.
            "UPCAST": INTERPRETED and self.kind in ("bf16x3", "bfloat16"),
            "ACC": self.acc,
        }

    @property
    def weight_rounding(self) -> str:
        """How weights are rounded before they meet the points."""
        return {"bfloat16": "bf16", "bf16x3": "bf16", "tf32": "tf32", "float16": "tf32"}.get(
            self.kind, "none"
        )


def padded(count: int) -> int:
    """``count`` rounded up to PADDING."""
    return triton.cdiv(count, PADDING) * PADDING


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """One of launch.KINDS for operands of a dtype at a precision."""
    if dtype == torch.float64:
        return "float64"
    if dtype == torch.float32:
        return "bfloat16" if precision == "bf16" else precision
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def prepare(x: Tensor, y: Tensor, scores: Scores) -> Operands:
    """Operands of one call; neither side may be empty."""
    kind = kind_of(x.dtype, scores.precision)
    acc = accumulator_dtype(x.dtype)
    x, y = x.detach().resolve_neg(), y.detach().resolve_neg()
    distances = scores.metric in DISTANCES
    mean = None
    if distances and x.dtype == acc:
        mean = y.mean(0)
    scale = scores.scale
    if isinstance(scale, Tensor):
        scale = scale.detach().to(device=x.device, dtype=acc)
    else:
        scale = torch.full((), scale, device=x.device, dtype=acc)
    if scores.metric == "cosine":
        return Operands(_directions(x), _directions(y), kind, scale)
    sides = (_points(side, mean, distances, kind, acc) for side in (x, y))
    return Operands(*sides, kind, scale)


def _directions(given: Tensor) -> Points:
    """Half points whose inverse norms are in the scores; these stand for the points as given."""
    values, inverse_norms, power = stretched(given, padded(given.shape[0]))
    return Points(values, values, values, inverse_norms, values, power)


def _points(
    given: Tensor, mean: Tensor | None, distances: bool, kind: str, acc: torch.dtype
) -> Points:
    count, dim = given.shape
    rounds = given.dtype == torch.float32 and kind != "ieee"
    # Offsets inside a tile are 32-bit, so rows far apart in memory are copied as well.
    lies_well = dim == 0 or (given.stride(1) == 1 and given.stride(0) < 1 << 22)
    stores = mean is not None or rounds or not lies_well
    if not stores and not distances:
        return Points(given, given, given, given, given)
    values = low = given  # the same tensor where nothing is split off
    if stores:
        dtype = torch.bfloat16 if kind in ("bfloat16", "bf16x3") else given.dtype
        width = -(-dim // 16) * 16  # rows that start on 16 bytes load faster
        values = low = torch.empty(count, width, dtype=dtype, device=given.device)[:, :dim]
        if kind == "bf16x3":
            low = torch.empty_strided(
                values.shape, values.stride(), dtype=dtype, device=given.device
            )
    programs = padded(count) // BLOCK
    sqnorm = torch.empty(programs * BLOCK, dtype=acc, device=given.device)
    largest = torch.empty(programs, dtype=acc, device=given.device)
    prepare_points_kernel[(programs,)](
        given, sqnorm if mean is None else mean, values, low, sqnorm, largest, count, dim,
        given.stride(0), given.stride(1), values.stride(0),
        CENTRE=mean is not None, STORE=stores and kind != "bf16x3", NORM=distances,
        ROUND={"tf32": "tf32", "bfloat16": "bf16", "bf16x3": "bf16x3"}.get(kind, "none"),
        ACC=tl.float64 if acc == torch.float64 else tl.float32, BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
    return Points(given, values, low, sqnorm[:count], largest)
