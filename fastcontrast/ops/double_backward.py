"""Gradients as functions of inputs and upstream gradients, for double backward in eager mode.

Called by the autograd functions of ``fastcontrast/ops`` where somebody will differentiate again;
the computation is the reference's, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcontrast import backends


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Any],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)``, None where not needed; inputs may be numbers.

    ``grads`` are the upstream gradients of its results, None for a result without one.
    """
    # Views: a gradient must stop at an input, also where one was computed from another.
    inputs = [v.view_as(v) if isinstance(v, Tensor) else v for v in inputs]
    with backends.autocast_off(inputs[0].device.type):
        outputs = function(*inputs)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                materialize_grads=True,
            )
        )
    return [next(found) if need else None for need in needs]
