"""Triton kernels: CUDA devices without nvcc, and any machine under Triton's interpreter, for tests.

``triton`` is imported in this folder only, and not before a kernel is asked for: ``import
fastcontrast`` neither needs it nor waits for it. ``import triton`` here means the library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Ops that have kernels here, and the dtypes that they take.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "distance_softmax": FLOATING,
    "extract_patches": (torch.uint8, *FLOATING),
    "nearest": FLOATING,
    "triplet_distances": FLOATING,
}
# Points whose "cosine" scores are taken from the points as given, with their norms in the scores.
COSINES = (torch.float16, torch.bfloat16)
# Entry of the backend table -> file of this folder that holds it.
ENTRIES: dict[str, str] = {
    "distance_softmax_forward": "distance_softmax",
    "distance_softmax_backward": "distance_softmax",
    "softmax_loss": "distance_softmax",
    "nearest_columns": "nearest",
    "sample_coords": "patch_draws",
    "first_invalid_box": "extract_patches",
    "extract_patches_forward": "extract_patches",
    "extract_patches_backward": "extract_patches",
    "random_patches_forward": "extract_patches",
    "triplet_distances_forward": "triplet_distances",
    "triplet_distances_backward": "triplet_distances",
    "triplet_difference_forward": "triplet_distances",
    "triplet_difference_backward": "triplet_distances",
}

# Triton reads the variable when a kernel is decorated, and its own functions are decorated when it
# is imported: it has to be set before Python starts, and is read here once.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
MINIMUM_CAPABILITY = (8, 0)
# Compilers of older Triton fail at reductions of what its tensor memory holds (capability 10.x).
TENSOR_MEMORY_CAPABILITY = 10
TENSOR_MEMORY_VERSION = (3, 8)


def _import_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "fastcontrast[triton]" (Linux)'
    return None


def _launcher_problem() -> str | None:
    """Triton compiles a launcher of its own, in C, before the first kernel of a machine runs."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler on the path or in CC, once, for its launcher"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "triton needs Python.h, once, for its launcher; apt install python3-dev"
    return None


IMPORT_PROBLEM = _import_problem()
LAUNCHER_PROBLEM = None if IMPORT_PROBLEM else _launcher_problem()


def why_not(op: str, tensor: Tensor) -> str | None:
    """Reason why the Triton kernels cannot run ``op`` on tensors like ``tensor``, or None."""
    if IMPORT_PROBLEM is not None:
        return IMPORT_PROBLEM
    if op not in DTYPES:
        return f"{op} has no Triton kernel"
    if tensor.dtype not in DTYPES[op]:
        return f"{op} has no Triton kernel for {tensor.dtype}"
    if INTERPRETED:
        if tensor.device.type != "cpu":
            return f"TRITON_INTERPRET=1 runs kernels on CPU tensors, got a {tensor.device.type} one"
        return None
    if tensor.device.type != "cuda":
        return (
            f"Triton kernels run on CUDA tensors, got a {tensor.device.type} tensor "
            "(TRITON_INTERPRET=1, set before Python starts, interprets them on CPU, for tests)"
        )
    return LAUNCHER_PROBLEM or _device_problem(tensor)


def _device_problem(tensor: Tensor) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are made for NVIDIA GPUs"
    if torch.compiler.is_compiling():  # what is traced has been asked before, and cannot ask
        return None
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < MINIMUM_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"the Triton kernels need compute capability 8.0, this device has {found}"
    return version_problem(capability, importlib.metadata.version("triton"))


def version_problem(capability: tuple[int, int], version: str) -> str | None:
    """Reason why a version of Triton cannot compile the kernels for a device, or None."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if capability[0] == TENSOR_MEMORY_CAPABILITY and numbers < TENSOR_MEMORY_VERSION:
        wanted = ".".join(map(str, TENSOR_MEMORY_VERSION))
        return f"compute capability 10 needs triton {wanted} or newer, {version} is installed"
    return None


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; one under the interpreter."""
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def __getattr__(name: str) -> Any:
    """The table's entries, from the file that holds each, imported when it is first called."""
    if name in ENTRIES and IMPORT_PROBLEM is None:
        return getattr(importlib.import_module(f"{__name__}.{ENTRIES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
