"""`info-nce-pytorch`: ``InfoNCE`` and ``info_nce`` with its arguments.

``from fastcontrast.compat.info_nce import InfoNCE, info_nce``. The library itself is not needed.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.ops.checks import check_choice

NEGATIVE_MODES = ("unpaired", "paired")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """Cosine InfoNCE: against the other positive keys, or against ``negative_keys`` alone.

    Args:
        query: [N, D].
        positive_key: [N, D].
        negative_keys: [M, D] for ``"unpaired"``, [N, M, D] for ``"paired"``, or None.
        temperature: Divides the cosines; here also a 0-dim tensor, which receives its gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: Whether the negative keys are for all queries or M for each.

    Returns:
        The loss, a scalar or [N].

    Raises:
        ValueError: If a shape or an option is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=0.5)  # log(1 + e^-2)
        tensor(0.1269)
    """
    check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
    if negative_keys is not None:
        if not isinstance(negative_keys, Tensor):
            raise TypeError(f"negative_keys must be a tensor, got {type(negative_keys).__name__}")
        dim = 3 if negative_mode == "paired" else 2
        if negative_keys.dim() != dim:
            raise ValueError(
                f"negative_keys must have {dim} dimensions for negative_mode={negative_mode!r}, "
                f"got {list(negative_keys.shape)}"
            )
    if len(query) != len(positive_key):
        raise ValueError(
            "query and positive_key must have the same number of rows, "
            f"got {list(query.shape)} and {list(positive_key.shape)}"
        )
    return info_nce_loss(
        query,
        positive_key,
        negatives=negative_keys,
        in_batch=negative_keys is None,
        metric="cosine",
        temperature=temperature,
        reduction=reduction,
    )


class InfoNCE(nn.Module):
    """Module of :func:`info_nce`; stores its options."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """See :func:`info_nce`."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )
