"""What ``fastcontrast doctor`` prints: versions, processor, native module, and who runs which op.

Called by ``fastcontrast/cli.py``; needs nothing beyond torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import torch

from fastcontrast import backends
from fastcontrast.backends import native, triton

COMPILERS = ("c++", "g++", "clang++", "cl")
EXTRAS = {
    "train": ("tyro", "rich", "matplotlib", "safetensors"),
    "triton": ("triton",),
    "bench": ("pytest-benchmark",),
    "test": ("hypothesis",),
}


def report() -> str:
    """The whole report as text, sections separated by blank lines.

    Example:
        >>> "backends" in report()
        True
    """
    sections = {
        "versions": _versions(),
        "processor": _processor(),
        "native module": _native_module(),
        "CUDA": _cuda(),
        "Triton": _triton(),
        "backends (fastest first; the first that can run is taken)": _backends(),
        "extras": _extras(),
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[str]:
    yield f"fastcontrast {_version('fastcontrast') or '(not installed)'}"
    yield f"torch        {torch.__version__}"
    yield f"numpy        {_version('numpy')}"
    yield f"python       {platform.python_version()} ({sys.executable})"


def _processor() -> Iterator[str]:
    threads = torch.get_num_threads()
    yield f"{platform.machine()}, {os.cpu_count()} cores, torch uses {threads} threads"
    yield f"torch's kernels use {torch.backends.cpu.get_cpu_capability()}"


def _native_module() -> Iterator[str]:
    info = native.build_info()
    if info:
        yield f"built by {info['compiler']}"
        lowered = info["active_isa"] != info["detected_isa"]
        yield f"instruction set {info['active_isa']}" + (
            f" (this processor runs {info['detected_isa']})" if lowered else ""
        )
        unit = info["active_bf16_unit"]
        yield "bfloat16 products: " + ("by torch, in float32" if unit == "none" else f"by {unit}")
        yield (
            "OpenMP: yes, torch's threads"
            if info["openmp"]
            else "OpenMP: no, so one thread; install a compiler with OpenMP and reinstall"
        )
        return
    yield f"not available: {native.IMPORT_PROBLEM}"
    found = [name for name in COMPILERS if shutil.which(name)]
    yield (
        f"C++ compiler here: {', '.join(found)}; reinstall with FASTCONTRAST_NATIVE=require"
        if found
        else "no C++ compiler here: apt install g++ (Debian, Ubuntu), xcode-select --install "
        "(macOS), Visual Studio Build Tools (Windows); then reinstall fastcontrast"
    )


def _cuda() -> Iterator[str]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    else:
        built = torch.version.cuda
        yield (
            f"torch is built for CUDA {built} and finds no device"
            if built
            else "this torch is built without CUDA"
        )
    nvcc = shutil.which("nvcc")
    yield f"nvcc: {nvcc}" if nvcc else "nvcc: not found, so a build here has no CUDA kernels"
    info = native.build_info()
    if not info:
        return
    if info["cuda_runtime"]:
        version = f"{info['cuda_runtime'] // 1000}.{info['cuda_runtime'] % 1000 // 10}"
        yield f"native module: CUDA {version} for {info['cuda_architectures']}"
        if info["cuda_device_problem"]:
            yield f"native module finds no device: {info['cuda_device_problem']}"
    else:
        yield "native module: built without CUDA"


def _triton() -> Iterator[str]:
    if triton.IMPORT_PROBLEM is not None:
        yield f"not available: {triton.IMPORT_PROBLEM}"
        return
    yield f"triton {_version('triton')}" + (
        ", interpreted on CPU (TRITON_INTERPRET): for tests, and only where it is named"
        if triton.INTERPRETED
        else ""
    )
    if triton.LAUNCHER_PROBLEM is not None and not triton.INTERPRETED:
        yield f"cannot start kernels: {triton.LAUNCHER_PROBLEM}"


def _backends() -> Iterator[str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in backends.OPS:
        for device in devices:
            probe = torch.empty(0, device=device)
            runs = backends.resolve(op, probe)
            yield f"{op} on {device}: {runs}"
            rule = native.size_rule(op) if device == "cuda" and runs == "native" else None
            if rule is not None and backends.why_not("triton", op, probe) is None:
                yield f"  by size: triton {rule}"
            for name in backends.BACKENDS:
                reason = backends.why_not(name, op, probe)
                yield f"  {name}: {'can run' if reason is None else reason}"


def _extras() -> Iterator[str]:
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        yield f"{extra}: " + (
            f'{", ".join(missing)} missing; pip install "fastcontrast[{extra}]"'
            if missing
            else "installed"
        )
