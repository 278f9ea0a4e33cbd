r"""Sum of row losses over `triplet_distances`, as one node of the autograd graph.

.. math:: L = \sum_i \ell(d^+_i - d^-_i)

Small batches are paid for by the call: a node per distance, difference and reduction costs more
than the arithmetic. So a loss gives :math:`\ell` together with its derivative, a few operations on
[M], and the gradients of the points follow in one pass. Called by ``fastcontrast/losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.reference.triplet_distances import difference, differentiable_distances
from fastcontrast.ops.double_backward import differentiable_gradients
from fastcontrast.ops.eager_function import EagerFunction
from fastcontrast.ops.reduction import reduce
from fastcontrast.ops.triplet_distances import checked_triplets, triplet_distances

# Loss of each row and its derivative, both [M], from the differences d₊ - d₋ [M]. Plain PyTorch:
# the loss is differentiated by autograd under torch.compile and for double backward.
RowLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
NO_GRADIENTS = (None,) * 5  # of the arguments after the points


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    row_loss: RowLoss,
    *,
    reduction: str,
    metric: str = "l2",
    swap: bool = False,
    backend: str | None,
) -> Tensor:
    """Reduced losses of the triplets' differences of distances.

    Args:
        anchor: See :func:`~fastcontrast.triplet_distances`, which checks it.
        positive: See :func:`~fastcontrast.triplet_distances`.
        negative: See :func:`~fastcontrast.triplet_distances`.
        row_loss: Loss and derivative of each difference.
        reduction: ``"mean"`` (of no rows 0), ``"sum"`` or ``"none"``, checked.
        metric: See :func:`~fastcontrast.triplet_distances`.
        swap: The negative's distance is the smaller of those to anchor and positive; where they
            are equal each receives half of the gradient, as from ``torch.minimum``.
        backend: See :func:`~fastcontrast.triplet_distances`.

    Returns:
        A scalar, or [M] for ``"none"``; float32 (float64 for float64 inputs).
    """
    if torch.compiler.is_compiling():
        found = triplet_distances(
            anchor, positive, negative, metric=metric, between=swap, backend=backend
        )
        distances = [distance for distance in found if distance is not None]
        return reduce(row_loss(difference(distances))[0], reduction)
    points, backend = checked_triplets(anchor, positive, negative, metric, backend)
    return _TripletLoss.apply(*points, row_loss, reduction, metric, swap, backend)


class _TripletLoss(EagerFunction):
    """Keeps the derivative of each row's loss; the gradients wait for the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        row_loss: RowLoss,
        reduction: str,
        metric: str,
        swap: bool,
        backend: str,
    ) -> Tensor:
        found = backends.run(
            backend, "triplet_difference_forward", anchor, positive, negative, metric, swap
        )
        loss, slope = row_loss(found[0])
        ctx.save_for_backward(anchor, positive, negative, found, slope)
        ctx.options = (row_loss, reduction, metric, swap, backend)
        return reduce(loss, reduction)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        anchor, positive, negative, found, slope = ctx.saved_tensors
        row_loss, reduction, metric, swap, backend = ctx.options
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again

            def loss(a: Tensor, p: Tensor, n: Tensor) -> list[Tensor]:
                distances = differentiable_distances(a, p, n, metric, swap)
                return [reduce(row_loss(difference(distances))[0], reduction)]

            points = (anchor, positive, negative)
            return (*differentiable_gradients(loss, points, upstream, needs), *NO_GRADIENTS)
        factor = 1.0 / max(1, anchor.shape[0]) if reduction == "mean" else 1.0
        a, p, n = backends.run(
            backend, "triplet_difference_backward", anchor, positive, negative, found, slope,
            upstream[0], factor, metric, needs,
        )  # fmt: skip
        return (
            a if needs[0] else None,
            p if needs[1] else None,
            n if needs[2] else None,
            *NO_GRADIENTS,
        )
