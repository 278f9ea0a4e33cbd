"""Layers of a configuration: defaults, a preset, a file, flags; for the command line.

A file is TOML, its keys are the fields of the recipe's configuration, and an unknown one is an
error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastcontrast.train.config import RunConfig
from fastcontrast.train.presets import PRESETS
from fastcontrast.train.runs import folder_of, read_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config", bound=RunConfig)


def configure(kind: type[Config], description: str, flags: Sequence[str]) -> Config:
    """Build a recipe's configuration from the command line.

    ``--preset`` and ``--config`` are taken first, in the order of the layers; every other flag is
    a field. With ``--resume`` and neither of them, what is not given is as the run was started.

    Args:
        kind: The recipe's configuration.
        description: What its help says first.
        flags: After the recipe's name.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: If the preset or a key of the file is unknown, or a value is unusable.
        FileNotFoundError: If the file, or the run to be resumed, is missing.
        SystemExit: From tyro, for unknown flags and for help.
    """
    import tyro

    rest, preset = _take(list(flags), "--preset")
    rest, file = _take(rest, "--config")
    base = layered(kind, preset, file)

    def parse(default: Config) -> Config:
        return tyro.cli(
            kind,
            prog=f"fastcontrast train {kind.recipe}",
            description=f"{description}\n\n{_layers_help(kind)}",
            default=default,
            args=rest,
        )

    config = parse(base)
    if config.resume and preset is None and file is None:
        return parse(read_config(folder_of(config), kind))
    return config


def layered(kind: type[Config], preset: str | None, file: str | None) -> Config:
    """Return the defaults, with the preset on top, with the file on top.

    Raises:
        ValueError: As :func:`configure`.
        FileNotFoundError: If the file is missing.
    """
    values: dict[str, Any] = _read_toml(Path(file)) if file is not None else {}
    named = values.pop("preset", None) or None  # "", as it is saved, is none
    preset = preset if preset is not None else named
    known = PRESETS[kind.recipe]
    if preset is not None and preset not in known:
        raise ValueError(f"preset is {preset!r}; {kind.recipe} has {', '.join(known)}")
    base = dataclasses.replace(known[preset], preset=preset) if preset is not None else kind()
    assert isinstance(base, kind)
    types = get_type_hints(kind)
    allowed = {field.name for field in dataclasses.fields(kind)}
    checked = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in allowed:
            raise ValueError(f"{file}: unknown key {key!r}; train {kind.recipe} --help lists them")
        checked[name] = _typed(f"{file}: {key}", value, types[name])
    try:
        return dataclasses.replace(base, **checked)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted a configuration in TOML")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({' '.join(str(error).split())})") from error


def _typed(where: str, value: Any, kind: Any) -> Any:
    """Return a TOML value as the field's type, or raise ValueError that says what was wanted."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{where} is {value!r}; wanted {' or '.join(map(repr, get_args(kind)))}")
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(_typed(where, one, get_args(kind)[0]) for one in value)
        raise ValueError(f"{where} is {value!r}; wanted a list")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}; wanted {kind.__name__}")
    return value


def _take(flags: list[str], name: str) -> tuple[list[str], str | None]:
    """Take one flag and its value out of the others."""
    value, rest, waiting = None, [], False
    for flag in flags:
        if waiting:
            value, waiting = flag, False
        elif flag == name:
            waiting = True
        elif flag.startswith(name + "="):
            value = flag.partition("=")[2]
        else:
            rest.append(flag)
    if waiting:
        raise ValueError(f"{name}: wants a value")
    return rest, value


def _layers_help(kind: type[RunConfig]) -> str:
    return (
        "Also: --preset NAME, one of " + ", ".join(PRESETS[kind.recipe]) + "; --config FILE.toml, "
        "whose keys are the flags below. Flags go over the file, the file over the preset."
    )
