"""Proxy-NCA: rows against one learnt proxy per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.ops.checks import (
    METRICS,
    check_choice,
    check_count,
    check_indices,
    check_operands,
    inverse_temperature,
)
from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.reduction import REDUCTIONS, reduce


def proxy_nca_loss(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    normalize: bool = True,
    positive_in_sum: bool = True,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
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
        normalize: Divide rows and proxies by their lengths first.
        positive_in_sum: Whether the sum has the row's own class.
        metric: ``"sqeuclidean"``, ``"l2"``, ``"cosine"`` or ``"dot"``.
        temperature: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs).

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
    options = {"precision": precision, "backend": backend}
    if normalize or metric == "cosine":
        embeddings, proxies = normalized(embeddings), normalized(proxies)
        metric = "dot" if metric == "cosine" else metric
    if positive_in_sum:
        return info_nce_loss(
            embeddings,
            proxies,
            target,
            metric=metric,
            temperature=temperature,
            reduction=reduction,
            **options,
        )
    if torch.promote_types(embeddings.dtype, proxies.dtype) in (torch.float16, torch.bfloat16):
        embeddings, proxies, options["precision"] = embeddings.float(), proxies.float(), "ieee"
    scale = inverse_temperature(temperature, embeddings, proxies)
    others = distance_softmax(
        embeddings, proxies, metric=metric, scale=scale, exclude=target, **options
    )
    own = torch.nn.functional.embedding(target, proxies)
    return reduce(
        others.lse - paired_scores(embeddings, own, metric=metric, scale=scale), reduction
    )


class ProxyNCALoss(nn.Module):
    """Module of :func:`proxy_nca_loss`, which holds the proxies.

    Args:
        classes: Number of classes C.
        dim: Length D of an embedding.
        normalize: See :func:`proxy_nca_loss`.
        positive_in_sum: See :func:`proxy_nca_loss`.
        metric: See :func:`proxy_nca_loss`.
        temperature: See :func:`proxy_nca_loss`.
        reduction: See :func:`proxy_nca_loss`.
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
        normalize: bool = True,
        positive_in_sum: bool = True,
        metric: str = "sqeuclidean",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_count("classes", classes)
        check_count("dim", dim)
        self.proxies = nn.Parameter(torch.randn(classes, dim))
        self.normalize = normalize
        self.positive_in_sum = positive_in_sum
        self.metric = metric
        self.temperature = temperature
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See :func:`proxy_nca_loss`."""
        return proxy_nca_loss(
            embeddings,
            labels,
            self.proxies,
            normalize=self.normalize,
            positive_in_sum=self.positive_in_sum,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"metric={self.metric!r}, normalize={self.normalize}"
