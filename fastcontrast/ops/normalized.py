"""Rows divided by their norms: what makes a dot product a cosine. Called by the ops and before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcontrast.backends.scores import accumulator_dtype
from fastcontrast.ops.double_backward import differentiable_gradients
from fastcontrast.ops.eager_function import EagerFunction


def normalized(x: Tensor) -> Tensor:
    """Rows [M, D] divided by their norms, in the accumulator dtype; zero rows stay zero."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return _divided(x)[0]
    return _Normalized.apply(x)


def of_unit_rows(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor, str]:
    """The same scores without "cosine": "dot" of normalized rows; one tensor stays one."""
    if metric != "cosine":
        return x, y, metric
    unit = normalized(x)
    return unit, unit if y is x else normalized(y), "dot"


def _divided(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and what each was multiplied by [M, 1]."""
    x = x.to(accumulator_dtype(x.dtype))
    if x.shape[1] == 0:
        return x, x.new_zeros(x.shape[0], 1)
    # Scaled first, so that squares neither overflow nor vanish.
    largest = x.detach().abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = x / largest
    squared = scaled.square().sum(1, keepdim=True)
    is_zero = squared == 0
    factor = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).rsqrt())
    return scaled * factor, factor / largest


class _Normalized(EagerFunction):
    """The same as one node of the graph: its dozen small operators cost more than a small loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, factor = _divided(x)
        ctx.save_for_backward(x, result, factor)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor | None:
        x, result, factor = ctx.saved_tensors
        (grad,) = upstream
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again
            return differentiable_gradients(lambda x: _divided(x)[:1], [x], [grad], [True])[0]
        # The part of the gradient along the row does not change its direction.
        along = (grad * result).sum(1, keepdim=True)
        return torch.addcmul(grad, along, result, value=-1.0).mul_(factor).to(x.dtype)
