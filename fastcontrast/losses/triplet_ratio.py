"""The triplet network's loss: a two-way softmax of distances."""

from __future__ import annotations

from torch import Tensor, nn

from fastcontrast.ops.checks import check_choice
from fastcontrast.ops.reduction import REDUCTIONS
from fastcontrast.ops.softmax_loss import softplus
from fastcontrast.ops.triplet_loss import triplet_loss


def _squared_error(difference: Tensor) -> tuple[Tensor, Tensor]:
    """d₊² and its derivative 2 d₊² (1 - d₊), where 1 - d₊ is a sigmoid too and loses nothing."""
    loss = difference.sigmoid().square()
    return loss, (loss + loss) * (-difference).sigmoid()


def _likelihood(difference: Tensor) -> tuple[Tensor, Tensor]:
    """-log(1 - d₊) and its derivative d₊."""
    return softplus(difference), difference.sigmoid()


OBJECTIVES = {"mse": _squared_error, "nll": _likelihood}


def triplet_ratio_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    objective: str = "mse",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Drive the softmax share of the positive's distance to zero.

    .. math::
        d_+ = \frac{e^{\lVert x - x^+\rVert_2}}
                   {e^{\lVert x - x^+\rVert_2} + e^{\lVert x - x^-\rVert_2}}, \qquad
        \ell = d_+^2 \;(\text{"mse"}) \quad\text{or}\quad \ell = -\log(1 - d_+) \;(\text{"nll"})

    Section 2.1 of Hoffer and Ailon, "Deep metric learning using triplet network", 2014, arXiv
    1412.6622. The paper writes the squared error of (d₊, d₋) against (0, 1), which is 2 d₊²; like
    its published code, which averages over the two outputs, this returns d₊².

    Args:
        anchor: Embeddings x [M, D], float16, bfloat16, float32 or float64.
        positive: Embeddings x⁺ of the same class [M, D].
        negative: Embeddings x⁻ of another class [M, D].
        objective: ``"mse"`` (the paper's choice) or ``"nll"``.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        backend: A name from ``fastcontrast.available_backends("triplet_distances")``, or None for
            the fastest.

    Returns:
        Loss, float32 (float64 for float64 inputs); in [0, 1] for ``"mse"``, in nats for ``"nll"``.

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not a floating-point tensor.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.zeros(3, 2)
        >>> triplet_ratio_loss(x, x, x)  # nothing to tell apart: (1/2)²
        tensor(0.2500)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("objective", objective, tuple(OBJECTIVES))
    return triplet_loss(
        anchor, positive, negative, OBJECTIVES[objective], reduction=reduction, backend=backend
    )


class TripletRatioLoss(nn.Module):
    """Module of :func:`triplet_ratio_loss`; stores its options."""

    def __init__(
        self, *, objective: str = "mse", reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__()
        self.objective = objective
        self.reduction = reduction
        self.backend = backend

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """See :func:`triplet_ratio_loss`."""
        return triplet_ratio_loss(
            anchor,
            positive,
            negative,
            objective=self.objective,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"objective={self.objective!r}, reduction={self.reduction!r}"
