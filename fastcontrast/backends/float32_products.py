"""How torch may round float32 operands of a product: for the backends that call its GEMM.

Norms and dot products must come from operands rounded alike, so a backend says how, whatever
torch's global settings are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(precision: str, *, cuda: bool = False) -> Iterator[None]:
    """Round operands on CPU, or on CUDA devices, as "ieee" (not at all) or "tf32" inside."""
    setting: Any = getattr(torch.backends.cuda if cuda else torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before
