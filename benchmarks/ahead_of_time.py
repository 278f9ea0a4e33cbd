"""Compiles the Triton kernels for GPUs that are not here, and reads what they take of them.

    python -m benchmarks.ahead_of_time            every entry of the table: docs/triton_kernels.md
    python -m benchmarks.ahead_of_time --subset   the part that the tests check, as JSON
    python -m benchmarks.ahead_of_time --subset --document    the document of that part alone

Triton brings its own assembler, so no GPU, driver or CUDA toolkit is needed. Run without
TRITON_INTERPRET. Results are kept in Triton's own cache: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import patch_kernels
from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton.launch_table import SIZES
from fastcontrast.backends.triton.point_gradients import point_gradients_kernel
from fastcontrast.backends.triton.row_statistics import row_statistics_kernel
from fastcontrast.backends.triton.triplet_distances import (
    triplet_backward_kernel,
    triplet_forward_kernel,
    triplet_tile,
)

METRICS = ("l2", "sqeuclidean", "dot")
# Kernels without products, whose sizes are their own and not of the launch table.
TRIPLETS = {
    "triplets forward": triplet_forward_kernel,
    "triplets backward": triplet_backward_kernel,
}
TRIPLET_KINDS = ("float64", "ieee", "bfloat16", "float16")
TRIPLET_DIMS = (32, 128, 1024)
PATCH_KINDS = ("float64", "ieee", "bfloat16")
PATCH_SIDES = (32, 224)
# Triton's names of the dtypes of (operands, points as given, sums) of each kind.
DTYPES = {
    "float64": ("fp64", "fp64", "fp64"),
    "ieee": ("fp32", "fp32", "fp32"),
    "tf32": ("fp32", "fp32", "fp32"),
    "bf16x3": ("bf16", "fp32", "fp32"),
    "bfloat16": ("bf16", "bf16", "fp32"),
    "float16": ("fp16", "fp16", "fp32"),
}
ROUNDING = {"bfloat16": "bf16", "bf16x3": "bf16", "tf32": "tf32", "float16": "tf32"}
# Shared memory of a program, and 32-bit registers of a multiprocessor, bytes and number. 99 KiB
# for 80: its entries also serve the smaller memories of 8.6 and 8.9.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_OF_PROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS = 65536
COLUMNS = (
    "sm", "kernel", "operands", "D", "metric", "block × tile", "warps", "registers", "stack",
    "shared, KiB", "matrix instructions", "resident warps",
)  # fmt: skip
TABLE = Path(__file__).resolve().parents[1] / "docs" / "triton_kernels.md"


class Entry(NamedTuple):
    """One compilation: an entry of the launch table or a kernel of triplets, and its constants."""

    architecture: int
    kernel: str
    kind: str
    dim: int
    metric: str
    rows: bool = True
    many: bool = False


class Resources(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    asynchronous_copies: int
    warps_resident: int
    vector_stores: int


def every_entry() -> Iterator[Entry]:
    """All that can be launched."""
    for (arch, kernel, kind, dim), metric in itertools.product(SIZES, METRICS):
        for many in (False, True):
            yield Entry(arch, kernel, kind, dim, metric, True, many)
            if kernel == "gradients":
                yield Entry(arch, kernel, kind, dim, metric, False, many)
    yield from (
        Entry(arch, kernel, kind, dim, metric, many=many)
        for arch, kernel, kind, dim, metric, many in itertools.product(
            launches.ARCHITECTURES, TRIPLETS, TRIPLET_KINDS, TRIPLET_DIMS, METRICS[:2],
            (False, True),
        )
    )  # fmt: skip
    for arch, kernel, side in itertools.product(
        launches.ARCHITECTURES, patch_kernels.KERNELS, PATCH_SIDES
    ):
        yield from patch_entries(arch, kernel, side, PATCH_KINDS)


def patch_entries(arch: int, kernel: str, side: int, kinds: tuple[str, ...]) -> Iterator[Entry]:
    """A kernel of patches of one size, plain and with all options."""
    for how, kind in itertools.product(patch_kernels.METHODS[kernel], kinds):
        yield Entry(arch, kernel, kind, side, how, many=how != "plain")


def subset() -> list[Entry]:
    """What the tests compile: each architecture, and on sm_90 each kind, at 128 dimensions."""
    kinds = {80: ("ieee", "bfloat16"), 90: launches.KINDS, 100: ("bfloat16",)}
    found = [
        Entry(arch, kernel, kind, 128, "l2", rows=kind != "tf32")
        for arch, kernel in itertools.product(launches.ARCHITECTURES, launches.KERNELS)
        for kind in kinds[arch]
        if (arch, kernel, kind, 128) in SIZES
    ]
    found.append(Entry(90, "statistics", "bfloat16", 256, "dot", many=True))
    return (
        found
        + [
            Entry(arch, kernel, kind, 128, "l2", many=True)
            for arch, kernel in itertools.product(launches.ARCHITECTURES, TRIPLETS)
            for kind in (kinds[arch] if arch != 90 else TRIPLET_KINDS)
        ]
        + [
            entry
            for arch, kernel in itertools.product(launches.ARCHITECTURES, patch_kernels.KERNELS)
            for entry in patch_entries(arch, kernel, 224, ("ieee",))
            if not entry.metric.endswith("reflected")
        ]
    )


def compiled(entry: Entry, sizes: launches.Launch | None = None) -> Resources:
    """Compile one entry and read what it takes."""
    sizes = sizes or launch_of(entry)
    kernel, constants, type_of = row_statistics_kernel, _constants, _type
    if entry.kernel in TRIPLETS:
        kernel, constants, type_of = TRIPLETS[entry.kernel], _triplet_constants, _triplet_type
    elif entry.kernel in patch_kernels.KERNELS:
        kernel = patch_kernels.KERNELS[entry.kernel]
        constants, type_of = patch_kernels.constants_of, patch_kernels.type_of
    elif entry.kernel == "gradients":
        kernel = point_gradients_kernel
    constants = constants(entry, sizes)
    signature, known, hints = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            known[(position,)] = constants[name]
            continue
        signature[name] = type_of(name, entry.kind)
        aligned = (
            "x_stride", "y_stride", "own_stride", "other_stride", "dim", "a_row", "p_row", "n_row",
            *patch_kernels.ALIGNED,
        )  # fmt: skip
        if signature[name].startswith("*") or name in aligned:
            hints[(position,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        ASTSource(kernel, signature, known, hints),
        target=GPUTarget("cuda", entry.architecture, 32),
        options={"num_warps": sizes.warps, "num_stages": sizes.stages},
    )
    registers, stack = _registers(result.asm["cubin"])
    shared = result.metadata.shared
    threads = 32 * sizes.warps
    programs = min(
        REGISTERS // (threads * -(-registers // 8) * 8),
        SHARED_OF_PROCESSOR[entry.architecture] // max(1, shared + 1024),
    )
    matrix = r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma"
    return Resources(
        registers, stack, shared, len(re.findall(matrix, result.asm["ptx"])),
        result.asm["ttgir"].count("async_copy_global"), programs * sizes.warps,
        len(re.findall(r"st\.global\S*\.v\d", result.asm["ptx"])),
    )  # fmt: skip


def launch_of(entry: Entry) -> launches.Launch:
    """Sizes of a call on a GPU of the entry's architecture, with rows enough to fill it."""
    if entry.kernel in TRIPLETS:
        block, chunk = triplet_tile(1 << 30, entry.dim, 8 if entry.kind == "float64" else 4, 1)
        return launches.Launch(block, chunk, chunk, chunk, 4, 1)
    if entry.kernel in patch_kernels.KERNELS:
        return patch_kernels.launch_of(entry.kernel, entry.dim, entry.metric == "plain")
    capability = (entry.architecture // 10, entry.architecture % 10)
    return launches.launch(entry.kernel, entry.kind, entry.dim, capability, many=entry.many)


def _type(name: str, kind: str) -> str:
    operand, given, acc = DTYPES[kind]
    pointers = {
        **dict.fromkeys(("x", "x_low", "y", "y_low"), operand),
        **dict.fromkeys(("own", "own_low", "other", "other_low"), operand),
        **dict.fromkeys(("given_x", "given_y", "given_own", "given_other"), given),
        **dict.fromkeys(
            ("x_sqnorm", "y_sqnorm", "own_sqnorm", "other_sqnorm", "scale", "threshold", "table",
             "column_table", "grad"), acc,
        ),
        **dict.fromkeys(("row_ids", "column_ids", "own_ids", "other_ids"), "i32"),
        **dict.fromkeys(("exclude", "counts"), "i64"),
        **dict.fromkeys(("state", "product"), "fp64"),
    }  # fmt: skip
    if name in pointers:
        return "*" + pointers[name]
    return "i64" if name.startswith("given_") else "i32"


def _constants(entry: Entry, sizes: launches.Launch) -> dict[str, Any]:
    width = launches.padded_dimension(entry.dim)
    many = entry.many
    constants = {
        "METRIC": METRICS.index(entry.metric),
        "EXCLUDE": 2 if many else 1,
        "KEEP": 1 if many else 0,
        "SPLIT": entry.kind == "bf16x3",
        "PRECISION": "tf32" if entry.kind == "tf32" else "ieee",
        "UPCAST": False,
        "ACC": tl.float64 if entry.kind == "float64" else tl.float32,
        "BLOCK_D": width,
        "BLOCK_K": min(sizes.part or width, width),
    }
    if entry.kernel == "statistics":
        return constants | {
            "SCORE_SUM": many, "RANK": many, "FROM_DOTS": False,
            "BLOCK_M": sizes.block, "BLOCK_N": sizes.other,
        }  # fmt: skip
    return constants | {
        "OWNS_ROWS": entry.rows, "HAS_ENTROPY": many, "HAS_SUM": False, "HAS_COLUMNS": many,
        "PRODUCT": many, "ROUND": ROUNDING.get(entry.kind, "none"),
        "BLOCK": sizes.block, "BLOCK_OTHER": sizes.other,
    }  # fmt: skip


def _triplet_type(name: str, kind: str) -> str:
    _, given, acc = DTYPES[kind]
    if name in ("m", "dim", "a_row", "p_row", "n_row", "upstream_stride"):
        return "i32"
    return "*" + (given if name in ("a", "p", "n", "da", "dp", "dn") else acc)


def _triplet_constants(entry: Entry, sizes: launches.Launch) -> dict[str, Any]:
    """Distances alone, or with ``many`` the difference with swap; contiguous columns."""
    many = entry.many
    unused = (
        ("grad_positive", "grad_negative", "grad_others") if many
        else ("difference", "slope", "upstream", "grad_others")
    )  # fmt: skip
    return {
        **dict.fromkeys(("a_column", "p_column", "n_column"), 1),
        **dict.fromkeys(unused, None),
        **dict.fromkeys(("HAS_POSITIVE", "HAS_NEGATIVE", "NEEDS_A", "NEEDS_P", "NEEDS_N"), True),
        "L2": entry.metric == "l2",
        "BETWEEN": many,
        "DIFFERENCE": many,
        "HAS_OTHERS": many,
        "ACC": tl.float64 if entry.kind == "float64" else tl.float32,
        "BLOCK": sizes.block,
        "CHUNK": sizes.other,
    }


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: spilled ones lie there."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers = max(map(int, re.findall(r"REG:(\d+)", done.stdout)))
    return registers, sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)))


def document(found: dict[Entry, Resources]) -> str:
    """The table of docs/triton_kernels.md."""
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Written by `python -m benchmarks.ahead_of_time`; `tests/test_triton_compiled.py` compiles",
        "a part of it again. No GPU has run these: the table says what they take of one. Bytes of",
        "stack are spilled registers. Entries that are not here were not compiled for it.",
        "",
        f"Triton {triton.__version__}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for e, r in found.items():
        sizes = launch_of(e)
        side = (" of rows" if e.rows else " of columns") if e.kernel == "gradients" else ""
        extras = ", all options" if e.many else ""
        lines.append(
            f"| {e.architecture} | {e.kernel}{side}{extras} | {e.kind} | {e.dim} | {e.metric} | "
            f"{sizes.block} × {sizes.other} | {sizes.warps} | {r.registers} | {r.spilled} | "
            f"{r.shared / 1024:.0f} | {r.matrix_instructions} | {r.warps_resident} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, and print JSON or write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true")
    parser.add_argument("--document", action="store_true", help="with --subset: write it too")
    parser.add_argument("--metric", choices=METRICS, action="append")
    parser.add_argument("--architecture", type=int, action="append")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if options.subset:
        results = {e: compiled(e) for e in subset()}
        if options.document:
            TABLE.write_text(document(results))
        else:
            print(json.dumps([(e._asdict(), r._asdict()) for e, r in results.items()]))
        return
    entries = [
        e
        for e in every_entry()
        if e.metric in (options.metric or METRICS)
        and e.architecture in (options.architecture or launches.ARCHITECTURES)
    ]
    TABLE.write_text(document({e: compiled(e) for e in entries}))


if __name__ == "__main__":
    main()
