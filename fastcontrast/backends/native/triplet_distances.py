"""`triplet_distances` in C++ and CUDA: one pass over the triplets in each direction.

The kernels are csrc/cpu/triplet_distances.cpp and csrc/cuda/triplet_distances.cu. Points are read
in place where their rows are contiguous, whatever lies between rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.native import devices
from fastcontrast.backends.native.extract_patches import SCALARS
from fastcontrast.backends.scores import METRICS, accumulator_dtype

# Elements of the points below which starting threads of the CPU takes longer than the work.
THREADING_MINIMUM = 1 << 18

Addresses = tuple[int, int, int]
NO_ADDRESSES = (0, 0, 0)


def triplet_distances_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, between: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of the three pairs, each [M]; the last is empty unless ``between``."""
    rows = anchor.shape[0]
    dtype = accumulator_dtype(anchor.dtype)
    to_positive = anchor.new_empty(rows, dtype=dtype)
    to_negative = anchor.new_empty(rows, dtype=dtype)
    of_others = anchor.new_empty(rows if between else 0, dtype=dtype)
    points = _Points(anchor, positive, negative, metric)
    devices.kernels(anchor).triplet_distances_forward(
        *points.arguments,
        (to_positive.data_ptr(), to_negative.data_ptr(), of_others.data_ptr() if between else 0),
        0,
    )
    return to_positive, to_negative, of_others


def triplet_distances_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    distances: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, each [M, D], from those of the distances; empty where not needed.

    A distance whose gradient is None has none.
    """
    dtype = distances[0].dtype
    first, second, third = (None if g is None else g.to(dtype).contiguous() for g in grads)
    to_positive, to_negative, of_others = distances
    return _Points(anchor, positive, negative, metric).gradients(
        needs,
        (to_positive.data_ptr(), to_negative.data_ptr(), of_others.data_ptr()),
        ((_address(first), _address(second), _address(third)), 0, 0, 0, 1.0),
    )


def triplet_difference_forward(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, swap: bool
) -> Tensor:
    """Difference d₊ - d₋ and the distances that it came from, [3, M]; with ``swap`` [4, M]."""
    dtype = accumulator_dtype(anchor.dtype)
    out = anchor.new_empty((4 if swap else 3, anchor.shape[0]), dtype=dtype)
    points = _Points(anchor, positive, negative, metric)
    devices.kernels(anchor).triplet_distances_forward(
        *points.arguments, _distances(out), out.data_ptr()
    )
    return out


def triplet_difference_backward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    found: Tensor,
    slope: Tensor,
    upstream: Tensor,
    factor: float,
    metric: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the points, from ``slope · factor · upstream`` [M], that of the difference.

    ``found`` is what the forward pass returned; ``upstream`` is [M], or one number.
    """
    slope = slope.contiguous()
    upstream = upstream.contiguous()
    return _Points(anchor, positive, negative, metric).gradients(
        needs,
        _distances(found),
        (NO_ADDRESSES, slope.data_ptr(), upstream.data_ptr(), upstream.dim(), factor),
    )


class _Points:
    """The triplets of a call with what forward and backward share, as the C++ functions take it."""

    def __init__(self, anchor: Tensor, positive: Tensor, negative: Tensor, metric: str) -> None:
        if anchor.stride(1) != 1:
            anchor = anchor.contiguous()
        if positive.stride(1) != 1:
            positive = positive.contiguous()
        if negative.stride(1) != 1:
            negative = negative.contiguous()
        self.kept = anchor, positive, negative  # for as long as C++ reads them
        rows, dim = self.shape = anchor.shape
        threads = torch.get_num_threads() if 3 * rows * dim >= THREADING_MINIMUM else 1
        self.arguments = (
            (anchor.data_ptr(), positive.data_ptr(), negative.data_ptr()),
            (anchor.stride(0), positive.stride(0), negative.stride(0)),
            SCALARS[anchor.dtype],
            rows,
            dim,
            METRICS.index(metric),
            devices.workers(anchor, threads),
        )

    def gradients(
        self, needs: tuple[bool, bool, bool], distances: Addresses, source: tuple[object, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the points [M, D] each; empty where not needed."""
        anchor, shape = self.kept[0], self.shape
        of_anchor = anchor.new_empty(shape if needs[0] else 0)
        of_positive = anchor.new_empty(shape if needs[1] else 0)
        of_negative = anchor.new_empty(shape if needs[2] else 0)
        devices.kernels(anchor).triplet_distances_backward(
            *self.arguments,
            distances,
            *source,
            (
                of_anchor.data_ptr() if needs[0] else 0,
                of_positive.data_ptr() if needs[1] else 0,
                of_negative.data_ptr() if needs[2] else 0,
            ),
        )
        return of_anchor, of_positive, of_negative


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _distances(found: Tensor) -> Addresses:
    """Of the distances in what :func:`triplet_difference_forward` returns."""
    count, rows = found.shape
    step = rows * found.element_size()
    first = found.data_ptr() + step
    return first, first + step, first + 2 * step if count == 4 else 0
