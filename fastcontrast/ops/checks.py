"""Checks of what users pass to the pairwise ops and losses. Errors name the argument.

Called by ``fastcontrast/ops`` and ``fastcontrast/losses`` before anything is computed, so that a
mistake reads the same whatever the backend, and in eager mode as under ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.backends.scores import KEEPS, PRECISIONS, accumulator_dtype
from fastcontrast.backends.scores import METRICS as backend_metrics

METRICS = (*backend_metrics, "cosine")  # what users may ask for; most backends see it as dot
PRECISION_CHOICES = ("auto", *PRECISIONS)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_operands(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise unless both are floating-point matrices [M, D] and [N, D] on one device."""
    for name, value in ((x_name, x), (y_name, y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
            )
        if value.dim() != 2:
            raise ValueError(f"{name} must have shape [rows, D], got {list(value.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{x_name} and {y_name} must have the same number of columns D, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must be on one device, got {x.device} and {y.device}"
        )


def check_pairs(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise unless both are floating-point matrices [M, D] on one device, row for row a pair."""
    check_operands(x_name, x, y_name, y)
    if x.shape != y.shape:
        raise ValueError(
            f"{x_name} and {y_name} must have the same shape [M, D], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )


def check_scale(
    name: str, value: float | Tensor, operand: Tensor | None = None, *, or_zero: bool = False
) -> None:
    """Raise unless ``value`` is a positive number (``or_zero``) or a 0-dim floating-point tensor.

    The value of a tensor is read on CPU only: on a GPU that would wait for the device. It may be
    there or on the device of the ``operand``.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got {list(value.shape)}")
        if operand is not None and value.device.type != "cpu" and value.device != operand.device:
            raise ValueError(
                f"{name} must be on cpu or on {operand.device} with the operands, got "
                f"{value.device}"
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        number = float(value.detach())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")
    if not (number > 0.0 or (or_zero and number == 0.0)) or number == float("inf"):
        wanted = "at least 0" if or_zero else "positive"
        raise ValueError(f"{name} must be {wanted} and finite, got {number}")


def inverse_temperature(temperature: float | Tensor, *operands: Tensor) -> float | Tensor:
    """1 / temperature in the accumulator dtype of the operands; raises if that is not positive."""
    check_scale("temperature", temperature, operands[0])
    dtype = operands[0].dtype
    for operand in operands[1:]:
        dtype = torch.promote_types(dtype, operand.dtype)
    dtype = accumulator_dtype(dtype)
    if isinstance(temperature, Tensor):
        scale = 1.0 / temperature.to(dtype)
        if scale.device.type != "cpu" or torch.compiler.is_compiling():
            return scale
        number = float(scale.detach())
    else:
        scale = number = 1.0 / temperature
    if not number <= torch.finfo(dtype).max:
        raise ValueError(f"temperature must not be so small that 1/temperature overflows {dtype}")
    return scale


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_integers(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``value`` is an int64 or int32 tensor of that shape on that device."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {kind}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with the operands, got {value.device}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def check_mask(
    x: Tensor,
    y: Tensor,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    keep: str,
) -> Tensor | None:
    """Return ``exclude`` as [M, E], or raise unless the mask of a pairwise op is well formed."""
    check_choice("keep", keep, KEEPS)
    m, n = x.shape[0], y.shape[0]
    if exclude is not None:
        if isinstance(exclude, Tensor) and exclude.dim() == 1:
            exclude = exclude[:, None]
        width = exclude.shape[-1] if isinstance(exclude, Tensor) and exclude.dim() == 2 else 1
        check_integers("exclude", exclude, (m, min(width, 2)), x.device)
    if keep == "all":
        if row_ids is not None or column_ids is not None:
            raise ValueError('row_ids and column_ids need keep="same" or keep="different"')
        return exclude
    for name, ids, length in (("row_ids", row_ids, m), ("column_ids", column_ids, n)):
        if ids is None:
            raise ValueError(f'keep="{keep}" needs {name}, an integer tensor [{length}]')
        check_integers(name, ids, (length,), x.device)
    return exclude


def check_thresholds(value: Tensor, rows: int, device: torch.device) -> None:
    """Raise unless ``value`` is a floating-point tensor [rows] on that device."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"threshold must be a floating-point tensor, got {kind}")
    if value.shape != (rows,):
        raise ValueError(f"threshold must have shape [{rows}], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"threshold must be on {device} with the operands, got {value.device}")


def check_indices(
    name: str, value: Tensor, rows: Tensor, lowest: int, count: int, meaning: str
) -> Tensor:
    """Return ``value`` as int64 [M], or raise if it is not a valid index for every row.

    The range is checked on CPU only: on a GPU that would wait for the device.
    """
    check_integers(name, value, (rows.shape[0],), rows.device)
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        least, most = int(value.min()), int(value.max())
        if least < lowest or most >= count:
            raise ValueError(
                f"{name} must lie in {lowest}..{count - 1} ({meaning}), got {least}..{most}"
            )
    return value.to(torch.int64)


def check_targets(
    value: Tensor, rows: Tensor, count: int, ignore_index: int
) -> tuple[Tensor, bool]:
    """Targets as int64 [M] with -1 for an ignored row, and whether none is known to be ignored.

    Raises if one is out of range. The range is checked on CPU only: on a GPU that would wait for
    the device.
    """
    check_integers("target", value, (rows.shape[0],), rows.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    ignored = value == ignore_index
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if not ignored.any():
            return check_indices("target", value, rows, 0, count, "a key's index"), True
        check_indices("target", value[~ignored], value[~ignored], 0, count, "a key's index")
    return value.to(torch.int64).masked_fill(ignored, -1), False


def check_fraction(name: str, value: float) -> None:
    """Raise unless ``value`` is a number in [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def check_row_weight(value: Tensor, rows: Tensor) -> None:
    """Raise unless ``value`` is a floating-point tensor [M] on the device of the rows."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"row_weight must be a floating-point tensor, got {kind}")
    if value.shape != (rows.shape[0],):
        raise ValueError(f"row_weight must have shape [{rows.shape[0]}], got {list(value.shape)}")
    if value.device != rows.device:
        raise ValueError(f"row_weight must be on {rows.device}, got {value.device}")


def check_distinct(name: str, value: Tensor) -> None:
    """Raise if an index occurs twice. Checked on CPU only: on a GPU that would wait for it."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() < 2:
        return
    ordered = value[value >= 0].sort().values  # -1 is an ignored row
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"{name} must not repeat an index here, got {int(repeated[0])} twice")
