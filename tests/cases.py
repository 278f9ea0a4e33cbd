"""Shapes, masks and layouts of the conformance suite, each with the regime that it covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METRICS = ("l2", "sqeuclidean", "dot", "cosine")

# The native backend's tile is 512 × 2048 (backends/native/distance_softmax.py); vectors are 16
# float32 wide. One value per regime.
SHAPES = {
    "no rows": (0, 5, 3),
    "no columns": (5, 0, 3),
    "one by one": (1, 1, 1),
    "one row": (1, 7, 4),
    "one column": (7, 1, 4),
    "no dimensions": (3, 5, 0),
    "few": (3, 6, 2),  # small enough for gradcheck; too small for coincident points
    "vector minus one": (4, 15, 16),
    "vector": (4, 16, 17),
    "vector plus one": (5, 17, 15),
    "ragged": (67, 131, 50),
    "wide": (9, 40, 257),
    "tile minus one": (511, 2047, 3),
    "tile": (512, 2048, 2),
    "tile plus one": (513, 2049, 5),
}
SMALL = ("one by one", "one column", "vector plus one", "ragged")
MASKS = ("all", "diagonal", "two excluded", "same", "different", "different and diagonal")


@dataclass(frozen=True)
class Case:
    """One call of the op: operands in float64 and options."""

    x: Tensor
    y: Tensor
    options: dict[str, Any]


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random [M, D] and [N, D] whose float64 values are exact in ``dtype``; some pairs coincide."""
    m, n, d = shape
    generator = torch.Generator().manual_seed(1000 * m + 10 * n + d + seed)
    x = torch.randn(m, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5
    if m > 3 and n > 3:
        y[3] = x[2]  # coincident points
    return x.to(dtype).double(), y.to(dtype).double()


def mask_options(mask: str, m: int, n: int) -> dict[str, Any]:
    rows, columns = torch.arange(m), torch.arange(n)
    if mask == "all":
        return {}
    if mask == "diagonal":
        return {"exclude": rows % max(n, 1)}
    if mask == "two excluded":  # repeats, and values that name no column
        first = torch.where(rows % 3 == 0, -1, (7 * rows) % max(n, 1))
        second = torch.where(rows % 4 == 0, first, n - rows % 2)
        return {"exclude": torch.stack([first, second], 1)}
    ids = {"row_ids": rows % 5 - 2**40, "column_ids": columns % 4 - 2**40}  # rows of id 4: no match
    if mask == "same":
        return {"keep": "same", **ids}
    if mask == "different":
        return {"keep": "different", **ids}
    return {"keep": "different", "exclude": rows % max(n, 1), **ids}


def case(shape: str, mask: str, dtype: torch.dtype) -> Case:
    x, y = operands(SHAPES[shape], dtype)
    return Case(x, y, mask_options(mask, x.shape[0], y.shape[0]))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, inside a NaN-filled parent where there is room."""
    m, d = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        parent = torch.full((m + 3, 2 * d + 5), torch.nan, dtype=x.dtype)
        view = parent[2 : m + 2, 1 : 2 * d + 1 : 2]
        return view.copy_(x)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "transposed", "sliced")
