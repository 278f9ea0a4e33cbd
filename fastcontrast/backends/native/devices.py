"""Where a call of the native backend runs: which entries of ``_C``, and on what.

The entries for CUDA tensors, ``_C.cuda``, take the arguments of those for CPU tensors but for one:
where these take a number of threads, they take a stream.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastcontrast import _C

ARCHITECTURES: str = _C.build_info()["cuda_architectures"]  # as "80-real,90-virtual"
BUILD_PROBLEM = (
    None
    if _C.build_info()["cuda_runtime"]
    else "fastcontrast._C was built without CUDA kernels; with nvcc on PATH, reinstall "
    "fastcontrast with FASTCONTRAST_CUDA=on"
)


def kernels(tensor: Tensor) -> Any:
    """Entries of the C++ module for the tensor's device."""
    return _C.cuda if tensor.is_cuda else _C


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take the tensor."""
    return kernels(tensor) is not _C


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; one for a CPU tensor, as under emulation."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def workers(tensor: Tensor, threads: int) -> int | tuple[int, int]:
    """What runs a call: ``threads`` on CPU; device and current stream for a CUDA tensor."""
    if not tensor.is_cuda:
        return threads
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def cuda_problem(tensor: Tensor) -> str | None:
    """Reason why the module cannot run kernels on the tensor's GPU, or None."""
    # What is traced has been asked before, and cannot ask.
    if BUILD_PROBLEM is not None or torch.compiler.is_compiling():
        return BUILD_PROBLEM
    index = tensor.device.index
    return _architecture_problem(torch.cuda.current_device() if index is None else index)


@cache
def _architecture_problem(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if runs_on(ARCHITECTURES, capability):
        return None
    major, minor = capability
    return (
        f"fastcontrast._C has CUDA kernels for {ARCHITECTURES}, and this GPU is sm_{major}{minor}; "
        f'reinstall fastcontrast with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    )


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, as "80-real,90-virtual", runs on a GPU.

    Machine code runs on GPUs of the same major version and at least its minor one, PTX on all that
    are not older. What is specific to one architecture ("90a"), or to a family of them, does not
    leave its major version.
    """
    for entry in architectures.split(","):
        number, _, kind = entry.partition("-")
        version = number.rstrip("af")
        built = int(version[:-1]), int(version[-1])
        if number.endswith("a") and built != capability:
            continue
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind != "real" and not number.endswith(("a", "f")) and built <= capability:
            return True
    return False
