"""Device functions that the kernels of `extract_patches` share: where pixels come from, and types.

An axis of a box has ``extent`` pixels from ``start`` on, that of a patch ``size``; positions lie in
the padded image. Weights are quotients of integers, as csrc/common/resize.h has them: every
function takes and returns integers of one type, int32 where the launcher knows that they fit.
"""

# Triton's language is Python only in its syntax: the checker sees the wrong types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from fastcontrast.backends.triton import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def widen(value, ACC: tl.constexpr):
    """An element in the type of arithmetic. The interpreter knows no denormal bfloat16: by bits."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(ACC)


@triton.jit
def narrow(value, OUT: tl.constexpr):
    """``value`` rounded to an element type, to nearest, ties to even; to 16 bits from float32.

    The interpreter cuts bfloat16 off instead of rounding: there it is done by bits.
    """
    if tl.uint8 == OUT:  # clamped; NaN is 0
        value = tl.where(value >= 0.0, tl.minimum(value, 255.0), 0.0)
        whole = 8388608.0 if value.dtype == tl.float32 else 4503599627370496.0
        value = ((value + whole) - whole).to(tl.int32)  # the sum rounds
    elif tl.float16 == OUT or tl.bfloat16 == OUT:
        value = value.to(tl.float32)
    if tl.bfloat16 == OUT and INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(OUT)
    return result


@triton.jit
def floor_division(a, b):
    """Rounded down, for b > 0; Triton's own quotient goes towards 0."""
    return tl.where(a >= 0, a // b, -((-a + b - 1) // b))


@triton.jit
def tap_radius(extent, size, ANTIALIAS: tl.constexpr):
    """R of resize.h."""
    return tl.maximum(extent, size) if ANTIALIAS else size + 0 * extent


@triton.jit
def taps(i, extent, size, radius, METHOD: tl.constexpr):
    """Pixels begin to end, half-open, of a box that pixel i of a patch is made of."""
    if METHOD == "bilinear":
        centre = (2 * i + 1) * extent - size
        begin = tl.maximum(floor_division(centre - 2 * radius, 2 * size) + 1, 0)
        end = tl.minimum(-floor_division(-(centre + 2 * radius), 2 * size), extent)
    else:
        begin = (2 * i + 1) * extent // (2 * size) if METHOD == "nearest" else i + 0 * extent
        end = begin + 1
    return begin, end


@triton.jit
def numerator(i, j, extent, size, radius):
    """Of the weight of pixel j of a box in pixel i of a patch."""
    return 2 * radius - tl.abs((2 * j + 1) * size - (2 * i + 1) * extent)


@triton.jit
def numerators(i, begin, end, extent, size, radius):
    """Their sum over the pixels begin to end, all of which are taps of i; 0 if there are none."""
    end = tl.maximum(begin, end)
    centre = (2 * i + 1) * extent
    top = floor_division(centre - size, 2 * size) + 1  # the first pixel beyond the centre
    top = tl.minimum(tl.maximum(top, begin), end)
    below, above = top - begin, end - top
    rising = below * (2 * radius - centre + size * (begin + top))
    return rising + above * (2 * radius + centre - size * (top + end))


@triton.jit
def weight_of(part, total, ACC: tl.constexpr):
    """part/total, rounded once; 1 where they are equal."""
    part, total = part.to(ACC), tl.maximum(total, 1).to(ACC)  # 0 of a pixel that is not there
    if tl.float64 == ACC:
        weight = part / total
    else:  # Triton approximates quotients of float32; the rest that one leaves mends it
        inverse = 1.0 / total
        weight = part * inverse
        weight = tl.fma(tl.fma(-weight, total, part), inverse, weight)
    return weight


@triton.jit
def padded_position(position, side, PADDING: tl.constexpr):
    """Position inside of the image that stands for each; -1 for the fill value."""
    if PADDING == "reflect":
        position = tl.abs(position)
        position = tl.where(position < side, position, 2 * (side - 1) - position)
    elif PADDING == "edge":
        position = tl.minimum(tl.maximum(position, 0), side - 1)
    elif PADDING == "constant":
        position = tl.where((position >= 0) & (position < side), position, -1)
    return position


@triton.jit
def standing_for(pixel, side, fold, PADDING: tl.constexpr):
    """Positions begin to end, half-open, of the padded image that hold a pixel of the image.

    ``fold``: 0, the pixel itself, with "edge" and all beyond it; with "reflect" also 1, mirrored at
    the near border, and 2, at the far one.
    """
    begin, end = pixel, pixel + 1
    if PADDING == "edge":
        begin = tl.where(pixel > 0, begin, -(1 << 30))
        end = tl.where(pixel < side - 1, end, (1 << 30) + side)
    if PADDING == "reflect":
        there = (fold == 0) | ((fold == 1) & (pixel > 0)) | ((fold == 2) & (pixel < side - 1))
        mirrored = tl.where(fold == 1, -pixel, 2 * (side - 1) - pixel)
        begin = tl.where(fold == 0, pixel, mirrored)
        end = tl.where(there, begin + 1, begin)
    return begin, end


@triton.jit
def pixels_made_of(begin, end, extent, size, radius, METHOD: tl.constexpr):
    """Pixels of a patch, half-open, that have a tap among the pixels begin to end of its box."""
    first, last = begin, end
    if METHOD == "nearest":
        first = -floor_division(extent - 2 * size * begin, 2 * extent)
        last = -floor_division(extent - 2 * size * end, 2 * extent)
    elif METHOD == "bilinear":
        first = floor_division((2 * begin + 1) * size - 2 * radius - extent, 2 * extent) + 1
        last = -floor_division(extent - (2 * end - 1) * size - 2 * radius, 2 * extent)
    first = tl.maximum(first, 0)
    return first, tl.where(begin < end, tl.maximum(tl.minimum(last, size), first), first)
