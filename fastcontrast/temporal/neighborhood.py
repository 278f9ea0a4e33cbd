"""Temporal neighbourhood coding: a discriminator says whether two frames are neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops.checks import FLOATING, check_choice, check_count, check_fraction, check_pairs
from fastcontrast.ops.reduction import REDUCTIONS, reduce


def temporal_neighborhood_loss(
    near: Tensor,
    far: Tensor,
    *,
    weight: float = 0.05,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of a discriminator, where a share of far frames counts as neighbours.

    .. math::
        \ell_i = \tfrac12 \bigl[ -\log \sigma(a_i) - w \log \sigma(b_i)
        - (1 - w) \log(1 - \sigma(b_i)) \bigr]

    with logits a of neighbours and b of far frames: Eq. 2 of Tonekaboni, Eytan and Goldenberg,
    "Unsupervised Representation Learning for Time Series with Temporal Neighborhood Coding", 2021,
    arXiv 2106.00750, halved as in its code. Far frames are unlabelled, not negative: w is how
    probably one is a neighbour. Which frames are near and far is up to the caller;
    :func:`temporal_triplets` with ``negatives="same"`` draws neighbours uniformly, where the paper
    has a Gaussian whose width a test of stationarity chooses.

    Args:
        near: Logits a [M], float16, bfloat16, float32 or float64.
        far: Logits b [M].
        weight: w in [0, 1).
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> temporal_neighborhood_loss(torch.zeros(1), torch.zeros(1))  # log 2
        tensor(0.6931)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_fraction("weight", weight)
    for name, value in (("near", near), ("far", far)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATING:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor [M], got {kind}")
        if value.dim() != 1:
            raise ValueError(f"{name} must have shape [M], got {list(value.shape)}")
    check_pairs("near", near[:, None], "far", far[:, None])
    dtype = torch.promote_types(near.dtype, far.dtype)
    dtype = dtype if dtype == torch.float64 else torch.float32
    near, far = near.to(dtype), far.to(dtype)
    # -log σ(b) = softplus(-b) and -log(1 - σ(b)) = softplus(b), which no large logit loses.
    loss = F.softplus(-near) + weight * F.softplus(-far) + (1 - weight) * F.softplus(far)
    return reduce(loss / 2, reduction)


class NeighborhoodDiscriminator(nn.Module):
    """The discriminator of temporal neighbourhood coding: logits [M] of pairs [M, D], [M, D].

    Two layers on the pair laid side by side, 4 D wide inside, with dropout, as in the paper's code.

    Args:
        dim: D, at least 1.
        dropout: Share of hidden units dropped in training, in [0, 1).

    Raises:
        ValueError: If an argument is not as above.
        TypeError: If an argument is not a number.
    """

    def __init__(self, dim: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        check_count("dim", dim)
        check_fraction("dropout", dropout)
        self.layers = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * dim, 1)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logit that row i of ``x`` and row i of ``y`` are neighbours, [M]."""
        check_pairs("x", x, "y", y)
        return self.layers(torch.cat([x, y], 1)).flatten()
