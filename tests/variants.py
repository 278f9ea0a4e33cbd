"""What "every backend" means in the tests: each backend of the table, on each instruction set.

A backend added to ``fastcontrast.backends.BACKENDS`` is picked up here and so by every test.
Kernels for GPUs run on a CUDA device where there is one, on the same CPU tensors carried there and
back (on_cuda.py). Elsewhere the native backend's run on the host, in their emulation, and the
Triton kernels under the interpreter where ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import cuda_emulation
import pytest
import torch
from cases import SHAPES
from cuda_emulation.guarded import guarded_allocations, guarded_copies
from on_cuda import Carried

from fastcontrast import backends
from fastcontrast.backends import native, triton

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class Variant:
    """One implementation under test; ``skip_reason`` says why it cannot run here."""

    backend: str
    instruction_set: str | None = None
    device: str = "cpu"
    op: str = ""
    skip_reason: str | None = None

    def __str__(self) -> str:
        part = self.instruction_set or (self.device if self.device != "cpu" else None)
        return self.backend + (f"-{part}" if part else "")


def variants(op: str) -> list[Variant]:
    """Every implementation of ``op`` that could run on CPU tensors, carried to a GPU or not."""
    found = []
    for name in backends.BACKENDS:
        reason = backends.why_not(name, op, torch.empty(0))
        if name == "native" and reason is None:
            best = INSTRUCTION_SETS.index(native.build_info()["detected_isa"])
            for level, isa in enumerate(INSTRUCTION_SETS):
                lacking = None if level <= best else f"this processor has no {isa}"
                found.append(Variant(name, isa, skip_reason=lacking))
            if op in native.CUDA_DTYPES:
                lacking = cuda_emulation.why_not()
                found.append(Variant(name, device="emulated_cuda", op=op, skip_reason=lacking))
                if torch.cuda.is_available():
                    lacking = backends.why_not(name, op, torch.empty(0, device="cuda"))
                    found.append(Variant(name, device="cuda", skip_reason=lacking))
        elif name == "triton" and not triton.INTERPRETED and torch.cuda.is_available():
            reason = backends.why_not(name, op, torch.empty(0, device="cuda"))
            found.append(Variant(name, device="cuda", skip_reason=reason))
        else:
            found.append(Variant(name, skip_reason=reason))
    return found


def on_every_backend(op: str, devices: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrise a test's ``backend`` argument over all implementations of ``op``.

    With ``devices``, over those of the native backend on these.
    """
    found = [
        v for v in variants(op) if not devices or (v.backend == "native" and v.device in devices)
    ]
    return pytest.mark.parametrize("backend", found, ids=str, indirect=True)


# The interpreter takes milliseconds for a tile, the emulation of the pairwise CUDA kernels one for
# few rows, so they get each regime once: shapes of up to so
# many scores, and parameters that do not depend on each other not in all combinations.
INTERPRETED_SCORES = 70 * 131
NOT_INTERPRETED = {
    "test_two_runs_and_thread_counts_are_bit_equal": "a large case, about threads",
    "test_upstream_factors_come_before_rounding": "a large case, about dtypes outside the kernels",
    "test_results_do_not_depend_on_threads_or_runs": "a large case, about threads",
    "test_gradcheck": "many calls; test_gradient_is_that_of_slicing compares the same gradients",
    "test_gradcheck_of_resized_patches": "many calls; test_triton_patches compares with the others",
    "test_23_outputs_beyond_the_caches_are_the_same": "a large case, about the caches of a CPU",
    "test_24_threads_are_those_of_torch": "a large case, about threads",
    "test_results_do_not_depend_on_threads": "a large case, about threads",
    "test_gradients_of_every_dtype_and_large_outputs": "test_tiles_and_gradients_of_padding",
    "test_26_half_gradients_are_summed_in_float32": "test_half_gradients_are_summed_in_float32",
    "test_28_deterministic_mode_has_nothing_to_refuse": "test_gradient_is_the_same_bits_each_time",
    "test_gradcheck_twice": "many calls; test_shapes compares the same gradients",
    "test_gradients": "many calls; test_losses_in_other_dtypes compares the same gradients",
    "test_semi_hard_is_its_definition": "test_batch_hard_is_its_definition makes the same searches",
    "test_opcheck": "about the operator, not about who runs it",
    "test_opcheck_forward": "about the operator, not about who runs it",
    "test_opcheck_backward": "about the operator, not about who runs it",
    "test_create_graph_leaves_first_gradients_as_they_are": "about the reference path",
    "test_create_graph_of_temporal_losses": "about the reference path",
    "test_double_backward_goes_through_the_reference": "about the reference path",
}


# Too slow for emulated threads, and why nothing is lost.
NOT_EMULATED = {
    "test_runs_and_thread_counts_are_bit_equal": "test_cuda_emulation.py has orders of threads",
    "test_gradcheck": "many calls; test_gradient_is_that_of_slicing compares the same gradients",
    "test_gradcheck_twice": "many calls; test_shapes compares the same gradients",
}

# Losses written on the ops: one test that goes through each of them is enough here.
LOSS_FILES = (
    "test_compat", "test_contrast_losses", "test_label_losses", "test_loss_statistics",
    "test_traps",
)  # fmt: skip
THROUGH_EVERY_LOSS = "test_half_inputs_lose_only_their_own_rounding"


# Parameters of tests/test_nearest.py that are interpreted, a regime each; calls take 0.1 to 1 s.
FLOAT32_L2: dict[str, tuple[Any, ...]] = {
    "metric": ("l2",), "dtype": (torch.float32,), "farthest": (False,),
}  # fmt: skip
NEAREST: dict[str, list[dict[str, tuple[Any, ...]]]] = {
    "test_the_equation": [{"shape": ("vector plus one",), "farthest": (True,)}],
    "test_every_shape_and_mask": [
        {"shape": ("ragged",), "mask": ("different and diagonal",), "metric": ("l2", "dot")},
        {"shape": ("ragged",), "mask": ("two excluded", "same"), "metric": ("cosine",)},
        {"shape": ("one row", "no dimensions", "vector", "wide"), "mask": ("all",), **FLOAT32_L2},
    ],
    "test_dtypes_and_layouts": [
        {"layout": ("contiguous",), "metric": ("sqeuclidean", "cosine")},
        {"layout": ("transposed", "sliced"), **FLOAT32_L2},
    ],
    "test_mixed_dtypes_are_promoted": [{}],
    "test_ties_go_to_the_lower_column": [FLOAT32_L2],
    "test_copies_of_a_column_tie": [{"metric": ("l2", "cosine")}],
    "test_hard_data": [
        {"data": ("collapsed", "one far outlier"), "metric": ("l2",)},
        {"data": ("denormal", "scales apart"), "metric": ("dot",)},
    ],
    "test_near_duplicates_keep_their_order": [{"distance": (1e-3,)}],
    "test_rows_with_too_few_columns_are_filled": [{}],
    "test_empty": [{}],
    "test_nan_comes_last": [{"metric": ("l2", "dot"), "farthest": (False,)}],
    "test_infinite_coordinates": [{"metric": ("l2", "cosine"), "farthest": (True,)}],
    "test_compiled_equals_eager": [{"metric": ("l2",)}],
    "test_autocast_does_not_lower_the_products": [{}],
}


def _is_regime_of_nearest(name: str, parameters: dict[str, Any]) -> bool:
    """Whether one of NEAREST has each of these parameters, where it speaks of it."""
    return any(
        all(parameters[key] in values for key, values in regime.items() if key in parameters)
        for regime in NEAREST.get(name, [])
    )


def worth_interpreting(item: Any) -> bool:
    """Whether the interpreter should run this test."""
    if "test_triton" in item.nodeid:
        return True
    variant = _parameters(item).get("backend")
    return isinstance(variant, Variant) and variant.backend == "triton" and _is_a_regime(item)


def worth_emulating(item: Any) -> bool:
    """Whether to run this test, if it is one of emulated kernels: all that take no seconds."""
    parameters = _parameters(item)
    variant = parameters.get("backend")
    if not isinstance(variant, Variant) or variant.device != "emulated_cuda":
        return True
    if "test_cuda_softmax" in item.nodeid:  # about nothing else
        return True
    name = item.nodeid.partition("::")[2].partition("[")[0]
    if name in NOT_EMULATED:
        return False
    if name == "test_ties_go_to_the_lower_column":  # thousands of direct differences a row
        keys = parameters["metric"], parameters["farthest"]
        return parameters["dtype"] == torch.float32 and keys in (("l2", False), ("dot", True))
    if name == "test_every_shape_and_mask" and parameters["shape"].startswith("tile"):  # the CPU's
        return parameters["shape"] == "tile plus one" and parameters["metric"] in ("l2", "dot")
    return variant.op != "distance_softmax" or _is_a_regime(item)


def _parameters(item: Any) -> dict[str, Any]:
    has_some = isinstance(item, pytest.Function) and hasattr(item, "callspec")
    return item.callspec.params if has_some else {}


def _is_a_regime(item: Any) -> bool:
    """Whether a slow variant should run this test: see INTERPRETED_SCORES."""
    parameters = _parameters(item)
    name = item.nodeid.partition("::")[2].partition("[")[0]
    if "test_nearest" in item.nodeid:
        return _is_regime_of_nearest(name, parameters)
    if name in NOT_INTERPRETED:
        return False
    if any(file in item.nodeid for file in LOSS_FILES) and name != THROUGH_EVERY_LOSS:
        return False
    shape = parameters.get("shape")
    shape = SHAPES.get(shape, (1, 1, 1)) if isinstance(shape, str) else shape
    if shape is not None and shape[0] * shape[1] > INTERPRETED_SCORES:
        return False
    if "test_triplet_distances" in item.nodeid and "shape" in parameters:
        name, dtype = parameters["shape"], parameters["dtype"]
        return name == "chunk plus one" or (dtype == torch.float32 and name != "threads")
    if name == "test_bilinear_is_interpolate_of_the_crop":  # not the sizes with many taps
        return parameters["size"] == (7, 9)
    if name == "test_padding_is_pad_and_cut":
        return parameters["dtype"] in (torch.float32, torch.bfloat16)
    # Masks and layouts are the same code in every dtype.
    combined = "mask" in parameters and "dtype" in parameters
    return not combined or (
        parameters["dtype"] == torch.float32 and parameters["shape"] == "ragged"
    )


@contextmanager
def active(variant: Variant, order: int = 0) -> Iterator[None]:
    """Use the variant's instruction set, or its device, inside the block.

    Emulated threads take their turns in ``order``, and every tensor's memory is guarded.
    """
    module = backends.BACKENDS[variant.backend]
    if variant.device == "emulated_cuda":
        carried = Carried(module, "cpu", guarded_copies, guarded_allocations)
        patched = patch.dict(backends.BACKENDS, {variant.backend: carried})
        with cuda_emulation.active(order), patched:
            yield
        return
    if variant.device != "cpu":
        with patch.dict(backends.BACKENDS, {variant.backend: Carried(module, variant.device)}):
            yield
        return
    if variant.instruction_set is None:
        yield
        return
    before = native._C.active_isa()
    native._C.set_active_isa(variant.instruction_set)
    try:
        yield
    finally:
        native._C.set_active_isa(before)
