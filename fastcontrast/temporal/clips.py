"""Batches of clips from sequences of any length, drawn by counter: seed and step are all state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcontrast.ops.checks import check_count
from fastcontrast.temporal.draws import CLIP_ORDER, CLIP_STARTS, below, check_seed, words

_KINDS = ("uint8", "float16", "float32", "float64")
_FRAMES = 1 << 31  # a start is 31 bits of a draw


class Clips(NamedTuple):
    """Frames of a batch with what the losses of this package ask for.

    Attributes:
        frames: [C, T, ...], in the dtype of the sequences.
        sequence_ids: Place of each frame's sequence among the sequences, int64 [C, T].
        times: Place of each frame in its sequence, int64 [C, T].
    """

    frames: Tensor
    sequence_ids: Tensor
    times: Tensor

    def flat(self) -> Clips:
        """Frame for frame: [C·T, ...], [C·T] and [C·T]."""
        return Clips(self.frames.flatten(0, 1), self.sequence_ids.flatten(), self.times.flatten())


class ClipSampler:
    """Draw clips of equally spaced frames from sequences of different lengths.

    Clips are numbered through the steps: clip c of step s has the number n = s C + c. With S
    sequences, clips n = e S to e S + S - 1 are one from each, in an order drawn for e, so that
    every sequence serves as often as another; where in it a clip starts is uniform. Both are
    pure functions of seed and n, so that ``batch(step)`` may be called in any order, on any worker
    or rank (rank r of R takes the steps r, r + R, ...). As an iterator it counts steps and never
    ends; ``state_dict()`` holds seed and step, and a loaded one continues bit for bit.

    Sequences may be memory-mapped arrays (``numpy.load(path, mmap_mode="r")``): only the frames
    of a clip are read.

    Args:
        sequences: Tensors or arrays [L, ...] on the CPU, uint8, float16, float32 or float64, of one
            dtype and frame shape and any lengths L < 2**31; a mapping names them for errors.
        clips: Clips of a batch C, at least 1; more than there are sequences draws some twice.
        length: Frames of a clip T, at least 1.
        stride: Time between the frames of a clip, at least 1.
        seed: 64-bit seed.
        step: The step that iterating starts at, 0 <= step < 2**48.

    Raises:
        ValueError: If a sequence is shorter than a clip, (T - 1) stride + 1 frames, or differs from
            the first in dtype or frame shape (the message names it), or an option is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> sequences = {"walk": torch.arange(5.0), "run": torch.arange(10.0, 14.0)}
        >>> sampler = ClipSampler(sequences, clips=2, length=3, seed=0)
        >>> sampler.batch(0).sequence_ids[:, 0].sort().values, sampler.batch(0).frames.shape
        (tensor([0, 1]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        sequences: Sequence[Any] | Mapping[str, Any],
        *,
        clips: int,
        length: int,
        stride: int = 1,
        seed: int,
        step: int = 0,
    ) -> None:
        for name, count in (("clips", clips), ("length", length), ("stride", stride)):
            check_count(name, count)
        check_seed(seed, step)
        if isinstance(sequences, Mapping):
            names, arrays = [repr(name) for name in sequences], list(sequences.values())
        else:
            arrays = list(sequences)
            names = [str(place) for place in range(len(arrays))]
        if not arrays:
            raise ValueError("sequences must hold at least one sequence, got none")
        needed = (length - 1) * stride + 1
        for name, array in zip(names, arrays, strict=True):
            _check_sequence(name, array, names[0], arrays[0], needed)
        self.clips, self.length, self.stride = clips, length, stride
        self.seed, self.step = seed, step
        self.sequences = arrays
        self._starts = torch.tensor([array.shape[0] - needed + 1 for array in arrays])

    def batch(self, step: int) -> Clips:
        """The clips of a step, on the CPU."""
        check_seed(self.seed, step)
        number = torch.arange(step * self.clips, (step + 1) * self.clips)
        count = len(self.sequences)
        rounds, places = number // count, number % count
        orders = {e: self._order(e) for e in rounds.unique().tolist()}
        chosen = torch.stack(
            [orders[e][p] for e, p in zip(rounds.tolist(), places.tolist(), strict=True)]
        )
        start = below(words(self.seed, 0, CLIP_STARTS, number)[0], self._starts[chosen])
        times = start[:, None] + self.stride * torch.arange(self.length)
        reach = (self.length - 1) * self.stride + 1
        frames = [
            _frames(self.sequences[sequence][first : first + reach : self.stride])
            for sequence, first in zip(chosen.tolist(), start.tolist(), strict=True)
        ]
        return Clips(torch.stack(frames), chosen[:, None].expand(-1, self.length), times)

    def _order(self, turn: int) -> Tensor:
        """The sequences in the order of one turn, int64 [S]."""
        drawn = words(self.seed, turn, CLIP_ORDER, torch.arange(len(self.sequences)))
        return (drawn[0] << 31 | drawn[1] >> 1).argsort(stable=True)

    def __iter__(self) -> Iterator[Clips]:
        return self

    def __next__(self) -> Clips:
        found = self.batch(self.step)
        self.step += 1
        return found

    def state_dict(self) -> dict[str, int]:
        """Seed and step, all that there is to save."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a saved state; sequences and options are those of this sampler."""
        if set(state) != {"seed", "step"}:
            raise ValueError(f"state must hold seed and step, got {', '.join(sorted(state))}")
        check_seed(state["seed"], state["step"])
        self.seed, self.step = state["seed"], state["step"]


def _check_sequence(name: str, array: Any, first_name: str, first: Any, needed: int) -> None:
    """Raise unless the sequence is like the first, and as long as a clip."""
    if not isinstance(array, (Tensor, np.ndarray)):
        raise TypeError(
            f"sequences must be tensors or arrays, got {type(array).__name__} as sequence {name}"
        )
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in _KINDS:
        raise TypeError(f"sequences must be {', '.join(_KINDS)}, got {kind} as sequence {name}")
    if isinstance(array, Tensor) and array.device.type != "cpu":
        raise ValueError(f"sequences must be on the CPU, got sequence {name} on {array.device}")
    if array.ndim < 1:
        raise ValueError(f"sequences must have shape [L, ...], got a number as sequence {name}")
    if array.dtype != first.dtype or array.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"sequences must be of one dtype and frame shape, got {kind} {list(array.shape[1:])} "
            f"as sequence {name} and {str(first.dtype).removeprefix('torch.')} "
            f"{list(first.shape[1:])} as sequence {first_name}"
        )
    if array.shape[0] >= _FRAMES:
        raise ValueError(f"sequence {name} has {array.shape[0]} frames; wanted less than 2^31")
    if array.shape[0] < needed:
        raise ValueError(
            f"sequence {name} has {array.shape[0]} frames, fewer than the {needed} of a clip"
        )


def _frames(frames: Any) -> Tensor:
    """A copy of frames as a tensor."""
    return frames.clone() if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
