"""The Triton kernels compiled for GPUs that are not here: they fit, and they do not spill.

What the interpreter cannot see: sizes that a matrix unit does not take, registers, shared memory,
and whether the matrix units are used at all. `python -m benchmarks.ahead_of_time` does it for every
entry of the launch table and writes docs/triton_kernels.md; here a part of it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcontrast.backends import triton
from fastcontrast.backends.scores import METRICS
from fastcontrast.backends.triton import launch as launches

ROOT = Path(__file__).resolve().parents[1]
WITH_PRODUCTS = (*launches.KERNELS, "nearest limits", "nearest candidates")


@functools.cache
def compiled_subset() -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Entries and what they take; in a process of its own, which does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ahead_of_time", "--subset"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(pair) for pair in json.loads(done.stdout)]


@pytest.mark.slow
@pytest.mark.skipif(triton.IMPORT_PROBLEM is not None, reason=str(triton.IMPORT_PROBLEM))
@pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter's run does not compile")
class TestCompiled:
    def test_nothing_spills_and_all_fits(self) -> None:
        for entry, resources in compiled_subset():
            limit = 99 << 10 if entry["architecture"] == 80 else 227 << 10
            assert resources["spilled"] == 0, (entry, resources)
            assert resources["shared"] <= limit, (entry, resources)
            assert resources["warps_resident"] >= 4, (entry, resources)

    def test_matrix_units_are_used(self) -> None:
        """By all kernels with products but those of float32 in full, for which there are none."""
        for entry, resources in compiled_subset():
            used = resources["matrix_instructions"] > 0
            wanted = entry["kernel"] in WITH_PRODUCTS and entry["kind"] != "ieee"
            assert used == wanted, (entry, resources)
            if entry["architecture"] == 90 and entry["kind"] != "float64":  # which WGMMA lacks
                wgmma = resources["warp_group_products"]
                assert wgmma == resources["matrix_instructions"], (entry, resources)

    def test_tiles_are_loaded_ahead(self) -> None:
        """A branch for near pairs must not keep the loop from being pipelined."""
        for entry, resources in compiled_subset():
            if entry["kernel"] in WITH_PRODUCTS and entry["kind"] in ("bfloat16", "float16"):
                assert resources["asynchronous_copies"] > 0, (entry, resources)

    def test_patches_are_written_by_vectors(self) -> None:
        """16 bytes at a time where sides allow, what the alignment of addresses comes to."""
        for entry, resources in compiled_subset():
            if entry["kernel"] in ("patches cut", "patches drawn and cut", "patches gathered"):
                assert resources["vector_stores"] > 0, (entry, resources)

    def test_the_document_has_these_figures(self) -> None:
        import triton as library

        from benchmarks import ahead_of_time

        text = (ROOT / "docs" / "triton_kernels.md").read_text()
        if f"Triton {library.__version__}." not in text:
            pytest.skip("docs/triton_kernels.md was written with another Triton")
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        for e, r in compiled_subset():
            name = ahead_of_time.name_of(ahead_of_time.Entry(**e))
            key = [f"| {e['architecture']}", name, e["kind"], str(e["dim"] or "any")]
            found = [row for row in rows if row[:4] == key]
            assert len(found) == 1, e
            registers, stack, shared = found[0][6:9]
            assert str(r["registers"]) in registers.split(", "), (e, r)
            assert int(stack) >= r["spilled"], (e, r)
            assert int(shared) >= round(r["shared"] / 1024), (e, r)


@pytest.mark.skipif(triton.IMPORT_PROBLEM is not None, reason=str(triton.IMPORT_PROBLEM))
@pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter's run does not compile")
class TestDocument:
    """Compiles nothing: docs/triton_kernels.md beside the kernels and launches of today."""

    def test_its_kernels_are_those_of_today(self) -> None:
        from benchmarks import ahead_of_time

        hashes = {row[0]: row[3] for row in rows_of_the_document() if len(row) == 4}
        for kernel, entries in ahead_of_time.by_kernel(ahead_of_time.every_entry()).items():
            assert hashes[kernel] == ahead_of_time.fingerprint(entries), (
                f"{kernel!r} has changed: run python -m benchmarks.ahead_of_time"
            )

    def test_every_launch_has_a_figure_and_fits(self) -> None:
        from benchmarks import ahead_of_time

        for e, figures in figures_of_the_document():
            assert figures, f"docs/triton_kernels.md has no figure of {e}"
            assert 1024 * int(figures[8]) <= ahead_of_time.SHARED[e.architecture], figures

    def test_no_launch_spills(self) -> None:
        for _, figures in figures_of_the_document():
            assert int(figures[7]) == 0, figures


def figures_of_the_document() -> list[tuple[Any, list[str]]]:
    """Every entry of the launch table, with its row; an empty one if there is none."""
    from benchmarks import ahead_of_time

    rows = rows_of_the_document()
    figures = {tuple(row[:4]): row for row in rows if len(row) == len(ahead_of_time.COLUMNS)}
    found = []
    for e in ahead_of_time.every_entry():
        key = (str(e.architecture), ahead_of_time.name_of(e), e.kind, str(e.dim or "any"))
        found.append((e, figures.get(key, [])))
    return found


def rows_of_the_document() -> list[list[str]]:
    """Cells of all tables."""
    text = (ROOT / "docs" / "triton_kernels.md").read_text()
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_launch_table_is_whole() -> None:
    """Needs no Triton: small dimensions have an entry, and sizes are such as kernels take."""
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for kernel in launches.KERNELS:
            for kind in launches.KINDS:
                dims = (1, 16, 33, 128, 129, launches.LARGEST_FUSED)
                for dim, metric in itertools.product(dims, METRICS):
                    if not launches.is_fused(kernel, kind, dim, capability, metric):
                        # wide.py has it; of float16 on 10.0 every size spills from 33 on.
                        small = 32 if capability >= (10, 0) and kind == "float16" else 64
                        assert dim > small, (capability, kernel, kind, dim)
                        continue
                    for many, symmetric in itertools.product((False, True), repeat=2):
                        sizes = launches.launch(
                            kernel, kind, dim, capability,
                            metric=metric, many=many, symmetric=symmetric,
                        )  # fmt: skip
                        assert sizes.block & (sizes.block - 1) == 0
                        assert min(sizes.block, sizes.other) >= 16
                        warp_groups = -(-sizes.warps // 4)
                        if capability == (9, 0) and kind not in ("ieee", "float64"):
                            assert sizes.block >= 64 * warp_groups  # or WGMMA is lost
        for kind in launches.NEAREST_KINDS:
            for dim in (1, 128, 129, 257, 5000):
                sizes = launches.launch("nearest", kind, dim, capability)
                assert sizes.block % 16 == sizes.other % 16 == 0
                assert 0 < sizes.part < dim or dim <= 128  # wide points go through in parts
    with pytest.raises(ValueError, match="dim must be at most 256, got 257"):
        launches.dimension_class(257)


def test_versions_that_cannot_compile_are_named() -> None:
    assert triton.version_problem((10, 0), "3.8.0") is None
    assert triton.version_problem((9, 0), "3.6.0") is None
    assert triton.version_problem((12, 0), "3.6.0+git1") is None
    reason = triton.version_problem((10, 3), "3.7.1")
    assert reason == "compute capability 10 needs triton 3.8 or newer, 3.7.1 is installed"
