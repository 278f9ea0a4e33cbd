"""Proxy-NCA: rows against one learnt proxy per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, with_entries
from fastcontrast.ops.checks import (
    METRICS,
    check_choice,
    check_count,
    check_indices,
    check_operands,
    inverse_temperature,
)
from fastcontrast.ops.contrast_loss import Candidates, Reweighting, contrast_loss
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.reduction import REDUCTIONS


def proxy_nca_loss(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    queue: MemoryQueue | None = None,
    normalize: bool = True,
    positive_in_sum: bool = True,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Pick each row's class among all proxies.

    .. math::
        \ell_i = -\log \frac{e^{-\lVert x_i - p_{y_i} \rVert^2 / \tau}}
                            {\sum_{c \in C_i} e^{-\lVert x_i - p_c \rVert^2 / \tau}}

    with :math:`x` and :math:`p` of length 1. :math:`C_i` are all classes, as in Teh, DeVries and
    Taylor, "ProxyNCA++", 2020, arXiv 2004.01113, or with ``positive_in_sum=False`` those other than
    :math:`y_i`: Eq. 4 of Movshovitz-Attias et al., "No Fuss Distance Metric Learning using
    Proxies", 2017, arXiv 1703.07464, a loss that has no lower bound. Deviation: other metrics.

    Args:
        embeddings: Rows x [M, D], float16, bfloat16, float32 or float64.
        labels: Class of each row, integer [M] in 0..C-1.
        proxies: p [C, D], same device; they receive gradients.
        queue: A :class:`fastcontrast.MemoryQueue`, whose entries are further negatives of all rows.
        normalize: Divide rows and proxies by their lengths first.
        positive_in_sum: Whether the sum has the row's own class.
        metric: ``"sqeuclidean"``, ``"l2"``, ``"cosine"`` or ``"dot"``.
        temperature: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        return_stats: See :func:`fastcontrast.info_nce_loss`; of rows against proxies.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If a shape, a label or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> proxy_nca_loss(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))  # log(1 + e^-2)
        tensor(0.1269)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_operands("embeddings", embeddings, "proxies", proxies)
    if proxies.shape[0] < 2 and not positive_in_sum:
        raise ValueError(f"proxies must be of at least two classes, got {list(proxies.shape)}")
    target = check_indices("labels", labels, embeddings, 0, proxies.shape[0], "a class")
    columns = with_entries(proxies, queue)
    scale = inverse_temperature(temperature, embeddings, columns)
    if normalize and metric == "dot":
        metric = "cosine"
    elif normalize and metric != "cosine":
        precision = of_widened(precision, embeddings, columns)
        embeddings, columns = normalized(embeddings), normalized(columns)
    return contrast_loss(
        Candidates(embeddings, columns, target, None, None, None, metric, scale),
        all_pay=True,
        reweighting=Reweighting(positive_in_sum=positive_in_sum),
        reduction=reduction,
        return_stats=return_stats,
        precision=precision,
        backend=backend,
    )


class ProxyNCALoss(nn.Module):
    """Module of :func:`proxy_nca_loss`, which holds the proxies.

    Args:
        classes: Number of classes C.
        dim: Length D of an embedding.
        queue: See :func:`proxy_nca_loss`.
        normalize: See :func:`proxy_nca_loss`.
        positive_in_sum: See :func:`proxy_nca_loss`.
        metric: See :func:`proxy_nca_loss`.
        temperature: See :func:`proxy_nca_loss`.
        reduction: See :func:`proxy_nca_loss`.
        return_stats: See :func:`proxy_nca_loss`.
        precision: See :func:`proxy_nca_loss`.
        backend: See :func:`proxy_nca_loss`.

    Attributes:
        proxies: Parameter [C, D], drawn from a normal distribution.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        queue: MemoryQueue | None = None,
        normalize: bool = True,
        positive_in_sum: bool = True,
        metric: str = "sqeuclidean",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_count("classes", classes)
        check_count("dim", dim)
        self.proxies = nn.Parameter(torch.randn(classes, dim))
        self.queue = queue
        self.normalize = normalize
        self.positive_in_sum = positive_in_sum
        self.metric = metric
        self.temperature = temperature
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.precision = precision
        self.backend = backend

    def forward(self, embeddings: Tensor, labels: Tensor) -> Any:
        """See :func:`proxy_nca_loss`."""
        return proxy_nca_loss(
            embeddings,
            labels,
            self.proxies,
            queue=self.queue,
            normalize=self.normalize,
            positive_in_sum=self.positive_in_sum,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            return_stats=self.return_stats,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"metric={self.metric!r}, normalize={self.normalize}"
