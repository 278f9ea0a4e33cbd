"""Supervised contrastive learning: several positives per row, by class ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, labelled_columns
from fastcontrast.ops.checks import METRICS, check_choice, inverse_temperature
from fastcontrast.ops.label_softmax import class_statistics
from fastcontrast.ops.ranks import Ranks, several
from fastcontrast.ops.reduction import REDUCTIONS

FORMS = ("out", "in")


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    key: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    queue: MemoryQueue | None = None,
    form: str = "out",
    metric: str = "cosine",
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Pull together rows of one class, against all others; no mask of pairs is written.

    .. math::
        \ell_i^{\mathrm{out}} = -\frac{1}{|P_i|} \sum_{p \in P_i}
            \log \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}}, \qquad
        \ell_i^{\mathrm{in}} = -\log \Bigl[\frac{1}{|P_i|} \sum_{p \in P_i}
            \frac{e^{s_{ip}}}{\sum_{a \ne i} e^{s_{ia}}}\Bigr]

    with :math:`P_i` the other rows of i's class. Eqs. 2 and 3 of Khosla et al., "Supervised
    Contrastive Learning", 2020, arXiv 2004.11362, with :math:`s_{ij} = \cos(z_i, z_j) / \tau`.
    Deviations: other metrics; the published code multiplies by :math:`\tau / 0.07`. Formed as
    softplus of the difference between two log-sum-exps, which keeps small losses exact.

    Args:
        embeddings: [M, D], float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        key: What they are compared with [N, D]; None for themselves, no row with itself.
        key_labels: Class ids of the keys, integer [N], with ``key``.
        queue: A :class:`fastcontrast.MemoryQueue` with labels, whose entries are further keys.
        form: ``"out"`` (the paper's choice) or ``"in"``: the mean over positives outside or inside
            of the logarithm.
        metric: ``"cosine"``, ``"dot"``, ``"l2"`` or ``"sqeuclidean"``.
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
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If a shape or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.eye(2).repeat(2, 1)
        >>> supcon_loss(x, torch.tensor([0, 1, 0, 1]), temperature=1.0)  # log(1 + 2 / e)
        tensor(0.5514)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_choice("form", form, FORMS)
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
    if form == "in":
        loss = found.share_loss + found.positive_count.log()
    else:
        loss = found.share_loss + found.positive_lse - found.positive_sum / found.positive_count
    return found.reduced(loss, reduction)


class SupConLoss(nn.Module):
    """Module of :func:`supcon_loss`; stores its options."""

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        form: str = "out",
        metric: str = "cosine",
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.form = form
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
        """See :func:`supcon_loss`."""
        return supcon_loss(
            embeddings,
            labels,
            key,
            key_labels,
            queue=self.queue,
            form=self.form,
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
        return f"form={self.form!r}, metric={self.metric!r}, reduction={self.reduction!r}"
