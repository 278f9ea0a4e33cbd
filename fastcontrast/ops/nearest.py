r"""The k nearest columns of every row: for nearest-neighbour evaluation and for hard mining.

Called by ``fastcontrast/retrieval.py``; the work is in
``fastcontrast/backends/<backend>/nearest.py``. As with ``distance_softmax``, a call is the custom
operator ``fastcontrast::nearest`` under ``torch.compile`` and goes straight to the backend in eager
mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.scores import Scores, accumulator_dtype
from fastcontrast.ops.checks import METRICS, check_choice, check_count, check_mask, check_operands
from fastcontrast.ops.normalized import normalized


class Nearest(NamedTuple):
    """What :func:`nearest` returns, nearest first. Neither carries a gradient.

    Attributes:
        values: Distances, squared distances, dot products or cosines, [M, k], float32 (float64 for
            float64 inputs).
        indices: The columns they belong to, int64 [M, k]; -1 where fewer than k columns count.
    """

    values: Tensor
    indices: Tensor


def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    metric: str = "l2",
    farthest: bool = False,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    keep: str = "all",
    backend: str | None = None,
) -> Nearest:
    r"""The k nearest columns of every row, without the M×N matrix.

    Nearest means of smallest :math:`\lVert x_i - y_j\rVert` (``"l2"``, ``"sqeuclidean"``), or of
    largest :math:`x_i\cdot y_j` (``"dot"``) or :math:`x_i\cdot y_j / \lVert x_i\rVert \lVert
    y_j\rVert` (``"cosine"``; 0 for a zero vector); with ``farthest``, the opposite. Memory is
    O((M+N)·D + M·k).

    The result is what sorting all pairs by direct difference in float64 gives: matrix products only
    decide which pairs need a look. Columns at equal distance come in the order of their index.
    A column whose distance is NaN counts, and comes after all others, nearest and farthest alike.
    Where fewer than k columns count, the rest of the row has index -1 and the value at the end of
    the order: distance inf and similarity -inf, the opposite with ``farthest``.

    Values carry no gradient. For one, take distances of the pairs found, with
    ``fastcontrast.ops.pairs.paired_distance(x, y[indices[:, 0]])``; the losses do.

    Args:
        x: Rows [M, D], float16, bfloat16, float32 or float64.
        y: Columns [N, D], on the same device. Mixed dtypes are promoted.
        k: How many, at least 1; may exceed N. The kernels are made for k up to a few hundred.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        farthest: Return the k farthest columns instead, farthest first.
        exclude: Column indices left out of each row, integer [M] or [M, E] with E <= 2; values
            outside 0..N-1, such as -1, name no column.
        row_ids: Integer ids of the rows [M]; needed unless ``keep="all"``.
        column_ids: Integer ids of the columns [N]; needed unless ``keep="all"``.
        keep: ``"all"`` columns count, or those whose id is the ``"same"`` as the row's, or
            ``"different"`` from it.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        :class:`Nearest`: values and indices, [M, k] each.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not a tensor of the kind above, or k not an integer.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> y = torch.tensor([[0.0], [3.0], [1.0]])
        >>> nearest(torch.tensor([[0.9]]), y, 2)
        Nearest(values=tensor([[0.1000, 0.9000]]), indices=tensor([[2, 0]]))
    """
    check_operands("x", x, "y", y)
    check_count("k", k)
    check_choice("metric", metric, METRICS)
    exclude = check_mask(x, y, exclude, row_ids, column_ids, keep)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.detach().to(dtype), y.detach().to(dtype)
    if metric == "cosine" and dtype == torch.float64:
        # Kernels square in float64, where numbers of this size could overflow.
        x, y = normalized(x), normalized(y)
    backend = backends.resolve("nearest", x, backend, others=y)
    function = _nearest_op if torch.compiler.is_compiling() else _nearest
    return Nearest(
        *function(x, y, k, metric, farthest, exclude, row_ids, column_ids, keep, backend)
    )


def _nearest(x, y, k, metric, farthest, exclude, row_ids, column_ids, keep, backend):
    scores = Scores(metric, 1.0, exclude, row_ids, column_ids, keep, "ieee")
    return backends.run(backend, "nearest_columns", x, y, k, scores, farthest)


# The custom operator: what torch.compile sees.

_nearest_op = torch.library.custom_op(
    "fastcontrast::nearest",
    _nearest,
    mutates_args=(),
    schema="(Tensor x, Tensor y, SymInt k, str metric, bool farthest, Tensor? exclude, "
    "Tensor? row_ids, Tensor? column_ids, str keep, str backend) -> (Tensor, Tensor)",
)


@_nearest_op.register_fake
def _(x, y, k, metric, farthest, exclude, row_ids, column_ids, keep, backend):
    return (
        x.new_empty(x.shape[0], k, dtype=accumulator_dtype(x.dtype)),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
    )
