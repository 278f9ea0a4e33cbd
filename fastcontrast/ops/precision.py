"""What ``precision="auto"`` means for the operands of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.scores import PRECISIONS, accumulator_dtype


def effective_precision(precision: str, x: Tensor) -> str:
    """What ``precision`` means for operands like ``x``: "auto" follows torch's global setting."""
    if x.dtype != torch.float32:
        return "ieee"
    if precision != "auto":
        return precision
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer per-device settings are in use
        library = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
        setting = getattr(library, "matmul").fp32_precision  # noqa: B009 (unknown to the stubs)
        return setting if setting in PRECISIONS else "ieee"
    return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[setting]


def of_widened(precision: str, *points: Tensor) -> str:
    """The same for points that become float32 before the op, normalized or to be added to.

    Half ones are multiplied as they come elsewhere. float32 in full has no matrix units on a GPU,
    so "auto" takes two bfloat16 terms there: of every half number they hold all bits, and 2^-17 of
    one that was normalized or centred since.
    """
    dtype = points[0].dtype
    for other in points[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    is_half = dtype != accumulator_dtype(dtype)
    return "bf16x3" if precision == "auto" and is_half and points[0].is_cuda else precision
