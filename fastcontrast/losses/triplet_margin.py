"""The triplet loss with a margin, hard or soft, and with swapped anchors on request."""

from __future__ import annotations

from torch import Tensor, nn

from fastcontrast.ops.checks import check_choice
from fastcontrast.ops.reduction import REDUCTIONS
from fastcontrast.ops.softmax_loss import softplus
from fastcontrast.ops.triplet_loss import RowLoss, triplet_loss


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float | None = 1.0,
    metric: str = "l2",
    swap: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Ask that each negative is farther than the positive, by a margin.

    .. math::
        \ell_i = \max\bigl(0,\; d(a_i, p_i) - d(a_i, n_i) + m\bigr) \quad\text{or, softly,}\quad
        \ell_i = \log\bigl(1 + e^{d(a_i, p_i) - d(a_i, n_i)}\bigr)

    With ``metric="sqeuclidean"`` the left is Eq. 3 of Schroff, Kalenichenko and Philbin, "FaceNet",
    2015, arXiv 1503.03832; the right is the soft margin of Hermans, Beyer and Leibe, "In Defense of
    the Triplet Loss for Person Re-Identification", 2017, arXiv 1703.07737, and equal to
    ``triplet_ratio_loss(objective="nll")``. ``swap=True`` takes the smaller of d(a, n) and d(p, n)
    for the negative's distance: Balntas et al., "Learning local feature descriptors with triplets
    and shallow convolutional neural networks", 2016.

    With ``metric="l2"`` and a margin it is ``torch.nn.functional.triplet_margin_loss`` with p = 2,
    in value and gradient, also at the hinge and where swapped distances are equal. Deviation from
    that: no eps is added to the differences (there 1e-6 is), so that coincident points are at
    distance 0, where the subgradient 0 is taken.

    Args:
        anchor: Embeddings a [M, D], float16, bfloat16, float32 or float64.
        positive: Embeddings p of the same class [M, D].
        negative: Embeddings n of another class [M, D].
        margin: m, positive, in embedding units (squared for ``"sqeuclidean"``), or None for the
            soft margin.
        metric: ``"l2"``, or ``"sqeuclidean"`` for squared distances.
        swap: Take the smaller one of the negative's distances to anchor and positive.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        backend: A name from ``fastcontrast.available_backends("triplet_distances")``, or None for
            the fastest.

    Returns:
        Loss in units of the margin, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not a floating-point tensor, or the margin not a number.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> anchor, positive = torch.zeros(2, 1), torch.ones(2, 1)
        >>> negative = torch.tensor([[1.5], [4.0]])
        >>> triplet_margin_loss(anchor, positive, negative, reduction="none")
        tensor([0.5000, 0.0000])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    row_loss = _soft_margin if margin is None else _hinge(margin)
    return triplet_loss(
        anchor,
        positive,
        negative,
        row_loss,
        reduction=reduction,
        metric=metric,
        swap=swap,
        backend=backend,
    )


def _soft_margin(difference: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + e^x) and its derivative."""
    return softplus(difference), difference.sigmoid()


def _hinge(margin: float) -> RowLoss:
    """max(0, x + margin) and its derivative, which torch's clamp takes as 1 at the hinge."""
    if not isinstance(margin, (int, float)) or isinstance(margin, bool):
        raise TypeError(f"margin must be a number or None, got {type(margin).__name__}")
    if not 0.0 < margin < float("inf"):
        raise ValueError(f"margin must be positive and finite, or None, got {margin}")

    def row_loss(difference: Tensor) -> tuple[Tensor, Tensor]:
        excess = difference + margin
        return excess.clamp_min(0.0), (excess >= 0.0).to(excess.dtype)

    return row_loss


class TripletMarginLoss(nn.Module):
    """Module of :func:`triplet_margin_loss`; stores its options."""

    def __init__(
        self,
        *,
        margin: float | None = 1.0,
        metric: str = "l2",
        swap: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.metric = metric
        self.swap = swap
        self.reduction = reduction
        self.backend = backend

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """See :func:`triplet_margin_loss`."""
        return triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            metric=self.metric,
            swap=self.swap,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return (
            f"margin={self.margin}, metric={self.metric!r}, swap={self.swap}, "
            f"reduction={self.reduction!r}"
        )
