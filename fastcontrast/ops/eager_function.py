"""The base of the autograd functions of eager mode, which says what cannot go through them."""

from __future__ import annotations

from typing import Any

import torch


class EagerFunction(torch.autograd.Function):
    """An ``autograd.Function`` without rules for ``torch.func``, which raises and says so."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As of ``autograd.Function``, whose message under ``torch.func`` is for its author."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "fastcontrast does not run under torch.func transforms (grad, vmap, jvp, ...): use "
                "torch.autograd.grad, and call it once for each batch"
            )
        return super().apply(*args)
