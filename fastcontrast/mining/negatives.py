"""The hardest negatives of each query, for losses over columns such as InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops.checks import check_count, check_indices, check_operands
from fastcontrast.ops.nearest import nearest


def hard_negatives(
    query: Tensor,
    key: Tensor,
    k: int = 1,
    *,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    skip: int = 0,
    metric: str = "l2",
    backend: str | None = None,
) -> Tensor:
    r"""The k keys nearest to each query that are not its own, nearest first.

    For :func:`fastcontrast.info_nce_loss` against those alone, or a larger pool than the batch:

    .. code-block:: python

        hard = hard_negatives(query, pool, 16, target=own_place_in_pool)
        loss = info_nce_loss(query, key, negatives=pool[hard], in_batch=False)

    As in Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning", 2020, arXiv
    2007.00808, with an exact search. One search of :func:`fastcontrast.nearest`: memory is
    O((M+N)·D + M·k). A key at a NaN distance is the last to be taken.

    Args:
        query: Queries [M, D], float16, bfloat16, float32 or float64.
        key: Keys to choose from [N, D], on the same device.
        k: How many of each query.
        target: Index of each query's own key, which is no negative, integer [M], -1 for none; None
            for key i of query i (N >= M).
        labels: Class ids of the queries, integer [M]: keys of the same class are no negatives.
        key_labels: Class ids of the keys, integer [N], with ``labels``.
        skip: Pass over so many of the nearest, which may be positives that nobody has marked.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        backend: See :func:`fastcontrast.nearest`.

    Returns:
        Indices of keys, int64 [M, k].

    Raises:
        ValueError: If a shape, an option or a device is not as above, or a query has fewer than
            k + skip negatives. (A GPU is waited for.)
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> hard_negatives(x, x, 2)
        tensor([[1, 2],
                [0, 2],
                [1, 0]])
    """
    check_operands("query", query, "key", key)
    check_count("k", k)
    if not isinstance(skip, int) or isinstance(skip, bool):
        raise TypeError(f"skip must be an integer, got {type(skip).__name__}")
    if skip < 0:
        raise ValueError(f"skip must be at least 0, got {skip}")
    if (labels is None) != (key_labels is None):
        raise ValueError("labels and key_labels must be given together")
    m, n = len(query), len(key)
    if target is None:
        if n < m:
            raise ValueError(
                f"target=None takes key i for query i and needs N >= M, got M={m}, N={n}"
            )
        target = torch.arange(m, device=query.device)
    else:
        target = check_indices("target", target, query, -1, n, "-1 = none")
    found = nearest(
        query, key, k + skip, metric=metric, exclude=target, row_ids=labels, column_ids=key_labels,
        keep="all" if labels is None else "different", backend=backend,
    ).indices  # fmt: skip
    # -1 as an index would silently be the last key.
    few = (found[:, -1] < 0).nonzero()[:, 0]
    if len(few):
        row = int(few[0])
        count = int((found[row] >= 0).sum())
        raise ValueError(
            f"k + skip must be at most the negatives of every query, got {k} + {skip} where query "
            f"{row} has {count}"
        )
    return found[:, skip:]
