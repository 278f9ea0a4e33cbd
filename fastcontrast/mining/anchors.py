"""Anchors of the classes for metric embedding: the nearest labelled examples, or class means."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.scores import accumulator_dtype
from fastcontrast.ops.checks import check_count, check_indices, check_operands
from fastcontrast.ops.nearest import nearest


def nearest_anchors(
    embeddings: Tensor,
    labelled: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    own: Tensor | None = None,
    metric: str = "l2",
    backend: str | None = None,
) -> Tensor:
    r"""For every embedding the nearest labelled example of each class.

    Instead of the random labelled example of each class that semi-supervised metric embedding
    takes (Hoffer and Ailon, 2016, arXiv 1611.01449), the same one for all rows:

    .. code-block:: python

        anchors = labelled[nearest_anchors(x, labelled, labels, 10)]  # [M, 10, D]
        loss = metric_embedding_loss(x, anchors, targets)

    One search of :func:`fastcontrast.nearest` for each class: memory is O((M+N)·D + M·C), and no
    pair is looked at twice.

    Args:
        embeddings: F(x) [M, D], float16, bfloat16, float32 or float64.
        labelled: F(z) [N, D], on the same device.
        labels: Their classes, integer [N], 0..C-1.
        num_classes: C, at least 1.
        own: The index among ``labelled`` of each embedding itself, integer [M], which is then no
            anchor of its own; -1 for none.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        Indices into ``labelled``, int64 [M, C].

    Raises:
        ValueError: If a shape, a label or a device is not as above, or a class has no example, or
            none but the embedding itself. (A GPU is waited for.)
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> labelled = torch.tensor([[0.0], [1.0], [5.0]])
        >>> nearest_anchors(torch.tensor([[0.9], [0.2]]), labelled, torch.tensor([0, 0, 1]), 2)
        tensor([[1, 2],
                [0, 2]])
    """
    check_operands("embeddings", embeddings, "labelled", labelled)
    labels = _checked_labels("labelled", labelled, labels, num_classes)
    if own is not None:
        own = check_indices("own", own, embeddings, -1, len(labelled), "-1 = none")
    found = [embeddings.new_empty(len(embeddings), 0, dtype=torch.int64)]
    for c, columns in enumerate(_of_each_class(labels, num_classes)):
        exclude = None
        if own is not None:
            place = torch.searchsorted(columns, own).clamp(max=len(columns) - 1)
            exclude = torch.where(columns[place] == own, place, -1)
        index = nearest(
            embeddings, labelled[columns], metric=metric, exclude=exclude, backend=backend
        ).indices
        if bool((index < 0).any()):
            raise ValueError(f"class {c} must have an example besides the embedding itself, own")
        found.append(columns[index])
    return torch.cat(found, 1)


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""The mean embedding of each class: an anchor for all rows; differentiable.

    .. math:: \mu_c = \frac{1}{|\{i: y_i = c\}|} \sum_{i:\, y_i = c} F(z_i)

    Eq. 1 of Snell, Swersky and Zemel, "Prototypical Networks for Few-shot Learning", 2017, arXiv
    1703.05175. Sums have one writer each: two runs are bit-equal.

    Args:
        embeddings: F(z) [N, D], float16, bfloat16, float32 or float64.
        labels: Their classes, integer [N], 0..C-1.
        num_classes: C, at least 1.

    Returns:
        Means [C, D], in the dtype of the embeddings; sums are taken in float32 or more.

    Raises:
        ValueError: If a shape, a label or a device is not as above, or a class has no example. (A
            GPU is waited for.)
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> class_means(torch.tensor([[0.0], [4.0], [2.0]]), torch.tensor([1, 0, 1]), 2)
        tensor([[4.],
                [1.]])
    """
    check_operands("embeddings", embeddings, "embeddings", embeddings)
    labels = _checked_labels("embeddings", embeddings, labels, num_classes)
    rows = embeddings.to(accumulator_dtype(embeddings.dtype))
    means = [rows[members].mean(0) for members in _of_each_class(labels, num_classes)]
    return torch.stack(means).to(embeddings.dtype)


def _checked_labels(name: str, rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    check_count("num_classes", num_classes)
    return check_indices("labels", labels, rows, 0, num_classes, f"classes of {name}")


def _of_each_class(labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    """Indices of each class in ascending order; raises for a class without any."""
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    if len(counts) > num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {len(counts) - 1}")
    if 0 in counts:
        raise ValueError(f"labels must name every class, got none of class {counts.index(0)}")
    return torch.argsort(labels, stable=True).split(counts)
