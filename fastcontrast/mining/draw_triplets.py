"""Triplets drawn at random, nearer or better spread negatives more often than a uniform draw."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.mining.draws import (
    NEGATIVE,
    NEGATIVE_CLASS,
    POSITIVE,
    integers_below,
    random_words,
    weighted_columns,
)
from fastcontrast.mining.labelled import Labelled, labelled, members
from fastcontrast.mining.triplets import Triplets
from fastcontrast.ops.checks import check_count, check_scale
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.pairs import row_chunks, values_between

# Weights of a block of rows, 8 bytes each: a dozen passes over them stay in a processor's cache.
BLOCK_WEIGHTS = 1 << 18


def distance_weighted_triplets(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    per_anchor: int = 1,
    cutoff: float = 0.5,
    max_distance: float = 1.4,
    seed: int,
    step: int = 0,
) -> Triplets:
    r"""Draw negatives so that their distances are spread evenly, and positives uniformly.

    .. math:: P(n \mid a) \propto \min\bigl(q(\text{cutoff})^{-1},\; q(d_{an})^{-1}\bigr), \qquad
        q(d) \propto d^{D-2} \bigl(1 - \tfrac14 d^2\bigr)^{(D-3)/2}

    for :math:`d_{an}` below ``max_distance``, and 0 beyond; q is the density of distances between
    uniform points of the unit sphere. Sec. 3 of Wu, Manmatha, Smola and Krähenbühl, "Sampling
    Matters in Deep Embedding Learning", 2017, arXiv 1706.07567. Embeddings are normalised here.

    The negatives have the distribution of ``DistanceWeightedMiner`` of pytorch-metric-learning,
    which subtracts one maximum from the logarithms of all rows, so that far rows lose theirs;
    here it is each row's own. Blocks of rows are streamed: memory is O((M+N)·D).

    Anchors without a positive, or without a negative nearer than ``max_distance``, give no triplet.
    An anchor that is NaN keeps its triplets, so that the loss shows it; a NaN column is never
    drawn as a negative.

    Args:
        embeddings: Anchors [M, D], D >= 2, float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        references: See :func:`fastcontrast.mining.batch_hard_triplets`.
        reference_labels: See :func:`fastcontrast.mining.batch_hard_triplets`.
        own: See :func:`fastcontrast.mining.batch_hard_triplets`.
        per_anchor: Triplets of each anchor, drawn independently.
        cutoff: Distance below which the weight no longer grows.
        max_distance: Distance from which on negatives are not drawn, at most 2.
        seed: 64-bit seed.
        step: Number of the batch in training; equal (seed, step) draw equal triplets of equal
            embeddings. 0 <= step < 2**48.

    Returns:
        :class:`Triplets`, at most M times ``per_anchor``.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
        >>> distance_weighted_triplets(x, torch.tensor([0, 0, 1]), seed=0)
        Triplets(anchor=tensor([0, 1]), positive=tensor([1, 0]), negative=tensor([2, 2]))
    """
    for name, value in (("cutoff", cutoff), ("max_distance", max_distance)):
        check_scale(name, value)
    if not cutoff < max_distance <= 2:
        raise ValueError(
            f"max_distance must be above the cutoff, {cutoff}, and at most 2, got {max_distance}"
        )
    batch = labelled(embeddings, labels, references, reference_labels, own)
    dim = batch.x.shape[1]
    if dim < 2:
        raise ValueError(f"embeddings must have at least 2 columns D, got {list(batch.x.shape)}")
    anchor, positive = _uniform_positives(batch, per_anchor, seed, step)
    x, y = normalized(batch.x.to(torch.float64)), normalized(batch.y.to(torch.float64))
    words = random_words(torch.arange(len(x), device=x.device), per_anchor, NEGATIVE, seed, step)
    negative = torch.full((len(x), per_anchor), -1, dtype=torch.int64, device=x.device)
    largest = float(_log_inverse_density(x.new_tensor(cutoff**2), dim))
    rows_with_triplets = anchor[::per_anchor]
    for part in row_chunks(rows_with_triplets, y, BLOCK_WEIGHTS):
        rows = rows_with_triplets[part]
        # A product of unit vectors is enough: nothing below the cutoff is told apart.
        d2 = (2 - 2 * (x[rows] @ y.T)).clamp(min=cutoff**2)
        weights = _log_inverse_density(d2, dim).clamp(max=largest)
        weights = weights.masked_fill(~(d2 < max_distance**2), -torch.inf)
        weights = torch.where(x[rows].isnan().any(1, keepdim=True), 0.0, weights)
        same = batch.labels[rows, None] == batch.column_labels
        weights = weights.masked_fill(same, -torch.inf)
        negative[rows] = weighted_columns(weights, (words[0][rows], words[1][rows]))
    return _found(anchor, positive, negative[rows_with_triplets].flatten())


def inverse_distance_triplets(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    per_anchor: int = 1,
    seed: int,
    step: int = 0,
) -> Triplets:
    r"""Draw a class uniformly, and in it negatives near the positive more often.

    .. math:: P(n \mid p, c) \propto \frac{1}{\max(1, \lceil \lVert y_p - y_n \rVert \rceil)}
        \quad\text{over } n \text{ of class } c,\; c \text{ uniform over the other classes}

    The biased negatives of the authors of the triplet network (Hoffer and Ailon, 2014, arXiv
    1412.6622), from their code and not in the paper; positives are drawn uniformly there too.
    Deviation: the maximum with 1. There half the table of distances is never filled, and what is
    0 divides by zero. Distances up to 1 weigh alike, so that the embedding's unit matters.

    Only distances within the class drawn are taken, in blocks of rows and by direct difference:
    memory is O((M+N)·D). Anchors without a positive or without another class give no triplet. An
    anchor or positive that is NaN keeps its triplets, so that the loss shows it; otherwise a NaN
    column is never drawn as a negative.

    Args:
        embeddings: Anchors [M, D], float16, bfloat16, float32 or float64.
        labels: Their class ids, integer [M].
        references: See :func:`fastcontrast.mining.batch_hard_triplets`.
        reference_labels: See :func:`fastcontrast.mining.batch_hard_triplets`.
        own: See :func:`fastcontrast.mining.batch_hard_triplets`.
        per_anchor: Triplets of each anchor, drawn independently.
        seed: 64-bit seed.
        step: See :func:`distance_weighted_triplets`.

    Returns:
        :class:`Triplets`, at most M times ``per_anchor``.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> inverse_distance_triplets(x, torch.tensor([0, 0, 1]), seed=0).negative
        tensor([2, 2])
    """
    batch = labelled(embeddings, labels, references, reference_labels, own)
    anchor, positive = _uniform_positives(batch, per_anchor, seed, step)
    names, ids, sizes = batch.column_labels.unique(return_inverse=True, return_counts=True)
    # A class, and one that is not the anchor's: the others keep their order.
    rows = torch.arange(len(batch.x), device=batch.x.device)
    words, _ = random_words(rows, per_anchor, NEGATIVE_CLASS, seed, step)
    words = words[anchor[::per_anchor]].flatten()
    drawn = integers_below(words, torch.tensor(max(1, len(names) - 1), device=words.device))
    drawn = drawn + (drawn >= ids[positive])
    first, second = random_words(rows, per_anchor, NEGATIVE, seed, step)
    first, second = (w[anchor[::per_anchor]].flatten() for w in (first, second))
    negative = torch.full_like(anchor, -1)
    by_class = torch.argsort(ids, stable=True).split(sizes.tolist())
    triplets = torch.argsort(drawn, stable=True)
    triplets_of = triplets.split(torch.bincount(drawn, minlength=len(names)).tolist())
    for columns, chosen in zip(by_class, triplets_of, strict=False):
        y = batch.y[columns].to(torch.float64)
        for part in row_chunks(chosen, y, BLOCK_WEIGHTS):
            t = chosen[part]
            d = values_between(batch.y[positive[t]].to(torch.float64), y, "l2")
            weights = -d.ceil().clamp(min=1).log()
            found = weighted_columns(_uniform_if_nan(weights), (first[t, None], second[t, None]))
            negative[t] = torch.where(found >= 0, columns[found], -1)[:, 0]
    return _found(anchor, positive, negative)


def _uniform_positives(
    batch: Labelled, per_anchor: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Anchors that have a positive, each ``per_anchor`` times, and a positive for each time."""
    check_count("per_anchor", per_anchor)
    columns, first, size = members(batch.labels, batch.column_labels)
    place = torch.full_like(size, len(columns))
    if batch.own is not None and len(columns):
        inside = (batch.own >= 0) & (batch.own < len(columns))
        own = batch.own.clamp(0, len(columns) - 1)
        inside &= batch.column_labels[own] == batch.labels
        place = torch.where(inside, torch.argsort(columns)[own], place)
        size = size - inside.long()
    rows = torch.arange(len(size), device=size.device)
    words, _ = random_words(rows, per_anchor, POSITIVE, seed, step)
    rows = (size > 0).nonzero()[:, 0]
    drawn = first[rows, None] + integers_below(words[rows], size[rows, None])
    drawn = drawn + (drawn >= place[rows, None])  # all but the anchor's own place
    return rows.repeat_interleave(per_anchor), columns[drawn.flatten()]


def _log_inverse_density(d2: Tensor, dim: int) -> Tensor:
    """-log q(d) up to a constant, from squared distances; what clips it keeps 0·inf out."""
    rest = (1 - d2 / 4).clamp(min=torch.finfo(d2.dtype).tiny)
    return -(dim - 2) / 2 * d2.log() - (dim - 3) / 2 * rest.log()


def _uniform_if_nan(log_weights: Tensor) -> Tensor:
    """0 for what is NaN, unless a whole row is: then all of it weighs the same."""
    nan = log_weights.isnan()
    whole = nan.all(1, keepdim=True)
    return torch.where(whole, 0.0, log_weights.masked_fill(nan, -torch.inf))


def _found(anchor: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
    kept = negative >= 0
    return Triplets(anchor[kept], positive[kept], negative[kept])
