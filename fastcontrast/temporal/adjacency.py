"""Who is near whom in time: frames in the order of their sequences, and ranges of that order.

A window of time around a frame is a range of positions once frames are sorted by sequence and time,
so near frames are found by search, and no M×M mask is written. Called by the other files here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.checks import check_count, check_integers

# Keys of (sequence, time) stay below this, so that sums of them do not overflow int64.
_KEY_LIMIT = 1 << 61


class Timeline(NamedTuple):
    """Frames [M] by sequence and time.

    Attributes:
        sequences: Number of each frame's sequence, int64 [M], 0 for the least id.
        times: Time since the first frame of all, int64 [M].
        span: Time of the last.
        order: Frames sorted by sequence, then time, int64 [M]; equal ones keep their order.
        keys: ``sequences * (span + 1) + times`` in that order, ascending.
    """

    sequences: Tensor
    times: Tensor
    span: int
    order: Tensor
    keys: Tensor

    def first_at(self, times: Tensor, rows: Tensor | None = None) -> Tensor:
        """First position, of the row's sequence, whose time is at least this [M], or its end.

        ``rows`` names the frames that ``times`` are of; None for all.
        """
        sequences = self.sequences if rows is None else self.sequences[rows]
        bounded = times.clamp(0, self.span + 1)
        return torch.searchsorted(self.keys, sequences * (self.span + 1) + bounded)


def timeline(
    frames: Tensor, sequence_ids: Tensor, times: Tensor, name: str = "embeddings"
) -> Timeline:
    """Sort frames; raises unless ids and times are integers [M] beside ``frames`` [M, ...]."""
    shape = (frames.shape[0],)
    check_integers("sequence_ids", sequence_ids, shape, frames.device)
    check_integers("times", times, shape, frames.device)
    ids, sequences = torch.unique(sequence_ids.to(torch.int64), return_inverse=True)
    times = times.to(torch.int64)
    span = 0
    if shape[0]:
        least, most = int(times.min()), int(times.max())
        span = most - least
        if (span + 2) * ids.shape[0] >= _KEY_LIMIT:
            raise ValueError(
                f"times must span less than 2^61 over the number of sequences, got {least}..{most} "
                f"beside {ids.shape[0]} sequences of {name}"
            )
        times = times - least
    keys = sequences * (span + 1) + times
    keys, order = keys.sort(stable=True)
    return Timeline(sequences, times, span, order, keys)


def check_window(window: int, margin: int | None) -> None:
    """Raise unless the window is at least 1 and the margin, if there is one, no smaller."""
    check_count("window", window)
    if margin is None:
        return
    check_count("margin", margin)
    if margin < window:
        raise ValueError(
            f"margin must be at least window, or a frame is positive and negative, got margin="
            f"{margin} and window={window}"
        )


class Ranges(NamedTuple):
    """Two ranges of positions for each row, int64 [M] each: ``first <= p < last``."""

    first: Tensor
    last: Tensor
    second_first: Tensor
    second_last: Tensor

    @property
    def counts(self) -> Tensor:
        """Number of positions of each row, int64 [M]."""
        return (self.last - self.first) + (self.second_last - self.second_first)

    def at(self, k: Tensor) -> Tensor:
        """The k-th position of each row, k [M] or [M, K]; any where there are fewer."""
        ends = (self.first, self.last, self.second_first)
        first, last, second = (e if k.dim() == 1 else e[:, None] for e in ends)
        left = last - first
        return torch.where(k < left, first + k, second + k - left)

    def of(self, rows: Tensor | slice) -> Ranges:
        """Those of some rows."""
        return Ranges(*(bound[rows] for bound in self))


def near(line: Timeline, window: int) -> Ranges:
    """Frames of the same sequence within the window, without the row's own position."""
    window = min(window, line.span)
    places = torch.empty_like(line.order)
    places[line.order] = torch.arange(line.order.shape[0], device=line.order.device)
    first = line.first_at(line.times - window)
    last = line.first_at(line.times + window + 1)
    return Ranges(first, places, places + 1, last)


def beyond(
    line: Timeline, margin: int, low: Tensor | None = None, high: Tensor | None = None
) -> Ranges:
    """Frames of the same sequence more than ``margin`` away, at times ``low <= t < high`` [M]."""
    margin = min(margin, line.span)
    start = line.first_at(torch.zeros_like(line.times) if low is None else low)
    end = line.first_at(torch.full_like(line.times, line.span + 1) if high is None else high)
    return Ranges(
        start,
        torch.maximum(line.first_at(line.times - margin), start),
        torch.minimum(line.first_at(line.times + margin + 1), end),
        end,
    )


def frames_after(line: Timeline, step: int) -> Tensor:
    """Frame of the same sequence ``step`` later, the first of several, int64 [M]; -1 for none."""
    m = line.order.shape[0]
    if m == 0 or step > line.span:
        return torch.full_like(line.order, -1)
    wanted = line.times + step
    positions = line.first_at(wanted).clamp(max=m - 1)
    keys = line.sequences * (line.span + 1) + wanted
    found = (line.keys[positions] == keys) & (wanted <= line.span)
    return torch.where(found, line.order[positions], -1)
