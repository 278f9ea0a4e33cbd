"""Batches of P classes with K examples each, for miners that need positives in the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastcontrast.mining.draws import BATCH, random_words
from fastcontrast.ops.checks import check_count


class ClassBalancedSampler(Sampler[list[int]]):
    r"""Draw batches of P classes with K examples of each: a pure function of (seed, step).

    The P×K batches of Hermans, Beyer and Leibe, 2017, arXiv 1703.07737. Classes are drawn
    uniformly and without replacement, and so are the examples of a class; a class with fewer than K
    examples gives all of them before it gives one again. Steps are independent, and an epoch is
    only a number of batches. Drawn with Philox4x32-10 in integers: the same on every machine.

    It is a ``batch_sampler`` of ``torch.utils.data.DataLoader``. Iterating goes on from ``step`` to
    the end of the epoch. A loader with workers reads ahead: after a restart set ``step`` to the
    number of batches trained, in place of what ``state_dict`` says.

    Args:
        labels: Class of each example, a sequence of integers or an integer tensor [N].
        classes: P, at most the number of classes.
        per_class: K.
        seed: 64-bit seed.
        batches: How many make an epoch; None for ``N // (P * K)``, and at least 1.

    Raises:
        ValueError: If a number is not as above.
        TypeError: If one is not an integer.

    Example:
        >>> sampler = ClassBalancedSampler([0, 0, 0, 1, 1, 2, 2, 2], 2, 2, seed=0)
        >>> batch = sampler.batch(7)
        >>> len(batch), len(set(batch)), len(sampler)
        (4, 4, 2)
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        classes: int,
        per_class: int,
        *,
        seed: int,
        batches: int | None = None,
    ) -> None:
        check_count("classes", classes)
        check_count("per_class", per_class)
        ids = labels.cpu() if isinstance(labels, Tensor) else torch.as_tensor(labels)
        if ids.dim() != 1:
            raise ValueError(f"labels must have shape [N], got {list(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {ids.dtype}")
        counts = ids.unique(return_counts=True)[1].tolist()
        if classes > len(counts):
            raise ValueError(
                f"classes must be at most the number of classes, {len(counts)}, got {classes}"
            )
        if batches is not None:
            check_count("batches", batches)
        _check_draws(seed, 0)
        self.members = [m.tolist() for m in torch.argsort(ids, stable=True).split(counts)]
        self.classes, self.per_class, self.seed = classes, per_class, seed
        self.batches = batches or max(1, len(ids) // (classes * per_class))
        self.step = 0

    def batch(self, step: int) -> list[int]:
        """Indices of batch ``step``, class after class, P·K of them; step below 2**48."""
        rows = torch.arange(1 + self.classes)
        draws = max(self.classes, self.per_class)
        words = random_words(rows, draws, BATCH, self.seed, step)[0].tolist()
        chosen = _distinct(words[0][: self.classes], len(self.members))
        batch = []
        for row, c in zip(words[1:], chosen, strict=True):
            members, needed = self.members[c], row[: self.per_class]
            while needed:
                turn, needed = needed[: len(members)], needed[len(members) :]
                batch.extend(members[i] for i in _distinct(turn, len(members)))
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``step`` to the end of the epoch that it lies in."""
        end = (self.step // self.batches + 1) * self.batches
        while self.step < end:
            self.step += 1
            yield self.batch(self.step - 1)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.batches

    def state_dict(self) -> dict[str, int]:
        """Seed and step: with the same labels, all there is to know."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a sampler with this state would; labels and options are this sampler's.

        Raises:
            ValueError: If the state is not seed and step, or one of them is out of range.
        """
        if set(state) != {"seed", "step"}:
            raise ValueError(f"state must hold seed and step, got {', '.join(sorted(state))}")
        _check_draws(state["seed"], state["step"])
        self.seed, self.step = state["seed"], state["step"]


def _check_draws(seed: int, step: int) -> None:
    random_words(torch.zeros(1, dtype=torch.int64), 1, BATCH, seed, step)


def _distinct(words: list[int], count: int) -> list[int]:
    """As many different numbers below ``count`` as there are words: Fisher-Yates, sparsely."""
    moved: dict[int, int] = {}
    drawn = []
    for i, word in enumerate(words):
        j = i + (word * (count - i) >> 32)
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn
