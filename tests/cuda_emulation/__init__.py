"""The CUDA kernels on the host: csrc/cuda/*.cu compiled against cuda_runtime.h of this folder.

:func:`module` builds an extension module with the entries of ``_C.cuda`` once per content of its
sources; :func:`active` makes the native backend call it with CPU tensors. `variants.py` lists it
among the implementations under test. cuda_runtime.h says what this can and cannot show.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from fastcontrast.backends import native

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAME = "_cuda_emulation"
KERNELS = sorted(path for path in CSRC.glob("cuda/*.cu") if path.stem != "device")
SOURCES = [HERE / "module.cpp", *sorted(CSRC.glob("cuda/*bindings.cpp")), *KERNELS]
# Fortified, longjmp takes the change of stacks for an error.
FLAGS = (
    "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Werror", "-Wno-unknown-pragmas", "-DFASTCONTRAST_CUDA_EMULATION",
)  # fmt: skip


def why_not() -> str | None:
    """Reason why the kernels cannot be built for the host here, or None."""
    if sys.platform != "linux":
        return f"the emulation of CUDA uses Linux' ucontext, this is {sys.platform}"
    if _compiler() is None:
        return "no C++ compiler for the emulation of CUDA"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed, which the emulation of CUDA is built with"
    if native.IMPORT_PROBLEM is not None:
        return native.IMPORT_PROBLEM
    return None


@cache
def module() -> ModuleType:
    """Return the extension module, built unless a build of the same sources is there."""
    import fcntl

    import pybind11

    include = [HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [str(_compiler()), *FLAGS, *(f"-I{folder}" for folder in include)]
    digest = hashlib.sha256(" ".join([*command, platform.machine(), sys.version]).encode())
    for path in sorted([*CSRC.glob("**/*.h"), *HERE.glob("**/*.h"), *SOURCES]):
        digest.update(path.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "fastcontrast-tests"
    built = folder / f"{NAME}-{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that share the tests build it once
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _build(command, Path(scratch), built)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(built))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def _build(command: list[str], scratch: Path, built: Path) -> None:
    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.stem}-{source.suffix[1:]}.o"
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    linked = scratch / "linked.so"
    _run([command[0], "-shared", *map(str, objects), "-o", str(linked)])
    linked.replace(built)  # whole or not at all


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@contextmanager
def active(order: int = 0) -> Iterator[None]:
    """Have the native backend run CPU tensors on the emulated kernels, in one order of threads."""
    emulated = module()
    emulated.set_order(order)

    def kernels(tensor: torch.Tensor) -> Any:
        assert tensor.device.type == "cpu"
        return emulated

    with (
        patch.object(native.devices, "kernels", kernels),
        patch.object(native.devices, "workers", lambda tensor, threads: (0, 0)),
    ):
        yield
