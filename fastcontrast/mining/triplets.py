"""Triplets chosen by distance: batch-hard and semi-hard, without the M×N matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.mining.labelled import (
    Labelled,
    is_empty_queue,
    labelled,
    positive_pairs,
)
from fastcontrast.ops.checks import check_choice, check_scale
from fastcontrast.ops.nearest import nearest
from fastcontrast.ops.pairs import CHUNK_ELEMENTS, row_chunks, values_between

POSITIVES = ("all", "nearest", "farthest")
# Nearest negatives that are looked at before all of them are: of pairs that are not yet well apart
# most have a semi-hard negative among so many.
CANDIDATES = 16


class Triplets(NamedTuple):
    """Indices of triplets, int64 [T] each, ordered by anchor.

    A tuple of three, as pytorch-metric-learning's losses take it for ``indices_tuple``.

    Attributes:
        anchor: Rows of the embeddings.
        positive: Rows of the same class, of the references or else of the embeddings.
        negative: Rows of another class, of the references or else of the embeddings.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor

    def take(
        self, embeddings: Tensor, references: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, positives and negatives, [T, D] each, for a loss of triplets; differentiable.

        Example:
            >>> import torch, fastcontrast as fc
            >>> x = torch.tensor([[0.0], [1.0], [1.5]])
            >>> chosen = fc.mining.batch_hard_triplets(x, torch.tensor([0, 0, 1]))
            >>> fc.triplet_margin_loss(*chosen.take(x), reduction="none")
            tensor([0.5000, 1.5000])
        """
        columns = embeddings if references is None else references
        if is_empty_queue(columns):
            columns = embeddings[:0]
        # Not columns[index]: the gradient of that is not deterministic on two threads.
        return (
            F.embedding(self.anchor, embeddings),
            F.embedding(self.positive, columns),
            F.embedding(self.negative, columns),
        )

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positive and then negative pairs, each once, for a loss of pairs.

        Returns:
            Anchors int64 [P], their partners int64 [P], and whether they are of one class, bool
            [P]: ``siamese_contrastive_loss(x[rows], x[columns], same)``.
        """
        positive = torch.stack([self.anchor, self.positive], 1).unique(dim=0)
        negative = torch.stack([self.anchor, self.negative], 1).unique(dim=0)
        rows, columns = torch.cat([positive, negative]).unbind(1)
        return rows, columns, torch.arange(len(rows), device=rows.device) < len(positive)


def batch_hard_triplets(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    metric: str = "l2",
    backend: str | None = None,
) -> Triplets:
    r"""For every anchor its farthest positive and its nearest negative.

    .. math:: p_i = \arg\max_{j:\, c_j = c_i,\, j \ne i} d(x_i, y_j), \qquad
        n_i = \arg\min_{j:\, c_j \ne c_i} d(x_i, y_j)

    Eq. 5 of Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification", 2017, arXiv 1703.07737. Without references it is ``BatchHardMiner`` of
    pytorch-metric-learning. Two searches of :func:`fastcontrast.nearest`, in O((M+N)·D) memory; at
    equal distance the lower index is taken.

    Anchors without a positive or without a negative give no triplet. An anchor whose distances are
    NaN keeps its triplet, so that the loss shows it.

    Args:
        embeddings: Anchors [M, D], float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        references: What positives and negatives are chosen from, [N, D], such as the embeddings of
            a :class:`fastcontrast.MemoryQueue`, empty at first; None for the embeddings, without
            each one itself.
        reference_labels: Their class ids, integer [N], with ``references``.
        own: With ``references``, the index among them of each anchor itself, integer [M], which is
            then no positive; -1 for none.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``; of similarities the
            smallest is the farthest.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        :class:`Triplets`, at most M. How many is known on the host: a GPU is waited for.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not a tensor of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [2.0]])
        >>> batch_hard_triplets(x, torch.tensor([0, 0, 0, 1])).positive
        tensor([2, 2, 0])
    """
    batch = labelled(embeddings, labels, references, reference_labels, own)
    positive = _extreme_positive(batch, metric, farthest=True, backend=backend)
    negative = _nearest_negatives(batch, 1, metric, backend)[:, 0]
    anchor = ((positive >= 0) & (negative >= 0)).nonzero()[:, 0]
    return Triplets(anchor, positive[anchor], negative[anchor])


def semi_hard_triplets(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    positive: str = "all",
    margin: float | None = None,
    metric: str = "l2",
    backend: str | None = None,
) -> Triplets:
    r"""For every anchor and positive the nearest negative that is farther than the positive.

    .. math:: n = \arg\min_{j:\, c_j \ne c_a} d(a, y_j) \quad\text{with}\quad
        d(a, p) < d(a, y_j) < d(a, p) + m

    Eq. 4 of Schroff, Kalenichenko and Philbin, "FaceNet", 2015, arXiv 1503.03832, with squared
    distances of unit vectors and m = 0.2 there; which of the negatives is taken the paper does not
    say. With ``positive="nearest"`` or ``"farthest"`` and no margin it is ``BatchEasyHardMiner``
    of pytorch-metric-learning with semi-hard negatives.

    Pairs without such a negative give no triplet. The 16 nearest negatives come from
    :func:`fastcontrast.nearest`; pairs with more than those before the positive are compared with
    all columns, in blocks of rows and by direct difference. Memory is O((M+N)·D + T). Negatives
    exactly as far as the positive are not farther. A pair whose distance is NaN keeps a triplet,
    so that the loss shows it.

    Args:
        embeddings: Anchors [M, D], float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        references: See :func:`batch_hard_triplets`.
        reference_labels: See :func:`batch_hard_triplets`.
        own: See :func:`batch_hard_triplets`.
        positive: ``"all"`` positives of an anchor, or its ``"nearest"`` or ``"farthest"``.
        margin: m, positive, in units of the metric; None for no upper end.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``; of similarities the sign is
            turned.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        :class:`Triplets`, at most one per pair. How many is known on the host: a GPU is waited for.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0], [1.0], [4.0]])
        >>> semi_hard_triplets(x, torch.tensor([0, 0, 1, 1]))
        Triplets(anchor=tensor([0, 3]), positive=tensor([1, 2]), negative=tensor([3, 0]))
    """
    check_choice("positive", positive, POSITIVES)
    if margin is not None:
        check_scale("margin", margin)
    batch = labelled(embeddings, labels, references, reference_labels, own)
    if positive == "all":
        anchor, chosen = positive_pairs(batch.labels, batch.column_labels, batch.own)
    else:
        farthest = positive == "farthest"
        column = _extreme_positive(batch, metric, farthest=farthest, backend=backend)
        anchor = (column >= 0).nonzero()[:, 0]
        chosen = column[anchor]
    candidates = _nearest_negatives(batch, CANDIDATES, metric, backend)
    limit = float("inf") if margin is None else float(margin)
    negative = _semi_hard_negatives(batch, anchor, chosen, candidates, metric, limit)
    kept = negative >= 0
    return Triplets(anchor[kept], chosen[kept], negative[kept])


def _extreme_positive(
    batch: Labelled, metric: str, *, farthest: bool, backend: str | None
) -> Tensor:
    """The nearest or farthest column of each row's class but its own, [M]; -1 for none."""
    return nearest(
        batch.x, batch.y, metric=metric, farthest=farthest, exclude=batch.own,
        row_ids=batch.labels, column_ids=batch.column_labels, keep="same", backend=backend,
    ).indices[:, 0]  # fmt: skip


def _nearest_negatives(batch: Labelled, k: int, metric: str, backend: str | None) -> Tensor:
    """The k nearest columns of other classes, [M, k]; -1 where there are fewer."""
    return nearest(
        batch.x, batch.y, k, metric=metric, row_ids=batch.labels, column_ids=batch.column_labels,
        keep="different", backend=backend,
    ).indices  # fmt: skip


def _semi_hard_negatives(
    batch: Labelled, anchor: Tensor, positive: Tensor, candidates: Tensor, metric: str, limit: float
) -> Tensor:
    """The semi-hard negative of each pair [T], -1 for none, from candidates [M, k] or from all."""
    negative, open_pairs = [anchor[:0]], [anchor[:0]]
    k, dim = candidates.shape[1], max(1, batch.x.shape[1])
    step = max(1, CHUNK_ELEMENTS // ((k + 1) * dim))
    for start in range(0, len(anchor), step):
        a, p = anchor[start : start + step], positive[start : start + step]
        columns = torch.cat([p[:, None], candidates[a].clamp(min=0)], 1)
        # The positive beside the candidates, so that what ties is rounded alike.
        values = _farness(batch.x[a][:, None], batch.y[columns], metric)[:, 0]
        bound, values = values[:, :1], values[:, 1:]
        found = candidates[a] >= 0
        good = found & _semi_hard(values, bound, limit)
        first = good.int().argmax(1, keepdim=True)  # of equal ones argmax takes the first
        negative.append(torch.where(good.any(1), candidates[a].gather(1, first)[:, 0], -1))
        farther_ones_left = (found & (values <= bound)).all(1)
        open_pairs.append(farther_ones_left.nonzero()[:, 0] + start)
    result, pairs = torch.cat(negative), torch.cat(open_pairs)
    for rows in row_chunks(pairs, batch.y):
        a, p = anchor[pairs[rows]], positive[pairs[rows]]
        rows_once, which = torch.unique_consecutive(a, return_inverse=True)
        values = _farness(batch.x[rows_once], batch.y, metric)[which]
        good = batch.labels[a][:, None] != batch.column_labels
        good &= _semi_hard(values, values.gather(1, p[:, None]), limit)
        best = torch.where(good, values, torch.inf).argmin(1)
        result[pairs[rows]] = torch.where(good.any(1), best, -1)
    return result


def _semi_hard(values: Tensor, bound: Tensor, limit: float) -> Tensor:
    return ((values > bound) & (values < bound + limit)) | bound.isnan()


def _farness(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distances, or similarities with the sign turned, [..., M, N] in float64."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    values = values_between(x.to(dtype), y.to(dtype), metric)
    return -values if metric in ("dot", "cosine") else values
