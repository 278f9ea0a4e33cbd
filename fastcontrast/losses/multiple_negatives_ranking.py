"""Multiple negatives ranking: the positives of other anchors, and hard negatives, as negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.losses.memory_queue import MemoryQueue
from fastcontrast.ops.checks import check_pairs
from fastcontrast.ops.ranks import Ranks


def multiple_negatives_ranking_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    share_negatives: bool = True,
    queue: MemoryQueue | None = None,
    metric: str = "cosine",
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Rank each anchor's positive before the other positives and before hard negatives.

    .. math::
        \ell_i = -\log \frac{\exp(s(a_i, p_i))}
                            {\sum_j \exp(s(a_i, p_j)) + \sum_{j,k} \exp(s(a_i, n_{jk}))}

    Section 4.4 of Henderson et al., "Efficient Natural Language Response Suggestion for Smart
    Reply", 2017, arXiv 1705.00652 (without the n); with K hard negatives per anchor, Karpukhin et
    al., "Dense Passage Retrieval", 2020, arXiv 2004.04906. Deviation: the temperature.

    Args:
        anchor: Anchors a [M, D], float16, bfloat16, float32 or float64.
        positive: Positives p of the same rows [M, D], same device.
        negatives: Hard negatives n: K of each anchor [M, K, D], or [H, D] of nobody in particular.
        share_negatives: Whether an anchor also contrasts with the hard negatives of the others; if
            not, the second sum goes over k with j = i.
        queue: See :func:`fastcontrast.info_nce_loss`.
        metric: ``"cosine"``, ``"dot"``, ``"l2"`` or ``"sqeuclidean"``.
        temperature: See :func:`fastcontrast.info_nce_loss`.
        symmetric: Also rank each positive's anchor before the others, and average the two; needs
            shared negatives.
        row_weight: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        return_stats: See :func:`fastcontrast.info_nce_loss`.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If a shape or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> anchor, positive = torch.eye(2), torch.eye(2)
        >>> hard = -torch.eye(2)[:, None]
        >>> multiple_negatives_ranking_loss(anchor, positive, hard, temperature=1.0)
        tensor(0.6265)
    """
    check_pairs("anchor", anchor, "positive", positive)
    if isinstance(negatives, Tensor) and negatives.dim() == 3 and share_negatives:
        if negatives.shape[0] != anchor.shape[0]:
            raise ValueError(
                f"negatives must have shape [M, K, D] with M={anchor.shape[0]}, got "
                f"{list(negatives.shape)}"
            )
        negatives = negatives.flatten(0, 1)
    return info_nce_loss(
        anchor,
        positive,
        negatives=negatives,
        queue=queue,
        metric=metric,
        temperature=temperature,
        symmetric=symmetric,
        row_weight=row_weight,
        reduction=reduction,
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


class MultipleNegativesRankingLoss(nn.Module):
    """Module of :func:`multiple_negatives_ranking_loss`; stores its options.

    A ``temperature`` that is an ``nn.Parameter`` is registered, and so learnt.
    """

    def __init__(
        self,
        *,
        share_negatives: bool = True,
        queue: MemoryQueue | None = None,
        metric: str = "cosine",
        temperature: float | Tensor = 0.05,
        symmetric: bool = False,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.share_negatives = share_negatives
        self.queue = queue
        self.metric = metric
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(self, anchor: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Any:
        """See :func:`multiple_negatives_ranking_loss`."""
        return multiple_negatives_ranking_loss(
            anchor,
            positive,
            negatives,
            share_negatives=self.share_negatives,
            queue=self.queue,
            metric=self.metric,
            temperature=self.temperature,
            symmetric=self.symmetric,
            reduction=self.reduction,
            return_stats=self.return_stats,
            ranks=self.ranks,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"metric={self.metric!r}, symmetric={self.symmetric}, reduction={self.reduction!r}"
