"""Other libraries that benchmarks and tests compare with, and why one is absent."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import torch

_library: torch.library.Library | None = None


def torchvision() -> ModuleType:
    """Import torchvision, also beside a torch without CUDA; ImportError says why not.

    Its wheels hold operators linked to CUDA's libraries, and where those are missing they do not
    load and the import dies of ``operator torchvision::nms does not exist``. Transforms need none
    of them: two empty declarations are enough.
    """
    global _library
    if _library is None and not torch.cuda.is_available():
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float s, int z, float t) -> Tensor",
        ):
            _library.define(schema)
    return import_module("torchvision")


def kornia() -> ModuleType:
    """Import kornia; ImportError says why not."""
    return import_module("kornia")


def triton_augment() -> ModuleType:
    """Import triton-augment, which greets on its first import; ImportError says why not."""
    os.environ.setdefault("TRITON_AUGMENT_SUPPRESS_FIRST_RUN_MESSAGE", "1")
    return import_module("triton_augment")


def why_not(name: str) -> str | None:
    """Reason why a library of this file cannot be compared with, or None."""
    try:
        {"torchvision": torchvision, "kornia": kornia}[name]()
    except (ImportError, RuntimeError) as error:
        return f"{name} does not import: {error}"
    return None
