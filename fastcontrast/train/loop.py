"""The training loop: plain functions that every recipe calls with its own batches and loss.

The loop owns the order of things (update, log, evaluate, checkpoint, stop) and nothing else. What a
step computes is a pure function of the step's number, so that a run can be continued from a
checkpoint as if it had never stopped. The network's outputs are cut out of the graph before the
loss: its gradient is taken first, then the network's, so that each can be timed, and the outputs
of several ranks brought together in between (:mod:`fastcontrast.train.ranks`).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastcontrast.ops.ranks import world_size
from fastcontrast.train.checkpoints import TrainingState, latest_checkpoint, save_checkpoint
from fastcontrast.train.clock import Clock
from fastcontrast.train.graphs import RecordedStep, Recorder
from fastcontrast.train.ranks import Shares, any_rank, from_first, is_first, sum_gradients
from fastcontrast.train.runs import RunFolder, append_metrics
from fastcontrast.train.schedules import Schedule

Targets = TypeVar("Targets")


class Batch(NamedTuple, Generic[Targets]):
    """What the network takes, and what the loss takes beside the network's outputs.

    Of several ranks, each has its share of the images, and the targets of all of them.
    """

    images: Tensor
    targets: Targets


class NonFiniteLossError(ArithmeticError):
    """The loss or the weights became NaN or infinite; the last good checkpoint is kept."""


class Progress(Protocol):
    """Where the loop says how far it is; see :mod:`fastcontrast.train.progress`."""

    def advance(self, step: int) -> None:
        """Take note of one more finished step."""

    def record(self, record: dict[str, Any]) -> None:
        """Show what was just written to the metrics."""


def run_network(network: Callable[..., Any], images: Tensor) -> Tensor:
    """One pass over all images."""
    return network(images)


@dataclass(frozen=True)
class Task(Generic[Targets]):
    """What a recipe hands to the loop: everything that differs between the papers.

    Attributes:
        batch_at: The batch of the step that follows this many finished ones.
        loss: From outputs and targets, the scalar to minimise and its parts to be logged, [P].
        part_names: Names of the parts, in their order; the first is ``"loss"``.
        shares: How many images a batch has, and which of them a rank takes.
        evaluate: Figures of a network in the state it is in, to be logged.
        schedule: Of the learning rate.
        steps: Where to end.
        watch: The figure, of the evaluation or ``"interval_loss"`` (the mean loss since the
            evaluation before), that the plateau schedule goes by; lower is better.
        keep_best: Whether the checkpoint with the lowest watched figure is kept beside the last.
        forward: The network's outputs for a batch's images, if it is not one pass over all.
        memory: What the loss remembers of earlier steps, alike on all ranks; checkpoints hold it.
        learnt: What the loss itself learns: a part of the model that its passes do not call. On
            every rank it sees the whole batch.
        restart: Flags that start another run at a lower rate from a checkpoint's WEIGHTS, for the
            message of a loss that became NaN.
    """

    batch_at: Callable[[int], Batch[Targets]]
    loss: Callable[[Tensor, Targets], tuple[Tensor, Tensor]]
    part_names: tuple[str, ...]
    shares: Shares
    evaluate: Callable[[nn.Module], dict[str, float]]
    schedule: Schedule
    steps: int
    watch: str = "interval_loss"
    keep_best: bool = False
    forward: Callable[[Callable[..., Any], Tensor], Tensor] = run_network
    memory: nn.Module | None = None
    learnt: nn.Module | None = None
    restart: str = "--learning-rate RATE --init-from WEIGHTS"


def train_step(
    model: Callable[..., Any],
    batch: Batch[Targets],
    task: Task[Targets],
    optimizer: torch.optim.Optimizer,
    clock: Clock,
    amp: bool = False,
    recorded: RecordedStep | None = None,
) -> Tensor:
    """Make one update.

    Args:
        model: In training mode.
        batch: What the task's functions take.
        task: Gives the network's pass and the loss.
        optimizer: Over the model's parameters.
        clock: Is told what took the time; of a recorded step, all of it is the model's.
        amp: Whether the network runs under autocast to bfloat16.
        recorded: Takes the gradients, if that is not to be done here and now.

    Returns:
        The parts of the loss, detached, [P], on the model's device; nothing here waits for it.
    """
    if recorded is None:
        parts = take_gradients(model, batch, task, optimizer, clock.lap, amp)
    else:
        parts = recorded(*batch)
    sum_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()
    clock.lap("model")
    return parts


def take_gradients(
    model: Callable[..., Any],
    batch: Batch[Targets],
    task: Task[Targets],
    optimizer: torch.optim.Optimizer,
    lap: Callable[[str], None],
    amp: bool,
) -> Tensor:
    """Do all of :func:`train_step` that comes before the sum over ranks and the update."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=amp):
        outputs = task.forward(model, batch.images)
    lap("model")
    wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    cut = task.shares.whole(wide).requires_grad_()
    loss, parts = task.loss(cut, batch.targets)
    own = [] if task.learnt is None else list(task.learnt.parameters())
    gradient, *of_own = torch.autograd.grad(loss, [cut, *own])
    for parameter, part in zip(own, of_own, strict=True):
        parameter.grad = part / world_size()  # every rank has all of it, and the sum follows
    lap("loss")
    outputs.backward(task.shares.own(gradient).to(outputs.dtype))
    return parts.detach()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    task: Task[Any],
    *,
    run: RunFolder,
    log_every: int,
    eval_every: int,
    progress: Progress,
    should_stop: Callable[[], bool],
    runner: Callable[..., Any] | None = None,
    average: nn.Module | None = None,
    decay: float = 0.0,
    amp: bool = False,
    recorder: Recorder | None = None,
) -> TrainingState:
    """Train from where ``state`` stands to the task's end, or until asked to stop.

    Every ``log_every`` steps a line goes to the metrics, for which the host waits for the device
    once; between lines it does not. Every ``eval_every`` steps the model is evaluated and a
    checkpoint written. Both also happen after the last step. A stop is taken after the current
    step, with a checkpoint. All ranks take every step, and the stop that one of them is asked for;
    rank 0 evaluates and writes.

    Args:
        model: Trained in place.
        optimizer: Over its parameters.
        state: Where the run stands: fresh, or as loaded with the model and the optimiser.
        task: What to train on, towards what.
        run: Where metrics and checkpoints go.
        log_every: Steps between metrics lines.
        eval_every: Steps between evaluations and checkpoints.
        progress: Is told of every step and of every metrics line.
        should_stop: Asked after every step.
        runner: What runs the model's passes, if that is compiled; evaluations take the model.
        average: Receives the moving average of the weights, and is evaluated instead of the model.
        decay: Of the moving average.
        amp: See :func:`train_step`.
        recorder: Records the step and replays it; without it every step runs eagerly.

    Returns:
        Where the run stands now.

    Raises:
        NonFiniteLossError: If a loss or a weight is NaN or infinite. Not checkpointed.
        OSError: If metrics or a checkpoint could not be written. The previous checkpoint is kept.
        LostRankError: If another rank has stopped. The previous checkpoint is kept.
    """
    model.train()
    device = state.sums.device
    clock = Clock(device, task.shares.total)
    begun = time.perf_counter() - state.seconds
    recorded = None
    if recorder is not None:

        def step(images: Tensor, targets: Any) -> Tensor:
            batch = Batch(images, targets)
            return take_gradients(runner or model, batch, task, optimizer, lambda part: None, amp)

        recorded = RecordedStep(step, model.parameters(), recorder)
    while state.step < task.steps and not task.schedule.is_over(state.watched):
        rate = task.schedule.at(state.step, state.watched)
        for group in optimizer.param_groups:
            group["lr"] = rate
        clock.start()
        batch = task.batch_at(state.step)
        clock.lap("data")
        parts = train_step(runner or model, batch, task, optimizer, clock, amp, recorded)
        if average is not None:
            update_average(average, model, decay)
            clock.lap("model")
        clock.end()
        done = state.step + 1
        state = state.after(parts)
        stopping, last = any_rank(should_stop()), done == task.steps
        evaluating = last or done % eval_every == 0
        record: dict[str, Any] = {}
        if last or done % log_every == 0:
            means = (state.sums / state.summed_steps).tolist()
            _require_finite(means, done, task, run)
            record |= dict(zip(task.part_names, means, strict=True))
            record |= {"learning_rate": rate, "speed": clock.read()}
            state = replace(state, sums=torch.zeros_like(state.sums), summed_steps=0)
        best = False
        if evaluating or stopping:
            weights = torch.stack([p.detach().sum() for p in model.parameters()])
            _require_finite(torch.cat([state.interval, weights]).tolist(), done, task, run)
        if evaluating:
            figures = from_first(lambda: task.evaluate(model if average is None else average))
            record |= figures
            figures["interval_loss"] = (state.interval[0] / state.interval_steps).item()
            watched = figures[task.watch]
            best = task.keep_best and watched < min(state.watched, default=math.inf)
            state = replace(
                state,
                watched=(*state.watched, watched),
                interval=torch.zeros_like(state.interval),
                interval_steps=0,
            )
        state = replace(state, seconds=time.perf_counter() - begun)
        if record:
            record = {"step": done, **record, "seconds": round(state.seconds, 3)}
        if record and is_first():
            append_metrics(run, record)
        if (evaluating or stopping) and is_first():
            save_checkpoint(
                run.checkpoints, model, optimizer, state, average, task.memory, best=best
            )
        progress.advance(done)
        if record:
            progress.record(record)
        if stopping:
            break
    return state


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average's parameters towards the model's, and copy its other buffers."""
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks after every step.

    The first signal makes the yielded function return True; after it the signals act as before, so
    that a second Ctrl-C stops at once. Outside the main thread, where Python takes no signal
    handlers, the function always returns False. Under torchrun, which passes on signals that a rank
    may have had already and kills after 30 seconds, further ones are ignored.
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
        if world_size() == 1:
            restore()

    for number in watched:
        signal.signal(number, take)
    try:
        yield received.is_set
    finally:
        restore()


def _require_finite(values: Sequence[float], step: int, task: Task[Any], run: RunFolder) -> None:
    if all(map(math.isfinite, values)):
        return
    kept = latest_checkpoint(run.checkpoints)
    advice = "There is no checkpoint yet: start again with --overwrite and a lower rate"
    if kept:
        restart = task.restart.replace("WEIGHTS", str(kept / "model.safetensors"))
        advice = (
            f"The last good checkpoint is {kept}. --resume keeps the rate; for a lower one start "
            f"another run: {restart} --name NAME"
        )
    raise NonFiniteLossError(
        f"the loss or a weight is NaN or infinite at step {step}; a lower learning rate may help. "
        + advice
    )
