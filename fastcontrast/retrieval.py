r"""How good an embedding is: recall, MAP@R, neighbours that vote, alignment, uniformity.

Queries are searched for in references; without references, among themselves, and no query then
finds itself. The M×N matrix is never written. Called by users and by
``fastcontrast/train/evaluation.py``; the search is ``fastcontrast/ops/nearest.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastcontrast.ops.checks import (
    check_count,
    check_integers,
    check_operands,
    check_pairs,
    check_scale,
)
from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.nearest import Nearest, nearest
from fastcontrast.ops.pairs import paired_distance

# Neighbours held at once, 16 bytes each before their labels: queries go in blocks of that many.
BLOCK_NEIGHBORS = 1 << 22


def nearest_neighbors(
    queries: Tensor,
    references: Tensor | None = None,
    k: int = 1,
    *,
    metric: str = "l2",
    backend: str | None = None,
) -> Nearest:
    """The k nearest references of every query, nearest first.

    Args:
        queries: Embeddings [M, D].
        references: Embeddings [N, D]; None searches the queries themselves, without each one's own.
        k: How many; see :func:`fastcontrast.nearest` for more than there are.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        :class:`~fastcontrast.Nearest`: values and indices [M, k].

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> nearest_neighbors(torch.tensor([[0.0], [1.0], [3.0]])).indices[:, 0]
        tensor([1, 0, 1])
    """
    if references is not None:
        return nearest(queries, references, k, metric=metric, backend=backend)
    check_operands("queries", queries, "queries", queries)
    own = torch.arange(queries.shape[0], device=queries.device)
    return nearest(queries, queries, k, metric=metric, exclude=own, backend=backend)


def recall_at_k(
    queries: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    k: Sequence[int] = (1,),
    metric: str = "l2",
    backend: str | None = None,
) -> dict[int, float]:
    r"""Share of queries with one of their own label among their k nearest references.

    .. math:: \mathrm{R@k} = \frac{1}{|Q|} \sum_{i \in Q} \bigl[\exists\, j \in \mathrm{NN}_k(i) :
        \mathrm{label}_j = \mathrm{label}_i\bigr]

    (Oh Song et al. 2016, arXiv 1511.06452.) Queries whose label no reference has are left out, as
    pytorch-metric-learning leaves them out. For k = 1 it is also precision at 1.

    Args:
        queries: Embeddings [M, D].
        labels: Their integer labels [M].
        references: Embeddings [N, D]; None searches the queries themselves, without each one's own.
        reference_labels: Integer labels [N], with ``references``.
        k: The numbers of neighbours, each at least 1.
        metric: See :func:`fastcontrast.nearest`.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        k to recall, from 0 to 1; NaN if no query is left.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
        >>> recall_at_k(x, torch.tensor([0, 0, 1, 1]), k=(1, 2))
        {1: 0.5, 2: 0.75}
    """
    if isinstance(k, int):
        raise TypeError(f"k must be a sequence of integers, got the number {k}")
    for value in k:
        check_count("k", value)
    hits = dict.fromkeys(k, 0)
    total = 0
    search = _Search(queries, labels, references, reference_labels, metric, backend)
    for same, relevant in search.matches(max(k, default=1)):
        answerable = relevant > 0
        total += int(answerable.sum())
        for value in hits:
            hits[value] += int((same[:, :value].any(1) & answerable).sum())
    return {value: count / total if total else float("nan") for value, count in hits.items()}


def mean_average_precision_at_r(
    queries: Tensor,
    labels: Tensor,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    metric: str = "l2",
    backend: str | None = None,
) -> float:
    r"""MAP@R: precision averaged over the ranks of the matches among the R nearest.

    .. math:: \mathrm{MAP@R}_i = \frac{1}{R_i} \sum_{r=1}^{R_i} m_{ir}\,
        \frac{1}{r} \sum_{q=1}^{r} m_{iq}

    where :math:`m_{ir}` is 1 if the r-th nearest reference has the label of query i, and
    :math:`R_i` is the number of references that have it (Musgrave, Belongie, Lim 2020, arXiv
    2003.08505). The mean over queries leaves out those with :math:`R_i = 0`.

    Args:
        queries: Embeddings [M, D].
        labels: Their integer labels [M].
        references: Embeddings [N, D]; None searches the queries themselves, without each one's own.
        reference_labels: Integer labels [N], with ``references``.
        metric: See :func:`fastcontrast.nearest`.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        The mean, from 0 to 1; NaN if no query is left.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
        >>> mean_average_precision_at_r(x, torch.tensor([0, 0, 1, 1]))
        0.5
    """
    search = _Search(queries, labels, references, reference_labels, metric, backend)
    total, answerable = 0.0, 0
    for same, relevant in search.matches(search.most_relevant()):
        rank = torch.arange(1, same.shape[1] + 1, device=same.device)
        same &= rank <= relevant[:, None]
        precision = same.cumsum(1).double() / rank
        average = torch.where(same, precision, 0.0).sum(1) / relevant.clamp(min=1)
        total += float(average.sum())
        answerable += int((relevant > 0).sum())
    return total / answerable if answerable else float("nan")


def knn_classify(
    queries: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    k: int = 1,
    *,
    metric: str = "l2",
    temperature: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Label each query by the vote of its k nearest references.

    Votes count alike, or with a ``temperature`` :math:`e^{s / \mathrm{temperature}}`, where s is
    the dot product or cosine, or the distance negated (Wu et al. 2018, arXiv 1805.01978, with
    cosine and temperature 0.07). Of two labels with as many votes the one whose nearest voter is
    nearer wins; of two references at the same distance the one of lower index is nearer.

    Args:
        queries: Embeddings [M, D].
        references: Embeddings [N, D], N at least k.
        reference_labels: Their integer labels [N].
        k: Number of references that vote.
        metric: See :func:`fastcontrast.nearest`.
        temperature: Positive, in units of the metric; None for votes that count alike.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        Labels [M], in the dtype of ``reference_labels``.

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> references = torch.tensor([[0.0], [1.0], [1.2]])
        >>> labels = torch.tensor([7, 5, 5])
        >>> query = torch.tensor([[0.1]])
        >>> knn_classify(query, references, labels), knn_classify(query, references, labels, 3)
        (tensor([7]), tensor([5]))
    """
    check_operands("queries", queries, "references", references)
    check_integers("reference_labels", reference_labels, (len(references),), queries.device)
    check_count("k", k)
    if k > len(references):
        raise ValueError(f"k must be at most the number of references, {len(references)}, got {k}")
    if temperature is not None:
        check_scale("temperature", temperature)
    predictions = [reference_labels[:0]]
    for part in queries.split(max(1, BLOCK_NEIGHBORS // k)):
        found = nearest(part, references, k, metric=metric, backend=backend)
        weights = torch.ones_like(found.values, dtype=torch.float64)
        if temperature is not None:
            scores = found.values.double() * (1 if metric in ("dot", "cosine") else -1)
            weights = ((scores - scores[:, :1]) / temperature).exp()  # the nearest voter counts 1
        predictions.append(_winners(reference_labels[found.indices], weights))
    return torch.cat(predictions)


def _winners(voters: Tensor, weights: Tensor) -> Tensor:
    """Label with the largest sum of weights in each row of voters [M, k], nearest first."""
    k = voters.shape[1]
    winners = [voters[:0, 0]]
    for start in range(0, len(voters), step := max(1, BLOCK_NEIGHBORS // k**2)):
        part = voters[start : start + step]
        same = part[:, :, None] == part[:, None, :]
        votes = torch.where(same, weights[start : start + step, None, :], 0.0).sum(2)
        # Of equal ones argmax takes the first, and so the nearest.
        winners.append(part.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(winners)


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    r"""Mean distance of positive pairs to the power alpha; differentiable.

    .. math:: \mathcal{L}_{\mathrm{align}} = \frac{1}{M} \sum_i \lVert x_i - y_i \rVert^\alpha

    (Wang, Isola 2020, arXiv 2005.10242, for embeddings on the unit sphere; normalise them first.)

    Args:
        x: Embeddings [M, D].
        y: Row i is the positive of row i of ``x``, [M, D].
        alpha: Exponent, positive.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if M is 0.

    Raises:
        ValueError: If the shapes differ or alpha is not positive.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> alignment(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [1.0]]))
        tensor(2.)
    """
    check_pairs("x", x, "y", y)
    check_scale("alpha", alpha)
    if alpha == 2:
        return paired_distance(x, y, squared=True).mean()
    return paired_distance(x, y).pow(alpha).mean()


def uniformity(
    x: Tensor, *, t: float = 2.0, precision: str = "auto", backend: str | None = None
) -> Tensor:
    r"""Logarithm of the mean Gaussian potential of all pairs; differentiable.

    .. math:: \mathcal{L}_{\mathrm{uniform}} = \log \frac{1}{M (M-1)} \sum_{i \ne j}
        e^{-t \lVert x_i - x_j \rVert^2}

    (Wang, Isola 2020, arXiv 2005.10242, for embeddings on the unit sphere; normalise them first.)

    Args:
        x: Embeddings [M, D], M at least 2.
        t: Inverse square width of the potential, positive.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: See :func:`fastcontrast.distance_softmax`.

    Returns:
        A scalar in nats, at most 0, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If M is below 2 or an option is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)
    """
    check_operands("x", x, "x", x)
    check_scale("t", t)
    m = x.shape[0]
    if m < 2:
        raise ValueError(f"x must have at least 2 rows, got {list(x.shape)}")
    rows = distance_softmax(
        x, x, metric="sqeuclidean", scale=t, exclude=torch.arange(m, device=x.device),
        precision=precision, backend=backend,
    )  # fmt: skip
    pairs = torch.tensor(float(m) * (m - 1), dtype=rows.lse.dtype, device=x.device)
    return rows.lse.logsumexp(0) - pairs.log()


class _Search:
    """Which neighbours of each query have its label, block by block."""

    def __init__(
        self,
        queries: Tensor,
        labels: Tensor,
        references: Tensor | None,
        reference_labels: Tensor | None,
        metric: str,
        backend: str | None,
    ) -> None:
        among_themselves = references is None
        if (reference_labels is None) != among_themselves:
            raise ValueError("references and reference_labels must be given together")
        self.references = queries if references is None else references
        check_operands("queries", queries, "references", self.references)
        check_integers("labels", labels, (len(queries),), queries.device)
        if reference_labels is None:
            reference_labels = labels
        shape = (len(self.references),)
        check_integers("reference_labels", reference_labels, shape, queries.device)
        self.queries, self.labels = queries, labels.to(torch.int64)
        self.reference_labels = reference_labels.to(torch.int64)
        self.metric, self.backend = metric, backend
        self.own = torch.arange(len(queries), device=queries.device) if among_themselves else None
        # Number of references with each query's label, without the query itself.
        both = torch.cat([self.labels, self.reference_labels])
        names, ids = torch.unique(both, return_inverse=True)
        counts = torch.bincount(ids[len(labels) :], minlength=len(names))
        self.relevant = counts[ids[: len(labels)]] - int(among_themselves)

    def most_relevant(self) -> int:
        """The largest number of references that a query could match, at least 1."""
        return max(1, int(self.relevant.max())) if self.relevant.numel() else 1

    def matches(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block of queries: which neighbours match, bool [m, k], and how many could, [m]."""
        step = max(1, BLOCK_NEIGHBORS // k)
        for start in range(0, len(self.queries), step):
            rows = slice(start, start + step)
            exclude = None if self.own is None else self.own[rows]
            indices = nearest(
                self.queries[rows], self.references, k, metric=self.metric, exclude=exclude,
                backend=self.backend,
            ).indices  # fmt: skip
            if len(self.references) == 0:
                yield torch.zeros_like(indices, dtype=torch.bool), self.relevant[rows]
                continue
            found = self.reference_labels[indices.clamp(min=0)]
            same = (found == self.labels[rows, None]) & (indices >= 0)
            yield same, self.relevant[rows]
