"""Neighbourhood components analysis: the softmax share of a row's class among its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, labelled_columns
from fastcontrast.ops.checks import METRICS, check_choice, inverse_temperature
from fastcontrast.ops.label_softmax import class_statistics
from fastcontrast.ops.ranks import Ranks, several
from fastcontrast.ops.reduction import REDUCTIONS

OBJECTIVES = ("nll", "error")


def nca_loss(
    embeddings: Tensor,
    labels: Tensor,
    key: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    queue: MemoryQueue | None = None,
    objective: str = "nll",
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Raise the probability that a stochastic nearest neighbour has the row's class.

    .. math::
        p_i = \frac{\sum_{j \in P_i} e^{-d_{ij}^2 / \tau}}
                   {\sum_{j \ne i} e^{-d_{ij}^2 / \tau}}, \qquad
        \ell_i = -\log p_i \;(\text{"nll"}) \quad\text{or}\quad \ell_i = 1 - p_i \;(\text{"error"})

    with :math:`P_i` the other rows of i's class. Goldberger et al., "Neighbourhood Components
    Analysis", NIPS 2004: Eqs. 1 to 3 maximise the sum of p ("error"), Section 2 proposes that of
    log p too ("nll"). Deviations: the temperature, and other metrics.

    Args:
        embeddings: [M, D], float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        key: What they are compared with [N, D]; None for themselves, no row with itself.
        key_labels: Class ids of the keys, integer [N], with ``key``.
        queue: A :class:`fastcontrast.MemoryQueue` with labels, whose entries are further keys.
        objective: ``"nll"`` or ``"error"``.
        metric: ``"sqeuclidean"``, ``"l2"``, ``"cosine"`` or ``"dot"``.
        temperature: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` (over the rows that have a positive; of none, 0) and ``"sum"`` give a
            scalar, ``"none"`` gives [M].
        return_stats: Figures to return beside the loss, as of :func:`fastcontrast.info_nce_loss`;
            the rank is that of the best positive, for which it is searched, and ``"alignment"``
            averages over all positive pairs, a pass of its own.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss, in nats for ``"nll"`` and in [0, 1] for ``"error"``, float32 (float64 for float64
        inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If a shape or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [0.0], [1.0]])
        >>> nca_loss(x, torch.tensor([0, 0, 1]), reduction="none")  # log(1 + 1 / e), no positive
        tensor([0.3133, 0.3133, 0.0000])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_choice("objective", objective, OBJECTIVES)
    ranks = several(ranks)
    columns = labelled_columns(embeddings, labels, key, key_labels, queue)
    found = class_statistics(
        embeddings,
        columns.keys,
        labels,
        columns.labels,
        columns.own,
        metric=metric,
        scale=inverse_temperature(temperature, embeddings, columns.keys),
        return_stats=return_stats,
        ranks=ranks,
        resident=0 if queue is None else len(queue),
        precision=precision,
        backend=backend,
    )
    loss = found.share_loss if objective == "nll" else found.gap.sigmoid()
    return found.reduced(loss, reduction)


class NCALoss(nn.Module):
    """Module of :func:`nca_loss`; stores its options."""

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        objective: str = "nll",
        metric: str = "sqeuclidean",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.objective = objective
        self.metric = metric
        self.temperature = temperature
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        key: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Any:
        """See :func:`nca_loss`."""
        return nca_loss(
            embeddings,
            labels,
            key,
            key_labels,
            queue=self.queue,
            objective=self.objective,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            return_stats=self.return_stats,
            ranks=self.ranks,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"objective={self.objective!r}, metric={self.metric!r}, reduction={self.reduction!r}"
