"""InfoNCE over any metric of the op: cross-entropy of a row's softmax over columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcontrast.ops.checks import (
    METRICS,
    check_choice,
    check_distinct,
    check_indices,
    check_operands,
    inverse_temperature,
)
from fastcontrast.ops.distance_softmax import accumulator_dtype
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.reduction import REDUCTIONS
from fastcontrast.ops.softmax_loss import LossWeights, row_losses_of, softmax_loss


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    metric: str = "l2",
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    reduction: str = "mean",
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Cross-entropy of picking each query's key among all keys, without the M×N score matrix.

    .. math::
        \ell_i = -\log \frac{\exp(s_{i t_i})}{\sum_{j=1}^{N} \exp(s_{ij})}
               = \mathrm{softplus}\Bigl(\log \sum_{j \ne t_i} e^{s_{ij}} - s_{i t_i}\Bigr)

    with :math:`s_{ij} = -\lVert q_i - k_j\rVert / \tau` (``"l2"``),
    :math:`-\lVert q_i - k_j\rVert^2 / \tau` (``"sqeuclidean"``), :math:`q_i \cdot k_j / \tau`
    (``"dot"``) or the same of normalised vectors (``"cosine"``). With ``metric="cosine"`` it is
    Eq. 4 of van den Oord et al., "Representation Learning with Contrastive Predictive Coding",
    2018, arXiv 1807.03748, with a cosine score. No deviation in value; the right-hand form keeps
    the loss and its gradient exact where the left-hand one rounds to 0.

    Equal to ``F.cross_entropy(-torch.cdist(query, key) / temperature, target)`` for ``"l2"``.
    ``symmetric=True`` averages it with the same of the keys, the sum then going over queries: the
    loss of CLIP (Radford et al., 2021, arXiv 2103.00020). Both directions come from one matrix of
    scores, for about 1.4 of the time of one.

    Args:
        query: Queries [M, D], float16, bfloat16, float32 or float64.
        key: Keys [N, D], on the same device.
        target: Column index of each query's key, integer [M]; None for the diagonal (N >= M: keys
            beyond the first M are further negatives). On a GPU and under ``torch.compile`` the
            range is not checked.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        temperature: Distance (or similarity) that changes a score by one nat. Positive; a number or
            a 0-dim tensor, which receives its gradient.
        symmetric: Also pick each query's key's query among all queries, and average the two. No two
            queries may share a key then.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape, the target, the temperature or an option is not as above.
        TypeError: If an argument is not a tensor of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> query = torch.tensor([[0.0], [3.0]])
        >>> key = torch.tensor([[1.0], [3.0]])
        >>> info_nce_loss(query, key, reduction="none")  # log(1 + e^-2) twice
        tensor([0.1269, 0.1269])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_operands("query", query, "key", key)
    scale = inverse_temperature(temperature, query, key)
    m, n = query.shape[0], key.shape[0]
    if metric == "cosine":
        query, key, metric = normalized(query), normalized(key), "dot"
    if target is None:
        if n < m:
            raise ValueError(
                f"target=None pairs query i with key i and needs N >= M, got M={m}, N={n}"
            )
        target = torch.arange(m, device=query.device)
    else:
        target = check_indices("target", target, query, 0, n, "a key's index")
        if symmetric:
            check_distinct("target", target)
    weight = 1.0 / max(1, m) if reduction == "mean" else 1.0
    dtype = accumulator_dtype(torch.promote_types(query.dtype, key.dtype))
    weights = torch.full((m,), weight, dtype=dtype, device=query.device)
    if symmetric:
        weights = LossWeights(weights / 2, None, weights / 2)
    else:
        weights = LossWeights(weights, None)
    loss = row_losses_of if reduction == "none" else softmax_loss
    return loss(
        query,
        key,
        target,
        weights,
        metric=metric,
        scale=scale,
        precision=precision,
        backend=backend,
    )


class InfoNCELoss(nn.Module):
    """Module of :func:`info_nce_loss`; stores its options.

    A ``temperature`` that is an ``nn.Parameter`` is registered, and so learnt.
    """

    def __init__(
        self,
        *,
        metric: str = "l2",
        temperature: float | Tensor = 1.0,
        symmetric: bool = False,
        reduction: str = "mean",
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.metric = metric
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, target: Tensor | None = None) -> Tensor:
        """See :func:`info_nce_loss`."""
        return info_nce_loss(
            query,
            key,
            target,
            metric=self.metric,
            temperature=self.temperature,
            symmetric=self.symmetric,
            reduction=self.reduction,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"metric={self.metric!r}, symmetric={self.symmetric}, reduction={self.reduction!r}"
