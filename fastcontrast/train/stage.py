"""What every recipe does around its loop: data, device, run folder, optimiser, checkpoint.

:func:`prepare` comes first and refuses what cannot be run; :func:`session` surrounds the training;
:func:`run_stage` trains one network to the end of one task, from where it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastcontrast.data import ImageDataset, load_dataset, other_sizes
from fastcontrast.ops.ranks import world_size
from fastcontrast.train.batches import Pixels, pixels_of
from fastcontrast.train.checkpoints import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
)
from fastcontrast.train.config import RunConfig
from fastcontrast.train.evaluation import Figure
from fastcontrast.train.graphs import CudaRecorder
from fastcontrast.train.loop import Task, fit, stop_on_signal
from fastcontrast.train.models import network_for
from fastcontrast.train.progress import show_progress, tensorboard
from fastcontrast.train.ranks import from_first, is_first, spread_layers
from fastcontrast.train.runs import (
    Config,
    RunFolder,
    folder_of,
    note_resumption,
    open_run,
    rewind_metrics,
)


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A checked configuration with its data and its run folder: all that training needs.

    Attributes:
        config: What is asked for, with every default filled in.
        run: The run's folder.
        dataset: In host memory.
        device: Where to train.
        pixels: How bytes become the network's input.
        network: The paper's network for which data set.
    """

    config: Config
    run: RunFolder
    dataset: ImageDataset
    device: torch.device
    pixels: Pixels
    network: str

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.dataset.train_images.shape[1]

    @property
    def resolved(self) -> dict[str, Any]:
        """What the configuration leaves to the data and to the machine."""
        threads = self.config.threads or torch.get_num_threads()
        found = {"dataset": self.dataset.name, "network": self.network, "device": str(self.device)}
        return {**found, "threads": threads, "ranks": world_size()}


AnyJob = TypeVar("AnyJob", bound=Job[Any])


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        run: Its folder.
        step: Finished steps, of the stage that came last.
        interrupted: Whether it was asked to stop before its end.
        figures: Test errors, each with its protocol.
    """

    run: RunFolder
    step: int
    interrupted: bool
    figures: list[Figure]


@dataclass(frozen=True)
class Trained:
    """What a stage came to.

    Attributes:
        model: The network to evaluate: the trained one, or the moving average of its weights.
        step: Finished steps.
        interrupted: Whether it was asked to stop before its end.
    """

    model: nn.Module
    step: int
    interrupted: bool


def prepare(
    config: Config,
    make: Callable[[str, int], nn.Module],
    check: Callable[[ImageDataset], Any] = lambda dataset: None,
    *,
    open_folder: bool = True,
    unlabelled: bool = True,
) -> Job[Config]:
    """Read the data and open the run folder, so that only training is left.

    Files of another size than the published ones are named in a line that is printed.

    Args:
        config: What is asked for.
        make: Builds the recipe's network from its name and the number of channels.
        check: Raises ValueError if the data set does not do for the recipe.
        open_folder: Whether to make the run folder; otherwise ``config`` is that of a finished run.
        unlabelled: Whether the recipe has a use for images without labels.

    Returns:
        The job.

    Raises:
        ValueError: If the data, the device, or the run folder is not usable as asked.
        FileNotFoundError: If a file of the data, or the run to be resumed, is missing.
        OSError: If the run folder cannot be written.
    """
    device = find_device(config.device)
    check_switches(config, device)
    dataset = load_dataset(config.data, config.dataset, config.image_size or None, unlabelled)
    if warning := other_sizes(config.data, config.dataset):
        print(f"warning: {warning}", flush=True)
    check(dataset)
    images = dataset.train_images
    network = network_for(images) if config.network == "auto" else config.network
    check_size(make, network, images)
    pixels = pixels_of(images, config.normalise)
    job = Job(config, folder_of(config), dataset, device, pixels, network)
    return open_job(job) if open_folder else job


def open_job(job: AnyJob) -> AnyJob:
    """Make the job's run folder, or check that the run in it can be continued.

    Raises:
        ValueError, FileNotFoundError, OSError: See :func:`fastcontrast.train.runs.open_run`.
    """
    run, config = from_first(lambda: open_run(job.config, job.resolved))
    return replace(job, run=run, config=config)


@contextmanager
def session(job: Job[Any]) -> Iterator[Callable[[], bool]]:
    """Hold the job's threads, torch's generators and the signals while training.

    Ctrl-C and SIGTERM make the yielded function return True. What the caller had is put back.
    """
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), stop_on_signal() as should_stop:
        torch.set_num_threads(job.config.threads or threads)
        try:
            yield should_stop
        finally:
            torch.set_num_threads(threads)


def run_stage(
    job: Job[Any],
    run: RunFolder,
    model: nn.Module,
    task: Task[Any],
    should_stop: Callable[[], bool],
    announcement: str,
    eval_every: int = 0,
) -> Trained:
    """Train a network to the end of a task, from its checkpoint if the job is resumed.

    Args:
        job: Gives device, optimiser and everything that is not the task's.
        run: Where this stage's metrics and checkpoints go; the job's folder, or one in it.
        model: Trained in place.
        task: What to train on, towards what.
        should_stop: Asked after every step.
        announcement: One line to print first.
        eval_every: Steps between evaluations, if they are not the configuration's.

    Returns:
        What it came to.

    Raises:
        NonFiniteLossError: If the loss became NaN or infinite.
        OSError: If something could not be written; the previous checkpoint is kept.
        ValueError: If the checkpoint or the metrics to resume from are damaged.
    """
    config, device = job.config, job.device
    place(model, device)
    spread_layers(model, task.shares, task.learnt)
    if task.memory is not None:
        task.memory.to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else None
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=task.schedule.rate,
        momentum=config.momentum,
        dampening=config.dampening,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    state = TrainingState.fresh(len(task.part_names), device)
    begun, checkpoint = from_first(lambda: _open_stage(run))
    if config.resume and begun:
        if checkpoint:
            state = load_checkpoint(checkpoint, model, optimizer, device, average, task.memory)
            announcement += f"\ncontinuing after step {state.step:,}"
        else:
            announcement += f"\nno checkpoint in {run.checkpoints}: starting over from step 0"
        if is_first():
            rewind_metrics(run, state.step)
            name = "" if run == job.run else run.path.name
            note_resumption(job.run, config, state.step, name, job.resolved)
    print(announcement, flush=True)
    runner = model if config.compile == "off" else compiled(model, config.compile)
    with (
        show_progress(task.steps, state.step) as shown,
        tensorboard(shown, run.tensorboard, state.step) as progress,
    ):
        state = fit(
            model,
            optimizer,
            state,
            task,
            run=run,
            log_every=config.log_every,
            eval_every=eval_every or config.eval_every,
            progress=progress,
            should_stop=should_stop,
            runner=runner,
            average=average,
            decay=config.ema,
            amp=config.amp,
            recorder=CudaRecorder() if config.cuda_graphs else None,
        )
    ended = state.step >= task.steps or task.schedule.is_over(state.watched)
    return Trained(model if average is None else average, state.step, not ended)


def compiled(model: nn.Module, mode: str) -> Callable[..., Any]:
    """Compile a network, with the dropout masks that it has without: the compiler draws others."""
    options = torch._inductor.list_mode_options(mode)
    return torch.compile(model, options={**options, "fallback_random": True})


def _open_stage(run: RunFolder) -> tuple[bool, Path | None]:
    """Make a stage's folder; return whether it was there, and the checkpoint in it."""
    begun = run.path.is_dir()  # a stage that was not reached has no folder yet
    run.path.mkdir(exist_ok=True)
    return begun, latest_checkpoint(run.checkpoints)


def place(model: nn.Module, device: torch.device) -> None:
    """Bring a network to a device in place, with its convolutions laid out as they run fastest."""
    model.to(device)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)


def load_initial_weights(path: str, model: nn.Module, stage: str = "") -> None:
    """Take the weights of ``--init-from``: a .safetensors file, or a run's latest checkpoint.

    Args:
        path: The file, or the folder of a run.
        model: Receives the weights.
        stage: Of a run in stages, which of them.

    Raises:
        ValueError: If there is no such checkpoint, or it is of another network.
    """
    place = Path(path)
    if place.is_dir():
        folders = [RunFolder(place), *([RunFolder(place).stage(stage)] if stage else [])]
        found = [c for c in (latest_checkpoint(f.checkpoints) for f in folders) if c]
        if not found:
            raise ValueError(f"init_from: {place} is no run with a checkpoint")
        place = found[-1] / "model.safetensors"
    load_weights(place, model)


def find_device(name: str) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        ValueError: If it is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(f"device is cuda, but torch {torch.__version__} sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def check_switches(config: RunConfig, device: torch.device) -> None:
    """Raise ValueError if a step cannot be compiled, or recorded, where it is to run."""
    if config.compile != "off" and world_size() > 1:
        raise ValueError(f"compile is {config.compile!r}; wanted 'off' on {world_size()} ranks")
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs is True; wanted a CUDA device, but the device is {device}")
    if config.cuda_graphs and world_size() > 1:
        raise ValueError(f"cuda_graphs is True; wanted False on {world_size()} ranks")


def check_size(make: Callable[[str, int], nn.Module], network: str, images: Tensor) -> None:
    """Raise if the network leaves nothing of images of this size; shapes only, nothing is run."""
    try:
        with torch.device("meta"), torch.no_grad():
            make(network, images.shape[1]).eval()(torch.empty(1, *images.shape[1:]))
    except RuntimeError as error:
        height, width = images.shape[2:]
        raise ValueError(
            f"network is {network!r}, which is too deep for images of {width} x {height} pixels"
        ) from error
