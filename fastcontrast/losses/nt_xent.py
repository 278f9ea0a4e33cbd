"""NT-Xent: two views of every sample, each contrasted with all others of both views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, with_entries
from fastcontrast.ops.checks import METRICS, check_choice, check_pairs, inverse_temperature
from fastcontrast.ops.contrast_loss import Candidates, Reweighting, contrast_loss
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.ranks import Ranks
from fastcontrast.ops.reduction import REDUCTIONS


def nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    *,
    queue: MemoryQueue | None = None,
    metric: str = "cosine",
    temperature: float | Tensor = 0.5,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    hardness: float = 0.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Pick each view's other view among all 2M - 1 other views.

    .. math::
        \ell_i = -\log \frac{\exp(s_{i p(i)})}{\sum_{j \ne i} \exp(s_{ij})}, \qquad
        p(i) = (i + M) \bmod 2M, \qquad i, j = 1 \dots 2M

    over the rows of both views. Eq. 1 of Chen et al., "A Simple Framework for Contrastive Learning
    of Visual Representations", 2020, arXiv 2002.05709, with :math:`s_{ij} = \cos(z_i, z_j) / \tau`.
    Deviations: other metrics, and the corrections of :func:`fastcontrast.info_nce_loss`; with
    ``tau_plus`` and ``hardness`` it is the loss of arXiv 2007.00224 and 2010.04592.

    Args:
        view1: Embeddings of the first view [M, D], float16, bfloat16, float32 or float64.
        view2: Embeddings of the second view of the same samples [M, D], same device.
        queue: A :class:`fastcontrast.MemoryQueue`, whose entries are further negatives.
        metric: ``"cosine"``, ``"dot"``, ``"l2"`` or ``"sqeuclidean"``.
        temperature: See :func:`fastcontrast.info_nce_loss`.
        label_smoothing: See :func:`fastcontrast.info_nce_loss`.
        tau_plus: See :func:`fastcontrast.info_nce_loss`.
        hardness: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [2M], the first view
            first. The mean of no rows is 0.
        return_stats: See :func:`fastcontrast.info_nce_loss`.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> view = torch.eye(2)
        >>> nt_xent_loss(view, view)  # log(1 + 2 e^-2)
        tensor(0.2395)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_pairs("view1", view1, "view2", view2)
    scale = inverse_temperature(temperature, view1, view2)
    reweighting = Reweighting(label_smoothing, tau_plus, hardness)
    reweighting.check()
    m = view1.shape[0]
    rows = torch.cat([view1, view2])
    further = queue is not None or ranks is not None
    if further and rows.dtype in (torch.float16, torch.bfloat16):
        # Every row is a column too: its two gradients are added before they are rounded.
        rows, precision = rows.float(), of_widened(precision, rows)
    columns = with_entries(rows, queue)
    resident = columns.shape[0] - 2 * m
    own = torch.arange(2 * m, device=rows.device)
    target = own.roll(m)
    return contrast_loss(
        Candidates(rows, columns, target, own, None, None, metric, scale, resident),
        all_pay=True,
        reweighting=reweighting,
        reduction=reduction,
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


class NTXentLoss(nn.Module):
    """Module of :func:`nt_xent_loss`; stores its options.

    A ``temperature`` that is an ``nn.Parameter`` is registered, and so learnt.
    """

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        metric: str = "cosine",
        temperature: float | Tensor = 0.5,
        label_smoothing: float = 0.0,
        tau_plus: float = 0.0,
        hardness: float = 0.0,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.metric = metric
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.tau_plus = tau_plus
        self.hardness = hardness
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(self, view1: Tensor, view2: Tensor) -> Any:
        """See :func:`nt_xent_loss`."""
        return nt_xent_loss(
            view1,
            view2,
            queue=self.queue,
            metric=self.metric,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            tau_plus=self.tau_plus,
            hardness=self.hardness,
            reduction=self.reduction,
            return_stats=self.return_stats,
            ranks=self.ranks,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"metric={self.metric!r}, reduction={self.reduction!r}"
