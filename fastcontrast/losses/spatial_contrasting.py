"""Spatial contrasting: patches of one image against patches of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.losses.memory_queue import MemoryQueue
from fastcontrast.ops.checks import check_pairs
from fastcontrast.ops.ranks import Ranks


def spatial_contrasting_loss(
    anchors: Tensor,
    positives: Tensor,
    *,
    queue: MemoryQueue | None = None,
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Softmax over negative distances between patch embeddings of the same and of other images.

    .. math::
        \ell_i = -\log \frac{\exp(-\lVert f_i^{(1)} - f_i^{(2)} \rVert_2 / \tau)}
                            {\sum_{j=1}^{N} \exp(-\lVert f_i^{(1)} - f_j^{(2)} \rVert_2 / \tau)}

    Equation 4 of Hoffer, Hubara and Ailon, "Deep unsupervised learning through spatial
    contrasting", 2016, arXiv 1610.00243; at ``temperature=1`` it is the paper's loss. The distance
    is not squared, and the positive is part of the sum. Deviation: ``symmetric=True`` averages the
    loss of both roles, which the paper does not.

    Args:
        anchors: Embeddings of the first patch of each image [M, D], float16, bfloat16, float32 or
            float64.
        positives: Embeddings of the second patch of the same images [M, D], same device.
        queue: A :class:`fastcontrast.MemoryQueue`, whose entries are further negatives of all
            anchors: patches of other images.
        temperature: Distance that changes a score by one nat, in embedding units. Positive; a
            number or a 0-dim tensor, which receives its gradient.
        symmetric: Also contrast each positive with all anchors, and average the two losses.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        return_stats: See :func:`fastcontrast.info_nce_loss`.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not a floating-point tensor.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> same = torch.ones(4, 2)
        >>> spatial_contrasting_loss(same, same)  # nothing to tell apart: log 4
        tensor(1.3863)
    """
    check_pairs("anchors", anchors, "positives", positives)

    return info_nce_loss(
        anchors,
        positives,
        queue=queue,
        metric="l2",
        temperature=temperature,
        symmetric=symmetric,
        reduction=reduction,
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


class SpatialContrastingLoss(nn.Module):
    """Module of :func:`spatial_contrasting_loss`; stores its options."""

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        temperature: float | Tensor = 1.0,
        symmetric: bool = False,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(self, anchors: Tensor, positives: Tensor) -> Any:
        """See :func:`spatial_contrasting_loss`."""
        return spatial_contrasting_loss(
            anchors,
            positives,
            queue=self.queue,
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
        return f"symmetric={self.symmetric}, reduction={self.reduction!r}"
