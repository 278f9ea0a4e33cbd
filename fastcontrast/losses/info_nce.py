"""InfoNCE over any metric of the op: cross-entropy of a row's softmax over columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, with_entries
from fastcontrast.ops.checks import (
    METRICS,
    check_choice,
    check_distinct,
    check_operands,
    check_row_weight,
    check_targets,
    inverse_temperature,
)
from fastcontrast.ops.contrast_loss import Candidates, Reweighting, contrast_loss
from fastcontrast.ops.ranks import Ranks
from fastcontrast.ops.reduction import REDUCTIONS


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    queue: MemoryQueue | None = None,
    metric: str = "l2",
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    in_batch: bool = True,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    hardness: float = 0.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
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

    Two corrections of the sum over the N negatives of a row may be asked for, together or alone:

    .. math::
        \sum_j e^{s_{ij}} \;\to\; N \max\Bigl(\frac{1}{1 - \tau^+}\Bigl[
        \frac{\sum_j e^{(1 + \beta) s_{ij}}}{\sum_j e^{\beta s_{ij}}} - \tau^+ e^{s_{i t_i}}\Bigr],
        \; e^{s_{\min}}\Bigr)

    :math:`\tau^+`: Chuang et al., "Debiased Contrastive Learning", 2020, arXiv 2007.00224;
    :math:`\beta`: Robinson et al., "Contrastive Learning with Hard Negative Samples", 2021, arXiv
    2010.04592, with gradients through the weights, as in its code. :math:`s_{\min}`, the least
    that a score can be, is :math:`-1/\tau` for ``"cosine"`` and ``"dot"`` (which supposes unit
    vectors) and :math:`-\infty` for distances.

    Args:
        query: Queries [M, D], float16, bfloat16, float32 or float64.
        key: Keys [N, D], on the same device.
        target: Column index of each query's key, integer [M]; None for the diagonal (N >= M: keys
            beyond the first M are further negatives). On a GPU and under ``torch.compile`` the
            range is not checked.
        negatives: Further keys: [H, D] for all queries, or [M, K, D] for each query alone.
        queue: A :class:`fastcontrast.MemoryQueue`, whose entries are further keys for all queries.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        temperature: Distance (or similarity) that changes a score by one nat. Positive; a number or
            a 0-dim tensor, which receives its gradient.
        symmetric: Also pick each query's key's query among all queries, and average the two. No two
            queries may share a key then. Further keys are nobody's, and count for queries alone.
        in_batch: False contrasts with ``negatives`` and ``queue`` alone, not with the keys of other
            queries, as MoCo does; ``target`` is None then and M = N.
        row_weight: Weight of each row [M], floating point; carries no gradient.
        ignore_index: The target of a row that pays nothing; as a column, for the other direction of
            a symmetric loss, it still counts.
        label_smoothing: :math:`\varepsilon` in [0, 1), as in ``F.cross_entropy``.
        tau_plus: :math:`\tau^+` in [0, 1): how probably a negative is of the positive's class.
        hardness: :math:`\beta` >= 0: how much harder negatives weigh more.
        reduction: ``"mean"`` (weighted, over the rows that pay) and ``"sum"`` give a scalar,
            ``"none"`` gives [M]. The mean of no rows is 0, with gradient 0.
        return_stats: Figures to return beside the loss, from the same scores: some of ``"lse"``,
            ``"entropy"``, ``"rank"``, ``"top1"``, ``"recall@5"`` (any k), ``"alignment"`` and
            ``"uniformity"``, of queries against keys.
        ranks: A :class:`fastcontrast.distributed.Ranks`, if the batch is spread over its ranks: the
            loss is then that of the whole. None for this process alone.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs). With ``return_stats``,
        ``(loss, stats)``, a NamedTuple with :class:`fastcontrast.LossStatistics`.

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
        >>> loss, stats = info_nce_loss(query, key, return_stats=("rank", "top1"))
        >>> stats.rank, stats.top1
        (tensor([0, 0]), tensor(1.))
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_operands("query", query, "key", key)
    scale = inverse_temperature(temperature, query, key)
    reweighting = Reweighting(label_smoothing, tau_plus, hardness)
    reweighting.check()
    if row_weight is not None:
        check_row_weight(row_weight, query)
    diagonal = target is None
    target, all_pay = _targets(query, key, target, ignore_index, in_batch)
    if symmetric:
        if not diagonal:
            check_distinct("target", target)
        if not in_batch or (negatives is not None and negatives.dim() == 3):
            raise ValueError("symmetric needs in_batch=True and no negatives [M, K, D]")
    shared, own = _further_keys(negatives, query)
    positive = None if in_batch else key
    columns = with_entries(key if in_batch else key[:0], queue, shared)
    resident = 0 if queue is None else len(queue)
    return contrast_loss(
        Candidates(query, columns, target, None, positive, own, metric, scale, resident),
        symmetric=symmetric,
        row_weight=row_weight,
        all_pay=all_pay,
        reweighting=reweighting,
        reduction=reduction,
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


def _targets(
    query: Tensor, key: Tensor, target: Tensor | None, ignore_index: int, in_batch: bool
) -> tuple[Tensor, bool]:
    """Column of each query's key, int64 [M], -1 where ignored, and whether none is."""
    m, n = query.shape[0], key.shape[0]
    if not in_batch and (target is not None or m != n):
        raise ValueError(
            f"in_batch=False pairs query i with key i and needs target=None and M = N, got M={m}, "
            f"N={n}"
        )
    if target is not None:
        if n == 0 and m > 0:
            raise ValueError("key must hold at least one row, got shape [0, D]")
        return check_targets(target, query, n, ignore_index)
    if n < m:
        raise ValueError(f"target=None pairs query i with key i and needs N >= M, got M={m}, N={n}")
    return torch.arange(m, device=query.device), True


def _further_keys(negatives: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Negatives of all queries [H, D] and of each query alone [M, K, D]."""
    if negatives is None:
        return None, None
    if not isinstance(negatives, Tensor) or negatives.dim() != 3:
        check_operands("negatives", negatives, "query", query)
        return negatives, None
    check_operands("negatives", negatives.flatten(0, 1), "query", query)
    if negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives must have shape [H, D] or [M, K, D] with M={query.shape[0]}, got "
            f"{list(negatives.shape)}"
        )
    return None, negatives


class InfoNCELoss(nn.Module):
    """Module of :func:`info_nce_loss`; stores its options.

    A ``temperature`` that is an ``nn.Parameter`` is registered, and so learnt; a ``queue`` moves
    and is saved with the module.
    """

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        metric: str = "l2",
        temperature: float | Tensor = 1.0,
        symmetric: bool = False,
        in_batch: bool = True,
        ignore_index: int = -100,
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
        self.symmetric = symmetric
        self.in_batch = in_batch
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.tau_plus = tau_plus
        self.hardness = hardness
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        target: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Any:
        """See :func:`info_nce_loss`."""
        return info_nce_loss(
            query,
            key,
            target,
            negatives=negatives,
            queue=self.queue,
            metric=self.metric,
            temperature=self.temperature,
            symmetric=self.symmetric,
            in_batch=self.in_batch,
            row_weight=row_weight,
            ignore_index=self.ignore_index,
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
        return f"metric={self.metric!r}, symmetric={self.symmetric}, reduction={self.reduction!r}"
