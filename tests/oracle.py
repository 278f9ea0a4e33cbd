"""The equations, as loops over Python floats: the start of the truth chain.

Nothing here is shared with the package. ``test_reference.py`` holds the reference backend to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def score(x: Sequence[float], y: Sequence[float], metric: str, scale: float) -> float:
    if metric == "cosine":
        norm = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
        return scale * sum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else 0.0
    if metric == "dot":
        return scale * sum(a * b for a, b in zip(x, y, strict=True))
    d2 = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return -scale * (math.sqrt(d2) if metric == "l2" else d2)


def columns_that_count(
    row: int,
    columns: int,
    exclude: Sequence[Sequence[int]] | None,
    row_ids: Sequence[int] | None,
    column_ids: Sequence[int] | None,
    keep: str,
) -> list[int]:
    result = []
    for j in range(columns):
        if exclude is not None and j in exclude[row]:
            continue
        if keep == "same" and row_ids[row] != column_ids[j]:
            continue
        if keep == "different" and row_ids[row] == column_ids[j]:
            continue
        result.append(j)
    return result


def log_sum_exp(values: Sequence[float]) -> float:
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def row_statistics(x: Matrix, y: Matrix, metric: str, scale: float, counting, thresholds):
    """Per row: lse, entropy, mean_score, rank, score_sum, count."""
    result = []
    for i, row in enumerate(x):
        scores = [score(row, y[j], metric, scale) for j in counting(i)]
        lse = log_sum_exp(scores)
        mean = sum(math.exp(s - lse) * s for s in scores) if scores else 0.0
        rank = sum(s > thresholds[i] for s in scores)
        surprise = entropy(scores) if scores else 0.0
        result.append((lse, surprise, mean, rank, sum(scores), len(scores)))
    return result


def cross_entropy(scores: Sequence[float], target: int) -> float:
    return log_sum_exp(scores) - scores[target]


def entropy(scores: Sequence[float]) -> float:
    lse = log_sum_exp(scores)
    return -sum(math.exp(s - lse) * (s - lse) for s in scores)


def triplet_ratio(anchor, positive, negative, objective: str) -> float:
    a, b = math.dist(anchor, positive), math.dist(anchor, negative)
    share = math.exp(a) / (math.exp(a) + math.exp(b))
    return share**2 if objective == "mse" else -math.log(1 - share)


def nearest(x: Matrix, y: Matrix, k: int, metric: str, farthest: bool, counting):
    """Per row: k pairs (value, column), equal values by column, the rest filled with column -1."""
    similarity = metric in ("dot", "cosine")
    end = math.inf if similarity == farthest else -math.inf
    result = []
    for i, row in enumerate(x):
        scores = [(score(row, y[j], metric, 1.0), j) for j in counting(i)]
        scores.sort(key=lambda pair: (pair[0] if farthest else -pair[0], pair[1]))
        found = [(s if similarity else -s, j) for s, j in scores[:k]]
        result.append(found + [(end, -1)] * (k - len(found)))
    return result


def triplet_margin(anchor, positive, negative, margin: float | None, metric: str, swap: bool):
    power = 1 if metric == "l2" else 2
    a, b = math.dist(anchor, positive) ** power, math.dist(anchor, negative) ** power
    if swap:
        b = min(b, math.dist(positive, negative) ** power)
    return math.log(1 + math.exp(a - b)) if margin is None else max(0.0, a - b + margin)


def smoothed_cross_entropy(scores: Sequence[float], target: int, smoothing: float) -> float:
    lse = log_sum_exp(scores)
    share = smoothing / len(scores)
    weights = [share + (1 - smoothing) * (j == target) for j in range(len(scores))]
    return -sum(w * (s - lse) for w, s in zip(weights, scores, strict=True))


def corrected_cross_entropy(
    scores: Sequence[float], target: int, tau_plus: float, hardness: float, lowest: float
) -> float:
    positive = math.exp(scores[target])
    negatives = [math.exp(s) for j, s in enumerate(scores) if j != target]
    weights = [v**hardness for v in negatives]
    total = sum(w * v for w, v in zip(weights, negatives, strict=True)) / sum(weights)
    mean = max((total - tau_plus * positive) / (1 - tau_plus), math.exp(lowest))
    return -math.log(positive / (positive + len(negatives) * mean))


def supervised_contrast(scores: Sequence[float], positives: Sequence[int], form: str) -> float:
    """Scores without the row's own; 0 without positives."""
    if not positives:
        return 0.0
    shares = [math.exp(scores[p] - log_sum_exp(scores)) for p in positives]
    if form == "in":
        return -math.log(sum(shares) / len(shares))
    return -sum(math.log(share) for share in shares) / len(shares)


def siamese_contrast(x: Sequence[float], y: Sequence[float], same: bool, margin: float) -> float:
    d = math.dist(x, y)
    return d * d / 2 if same else max(0.0, margin - d) ** 2 / 2
