"""The conformance suite on a GPU: a backend whose kernels get CUDA copies of a test's CPU tensors.

Storage is copied, not values, so that layouts, offsets and what lies around a tensor are those of
the test; what a kernel writes comes back into the same places. `variants.py` puts it in the table.
The emulated kernels get copies as well, in memory that ends where a storage ends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DRAWS = ("sample_coords", "random_patches_forward")
ON_CPU = ("first_invalid_box",)  # looks at coordinates that are on the CPU, and returns a number


class Copies:
    """Copies of storages on a device, one for each, and tensors on them.

    With ``bytes_for``, in the memory that it gives for a number of bytes; where it gives none, the
    storage is taken as it is.
    """

    def __init__(
        self, device: str, bytes_for: Callable[[int], Tensor | None] | None = None
    ) -> None:
        self.device = device
        self.bytes_for = bytes_for or self._bytes
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def _bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor on a copy of its storage."""
        source = tensor.detach().untyped_storage()
        if source.data_ptr() not in self.storages:
            given = self.bytes_for(source.nbytes())
            copy = source if given is None else given.untyped_storage()
            self.storages[source.data_ptr()] = source, copy
            if given is not None:
                copy.copy_(source)
        found = torch.empty(0, dtype=tensor.dtype, device=self.device)
        _, storage = self.storages[source.data_ptr()]
        return found.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def write_back(self) -> None:
        """Make the originals what the copies are now."""
        for source, copy in self.storages.values():
            if copy is not source:
                source.copy_(copy)


class Carried(ModuleType):
    """A backend of another device that takes CPU tensors: they travel there and back.

    Its entries run inside of ``around()``.
    """

    def __init__(
        self,
        module: ModuleType,
        device: str,
        bytes_for: Callable[[int], Tensor | None] | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(module.__name__)
        self._module, self._device, self._bytes_for = module, device, bytes_for
        self._around = around

    def why_not(self, op: str, tensor: Tensor) -> str | None:
        return self._module.why_not(op, tensor.new_empty(0, device=self._device))

    def __getattr__(self, name: str) -> Any:
        entry = getattr(self._module, name)
        if name in ON_CPU:
            return entry

        def carried(*args: Any) -> Any:
            copies = Copies(self._device, self._bytes_for)
            with self._around():
                result = entry(*tree_map_only(Tensor, copies.of, args))
            copies.write_back()
            if name in DRAWS and result < 0:  # ask again what a GPU may say too late
                from fastcontrast.backends.native import extract_patches as patch_kernels

                coords = args[name == "random_patches_forward"]
                word = patch_kernels._word(copies.of(coords).device)
                result = patch_kernels._taken(word, coords.shape[1])
            return tree_map_only(Tensor, Tensor.cpu, result)

        return carried
