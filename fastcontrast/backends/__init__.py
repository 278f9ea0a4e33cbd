"""Which implementation runs an op: the table, :func:`resolve` and :func:`why_not`.

Called by ``fastcontrast/ops``. A backend is a package in this folder with a function
``why_not(op, tensor)`` and one function per kernel entry; it is made known by one line in
:data:`BACKENDS`, and every test of the conformance suite then runs on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcontrast.backends import native, reference, triton

OPS = ("distance_softmax", "extract_patches", "nearest", "triplet_distances")

# Fastest first: `backend=None` takes the first that can run.
BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "reference": reference,
}
# Backend and device type that nobody gets unasked: interpreted kernels are there for tests.
ONLY_BY_NAME = {("triton", "cpu")}


def why_not(backend: str, op: str, tensor: Tensor) -> str | None:
    """Reason why ``backend`` cannot run ``op`` on tensors like ``tensor``, or None if it can."""
    return BACKENDS[backend].why_not(op, tensor)


def resolve(
    op: str,
    tensor: Tensor,
    backend: str | None = None,
    *,
    others: Tensor | None = None,
    precision: str = "ieee",
) -> str:
    """Name of the backend that runs ``op`` on tensors like ``tensor``.

    Args:
        op: One of :data:`OPS`.
        tensor: A tensor of the call; its device and dtype decide.
        backend: A name asks for that backend alone; None takes the fastest that can run, those in
            :data:`ONLY_BY_NAME` left out.
        others: The columns of a pairwise op: with them its size decides as well.
        precision: How its products may be rounded; "auto" where that is not known yet.

    Raises:
        ValueError: If ``backend`` is not the name of a backend.
        RuntimeError: If the named backend cannot run this call; the message says why.
    """
    if backend is None:
        for name, module in BACKENDS.items():
            unasked = (name, tensor.device.type) not in ONLY_BY_NAME
            if unasked and module.why_not(op, tensor) is None:
                return _faster(name, op, tensor, others, precision)
        raise RuntimeError(
            f"no backend runs {op} on {tensor.device.type} tensors of {tensor.dtype}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].why_not(op, tensor)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend


def _faster(name: str, op: str, tensor: Tensor, others: Tensor | None, precision: str) -> str:
    """``name``, or the backend that it leaves a call of this size to, where that one can run."""
    if name != "native" or others is None:
        return name
    other = native.leaves_to(op, tensor, others, precision)
    return name if other is None or why_not(other, op, tensor) is not None else other


def available_backends(
    op: str = "distance_softmax", device: str | torch.device = "cpu"
) -> tuple[str, ...]:
    """Names of the backends that run ``op`` on ``device`` here, fastest first.

    Example:
        >>> "reference" in available_backends()
        True
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    probe = torch.empty(0, device=device)
    return tuple(name for name in BACKENDS if why_not(name, op, probe) is None)


def has(backend: str, function: str) -> bool:
    """Whether ``backend`` has an entry that not every backend needs to have."""
    return hasattr(BACKENDS[backend], function)


def takes_cosine(backend: str, dtype: torch.dtype) -> bool:
    """Whether ``backend`` knows "cosine" of such points; others see "dot" of unit rows."""
    return dtype in getattr(BACKENDS[backend], "COSINES", ())


def run(backend: str, function: str, tensor: Tensor, *args: Any) -> Any:
    """Call a kernel entry of ``backend`` on the tensor's GPU, if it is on one.

    Autocast is off: kernels choose their own dtypes.
    """
    entry = getattr(BACKENDS[backend], function)
    with autocast_off(tensor.device.type), on_device_of(tensor):
        return entry(tensor, *args)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, where kernels are launched; at no cost where it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off for a device, at no cost where it is off."""
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
