"""The contrastive loss of siamese networks: pairs pulled together, or pushed to a margin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcontrast.ops.checks import check_choice, check_pairs, check_scale
from fastcontrast.ops.pairs import paired_distance
from fastcontrast.ops.reduction import REDUCTIONS, reduce


def siamese_contrastive_loss(
    x: Tensor,
    y: Tensor,
    same: Tensor,
    *,
    margin: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Pull pairs of one class together and push other pairs apart, up to a margin.

    .. math::
        \ell_i = \frac{1}{2} d_i^2 \;\text{ where same}, \qquad
        \ell_i = \frac{1}{2} \max(0,\; m - d_i)^2 \;\text{ elsewhere}, \qquad
        d_i = \lVert x_i - y_i \rVert_2

    Eq. 4 of Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006, after Chopra et al. 2005: the baseline that the triplet network (arXiv 1412.6622) is
    compared with. No deviation. Plain PyTorch, O(M·D).

    Args:
        x: First embeddings [M, D], float16, bfloat16, float32 or float64.
        y: Second embeddings [M, D], same device.
        same: Whether the two are of one class, bool [M].
        margin: m, positive, in embedding units.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.

    Returns:
        Loss in squared embedding units, float32 (float64 for float64 inputs). Where x and y
        coincide the gradient is 0.

    Raises:
        ValueError: If a shape, the margin or the reduction is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(2, 1), torch.tensor([[2.0], [0.5]])
        >>> siamese_contrastive_loss(x, y, torch.tensor([True, False]), reduction="none")
        tensor([2.0000, 0.1250])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_pairs("x", x, "y", y)
    if not isinstance(same, Tensor) or same.dtype != torch.bool:
        kind = same.dtype if isinstance(same, Tensor) else type(same).__name__
        raise TypeError(f"same must be a bool tensor, got {kind}")
    if same.shape != x.shape[:1]:
        raise ValueError(f"same must have shape [{x.shape[0]}], got {list(same.shape)}")
    if same.device != x.device:
        raise ValueError(f"same must be on {x.device}, got {same.device}")
    check_scale("margin", margin)
    squared = paired_distance(x, y, squared=True)
    short = (margin - paired_distance(x, y)).clamp_min(0.0)
    return reduce(0.5 * torch.where(same, squared, short.square()), reduction)


class SiameseContrastiveLoss(nn.Module):
    """Module of :func:`siamese_contrastive_loss`; stores its options."""

    def __init__(self, *, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.margin = margin
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor, same: Tensor) -> Tensor:
        """See :func:`siamese_contrastive_loss`."""
        return siamese_contrastive_loss(x, y, same, margin=self.margin, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"margin={self.margin}, reduction={self.reduction!r}"
