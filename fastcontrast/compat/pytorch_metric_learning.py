"""`pytorch-metric-learning`: its softmax losses, with distances, miners, reducers and references.

``from fastcontrast.compat.pytorch_metric_learning import NTXentLoss``. The classes are subclasses
of the library's own, so that wrappers, loggers and checkpoints know them.
"""

# Where the library is not installed, pyright takes this file for it.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from fastcontrast.losses.nca import nca_loss
from fastcontrast.mining.labelled import positive_pairs
from fastcontrast.ops.checks import inverse_temperature
from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.label_softmax import ClassStatistics, class_statistics
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.softmax_loss import softplus

POWERS = {1: "l2", 2: "sqeuclidean"}
# Pairs whose embeddings are held at once, in numbers: 64 MiB in float32.
BLOCK_NUMBERS = 1 << 24


def metric_of(distance: Any) -> tuple[str, bool]:
    """Metric of a distance object, and whether it normalises; raises for one without a kernel."""
    kind = type(distance)
    if kind is distances.LpDistance and distance.p == 2 and distance.power in POWERS:
        return POWERS[distance.power], distance.normalize_embeddings
    similarity = kind in (distances.CosineSimilarity, distances.DotProductSimilarity)
    if similarity and distance.power == 1 and distance.p == 2:
        return "dot", distance.normalize_embeddings
    raise ValueError(
        "distance must be LpDistance(p=2, power=1 or 2), CosineSimilarity() or "
        f"DotProductSimilarity(), got {distance!r}"
    )


class _Operands:
    """Embeddings and references as a distance object sees them, with ids and own columns."""

    def __init__(
        self, distance: Any, embeddings: Tensor, labels: Any, ref_emb: Tensor, ref_labels: Any
    ) -> None:
        self.metric, normalize = metric_of(distance)
        self.precision = of_widened("auto", embeddings, ref_emb) if normalize else "auto"
        self.x = normalized(embeddings) if normalize else embeddings
        same = ref_emb is embeddings
        self.y = self.x if same else normalized(ref_emb) if normalize else ref_emb
        self.labels, self.ref_labels = labels, ref_labels
        # The library leaves out the diagonal where both label arguments are one object.
        self.own = torch.arange(len(embeddings), device=embeddings.device)
        self.own = self.own if ref_labels is labels else None

    def pair_scores(self, rows: Tensor, columns: Tensor, scale: float | Tensor) -> Tensor:
        """Scores of pairs [P], without a matrix."""
        step = max(1, BLOCK_NUMBERS // max(1, self.x.shape[1]))
        parts = [
            paired_scores(self.x[a], self.y[b], metric=self.metric, scale=scale)
            for a, b in zip(rows.split(step), columns.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else self.x.new_empty(0)

    def of_classes(self, scale: float | Tensor) -> ClassStatistics:
        """Statistics of each row's class and of the others."""
        return class_statistics(
            self.x, self.y, self.labels, self.ref_labels, self.own, metric=self.metric,
            scale=scale, precision=self.precision, backend=None,
        )  # fmt: skip

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """Every (row, column) of one class, by row, without a matrix of matches."""
        return positive_pairs(self.labels, self.ref_labels, self.own)


def _sums_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Log-sum-exp of values [P] by row [count]; -inf for a row without one."""
    top = values.new_full((count,), -torch.inf)
    top = top.scatter_reduce(0, rows, values.detach(), "amax")
    finite = torch.where(torch.isneginf(top), 0.0, top)
    total = values.new_zeros(count).index_add(0, rows, (values - finite[rows]).exp())
    some = total > 0
    return torch.where(some, torch.where(some, total, 1.0).log() + finite, -torch.inf)


class NTXentLoss(losses.NTXentLoss):
    """The library's ``NTXentLoss`` in O(N·D + P·D) memory, P the number of positive pairs.

    The library writes a matrix of positive by negative pairs, O(N³) in all. Every loss is
    ``softplus(lse of the anchor's negatives - score of the pair)``.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict:
        """Losses of all positive pairs, or of those that a miner chose."""
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple cannot both be None")
        operands = _Operands(self.distance, embeddings, labels, ref_emb, ref_labels)
        scale = inverse_temperature(self.temperature, operands.x)
        if indices_tuple is None:
            a, p = operands.positive_pairs()
            lse = distance_softmax(
                operands.x, operands.y, metric=operands.metric, scale=scale, keep="different",
                row_ids=labels, column_ids=ref_labels,
            ).lse  # fmt: skip
            any_negative = bool((~torch.isneginf(lse)).any())
        else:
            a, p, a2, n = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            lse = _sums_by_row(operands.pair_scores(a2, n, scale), a2, len(embeddings))
            any_negative = len(a2) > 0
        if len(a) == 0 or not any_negative:
            return self.zero_losses()
        loss = softplus(lse[a] - operands.pair_scores(a, p, scale))
        return {"loss": {"losses": loss, "indices": (a, p), "reduction_type": "pos_pair"}}


class SupConLoss(losses.SupConLoss):
    """The library's ``SupConLoss`` without matrices of scores and masks."""

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict:
        """Loss of every row; 0 without a positive, which the default reducer leaves out."""
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple cannot both be None")
        operands = _Operands(self.distance, embeddings, labels, ref_emb, ref_labels)
        scale = inverse_temperature(self.temperature, operands.x)
        if indices_tuple is None and labels is not None:
            found = operands.of_classes(scale)
            one_class = len(torch.unique(torch.cat([labels, operands.ref_labels]))) < 2
            if one_class or not found.pays.any():
                return self.zero_losses()
            loss = found.share_loss + found.positive_lse
            loss = loss - found.positive_sum / found.positive_count
            loss = torch.where(found.pays, loss, 0.0)
        else:
            loss = self._of_pairs(operands, indices_tuple, scale)
            if loss is None:
                return self.zero_losses()
        return {
            "loss": {
                "losses": loss,
                "indices": torch.arange(len(embeddings), device=embeddings.device),
                "reduction_type": "element",
            }
        }

    @staticmethod
    def _of_pairs(operands: _Operands, indices_tuple: Any, scale: float | Tensor) -> Tensor | None:
        """Losses from the pairs that a miner chose, each counted once."""
        a, p, a2, n = loss_and_miner_utils.convert_to_pairs(
            indices_tuple, operands.labels, operands.ref_labels
        )
        if len(a) == 0 or len(a2) == 0:
            return None
        m, width = len(operands.x), len(operands.y)
        positives, negatives = torch.unique(a * width + p), torch.unique(a2 * width + n)
        rows = positives // width
        scores = operands.pair_scores(rows, positives % width, scale)
        others = operands.pair_scores(negatives // width, negatives % width, scale)
        lse = _sums_by_row(scores, rows, m)
        pays = ~torch.isneginf(lse)
        lse = torch.where(pays, lse, 0.0)
        gap = _sums_by_row(others, negatives // width, m) - lse
        number = torch.zeros_like(lse).index_add(0, rows, torch.ones_like(scores))
        mean = torch.zeros_like(lse).index_add(0, rows, scores) / number.clamp(min=1)
        return torch.where(pays, softplus(gap) + lse - mean, 0.0)


class _WithoutMatrix:
    """`nca_computation` of the library's NCA losses, on the kernels."""

    distance: Any
    softmax_scale: float
    zero_losses: Any

    def nca_computation(
        self,
        query: Tensor,
        reference: Tensor,
        query_labels: Tensor,
        reference_labels: Tensor,
        indices_tuple: Any,
    ) -> dict:
        """Losses of the rows that have a positive, weighted as a miner says."""
        weights = loss_and_miner_utils.convert_to_weights(
            indices_tuple, query_labels, dtype=query.dtype, using_ref=query is not reference
        )
        operands = _Operands(self.distance, query, query_labels, reference, reference_labels)
        keys: dict = {"key": operands.y, "key_labels": reference_labels}
        counts = torch.isin(query_labels, reference_labels)
        if query is reference:
            keys = {}
            _, place, number = torch.unique(query_labels, return_inverse=True, return_counts=True)
            counts = number[place] > 1
        if not counts.any():  # the library's mean is NaN here
            return self.zero_losses()
        loss = nca_loss(
            operands.x, query_labels, metric=operands.metric, temperature=1 / self.softmax_scale,
            reduction="none", **keys,
        )  # fmt: skip
        return {
            "loss": {
                "losses": loss[counts] * weights[counts],
                "indices": torch.arange(len(query), device=query.device)[counts],
                "reduction_type": "element",
            }
        }


class NCALoss(_WithoutMatrix, losses.NCALoss):
    """The library's ``NCALoss`` without the matrix of scores.

    Rows whose softmax share rounds to 0 keep their loss; the library drops them, which are the
    worst ones.
    """


class ProxyNCALoss(_WithoutMatrix, losses.ProxyNCALoss):
    """The library's ``ProxyNCALoss`` without the matrix of scores; see :class:`NCALoss`."""
