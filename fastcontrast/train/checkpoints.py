"""Checkpoints that survive a crash or a full disk; written and read by the training loop.

A checkpoint is a folder ``step-<n>`` with ``model.safetensors`` (weights and buffers, nothing but
tensors) and ``training.pt`` (optimiser, step, unfinished sums; loads with ``weights_only=True``).
It is written under another name, flushed to the disk and renamed, and only then is the one before
it removed: at every moment there is a complete one.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d+)")
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
    """

    step: int
    sums: Tensor
    summed_steps: int
    seconds: float


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps in the folder, or None."""
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return max(found, key=_step_of, default=None)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> Path:
    """Write a checkpoint, then remove the older ones.

    Args:
        folder: Where checkpoints lie; made if needed.
        model: Its state_dict is saved.
        optimizer: Its state_dict is saved.
        state: Where the run stands.

    Returns:
        The new checkpoint's folder.

    Raises:
        OSError: If it could not be written; what was there before is still there.
    """
    from safetensors.torch import save

    target = folder / f"step-{state.step:07d}"
    if target.exists():  # a step's state never differs: the run was resumed and had nothing to do
        return target
    partial = target.with_name(target.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with open(partial / "model.safetensors", "wb") as file:
            file.write(save(weights))
            _flush(file)
        with open(partial / "training.pt", "wb") as file:
            torch.save(
                {
                    "optimizer": optimizer.state_dict(),
                    "step": state.step,
                    "sums": state.sums,
                    "summed_steps": state.summed_steps,
                    "seconds": state.seconds,
                },
                file,
            )
            _flush(file)
        os.replace(partial, target)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest_checkpoint(folder)
        raise OSError(
            f"{target}: could not write the checkpoint ({error}); "
            + (f"{kept.name} is still there" if kept else "there was none before it")
        ) from error
    for path in _all_in(folder):
        if path != target:
            shutil.rmtree(path, ignore_errors=True)
    return target


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in the folder, complete or not, and nothing else.

    Raises:
        OSError: If one could not be removed.
    """
    if folder.is_dir():
        for path in _all_in(folder):
            shutil.rmtree(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainingState:
    """Restore model and optimiser in place from one checkpoint.

    Args:
        path: A checkpoint's folder.
        model: Receives the weights.
        optimizer: Receives its state.
        device: Where the unfinished sums go.

    Returns:
        Where the run stood.

    Raises:
        ValueError: If a file of it is missing, damaged, or of another model; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights_path, training_path = path / "model.safetensors", path / "training.pt"
    try:
        model.load_state_dict(load_file(weights_path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights_path}: cannot be loaded: {_first_line(error)}") from error
    try:
        saved: dict[str, Any] = torch.load(training_path, map_location=device, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        return TrainingState(saved["step"], saved["sums"], saved["summed_steps"], saved["seconds"])
    except _UNREADABLE as error:
        raise ValueError(f"{training_path}: cannot be loaded: {_first_line(error)}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one move: a reader finds the old or the new, never a part.

    Raises:
        OSError: If it could not be written; the old content is still there.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            _flush(file)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _all_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name.removesuffix(_PARTIAL))]


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


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
