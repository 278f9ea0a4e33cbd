"""A run's folder: what lies in it, when it may be written to, and its two logs.

``config.json`` says what was run, with which versions; ``metrics.jsonl`` has one JSON object a
line. The recipes open a folder here before they train, and the loop appends to its metrics.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastcontrast.train.checkpoints import remove_checkpoints, write_atomically
from fastcontrast.train.config import (
    RUN_FIELDS,
    RunConfig,
    SemisupConfig,
    SpatialConfig,
    TemporalConfig,
    TripletConfig,
)

RECIPES = {
    config.recipe: config
    for config in (TripletConfig, SpatialConfig, SemisupConfig, TemporalConfig)
}
STAGES = ("pretraining", "finetuned", "baseline")
METHODS = ("pca", "tsne", "umap")  # by which an embedding is brought to two dimensions

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """What was run: configuration, versions, commit."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """Losses and errors, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """What the run came to: every figure with its protocol."""
        return self.path / "results.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    @property
    def embeddings(self) -> Path:
        """Embeddings of the test images and of labelled images."""
        return self.path / "embeddings.npz"

    @property
    def curve(self) -> Path:
        """Picture of losses and figures over the steps."""
        return self.path / "curve.png"

    @property
    def embedding(self) -> Path:
        """Picture of the embedding in two dimensions."""
        return self.path / "embedding.png"

    def embedding_by(self, method: str) -> Path:
        """The same, brought there by a method other than PCA if it is not ``"pca"``."""
        return self.embedding if method == "pca" else self.path / f"embedding_{method}.png"

    @property
    def confusion(self) -> Path:
        """Picture of what was taken for what."""
        return self.path / "confusion.png"

    @property
    def neighbours(self) -> Path:
        """Sheet of test images beside their nearest neighbours."""
        return self.path / "neighbours.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files, if it is installed."""
        return self.path / "tensorboard"

    @property
    def written(self) -> tuple[Path, ...]:
        """All that a run may leave, in the order in which it is shown."""
        files = (self.config, self.metrics, self.results, *self.stages, self.checkpoints)
        return (*files, self.embeddings, *self.pictures, self.tensorboard)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All pictures that there may be, in the order in which they are shown."""
        embeddings = (self.embedding_by(method) for method in METHODS)
        return (self.curve, *embeddings, self.confusion, self.neighbours)

    @property
    def stages(self) -> list[Path]:
        """Folders of the run's stages that are there, "finetuned-fold3" included."""
        found = [p for p in self.path.glob("*") if p.is_dir()]
        return sorted(p for p in found if p.name.partition("-fold")[0] in STAGES)

    def stage(self, name: str) -> RunFolder:
        """Folder of one of a run's stages, with metrics and checkpoints of its own."""
        return RunFolder(self.path / name)


def folder_of(config: RunConfig) -> RunFolder:
    """Return the run folder that a configuration names; nothing is made."""
    name = config.name
    if name == "auto":
        data = config.dataset if config.dataset != "auto" else Path(config.data).resolve().name
        data = "mnist-sample" if config.data == "sample" else data
        name = f"{config.recipe}-{data}-seed{config.seed}"
    return RunFolder(config.out_dir / name)


def open_run(
    config: Config, resolved: Mapping[str, Any] = MappingProxyType({})
) -> tuple[RunFolder, Config]:
    """Make the run folder, or check that the run in it can be continued.

    Args:
        config: What is asked for. With ``resume``, all that determines the result must equal what
            the folder's run was started with, except that ``steps`` may grow.
        resolved: What ``"auto"`` came to, to be saved beside it.

    Returns:
        The folder, and the configuration to run. Rate drops that were placed by the first run's
        ``steps`` stay where they were when ``steps`` grows.

    Raises:
        ValueError: If the folder holds a run and neither ``resume`` nor ``overwrite`` is given, if
            it holds something else, or if a resumed run was started otherwise.
        FileNotFoundError: If there is no run to resume.
        OSError: If the folder cannot be written.
    """
    run = folder_of(config)
    if config.resume:
        return run, _resumed(config, read_config(run, type(config)), run)
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"{run.path}: is a file; wanted a folder for the run")
    if run.path.is_dir() and any(run.path.iterdir()):
        _require_run(run)
        if not config.overwrite:
            raise ValueError(
                f"{run.path}: there is a run already; continue it with --resume, "
                "replace it with --overwrite, or choose another --name"
            )
        _clear(run)
    run.path.mkdir(parents=True, exist_ok=True)
    started = dataclasses.replace(config, data=_absolute(config.data), lr_drops=config.drop_steps)
    fields = _saved_fields(started)
    head = {"recipe": config.recipe, "seed": config.seed, **_environment()}
    _write_json(run.config, {**head, "config": fields, "resolved": dict(resolved)})
    return run, started


def read_config(run: RunFolder, kind: type[Config]) -> Config:
    """Read back the configuration of the run in a folder, as one that resumes it.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If its config.json is damaged, or of another recipe or version.
    """
    if not run.config.is_file():
        raise FileNotFoundError(f"{run.config}: no such file; there is no run to resume")
    try:
        content = json.loads(run.config.read_text("utf-8"))
        saved, recipe = content["config"], content.get("recipe", kind.recipe)
        saved["lr_drops"] = tuple(saved["lr_drops"])
        if recipe == kind.recipe:
            place = {"out_dir": run.path.parent, "name": run.path.name}
            return kind(**saved, **place, resume=True, overwrite=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.config}: not a configuration of this version ({error})") from error
    raise ValueError(f"{run.config}: a run of train {recipe}, not of train {kind.recipe}")


def read_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """Find the run in a folder, whatever its recipe.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If its config.json is damaged or of another version.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise FileNotFoundError(f"{run.config}: no such file; wanted the folder of a run")
    try:
        recipe = json.loads(run.config.read_text("utf-8"))["recipe"]
        kind = RECIPES[recipe]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.config}: not a configuration of this version ({error})") from error
    return run, read_config(run, kind)


def write_results(run: RunFolder, step: int, figures: Sequence[Any]) -> None:
    """Write what the run came to: dataclasses of figures, each with its protocol."""
    content = [dataclasses.asdict(figure) for figure in figures]
    _write_json(run.results, {"step": step, "figures": content})


def save_embeddings(path: Path, **arrays: Tensor) -> None:
    """Write tensors as an .npz file, in one move."""
    file = io.BytesIO()
    contents: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    np.savez(file, **contents)
    write_atomically(path, file.getvalue())


def note_resumption(
    run: RunFolder, config: RunConfig, step: int, stage: str, resolved: Mapping[str, Any]
) -> None:
    """Record in config.json that the run was continued, from where and by which versions."""
    content = json.loads(run.config.read_text("utf-8"))
    content["config"] = _saved_fields(config)
    place = {"stage": stage} if stage else {}
    begun = {**place, "from_step": step, "resolved": dict(resolved), **_environment()}
    content.setdefault("resumed", []).append(begun)
    _write_json(run.config, content)


def append_metrics(run: RunFolder, record: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl and see it to the disk.

    Raises:
        OSError: If it could not be written; the message names the file.
    """
    try:
        with open(run.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{run.metrics}: could not be written ({error})") from error


def read_metrics(run: RunFolder, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without a last line that a crash cut short.

    Args:
        run: The run's folder.
        last_step: Leave out what lies beyond this step.

    Returns:
        The records in order; empty if there is no file.

    Raises:
        ValueError: If a line is not a record with its step; the message names file and line.
    """
    if not run.metrics.is_file():
        return []
    try:
        lines = run.metrics.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{run.metrics}: damaged ({error})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{run.metrics}: line {number} is not an object with a "step"')
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


def rewind_metrics(run: RunFolder, step: int) -> None:
    """Drop the lines after a step: the steps that follow a checkpoint are computed again."""
    lines = [json.dumps(record) + "\n" for record in read_metrics(run, last_step=step)]
    write_atomically(run.metrics, "".join(lines).encode("utf-8"))


def _resumed(config: Config, saved: Config, run: RunFolder) -> Config:
    config = dataclasses.replace(
        config, data=_absolute(config.data), lr_drops=config.lr_drops or saved.lr_drops
    )
    for field in dataclasses.fields(config):
        asked, was = getattr(config, field.name), getattr(saved, field.name)
        grown = field.name == "steps" and asked > was and config.schedule != "cosine"
        if field.name in RUN_FIELDS or asked == was or grown:
            continue
        flag = "--" + field.name.replace("_", "-")
        hint = "start another run for that"
        if field.name == "steps" and config.schedule != "cosine":
            hint = "it can only grow"
        raise ValueError(f"{run.path}: was started with {flag} {was}, not {asked}; {hint}")
    return config


def _absolute(data: str) -> str:
    return data if data == "sample" else str(Path(data).resolve())


def _require_run(run: RunFolder) -> None:
    """Refuse a folder in use whose config.json does not say that this recipe wrote it."""
    content = None
    if run.config.is_file():
        try:
            content = json.loads(run.config.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{run.config}: damaged ({error}), so whose folder it is cannot be told; "
                "remove the folder by hand or choose another --name"
            ) from error
    if not isinstance(content, dict) or content.get("recipe") not in RECIPES:
        raise ValueError(
            f"{run.path}: the folder exists and is not a run of this command; "
            "choose another --name or --out-dir"
        )


def _clear(run: RunFolder) -> None:
    """Remove what a run wrote and nothing else; config.json stays until it is replaced."""
    for folder in (run, *(RunFolder(path) for path in run.stages)):
        remove_checkpoints(folder.checkpoints)
        for path in (folder.metrics, folder.results, folder.embeddings, *folder.pictures):
            path.unlink(missing_ok=True)
        for path in folder.tensorboard.glob("events.out.tfevents.*"):
            path.unlink()


def _saved_fields(config: RunConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    for name in ("out_dir", "name", "resume", "overwrite"):  # where the folder is, not what it is
        del fields[name]
    return fields


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode("utf-8"))


def _environment() -> dict[str, Any]:
    try:
        version = metadata.version("fastcontrast")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "versions": {
            "fastcontrast": version,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        },
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, "+changes" if edited."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        edited = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if edited else "")


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
