"""C++ kernels: on CPU always, on CUDA devices when built with nvcc. The only importer of ``_C``.

Each op's file allocates with torch, passes addresses to ``_C`` and names the C++ file that runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    # After torch: the module's OpenMP calls then resolve to the thread pool that torch has loaded.
    import fastcontrast._C as _C

    IMPORT_PROBLEM: str | None = None
except ImportError as error:
    _C = None
    IMPORT_PROBLEM = (
        f"fastcontrast._C is not built ({error}); install a C++17 compiler and reinstall "
        "fastcontrast, with FASTCONTRAST_NATIVE=require to see the build's error"
    )

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU_DTYPES = {
    "distance_softmax": FLOATING,
    "extract_patches": (torch.uint8, *FLOATING),
    "nearest": FLOATING,
    "triplet_distances": FLOATING,
}
# Ops that have CUDA kernels.
CUDA_DTYPES = {
    "distance_softmax": FLOATING,
    "extract_patches": (torch.uint8, *FLOATING),
    "nearest": FLOATING,
    "triplet_distances": FLOATING,
}

# Multiplications M·N·D of a product up to which the CUDA kernels are faster than Triton's, by the
# launches that they save: of `distance_softmax` by differences and in matrix units, and of
# `nearest`. And columns up to which `distance_softmax` waits for memory in both. What these are by
# the model, tests/test_roofline.py says.
DIFFERENCES_ON_CUDA, PRODUCTS_ON_CUDA, SEARCH_ON_CUDA = 1 << 28, 1 << 32, 1 << 30
FEW_COLUMNS = 16
# From which the CUDA kernels of `distance_softmax` use matrix units where rounding is allowed:
# below, differences in float32 take less time than rounding both sides first. With FEW_COLUMNS they
# do at any size: they wait for the memory that rounded rows would be written to and read from.
TENSOR_MINIMUM = 1 << 27


def why_not(op: str, tensor: Tensor) -> str | None:
    """Reason why the C++ kernels cannot run ``op`` on tensors like ``tensor``, or None."""
    if IMPORT_PROBLEM is not None:
        return IMPORT_PROBLEM
    device = tensor.device.type
    if device == "cuda" and op in CUDA_DTYPES:
        if tensor.dtype not in CUDA_DTYPES[op]:
            return f"{op} has no CUDA kernel for {tensor.dtype}"
        return devices.cuda_problem(tensor)
    if device != "cpu":
        return f"{op} has a C++ kernel for CPU tensors only, got a {device} tensor"
    if tensor.dtype not in CPU_DTYPES[op]:
        return f"{op} has no C++ kernel for {tensor.dtype}"
    return None


def leaves_to(op: str, rows: Tensor, columns: Tensor, precision: str) -> str | None:
    """Backend that is faster than this one on a call of such points, where it can run; or None."""
    if rows.device.type != "cuda":
        return None
    if op == "nearest":
        # Triton's waits for the device: no graph can hold it, and compiled code may become one.
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return None
        largest = SEARCH_ON_CUDA
    elif op == "distance_softmax" and columns.shape[0] > FEW_COLUMNS:
        largest = PRODUCTS_ON_CUDA if may_round(rows.dtype, precision) else DIFFERENCES_ON_CUDA
    else:
        return None
    return "triton" if rows.shape[0] * columns.shape[0] * rows.shape[1] > largest else None


def may_round(dtype: torch.dtype, precision: str) -> bool:
    """Whether matrix units may take products of such points; what "auto" will say is not known."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half or (dtype == torch.float32 and precision not in ("ieee", "auto"))


def size_rule(op: str) -> str | None:
    """When :func:`leaves_to` hands a call on CUDA to Triton, in words; None for never."""
    differences, products, search = (
        f"2^{bound.bit_length() - 1}"
        for bound in (DIFFERENCES_ON_CUDA, PRODUCTS_ON_CUDA, SEARCH_ON_CUDA)
    )
    return {
        "distance_softmax": f"beyond M·N·D = {differences} ({products} of half points or with "
        f"rounded products), but for up to {FEW_COLUMNS} columns",
        "nearest": f"beyond M·N·D = {search}, but for graphs and compiled code",
    }.get(op)


def build_info() -> dict[str, Any]:
    """Compiler, OpenMP, matrix units and CUDA of the module; empty when it is not built."""
    if _C is None:
        return {}
    info = dict(_C.build_info())
    info["active_isa"] = _C.active_isa()
    info["active_bf16_unit"] = _C.active_bf16_unit()
    info["cuda_device_count"] = _C.cuda_device_count() if info["cuda_runtime"] else 0
    info["cuda_device_problem"] = _C.cuda_device_problem() if info["cuda_runtime"] else ""
    return info


if _C is not None:
    from fastcontrast.backends.native import devices
    from fastcontrast.backends.native.distance_softmax import (  # noqa: F401 (the table's entries)
        distance_softmax_backward,
        distance_softmax_forward,
        softmax_loss,
    )
    from fastcontrast.backends.native.extract_patches import (  # noqa: F401
        extract_patches_backward,
        extract_patches_forward,
        first_invalid_box,
        random_patches_forward,
        sample_coords,
    )
    from fastcontrast.backends.native.nearest import nearest_columns  # noqa: F401
    from fastcontrast.backends.native.triplet_distances import (  # noqa: F401
        triplet_difference_backward,
        triplet_difference_forward,
        triplet_distances_backward,
        triplet_distances_forward,
    )
