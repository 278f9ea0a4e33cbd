"""The bfloat16 matrix units under test: those of this machine, and AMX on emulated tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fastcontrast.backends import native

UNITS = ("avx512_bf16", "amx", "amx_emulated")


def lacking(unit: str) -> str | None:
    """Reason why ``unit`` cannot run here, or None."""
    if native.IMPORT_PROBLEM is not None:
        return native.IMPORT_PROBLEM
    if unit in native._C.bf16_units():
        return None
    if unit == "amx_emulated":
        return "only an editable installation has the emulation of AMX"
    if unit not in native._C.BF16_UNITS_BUILT:
        return f"this build has no kernels for {unit}"
    return f"this machine has no {unit}"


@contextmanager
def active_unit(unit: str) -> Iterator[None]:
    """Multiply by ``unit`` inside the block, products of any size; "none" is torch."""
    from fastcontrast.backends.native import products

    before, minimum = native._C.active_bf16_unit(), products.PACKING_MINIMUM
    native._C.set_active_bf16_unit(unit)
    products.PACKING_MINIMUM = 0
    try:
        yield
    finally:
        native._C.set_active_bf16_unit(before)
        products.PACKING_MINIMUM = minimum


def on_units(*units: str) -> Callable:
    """Parametrise a test's ``unit`` fixture argument over units, skipping what cannot run."""
    return pytest.mark.parametrize("unit", units, indirect=True)


on_every_unit = on_units(*UNITS)
on_threefold_units = on_units("amx", "amx_emulated")
