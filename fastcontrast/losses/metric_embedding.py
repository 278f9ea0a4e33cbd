"""Semi-supervised metric embedding: labelled rows pay cross-entropy, unlabelled rows entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, with_entries
from fastcontrast.ops.checks import (
    check_choice,
    check_indices,
    check_operands,
    inverse_temperature,
)
from fastcontrast.ops.contrast_loss import Candidates, contrast_loss
from fastcontrast.ops.distance_softmax import accumulator_dtype
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.ranks import Ranks, several, total
from fastcontrast.ops.reduction import REDUCTIONS
from fastcontrast.ops.softmax_loss import softplus


def metric_embedding_loss(
    embeddings: Tensor,
    anchors: Tensor,
    targets: Tensor,
    *,
    queue: MemoryQueue | None = None,
    squared: bool = True,
    temperature: float | Tensor = 1.0,
    unlabelled_weight: float = 1.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Contrast embeddings with one labelled anchor per class.

    .. math::
        P(x)_c = \frac{e^{-\lVert F(x) - F(z_c)\rVert^2 / \tau}}
                      {\sum_k e^{-\lVert F(x) - F(z_k)\rVert^2 / \tau}}, \qquad
        L = \overline{-\log P(x_l)_{y(x_l)}}
            + \lambda\, \overline{-\sum_c P(x_u)_c \log P(x_u)_c}

    The bars are means over the labelled rows :math:`x_l` and over the unlabelled rows :math:`x_u`.
    Hoffer and Ailon, "Semi-supervised deep learning by metric embedding", 2016, arXiv 1611.01449.
    The paper squares the distance; the authors' published code does not (``squared=False``).
    Deviation: the temperature, 1 in the paper.

    Args:
        embeddings: F(x) [M, D], float16, bfloat16, float32 or float64.
        anchors: F(z) [C, D], one per class in the order of the classes; they receive gradients. Or
            [M, C, D], such anchors of each row alone
            (:func:`fastcontrast.mining.nearest_anchors`); without queue and figures then.
        targets: Class of each row, integer [M]: c in 0..C-1 pays cross-entropy, -1 pays entropy.
        queue: A :class:`fastcontrast.MemoryQueue`, whose entries are further columns, of no class:
            negatives of labelled rows, and part of the entropy of the others.
        squared: Use the squared distance.
        temperature: (Squared) distance that changes a score by one nat. Positive; a number or a
            0-dim tensor, which receives its gradient.
        unlabelled_weight: The factor :math:`\lambda` of the entropy.
        reduction: ``"mean"`` gives the sum of the two means above (a mean of no rows is 0),
            ``"sum"`` the sum over all rows, ``"none"`` the rows [M]; entropies carry their factor.
        return_stats: Figures to return beside the loss, as of :func:`fastcontrast.info_nce_loss`;
            shares and alignment are those of the labelled rows.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If a shape, a target, the temperature or an option is not as above.
        TypeError: If an argument is not a tensor of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> anchors = torch.tensor([[0.0], [1.0]])
        >>> rows = torch.tensor([[0.0], [0.5]])
        >>> metric_embedding_loss(rows, anchors, torch.tensor([0, -1]), reduction="none")
        tensor([0.3133, 0.6931])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    each_row = isinstance(anchors, Tensor) and anchors.dim() == 3
    check_operands(
        "embeddings", embeddings, "anchors", anchors.flatten(0, 1) if each_row else anchors
    )
    if each_row and len(anchors) != len(embeddings):
        raise ValueError(
            f"anchors must have shape [C, D] or [M, C, D] with M={len(embeddings)}, got "
            f"{list(anchors.shape)}"
        )
    if each_row and (queue is not None or return_stats):
        raise ValueError("anchors of each row [M, C, D] take neither queue nor return_stats")
    scale = inverse_temperature(temperature, embeddings, anchors)
    if isinstance(unlabelled_weight, bool) or not isinstance(unlabelled_weight, (int, float)):
        raise TypeError(
            f"unlabelled_weight must be a number, got {type(unlabelled_weight).__name__}"
        )
    if not -math.inf < unlabelled_weight < math.inf:  # torch.compile traces no math.isfinite
        raise ValueError(f"unlabelled_weight must be finite, got {unlabelled_weight}")
    classes = anchors.shape[-2]
    if classes == 0:
        raise ValueError(f"anchors must hold at least one class, got {list(anchors.shape)}")
    ranks = several(ranks)
    targets = check_indices("targets", targets, embeddings, -1, classes, "-1 = unlabelled")
    labelled = targets >= 0
    dtype = accumulator_dtype(torch.promote_types(embeddings.dtype, anchors.dtype))
    weight = labelled.to(dtype)
    rest = unlabelled_weight * (1.0 - weight)
    if reduction == "mean":
        weight = weight / total(labelled.sum(), ranks).clamp(min=1)
        rest = rest / total((~labelled).sum(), ranks).clamp(min=1)
    metric = "sqeuclidean" if squared else "l2"
    if each_row:
        scores = paired_scores(embeddings[:, None], anchors, metric=metric, scale=scale)
        rows = _row_losses(scores, targets, weight, rest)
        if reduction == "none":
            return rows if ranks is None else ranks.loss(rows, "none")
        return rows.sum() if ranks is None else ranks.loss(rows.sum(), "sum")
    columns = with_entries(anchors, queue)
    # -1 excludes nothing, so one pass serves both kinds of row.
    return contrast_loss(
        Candidates(embeddings, columns, targets, None, None, None, metric, scale, columns.shape[0]),
        row_weight=weight,
        entropy_weight=rest,
        all_pay=True,
        reduction="none" if reduction == "none" else "sum",
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


def _row_losses(scores: Tensor, targets: Tensor, weight: Tensor, rest: Tensor) -> Tensor:
    """Weighted cross-entropy and entropy of each row, from the scores [M, C] of its own anchors."""
    own = targets.clamp(min=0)[:, None]
    # Not -inf: of a single class nothing would be left, and the gradient of its sum is NaN.
    others = scores.scatter(1, own, torch.finfo(scores.dtype).min).logsumexp(1)
    log_p = scores.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return weight * softplus(others - scores.gather(1, own)[:, 0]) + rest * entropy


class MetricEmbeddingLoss(nn.Module):
    """Module of :func:`metric_embedding_loss`; stores its options."""

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        squared: bool = True,
        temperature: float | Tensor = 1.0,
        unlabelled_weight: float = 1.0,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.squared = squared
        self.temperature = temperature
        self.unlabelled_weight = unlabelled_weight
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(self, embeddings: Tensor, anchors: Tensor, targets: Tensor) -> Any:
        """See :func:`metric_embedding_loss`."""
        return metric_embedding_loss(
            embeddings,
            anchors,
            targets,
            queue=self.queue,
            squared=self.squared,
            temperature=self.temperature,
            unlabelled_weight=self.unlabelled_weight,
            reduction=self.reduction,
            return_stats=self.return_stats,
            ranks=self.ranks,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"squared={self.squared}, unlabelled_weight={self.unlabelled_weight}"
