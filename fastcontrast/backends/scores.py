"""How the scores of a call are formed: what every backend of `distance_softmax` is handed.

Filled by ``fastcontrast/ops/distance_softmax.py``, which has checked it; read by the backends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("l2", "sqeuclidean", "dot")
KEEPS = ("all", "same", "different")
PRECISIONS = ("ieee", "tf32", "bf16x3", "bf16")


class Scores(NamedTuple):
    """Metric, scale, mask and precision of one call.

    Attributes:
        metric: One of :data:`METRICS`; ``s = -scale d``, ``-scale d²`` or ``scale x·y``.
        scale: Positive number or 0-dim tensor.
        exclude: Columns left out of each row, [M, E] with E <= 2; values outside 0..N-1 name none.
        row_ids: Integers [M], or None when ``keep`` is "all".
        column_ids: Integers [N], or None when ``keep`` is "all".
        keep: Which columns count by their id: all, those of the row's id, or the others.
        precision: How the operands of matrix products may be rounded, at the worst: a backend may
            be more exact. float64 inputs are never rounded.
    """

    metric: str
    scale: float | Tensor
    exclude: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None
    keep: str
    precision: str


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: dtype of sums, statistics and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_mean(y: Tensor) -> Tensor:
    """Detached mean of the columns [N, D] -> [D]: what both sides are centred by.

    Distances do not change, and the rounding error of ``‖x‖²+‖y‖²-2x·y`` no longer grows with the
    offset of the data. Where the mean is not finite 0 is taken, so that one bad column stays alone.
    """
    if y.shape[0] == 0:
        return y.new_zeros(y.shape[1])
    mean = y.detach().mean(0)
    return torch.where(torch.isfinite(mean), mean, 0.0)
