"""The learning rate as a pure function of the step and of what was watched; asked by the loop.

A schedule keeps no state: the figures watched so far are part of the checkpoint, and everything
else follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A rate and how it falls.

    Attributes:
        kind: ``"step"``, ``"cosine"``, ``"plateau"`` or ``"constant"``.
        rate: Initial learning rate.
        steps: Where the cosine reaches 0.
        drops: With ``"step"``: steps after which the rate falls to a tenth.
        decay: The rate is also divided by 1 + decay * step.
        patience: With ``"plateau"``: watched figures without improvement that lower the rate.
        max_drops: With ``"plateau"``: drops before training is over.
    """

    kind: str
    rate: float
    steps: int
    drops: tuple[int, ...] = ()
    decay: float = 0.0
    patience: int = 3
    max_drops: int = 3

    def at(self, step: int, watched: Sequence[float] = ()) -> float:
        """Learning rate of the update that follows ``step`` finished ones.

        Args:
            step: Finished steps.
            watched: The figures watched so far, lower being better.

        Returns:
            The rate.
        """
        if self.kind == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        elif self.kind == "plateau":
            factor = 0.1 ** min(plateaus(watched, self.patience), self.max_drops)
        elif self.kind == "step":
            factor = 0.1 ** sum(step >= drop for drop in self.drops)
        else:
            factor = 1.0
        return self.rate * factor / (1 + self.decay * step)

    def is_over(self, watched: Sequence[float]) -> bool:
        """Whether a plateau was met that no further drop is left for."""
        return self.kind == "plateau" and plateaus(watched, self.patience) > self.max_drops


def plateaus(watched: Sequence[float], patience: int) -> int:
    """How often ``patience`` figures in a row brought nothing better than the best before them.

    Example:
        >>> plateaus([3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.2], patience=2)
        2
    """
    best, waiting, count = math.inf, 0, 0
    for figure in watched:
        best, waiting = (figure, 0) if figure < best else (best, waiting + 1)
        if waiting == patience:
            count, waiting = count + 1, 0
    return count
