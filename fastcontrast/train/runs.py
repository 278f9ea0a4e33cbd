"""A run's folder: what lies in it, when it may be written to, and its two logs.

``config.json`` says what was run, with which versions; ``metrics.jsonl`` has one JSON object a
line. The recipes open a folder here before they train, and the loop appends to its metrics.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcontrast.train.checkpoints import remove_checkpoints, write_atomically
from fastcontrast.train.config import RUN_FIELDS, SemisupConfig

_RECIPE = "semisup"


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
    def checkpoints(self) -> Path:
        """Folder of the checkpoint."""
        return self.path / "checkpoint"

    @property
    def embeddings(self) -> Path:
        """Embeddings of the test images and of the labelled images."""
        return self.path / "embeddings.npz"

    @property
    def curve(self) -> Path:
        """Picture of loss and error over the steps."""
        return self.path / "curve.png"

    @property
    def embedding(self) -> Path:
        """Picture of the embedding in two dimensions."""
        return self.path / "embedding.png"


def folder_of(config: SemisupConfig) -> RunFolder:
    """Return the run folder that a configuration names; nothing is made."""
    name = config.name
    if name == "auto":
        data = "mnist-sample" if config.data == "sample" else "mnist"
        name = f"semisup-{data}-seed{config.seed}"
    return RunFolder(config.out_dir / name)


def open_run(config: SemisupConfig) -> tuple[RunFolder, SemisupConfig]:
    """Make the run folder, or check that the run in it can be continued.

    Args:
        config: What is asked for. With ``resume``, all that determines the result must equal what
            the folder's run was started with, except that ``steps`` may grow.

    Returns:
        The folder, and the configuration to run. Rate drops that were placed by the first run's
        ``steps`` stay where they were when ``steps`` grows.

    Raises:
        ValueError: If the folder is in use and neither ``resume`` nor ``overwrite`` is given, if
            its config.json does not say that it is a run of this recipe, or if the configuration
            conflicts with the run to be continued.
        FileNotFoundError: If there is nothing to resume.
    """
    run = folder_of(config)
    if config.resume:
        return run, _resumed(config, read_config(run), run)
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
    content = {"recipe": _RECIPE, "seed": config.seed, **_environment(), "config": fields}
    _write_json(run.config, content)
    return run, started


def read_config(run: RunFolder) -> SemisupConfig:
    """Read back the configuration of the run in a folder, as one that resumes it.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If its config.json is damaged or of another version.
    """
    if not run.config.is_file():
        raise FileNotFoundError(f"{run.config}: no such file; there is no run to resume")
    try:
        saved = json.loads(run.config.read_text("utf-8"))["config"]
        saved["lr_drops"] = tuple(saved["lr_drops"])
        return SemisupConfig(
            **saved, out_dir=run.path.parent, name=run.path.name, resume=True, overwrite=False
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.config}: not a configuration of this version ({error})") from error


def note_resumption(run: RunFolder, config: SemisupConfig, step: int) -> None:
    """Record in config.json that the run was continued, from where and by which versions."""
    content = json.loads(run.config.read_text("utf-8"))
    content["config"] = _saved_fields(config)
    content.setdefault("resumed", []).append({"from_step": step, **_environment()})
    _write_json(run.config, content)


def append_metrics(run: RunFolder, record: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl and see it to the disk.

    Raises:
        OSError: If it could not be written.
    """
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


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


def _resumed(config: SemisupConfig, saved: SemisupConfig, run: RunFolder) -> SemisupConfig:
    config = dataclasses.replace(
        config, data=_absolute(config.data), lr_drops=config.lr_drops or saved.lr_drops
    )
    for field in dataclasses.fields(SemisupConfig):
        asked, was = getattr(config, field.name), getattr(saved, field.name)
        if field.name in RUN_FIELDS or asked == was or (field.name == "steps" and asked > was):
            continue
        flag = "--" + field.name.replace("_", "-")
        hint = "it can only grow" if field.name == "steps" else "start another run for that"
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
    if not isinstance(content, dict) or content.get("recipe") != _RECIPE:
        raise ValueError(
            f"{run.path}: the folder exists and is not a run of this command; "
            "choose another --name or --out-dir"
        )


def _clear(run: RunFolder) -> None:
    """Remove what a run wrote and nothing else; config.json stays until it is replaced."""
    remove_checkpoints(run.checkpoints)
    for path in (run.metrics, run.embeddings, run.curve, run.embedding):
        path.unlink(missing_ok=True)


def _saved_fields(config: SemisupConfig) -> dict[str, Any]:
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
