r"""Cross-entropy of one positive per row against negatives, with all that a loss may add to it.

.. math::
    L = \sum_i w_i \Bigl[\mathrm{softplus}(n_i - s_i^+) + \varepsilon\,(s_i^+ - \bar s_i)\Bigr]

where :math:`n_i` is the log-sum-exp of row i's negatives, debiased or with hard ones weighted up,
and the second term is label smoothing. Plain losses take their gradients in the forward pass
(``ops/softmax_loss.py``), the others through ``distance_softmax``. Called by
``fastcontrast/losses``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast.backends.scores import Scores, transposed
from fastcontrast.ops.checks import check_fraction, check_scale
from fastcontrast.ops.distance_softmax import RowStatistics, accumulator_dtype
from fastcontrast.ops.normalized import normalized, of_unit_rows
from fastcontrast.ops.pairs import paired_distance, paired_scores
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.ranks import Ranks, several, total
from fastcontrast.ops.sharded_softmax import columns_of_all, sharded_softmax
from fastcontrast.ops.softmax_loss import (
    LossWeights,
    log_add,
    positive_scores,
    row_losses_of,
    softmax_loss,
    softplus,
)
from fastcontrast.ops.statistics import (
    Wanted,
    check_statistics,
    joined_entropy,
    mean_potential,
    with_statistics,
)


class Reweighting(NamedTuple):
    """How negatives are counted; the defaults leave them as they are.

    Attributes:
        label_smoothing: Share of the target spread over all columns that count, in [0, 1).
        tau_plus: Probability that a negative is of the positive's class, in [0, 1).
        hardness: Concentration on negatives of high score, at least 0.
        positive_in_sum: Whether the positive is one of the columns it is picked from.
    """

    label_smoothing: float = 0.0
    tau_plus: float = 0.0
    hardness: float = 0.0
    positive_in_sum: bool = True

    def check(self) -> None:
        """Raise unless the options are in range and go together."""
        check_fraction("label_smoothing", self.label_smoothing)
        check_fraction("tau_plus", self.tau_plus)
        check_scale("hardness", self.hardness, or_zero=True)
        if self.label_smoothing and (self.tau_plus or self.hardness):
            raise ValueError("label_smoothing does not go together with tau_plus or hardness")


class Candidates(NamedTuple):
    """Rows, columns and who belongs to whom; checked.

    Attributes:
        x: Rows [M, D].
        y: Columns [N, D].
        target: Column of each row's positive, int64 [M]; -1 for a row that pays nothing.
        own: A further column left out of each row, int64 [M], or None.
        positive: Positives [M, D] that are no columns, or None for ``y[target]``.
        negatives: Further columns of each row alone [M, K, D], or None.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        scale: 1 / temperature.
        resident: With ranks, how many columns, the last ones, count for this rank's rows alone.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    own: Tensor | None
    positive: Tensor | None
    negatives: Tensor | None
    metric: str
    scale: float | Tensor
    resident: int = 0


def contrast_loss(
    candidates: Candidates,
    *,
    symmetric: bool = False,
    row_weight: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    all_pay: bool = False,
    reweighting: Reweighting = Reweighting(),  # noqa: B008 (immutable)
    reduction: str,
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str,
    backend: str | None,
) -> Any:
    """Reduced loss, or :class:`LossWithStatistics` where statistics are asked for.

    Args:
        candidates: Rows and columns.
        symmetric: Average with the same of the columns; no ``own``, ``positive`` or ``negatives``
            then, and no two rows share a positive.
        row_weight: Weights of the rows [M], checked, or None for 1; they carry no gradient.
        entropy_weight: Weights of the entropies of rows without a positive [M], 0 elsewhere, or
            None; added to the loss as they are. Neither symmetric nor with ``negatives``.
        all_pay: Whether no row without a positive has a weight, which saves looking.
        reweighting: Options, checked.
        reduction: ``"mean"`` over the weights of the rows that pay (of none, 0), ``"sum"`` or
            ``"none"``, checked.
        return_stats: Figures to return beside the loss.
        ranks: Contrast with the columns of all ranks, and reduce over the rows of all; None for
            this process alone. Indices name columns of this rank.
        precision: See :func:`~fastcontrast.distance_softmax`.
        backend: See :func:`~fastcontrast.distance_softmax`.
    """
    c, ranks = candidates, several(ranks)
    wanted = check_statistics(return_stats)
    weight = _row_weights(c, row_weight, all_pay, reduction, ranks)
    both = weight / 2 if symmetric else weight
    shards = ranks
    if ranks is not None and ranks.strategy == "gather" and not symmetric:
        c, shards = _gathered(c, ranks), None  # once, for whatever is asked of them
    options = {"ranks": shards, "precision": precision, "backend": backend}
    plain = (
        reweighting == Reweighting()
        and wanted is None
        and c.positive is None
        and c.negatives is None
    )
    if plain:
        weights = LossWeights(both, entropy_weight, both if symmetric else None)
        given = {"metric": c.metric, "scale": c.scale, "own": c.own}
        if reduction == "none" or shards is not None:
            rows = row_losses_of(
                c.x, c.y, c.target, weights, resident=c.resident, **given, **options
            )
            loss = rows if reduction == "none" else rows.sum()
        else:
            loss = softmax_loss(
                c.x, c.y, c.target, weights, precision=precision, backend=backend, **given
            )
        return loss if ranks is None else ranks.loss(loss, reduction)
    if torch.promote_types(c.x.dtype, c.y.dtype) in (torch.float16, torch.bfloat16):
        # Operands reach the loss by several ways: their gradients are added before one rounding.
        options["precision"] = of_widened(precision, c.x, c.y)
        c = _widened(c)
    c = _of_unit_rows(c)
    direction = _Direction(c, options, wanted, all_ranks=ranks)
    loss = direction.losses(reweighting)
    if symmetric:
        turned = _Direction(_turned(c), options, None, direction.positive, rows=c.target)
        loss = loss + turned.losses(reweighting)
    loss = torch.where(both == 0, 0.0, both * loss)
    if entropy_weight is not None:
        entropies = entropy_weight * direction.over_columns().entropy
        loss = loss + torch.where(entropy_weight == 0, 0.0, entropies)
    loss = loss if reduction == "none" else loss.sum()
    loss = loss if ranks is None else ranks.loss(loss, reduction)
    return with_statistics(loss, direction, wanted, ranks)


def _gathered(c: Candidates, ranks: Ranks) -> Candidates:
    """The same with the columns of all ranks."""
    columns = columns_of_all(ranks, c.y, c.resident)
    own = None if c.own is None else columns.shifted(c.own)
    return c._replace(y=columns.y, target=columns.shifted(c.target), own=own, resident=0)


def _row_weights(
    c: Candidates,
    row_weight: Tensor | None,
    all_pay: bool,
    reduction: str,
    ranks: Ranks | None,
) -> Tensor:
    """Weight of each row's loss [M] in the reduced one; 0 where it has no positive."""
    m, device = c.x.shape[0], c.x.device
    dtype = accumulator_dtype(torch.promote_types(c.x.dtype, c.y.dtype))
    if all_pay and row_weight is None and ranks is None:
        weight = 1.0 / max(1, m) if reduction == "mean" else 1.0
        return torch.full((m,), weight, dtype=dtype, device=device)
    if all_pay and row_weight is not None and reduction != "mean":
        return row_weight.detach().to(dtype)
    weight = (c.target >= 0).to(dtype)
    if row_weight is not None:
        weight = torch.where(weight == 0, 0.0, row_weight.detach().to(dtype))
    if reduction != "mean":
        return weight
    sum_of_weights = total(weight.sum(), ranks)
    return weight / torch.where(sum_of_weights == 0, 1.0, sum_of_weights)


def _widened(c: Candidates) -> Candidates:
    x, positive, negatives = (
        None if v is None else v.float() for v in (c.x, c.positive, c.negatives)
    )
    assert x is not None
    y = x if c.y is c.x else c.y.float()
    return c._replace(x=x, y=y, positive=positive, negatives=negatives)


def _of_unit_rows(c: Candidates) -> Candidates:
    """The same scores without "cosine"."""
    if c.metric != "cosine":
        return c
    x, y, metric = of_unit_rows(c.x, c.y, c.metric)
    positive, negatives = c.positive, c.negatives
    if positive is not None:
        positive = normalized(positive)
    if negatives is not None:
        negatives = normalized(negatives.flatten(0, 1)).view(negatives.shape)
    return c._replace(x=x, y=y, positive=positive, negatives=negatives, metric=metric)


def _scores(c: Candidates) -> Scores:
    """Scores without each row's positive."""
    return Scores(c.metric, c.scale, c.target[:, None], None, None, "all", "ieee")


def _turned(c: Candidates) -> Candidates:
    """Columns as rows: the target of a column is the row whose positive it is."""
    exclude = transposed(_scores(c), c.y.shape[0]).exclude
    assert exclude is not None
    return c._replace(x=c.y, y=c.x, target=exclude[:, 0], resident=0)


class _Negatives(NamedTuple):
    """Of the negatives of every row [M]: log-sum-exp, sum of scores, number."""

    lse: Tensor
    score_sum: Tensor
    number: Tensor


class _Direction:
    """Statistics of the negatives of every row, and the losses and figures that follow from them.

    ``rows`` says which of them to report, with their ``positive`` scores: in the other direction
    of a symmetric loss, the column of each row's positive.
    """

    def __init__(
        self,
        candidates: Candidates,
        options: dict,
        wanted: Wanted | None,
        positive: Tensor | None = None,
        rows: Tensor | None = None,
        all_ranks: Ranks | None = None,
    ) -> None:
        self.c, self.options, self.all_ranks = candidates, options, all_ranks
        c = self.c
        columns = [c.own] if c.positive is not None else [c.target, c.own]
        left_out = [column for column in columns if column is not None]
        self.exclude = torch.stack(left_out, 1) if left_out else None
        self.rows = rows
        self.ranked = wanted is not None and wanted.rank
        self.positive = self._positive_scores() if positive is None else positive
        self.own_scores = None
        if c.negatives is not None and c.negatives.shape[1]:
            self.own_scores = paired_scores(
                c.x[:, None], c.negatives, metric=c.metric, scale=c.scale
            )
        self.plain: RowStatistics | None = None

    def _positive_scores(self) -> Tensor:
        c = self.c
        if c.positive is None:
            return positive_scores(c.x, c.y, _scores(c))
        return paired_scores(c.x, c.positive, metric=c.metric, scale=c.scale)

    def _of_rows(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows.clamp(min=0)]

    def negatives(self, multiple: float = 1.0) -> _Negatives:
        """Log-sum-exp of ``multiple`` times the scores of the negatives, their sum and number."""
        c = self.c
        scale = c.scale if multiple == 1.0 else multiple * c.scale
        ranked = self.ranked and multiple == 1.0
        found = sharded_softmax(
            x=c.x, y=c.y, resident=c.resident, metric=c.metric, scale=scale, exclude=self.exclude,
            score_sum=True, threshold=self.positive.detach() if ranked else None, **self.options,
        )  # fmt: skip
        if multiple == 1.0:
            self.plain = found
        lse, score_sum, count = found.lse, found.score_sum, found.column_count
        assert score_sum is not None
        assert count is not None
        if self.own_scores is not None:
            own = (multiple * self.own_scores).logsumexp(1)
            lse = log_add(lse, own)
            score_sum = score_sum + self.own_scores.sum(1)
            count = count + self.own_scores.shape[1]
        return _Negatives(lse, score_sum, count)

    def losses(self, reweighting: Reweighting) -> Tensor:
        """Loss of every reported row, unweighted."""
        smoothing, tau_plus, hardness, positive_in_sum = reweighting
        if hardness:
            # N Σ e^{(1+β)s} / Σ e^{βs}: negatives weighted by e^{βs}, with weights of mean 1.
            harder, found = self.negatives(1.0 + hardness), self.negatives(hardness)
            mean = torch.where(found.number == 0, 0.0, found.lse)
            log_count = found.number.clamp(min=1).to(mean.dtype).log()
            found = found._replace(lse=harder.lse - mean + log_count)
        else:
            found = self.negatives()
        lse, score_sum, count = (self._of_rows(values) for values in found)
        if tau_plus:
            lse = self._debiased(lse, count, tau_plus)
        loss = lse - self.positive
        loss = softplus(loss) if positive_in_sum else loss
        if smoothing:
            all_scores = score_sum + self.positive
            loss = loss + smoothing * (self.positive - all_scores / (count + 1))
        return loss

    def _debiased(self, lse: Tensor, count: Tensor, tau_plus: float) -> Tensor:
        """Log N g, g = max((mean e^s - τ⁺ e^{s⁺}) / (1 - τ⁺), least e^s), without leaving logs."""
        log_count = count.clamp(min=1).to(lse.dtype).log()
        gap = self.positive + math.log(tau_plus) + log_count - lse
        positive_part = (gap < 0) & (count > 0)
        inside = torch.where(positive_part, gap, -1.0)
        corrected = lse + torch.log(-torch.expm1(inside)) - math.log1p(-tau_plus)
        corrected = torch.where(positive_part, corrected, -torch.inf)
        # NaN, which no comparison holds for, must reach the loss.
        corrected = torch.where(torch.isnan(gap), gap, corrected)
        if self.c.metric == "dot":  # of unit vectors: no score is below -1 / temperature
            corrected = torch.maximum(corrected, log_count - self.c.scale)
        return torch.where(count > 0, corrected, -torch.inf)

    def over_columns(self) -> RowStatistics:
        """Statistics over the columns that are no positives, at the loss's own temperature."""
        if self.plain is None:  # hardness took the scores at other temperatures
            self.negatives()
        assert self.plain is not None
        return self.plain

    # The figures of ops/statistics.py, called without gradients.

    def pays(self) -> Tensor:
        return self.c.target >= 0

    def lse(self) -> Tensor:
        lse = self.over_columns().lse
        if self.own_scores is not None:
            lse = log_add(lse, self.own_scores.logsumexp(1))
        return torch.where(self.pays(), log_add(lse, self.positive), lse)

    def entropy(self) -> Tensor:
        plain = self.over_columns()
        lse, entropy = plain.lse, plain.entropy
        if self.own_scores is not None:
            own = self.own_scores.logsumexp(1)
            own_entropy = torch.special.entr(self.own_scores.softmax(1)).sum(1)
            entropy = joined_entropy(lse, entropy, own, own_entropy)
            lse = log_add(lse, own)
        return torch.where(self.pays(), joined_entropy(lse, entropy, self.positive, 0.0), entropy)

    def rank(self) -> Tensor:
        rank = self.over_columns().rank
        assert rank is not None
        if self.own_scores is not None:
            rank = rank + (self.own_scores > self.positive[:, None]).sum(1)
        return rank

    def alignment(self) -> Tensor:
        c, pays = self.c, self.pays()
        partner = c.positive
        if partner is None:
            partner = c.y[c.target.clamp(min=0)] if c.y.shape[0] else c.x
        d2 = paired_distance(normalized(c.x), normalized(partner), squared=True)
        sum_d2 = torch.where(pays, d2, 0.0).sum()
        return total(sum_d2, self.all_ranks) / total(pays.sum(), self.all_ranks)

    def uniformity(self) -> Tensor:
        c = self.c
        x = normalized(c.x)
        rows = sharded_softmax(
            x=x, y=normalized(c.y), resident=c.resident, metric="sqeuclidean", scale=2.0,
            exclude=self.exclude, score_sum=True, **self.options,
        )  # fmt: skip
        lse, count = rows.lse, rows.column_count
        assert count is not None
        if c.negatives is not None and c.negatives.shape[1]:
            flat = c.negatives.reshape(-1, c.negatives.shape[2])
            own = normalized(flat).view(c.negatives.shape)
            own = paired_scores(x[:, None], own, metric="sqeuclidean", scale=2.0)
            lse, count = log_add(lse, own.logsumexp(1)), count + own.shape[1]
        return mean_potential(lse, count, self.all_ranks)
