"""Where the time of a training step goes: data, network or loss; the loop asks and the log shows.

On a GPU the marks are events on the stream, read when a log line waits for the device anyway.
"""

from __future__ import annotations

import time
from typing import Any

import torch

PARTS = ("data", "model", "loss")


class Clock:
    """Adds up the time since the last :meth:`read`, by part of the step.

    The first step after it was made is left out: it pays for caches, threads and compilation.
    """

    def __init__(self, device: torch.device, images_per_step: int):
        self._cuda = device.type == "cuda"
        self._images_per_step = images_per_step
        self._warm = False
        self._reset()

    def start(self) -> None:
        """Mark the beginning of a step."""
        self._marks.append(("", self._now()))

    def lap(self, part: str) -> None:
        """Mark the end of what ``part`` took since the mark before."""
        self._marks.append((part, self._now()))

    def end(self) -> None:
        """Count the step."""
        self._steps += 1
        if not self._warm:
            self._warm = True
            self._reset()

    def read(self) -> dict[str, float]:
        """Images per second of training and each part's share; empty if no step was timed."""
        if not self._steps:
            return {}
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                seconds[part] += self._seconds(before, now)
        total = sum(seconds.values())
        rate = self._steps * self._images_per_step / total
        self._reset()
        shares = {part: round(spent / total, 3) for part, spent in seconds.items()}
        return {"images_per_second": round(rate, 1), **shares}

    def _reset(self) -> None:
        self._marks: list[tuple[str, Any]] = []  # part that ended there, time or event
        self._steps = 0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, before: Any, now: Any) -> float:
        return before.elapsed_time(now) / 1000 if self._cuda else now - before
