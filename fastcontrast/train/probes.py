"""Linear classifiers on frozen embeddings: softmax regression and a linear support-vector machine.

Both are convex problems, solved by L-BFGS to convergence in float64 on standardised features, with
the penalty chosen on a tenth of the training points: no learning rate, nothing left to luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.train.batches import hold_out

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_ITERATIONS = 200
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Probe:
    """A linear classifier that was fitted.

    Attributes:
        predictions: Class of each test point, int64 [T].
        error: Fraction of the test points that it labels wrongly.
        penalty: The L2 penalty that was best on the held-out training points.
    """

    predictions: Tensor
    error: float
    penalty: float


def linear_probe(
    points: Tensor,
    labels: Tensor,
    test_points: Tensor,
    test_labels: Tensor,
    kind: str = "softmax",
    seed: int = 0,
) -> Probe:
    """Train a linear classifier on frozen points and test it.

    Args:
        points: Training points [N, D].
        labels: int64 [N].
        test_points: [T, D].
        test_labels: int64 [T].
        kind: ``"softmax"``, multinomial logistic regression, or ``"svm"``, one machine against the
            rest for each class with the squared hinge (scikit-learn's LinearSVC).
        seed: Chooses the held-out tenth.

    Returns:
        The classifier's predictions and its error.
    """
    mean, std = points.double().mean(0), points.double().std(0, unbiased=False)
    std = torch.where(std > 0, std, 1.0)
    points, test_points = ((x.double() - mean) / std for x in (points, test_points))
    classes = int(max(labels.max(), test_labels.max())) + 1
    kept, held = (
        torch.from_numpy(part).to(points.device) for part in hold_out(labels.cpu(), _HELD_OUT, seed)
    )
    best, start = (2.0, PENALTIES[0]), None
    for penalty in reversed(PENALTIES) if len(held) else PENALTIES[2:3]:  # each starts at the last
        start = _fit(points[kept], labels[kept], classes, kind, penalty, start)
        error = _error(start, points[held], labels[held]) if len(held) else 0.0
        best = min(best, (error, penalty))
    weights = _fit(points, labels, classes, kind, best[1], start)
    predictions = (test_points @ weights[:-1] + weights[-1]).argmax(1)
    error = (predictions != test_labels).double().mean().item()
    return Probe(predictions, error, best[1])


def _fit(
    points: Tensor, labels: Tensor, classes: int, kind: str, penalty: float, start: Tensor | None
) -> Tensor:
    """Minimise mean loss + penalty / 2 * ‖weights‖² (biases are free); returns [D + 1, C]."""
    shape = (points.shape[1] + 1, classes)
    weights = points.new_zeros(shape) if start is None else start.clone()
    weights.requires_grad_()
    signs = 2.0 * F.one_hot(labels, classes).double() - 1.0 if kind == "svm" else None
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=1e-6, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = points @ weights[:-1] + weights[-1]
        if signs is None:
            loss = F.cross_entropy(scores, labels)
        else:
            loss = (1 - signs * scores).clamp_min(0).square().sum(1).mean()
        loss = loss + 0.5 * penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def _error(weights: Tensor, points: Tensor, labels: Tensor) -> float:
    return ((points @ weights[:-1] + weights[-1]).argmax(1) != labels).double().mean().item()
