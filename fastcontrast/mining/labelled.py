"""Who belongs to which class: what the miners of triplets share.

Called by the other files of this folder, and for its list of positive pairs by
``fastcontrast/compat/pytorch_metric_learning.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.checks import check_integers, check_operands


class Labelled(NamedTuple):
    """Anchors and the columns that they choose from, checked.

    Attributes:
        x: Anchors [M, D], detached.
        labels: Their class ids, int64 [M].
        y: Columns [N, D], detached.
        column_labels: Their class ids, int64 [N].
        own: The column that each anchor is itself, int64 [M], or None.
    """

    x: Tensor
    labels: Tensor
    y: Tensor
    column_labels: Tensor
    own: Tensor | None


def labelled(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    own: Tensor | None,
) -> Labelled:
    """The embeddings among themselves, or among references; raises if they are malformed."""
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels must be given together")
    empty = references is not None and is_empty_queue(references)
    columns = embeddings if references is None or empty else references
    check_operands("embeddings", embeddings, "references", columns)
    rows = len(embeddings)
    check_integers("labels", labels, (rows,), embeddings.device)
    if empty:
        references, reference_labels = embeddings[:0], labels[:0]
    if references is None or reference_labels is None:
        if own is not None:
            raise ValueError("own needs references: among themselves, it is each row's own index")
        references, reference_labels = embeddings, labels
        own = torch.arange(rows, device=embeddings.device)
    else:
        check_integers("reference_labels", reference_labels, (len(references),), embeddings.device)
        if own is not None:
            check_integers("own", own, (rows,), embeddings.device)
            own = own.to(torch.int64)
    ids, column_ids = labels.to(torch.int64), reference_labels.to(torch.int64)
    return Labelled(embeddings.detach(), ids, references.detach(), column_ids, own)


def is_empty_queue(references: Tensor) -> bool:
    """Whether they are those of a queue before its first entry, which knows no D and no device."""
    return isinstance(references, Tensor) and references.shape == (0, 0)


class Members(NamedTuple):
    """Columns sorted by class, and where the class of each row is among them.

    Attributes:
        columns: Column indices by class, within a class in their order, [N].
        first: Where in ``columns`` the class of each row begins, [M].
        size: How many columns it has, [M].
    """

    columns: Tensor
    first: Tensor
    size: Tensor


def members(labels: Tensor, column_labels: Tensor) -> Members:
    """The columns of the class of every row, in O((M+N) log N) and without a matrix."""
    columns = torch.argsort(column_labels, stable=True)
    ids, wanted = column_labels[columns].contiguous(), labels.contiguous()
    first = torch.searchsorted(ids, wanted)
    return Members(columns, first, torch.searchsorted(ids, wanted, right=True) - first)


def positive_pairs(
    labels: Tensor, column_labels: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every (row, column) of one class but a row's own, by row, without a matrix of matches."""
    columns, first, size = members(labels, column_labels)
    rows = torch.repeat_interleave(torch.arange(len(labels), device=labels.device), size)
    before = torch.repeat_interleave(size.cumsum(0) - size, size)
    found = columns[torch.arange(len(rows), device=labels.device) - before + first[rows]]
    if own is None:
        return rows, found
    keep = own[rows] != found
    return rows[keep], found[keep]
