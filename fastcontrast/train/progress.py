"""How a run shows itself: a live bar where standard output is a terminal, plain lines where not.

The recipes open one with :func:`show_progress` and hand it to the loop; the closing table is here
too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcontrast.train.clock import PARTS
from fastcontrast.train.evaluation import Figure
from fastcontrast.train.loop import Progress
from fastcontrast.train.ranks import is_first

# What keys of the metrics mean, where their words do not say it.
LABELS = {
    **{f"error_{k}nn": f"{k}-NN test error" for k in (1, 3, 5)},
    "error_triplets": "test triplets in error",
    "error_held_out": "held-out triplets in error",
    "error_train": "training triplets in error",
    "error_test": "test error",
    "error_time": "test frames whose nearest is far in time",
}


@contextmanager
def show_progress(steps: int, done: int) -> Iterator[Progress]:
    """Open the display that suits standard output.

    Args:
        steps: Where the run ends.
        done: Steps finished before.
    """
    if not sys.stdout.isatty():
        yield _Lines(steps)
        return
    from rich import progress

    with progress.Progress(
        progress.TextColumn("step {task.completed:,}/{task.total:,}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeRemainingColumn(),
    ) as bar:
        yield _Bar(bar, bar.add_task("", total=steps, completed=done, figures=""), steps)


@contextmanager
def tensorboard(progress: Progress, folder: Path, done: int) -> Iterator[Progress]:
    """Also write every figure for TensorBoard, if it is installed.

    Args:
        progress: Is told as before.
        folder: Where the event files go.
        done: Steps finished before; what an earlier attempt wrote beyond them is hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    # Outside of the except: what fails inside is no import's fault.
    if SummaryWriter is None or not is_first():
        yield progress
        return
    writer = SummaryWriter(str(folder), purge_step=done)
    try:
        yield _Board(progress, writer)
    finally:
        writer.close()


class _Board:
    """Hands on what it is told, and writes figures to TensorBoard."""

    def __init__(self, progress: Progress, writer: Any):
        self._progress, self._writer = progress, writer

    def advance(self, step: int) -> None:
        """Hand on."""
        self._progress.advance(step)

    def record(self, record: dict[str, Any]) -> None:
        """Hand on, and write the figures."""
        self._progress.record(record)
        figures = {**record, **record.get("speed", {})}
        for name in figures.keys() - {"step", "speed"}:
            self._writer.add_scalar(name, figures[name], record["step"])


class _Lines:
    """One line for every line of the metrics."""

    def __init__(self, steps: int):
        self._steps = steps

    def advance(self, step: int) -> None:
        """Say nothing: lines come with the metrics."""

    def record(self, record: dict[str, Any]) -> None:
        """Print the record's figures."""
        print(_step_and_figures(record, self._steps), flush=True)


class _Bar:
    """A live bar with the latest loss, and a line above it for every evaluation."""

    def __init__(self, bar: Any, task: Any, steps: int):
        self._bar, self._task, self._steps = bar, task, steps

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        """Show the loss beside the bar, and an error as a line that stays."""
        if "loss" in record:
            speed = record["speed"].get("images_per_second")
            figures = f"loss {record['loss']:.3f}" + (f", {speed:,.0f} images/s" if speed else "")
            self._bar.update(self._task, figures=figures)
        if any(key.startswith("error") for key in record):
            self._bar.console.print(_step_and_figures(record, self._steps), highlight=False)


def print_figures(figures: Sequence[Figure], title: str) -> None:
    """Print figures as percentages, each with the protocol that it was taken by.

    Args:
        figures: What to print, a line each.
        title: What they are about.
    """
    width = max(len(figure.name) for figure in figures)
    print(f"\n{title}")
    for figure in figures:
        print(f"  {figure.name:<{width}}  {figure.value:>7.2%}   {figure.protocol}")


def print_errors(rows: dict[str, dict[int, float]], title: str) -> None:
    """Print a table of errors: a row for each representation, a column for each k.

    Args:
        rows: Row title to (k to error, 0 to 1).
        title: What the table is about.
    """
    width = max(map(len, rows))
    neighbours = list(next(iter(rows.values())))
    print(f"\n{title}")
    print("  " + " " * width + "".join(f"{f'{k}-NN':>9}" for k in neighbours))
    for name, errors in rows.items():
        print("  " + name.ljust(width) + "".join(f"{errors[k]:>9.2%}" for k in neighbours))


def _step_and_figures(record: dict[str, Any], steps: int) -> str:
    text = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if "loss" in record:
        parts = ", ".join(
            f"{key.removeprefix('loss_').replace('_', ' ')} {value:.4f}"
            for key, value in record.items()
            if key.startswith("loss_")
        )
        text += f"   loss {record['loss']:.4f}" + (f" ({parts})" if parts else "")
    for key, value in record.items():
        if key.startswith("error"):
            text += f"   {LABELS.get(key, key.replace('_', ' '))} {value:.2%}"
    if speed := record.get("speed"):
        shares = ", ".join(f"{part} {speed[part]:.0%}" for part in PARTS)
        text += f"   {speed['images_per_second']:,.0f} images/s ({shares})"
    return text
