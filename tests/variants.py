"""What "every backend" means in the tests: each backend of the table, on each instruction set.

A backend added to ``fastcontrast.backends.BACKENDS`` is picked up here and so by every test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from fastcontrast import backends
from fastcontrast.backends import native

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class Variant:
    """One implementation under test; ``skip_reason`` says why it cannot run here."""

    backend: str
    instruction_set: str | None = None
    skip_reason: str | None = None

    def __str__(self) -> str:
        return self.backend + (f"-{self.instruction_set}" if self.instruction_set else "")


def variants(op: str) -> list[Variant]:
    """Every implementation of ``op`` that could run on CPU tensors."""
    found = []
    for name in backends.BACKENDS:
        reason = backends.why_not(name, op, torch.empty(0))
        if name == "native" and reason is None:
            best = INSTRUCTION_SETS.index(native.build_info()["detected_isa"])
            for level, isa in enumerate(INSTRUCTION_SETS):
                lacking = None if level <= best else f"this processor has no {isa}"
                found.append(Variant(name, isa, lacking))
        else:
            found.append(Variant(name, None, reason))
    return found


def on_every_backend(op: str) -> pytest.MarkDecorator:
    """Parametrise a test's ``backend`` argument over all implementations of ``op``."""
    return pytest.mark.parametrize("backend", variants(op), ids=str, indirect=True)


@contextmanager
def active(variant: Variant) -> Iterator[None]:
    """Use the variant's instruction set inside the block."""
    if variant.instruction_set is None:
        yield
        return
    before = native._C.active_isa()
    native._C.set_active_isa(variant.instruction_set)
    try:
        yield
    finally:
        native._C.set_active_isa(before)
