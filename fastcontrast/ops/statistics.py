r"""Figures of a softmax with one positive per row, from the pass that its loss makes anyway.

Detached, for logging. Asked for by the names in :data:`STATISTICS`; called by
``fastcontrast/ops/contrast_loss.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("lse", "entropy", "rank", "top1", "recall@k", "alignment", "uniformity")


class LossStatistics(NamedTuple):
    """What ``return_stats`` asked for, None for the rest; nothing carries a gradient.

    Attributes:
        lse: Log-sum-exp of the scores of each row, its positive included, [M], nats.
        entropy: Entropy of the softmax of each row, [M], nats.
        rank: Number of keys that score above the positive, int64 [M]; keys that tie do not count.
        top1: Share of rows whose positive has rank 0, 0-dim.
        recall: k to the share of rows whose positive is among the k best, 0-dim each.
        alignment: Mean squared distance of a row to its positive, normalised, 0-dim (Wang, Isola
            2020, arXiv 2005.10242).
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


def check_statistics(names: Sequence[str]) -> tuple[set[str], list[int]]:
    """The figures asked for, and the k of ``"recall@k"``; raises for a name that is none."""
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
    return wanted, ks


def needs_rank(wanted: set[str], ks: Sequence[int]) -> bool:
    """Whether a figure is taken from the rank of the positive."""
    return bool(ks or wanted & {"rank", "top1"})


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


def share(hits: Tensor, pays: Tensor) -> Tensor:
    """Share of the rows that pay which hit, 0-dim; NaN if none pays."""
    return (hits & pays).sum() / pays.sum()
