"""Memory that ends where a tensor ends: access beyond it is a fault, which the emulation reports.

Storages lie before a page that nobody may touch, and behind one. Between a storage that is no
multiple of 16 bytes and its page, up to 15 bytes are not guarded, and as many as fill a page before
it. Storages of more than LARGEST, files of which few pages exist, stay where they are.
cuda_runtime.h makes an error of the fault.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
ALIGNMENT = 16  # of the largest access
LARGEST = 1 << 30


def guarded_copies(count: int) -> Tensor | None:
    """Bytes for a copy of a storage of that size, unless it is too large to be copied."""
    return guarded_bytes(count) if count <= LARGEST else None


def guarded_bytes(count: int) -> Tensor:
    """So many bytes, all 0xFF: NaN, as floats."""
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-count // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        if _protect()(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = PAGE + (size - count) // ALIGNMENT * ALIGNMENT
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=begin).fill_(0xFF)


@cache
def _protect() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Inside the block, what `new_empty` and `new_zeros` make is guarded as well."""
    real = torch.Tensor.new_empty

    def guarded_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        shape = real(self, *size, **(options | {"device": "meta"}))
        storage = guarded_bytes(shape.numel() * shape.element_size()).untyped_storage()
        found = torch.empty(0, dtype=shape.dtype)
        return found.set_(storage, 0, shape.shape, shape.stride())

    def guarded_zeros(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return guarded_empty(self, *size, **options).zero_()

    with (
        patch.object(torch.Tensor, "new_empty", guarded_empty),
        patch.object(torch.Tensor, "new_zeros", guarded_zeros),
    ):
        yield
