"""Checkpoints that survive a crash or a full disk; written and read by the training loop.

A checkpoint is a folder ``step-<n>`` with ``model.safetensors`` (weights and buffers, nothing but
tensors), ``average.safetensors`` (their moving average, if there is one), ``memory.safetensors``
(what the loss remembers of earlier steps, if it does) and ``training.pt`` (optimiser, step,
unfinished sums; loads with ``weights_only=True``). It is written under another name, flushed to the
disk and renamed, and only then is the one before it removed: at every moment there is a complete
one. ``best-<n>`` is the same of the step at which the watched figure was lowest.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"(step|best)-(\d+)")
_PARTIAL = ".partial"
# What torch.load and the optimiser raise for a file that is damaged or holds something else.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, beside its model and optimiser.

    Attributes:
        step: Finished training steps. Batches and learning rate are functions of it.
        sums: Sums of the loss's parts since the last metrics line, [P].
        summed_steps: How many steps they cover.
        seconds: Wall-clock time spent so far.
        interval: Sums of the loss's parts since the last evaluation, [P].
        interval_steps: How many steps they cover.
        watched: The watched figure of every evaluation so far. Schedules are functions of it.
    """

    step: int
    sums: Tensor
    summed_steps: int
    seconds: float
    interval: Tensor
    interval_steps: int
    watched: tuple[float, ...]

    @classmethod
    def fresh(cls, parts: int, device: torch.device) -> TrainingState:
        """Return the state before the first step, of a loss with this many parts."""
        zeros = torch.zeros(parts, device=device)
        return cls(0, zeros, 0, 0.0, zeros.clone(), 0, ())

    def after(self, parts: Tensor) -> TrainingState:
        """Return the state after one more step, whose loss had these parts [P]."""
        return replace(
            self,
            step=self.step + 1,
            sums=self.sums + parts,
            summed_steps=self.summed_steps + 1,
            interval=self.interval + parts,
            interval_steps=self.interval_steps + 1,
        )


def latest_checkpoint(folder: Path, kind: str = "step") -> Path | None:
    """Return the complete checkpoint with the most steps in the folder, or None.

    Args:
        folder: Where checkpoints lie.
        kind: ``"step"``, where training goes on from, or ``"best"``.
    """
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if _kind_and_step(path)[0] == kind]
    return max(found, key=lambda path: _kind_and_step(path)[1], default=None)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    average: nn.Module | None = None,
    memory: nn.Module | None = None,
    *,
    best: bool = False,
) -> Path:
    """Write a checkpoint, then remove the older ones.

    Args:
        folder: Where checkpoints lie; made if needed.
        model: Its state_dict is saved.
        optimizer: Its state_dict is saved.
        state: Where the run stands.
        average: The moving average of the model, if there is one; its state_dict is saved.
        memory: What the loss remembers, if it does; its state_dict is saved.
        best: Whether to keep it as the best so far, too.

    Returns:
        The new checkpoint's folder.

    Raises:
        OSError: If it could not be written; what was there before is still there.
    """
    target = folder / f"step-{state.step:07d}"
    if target.exists():  # a step's state never differs: the run was resumed and had nothing to do
        return target
    copy = folder / f"best-{state.step:07d}"
    if best and not copy.exists():  # first: if the run dies in between, it comes by here again
        _write(copy, model, optimizer, state, average, memory)
    _write(target, model, optimizer, state, average, memory)
    kept = {target, latest_checkpoint(folder, "best")}
    for path in _all_in(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def _write(
    target: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    average: nn.Module | None,
    memory: nn.Module | None,
) -> None:
    partial = target.with_name(target.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, module in (("model", model), ("average", average), ("memory", memory)):
            if module is not None:
                _write_weights(partial / f"{name}.safetensors", module)
        with open(partial / "training.pt", "wb") as file:
            content = {field.name: getattr(state, field.name) for field in fields(state)}
            torch.save({"optimizer": optimizer.state_dict(), **content}, file)
            _flush(file)
        os.replace(partial, target)
        _flush_folder(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest_checkpoint(target.parent)
        raise OSError(
            f"{target}: could not write the checkpoint ({error}); "
            + (f"{kept.name} is still there" if kept else "there was none before it")
        ) from error


def _write_weights(path: Path, module: nn.Module) -> None:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with open(path, "wb") as file:
        file.write(save(weights))
        _flush(file)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in the folder, complete or not, and nothing else.

    Raises:
        OSError: If one could not be removed.
    """
    if folder.is_dir():
        for path in _all_in(folder):
            shutil.rmtree(path)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    average: nn.Module | None = None,
    memory: nn.Module | None = None,
) -> TrainingState:
    """Restore model and optimiser in place from one checkpoint.

    Args:
        path: A checkpoint's folder.
        model: Receives the weights.
        optimizer: Receives its state.
        device: Where the unfinished sums go.
        average: Receives the moving average of the weights.
        memory: Receives what the loss remembered.

    Returns:
        Where the run stood.

    Raises:
        ValueError: If a file of it is missing, damaged, or of another model; the message names it.
    """
    load_weights(path / "model.safetensors", model)
    for name, module in (("average", average), ("memory", memory)):
        if module is not None:
            load_weights(path / f"{name}.safetensors", module)
    training_path = path / "training.pt"
    try:
        saved: dict[str, Any] = torch.load(training_path, map_location=device, weights_only=True)
        optimizer.load_state_dict(saved.pop("optimizer"))
        return TrainingState(**saved)
    except _UNREADABLE as error:
        raise ValueError(f"{training_path}: cannot be loaded: {_first_line(error)}") from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a .safetensors file into a model that has exactly its tensors.

    Raises:
        ValueError: If it is missing, damaged, or of another model; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be loaded: {_first_line(error)}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one move: a reader finds the old or the new, never a part.

    Raises:
        OSError: If it could not be written; the message names it, the old content is still there.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            _flush(file)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error})") from error


def _all_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name.removesuffix(_PARTIAL))]


def _kind_and_step(path: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(path.name)
    return (match[1], int(match[2])) if match else ("", -1)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
