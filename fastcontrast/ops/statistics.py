r"""Figures of a loss's softmax, from the passes that the loss makes anyway.

Detached, for logging. Asked for by the names in :data:`STATISTICS`. What can tell them is a
:class:`Figures`: ``ops/contrast_loss.py`` for one positive per row, ``ops/label_softmax.py`` for
the positives of a class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastcontrast.ops.ranks import Ranks, total

STATISTICS = ("lse", "entropy", "rank", "top1", "recall@k", "alignment", "uniformity")


class LossStatistics(NamedTuple):
    """What ``return_stats`` asked for, None for the rest; nothing carries a gradient.

    A row pays if it has a positive; shares are of those rows, and of none NaN.

    Attributes:
        lse: Log-sum-exp of the scores of each row, its positives included, [M], nats.
        entropy: Entropy of the softmax of each row, [M], nats.
        rank: Number of keys that score above the positive, of several the best, int64 [M]; other
            positives and keys that tie do not count. -1 for a row without a positive.
        top1: Share of the rows that pay whose positive has rank 0, 0-dim.
        recall: k to the share of the rows that pay with a positive among the k best, 0-dim each.
        alignment: Mean squared distance of positive pairs, normalised, 0-dim (Wang, Isola 2020,
            arXiv 2005.10242).
        uniformity: Logarithm of the mean of e^(-2 d²) over rows and their negatives, normalised,
            0-dim, nats (ibid., over other pairs); a pass of its own.
    """

    lse: Tensor | None = None
    entropy: Tensor | None = None
    rank: Tensor | None = None
    top1: Tensor | None = None
    recall: dict[int, Tensor] | None = None
    alignment: Tensor | None = None
    uniformity: Tensor | None = None


class LossWithStatistics(NamedTuple):
    """A loss, and the figures that ``return_stats`` asked for.

    Attributes:
        loss: As without ``return_stats``.
        stats: :class:`LossStatistics`.
    """

    loss: Tensor
    stats: LossStatistics


class Wanted(NamedTuple):
    """What ``return_stats`` asks for.

    Attributes:
        names: Those of :data:`STATISTICS` but recall.
        ks: The k of ``"recall@k"``.
    """

    names: frozenset[str]
    ks: tuple[int, ...]

    @property
    def rank(self) -> bool:
        """Whether a figure is taken from the rank of the positive."""
        return bool(self.ks or self.names & {"rank", "top1"})


def check_statistics(names: Sequence[str]) -> Wanted | None:
    """The figures asked for, or None; raises for a name that is none."""
    if isinstance(names, str):
        raise TypeError(f"return_stats must be a sequence of names, got the text {names!r}")
    wanted, ks = set(), []
    for name in names:
        at = re.fullmatch(r"recall@([1-9][0-9]*)", name) if isinstance(name, str) else None
        if at:
            ks.append(int(at[1]))
        elif name not in STATISTICS or name == "recall@k":
            raise ValueError(
                f"return_stats must name some of {', '.join(STATISTICS)} (k a number, as in "
                f"recall@5), got {name!r}"
            )
        else:
            wanted.add(name)
    return Wanted(frozenset(wanted), tuple(ks)) if names else None


class Figures(Protocol):
    """Where figures come from; a method is called only if its figure is asked for."""

    def pays(self) -> Tensor:
        """Whether each row has a positive, bool [M]."""
        ...

    def lse(self) -> Tensor:
        """Of every row [M]; see :class:`LossStatistics`."""
        ...

    def entropy(self) -> Tensor:
        """Of every row [M]."""
        ...

    def rank(self) -> Tensor:
        """Of every row, int64 [M]; any number where there is no positive."""
        ...

    def alignment(self) -> Tensor:
        """0-dim."""
        ...

    def uniformity(self) -> Tensor:
        """0-dim."""
        ...


def with_statistics(
    loss: Tensor, figures: Figures, wanted: Wanted | None, ranks: Ranks | None
) -> Any:
    """The loss, and beside it in a :class:`LossWithStatistics` what is wanted, if anything is.

    Rows are those of this rank, shares those of all rows of ``ranks``.
    """
    if wanted is None:
        return loss
    with torch.no_grad():
        names = ("lse", "entropy", "alignment", "uniformity")
        found: dict = {name: getattr(figures, name)() for name in names if name in wanted.names}
        if wanted.rank:
            pays = figures.pays()
            rank = torch.where(pays, figures.rank(), -1)
            found["rank"] = rank if "rank" in wanted.names else None
            found["top1"] = share(rank == 0, pays, ranks) if "top1" in wanted.names else None
            found["recall"] = {k: share(rank < k, pays, ranks) for k in wanted.ks} or None
    return LossWithStatistics(loss, LossStatistics(**found))


def joined_entropy(
    lse: Tensor, entropy: Tensor, other_lse: Tensor, other_entropy: Tensor | float
) -> Tensor:
    """Entropy of the union of two sets of columns, from log-sum-exp and entropy of each, [M].

    ``p H + q H' + h(p)`` with p the first set's share; 0 where neither has a column.
    """
    gap = torch.where(lse == other_lse, 0.0, lse - other_lse)  # both may be -inf
    p, q = gap.sigmoid(), (-gap).sigmoid()
    surprise = torch.special.entr(p) + torch.special.entr(q)
    empty = torch.isneginf(lse) & torch.isneginf(other_lse)
    return torch.where(empty, 0.0, p * entropy + q * other_entropy + surprise)


def share(hits: Tensor, pays: Tensor, ranks: Ranks | None) -> Tensor:
    """Share of the rows that pay, of all ranks, which hit, 0-dim; NaN if none pays."""
    return total((hits & pays).sum(), ranks) / total(pays.sum(), ranks)


def mean_potential(lse: Tensor, count: Tensor, ranks: Ranks | None) -> Tensor:
    """Logarithm of the mean over all pairs, 0-dim, from log-sum-exp and number in each row.

    The exponents lie in -8..0, so that ranks need no maximum to agree on.
    """
    every = lse.logsumexp(0)
    if ranks is not None:
        every = ranks.total(every.exp()).log()
    return every - total(count.sum(), ranks).to(lse.dtype).log()
