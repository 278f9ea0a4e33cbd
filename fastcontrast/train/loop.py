"""The training loop: plain functions that every recipe calls with its own batches and loss.

The loop owns the order of things (update, log, evaluate, checkpoint, stop) and nothing else. What a
step computes is a pure function of the step's number, so that a run can be continued from a
checkpoint as if it had never stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastcontrast.train.checkpoints import TrainingState, latest_checkpoint, save_checkpoint
from fastcontrast.train.runs import RunFolder, append_metrics

Batch = TypeVar("Batch")


class NonFiniteLossError(ArithmeticError):
    """The loss or the weights became NaN or infinite; the last good checkpoint is kept."""


class Progress(Protocol):
    """Where the loop says how far it is; see :mod:`fastcontrast.train.progress`."""

    def advance(self, step: int) -> None:
        """Take note of one more finished step."""

    def record(self, record: dict[str, Any]) -> None:
        """Show what was just written to the metrics."""


def train_step(
    model: nn.Module,
    batch: Batch,
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Make one update.

    Args:
        model: In training mode.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: Gives the scalar to minimise and the parts of it to be logged, [P].
        optimizer: Over the model's parameters.

    Returns:
        The parts, detached, [P], on the model's device; nothing here waits for the device.
    """
    loss, parts = loss_fn(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return parts.detach()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    steps: int,
    batch_at: Callable[[int], Batch],
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    part_names: tuple[str, ...],
    learning_rate_at: Callable[[int], float],
    evaluate: Callable[[], dict[str, float]],
    run: RunFolder,
    log_every: int,
    eval_every: int,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> TrainingState:
    """Train from where ``state`` stands up to ``steps``, or until asked to stop.

    Every ``log_every`` steps a line goes to the metrics (the one time that the host waits for the
    device); every ``eval_every`` steps the model is evaluated and a checkpoint written. Both also
    happen after the last step. A stop is taken after the current step, with a checkpoint.

    Args:
        model: Trained in place.
        optimizer: Over its parameters.
        state: Where the run stands: fresh, or as loaded with the model and the optimiser.
        steps: Where to end.
        batch_at: The batch of the step that follows this many finished ones.
        loss_fn: See :func:`train_step`.
        part_names: Names of the loss's parts, in their order.
        learning_rate_at: Learning rate after this many finished steps.
        evaluate: Figures to be logged; called with the model as it is.
        run: Where metrics and checkpoints go.
        log_every: Steps between metrics lines.
        eval_every: Steps between evaluations and checkpoints.
        progress: Is told of every step and of every metrics line.
        should_stop: Asked after every step.

    Returns:
        Where the run stands now.

    Raises:
        NonFiniteLossError: If a loss or a weight is NaN or infinite. Not checkpointed.
        OSError: If metrics or a checkpoint could not be written. The previous checkpoint is kept.
    """
    model.train()
    sums, summed_steps = state.sums, state.summed_steps
    begun = time.perf_counter() - state.seconds
    while state.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step)
        sums = sums + train_step(model, batch_at(state.step), loss_fn, optimizer)
        summed_steps += 1
        done = state.step + 1
        stopping, last = should_stop(), done == steps
        evaluating = last or done % eval_every == 0
        record: dict[str, Any] = {}
        if last or done % log_every == 0:
            means = (sums / summed_steps).tolist()
            _require_finite(sums, done, run)
            record |= dict(zip(part_names, means, strict=True))
            record["learning_rate"] = learning_rate_at(state.step)
            sums, summed_steps = torch.zeros_like(sums), 0
        if evaluating or stopping:
            _require_finite(sums, done, run)
            _require_finite(torch.stack([p.detach().sum() for p in model.parameters()]), done, run)
        if evaluating:
            record |= evaluate()
        state = TrainingState(done, sums, summed_steps, time.perf_counter() - begun)
        if record:
            record = {"step": done, **record, "seconds": round(state.seconds, 3)}
            append_metrics(run, record)
        if evaluating or stopping:
            save_checkpoint(run.checkpoints, model, optimizer, state)
        progress.advance(done)
        if record:
            progress.record(record)
        if stopping:
            break
    return state


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks after every step.

    The first signal makes the yielded function return True; after it the signals act as before, so
    that a second Ctrl-C stops at once. Outside the main thread, where Python takes no signal
    handlers, the function always returns False.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take(number: int, frame: Any) -> None:
        received.set()
        restore()

    for number in watched:
        signal.signal(number, take)
    try:
        yield received.is_set
    finally:
        restore()


def _require_finite(values: Tensor, step: int, run: RunFolder) -> None:
    if bool(values.isfinite().all()):
        return
    kept = latest_checkpoint(run.checkpoints)
    raise NonFiniteLossError(
        f"the loss or a weight is NaN or infinite at step {step}; a lower learning rate may help. "
        + (f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet")
    )
