"""Compiles the Triton kernels for GPUs that are not here, and reads what they take of them.

    python -m benchmarks.ahead_of_time            every entry of the table: docs/triton_kernels.md
    python -m benchmarks.ahead_of_time --seconds 100    the same in pieces: call it until it is done
    python -m benchmarks.ahead_of_time --subset   the part that the tests check, as JSON

Triton brings its own assembler, so no GPU, driver or CUDA toolkit is needed. Run without
TRITON_INTERPRET. Results are kept in build/ahead_of_time.json, by what they were compiled from: a
second run compiles what has changed. All of it takes about an hour on one core.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import patch_kernels
from benchmarks.triton_entries import (
    BOTH_GRADIENTS,
    GIVEN_KINDS,
    METRICS,
    TRIPLETS,
    Entry,
    every_entry,
    metrics_of,
    patch_entries,
)
from benchmarks.triton_launches import KERNELS, arguments, function_of, launch_of
from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton.launch_table import SIZES

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "triton_kernels.md"
CACHE = ROOT / "build" / "ahead_of_time.json"
# Shared memory of a program, and 32-bit registers of a multiprocessor, bytes and number. 99 KiB
# for 80: its entries also serve the smaller memories of 8.6 and 8.9.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_OF_PROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS = 65536
WARPS = 64
COLUMNS = (
    "sm", "kernel", "operands", "D", "block × tile", "warps", "registers", "stack", "shared, KiB",
    "matrix instructions", "resident warps",
)  # fmt: skip


class Resources(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    asynchronous_copies: int
    warps_resident: int
    vector_stores: int
    warp_group_products: int  # of the matrix instructions, those of a warp group: WGMMA


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
    found.append(Entry(90, "gradients", "bf16x3", 128, "dot"))
    found += [Entry(90, kernel, "bfloat16", 128, "cosine") for kernel in launches.KERNELS]
    found += [
        Entry(arch, kernel, kind, 128, "l2", many=True)
        for arch, kernel in itertools.product(launches.ARCHITECTURES, TRIPLETS)
        for kind in (kinds[arch] if arch != 90 else GIVEN_KINDS)
    ]
    found += [
        Entry(arch, kernel, kind, 128, "dot", many=True)
        for arch, kind in ((80, "tf32"), (90, "tf32"), (90, "bfloat16"), (100, "float64"))
        for kernel in ("nearest limits", "nearest candidates")
    ]
    found += [
        entry
        for arch, kernel in itertools.product(launches.ARCHITECTURES, patch_kernels.KERNELS)
        for entry in patch_entries(arch, kernel, 224, ("ieee",))
        if not entry.metric.endswith("reflected")
    ]
    found += [
        Entry(90, kernel, "bfloat16", 0, "cosine")
        for kernel in ("wide weights", "directions", "gradients of directions")
    ]
    return found + [
        Entry(90, kernel, "bfloat16" if kernel.startswith("wide") else "ieee", 0, "l2")
        for kernel in KERNELS
        if Entry(90, kernel, "ieee", 0, "l2") in set(every_entry())
    ]


def compiled(entry: Entry, sizes: launches.Launch | None = None) -> Resources:
    """Compile one entry, or find it in the cache, and say what it takes."""
    sizes, cache = sizes or launch_of(entry), _cache()
    key = _key(entry, sizes)
    if key not in cache:
        cache[key] = list(_compile(entry, sizes))
    return Resources(*cache[key])


def is_compiled(entry: Entry) -> bool:
    """Whether :func:`compiled` finds the entry in the cache."""
    return _key(entry, launch_of(entry)) in _cache()


def _key(entry: Entry, sizes: launches.Launch) -> str:
    return _hash(triton.__version__, Resources._fields, *_compiled_from(entry, sizes))


def _compiled_from(entry: Entry, sizes: launches.Launch) -> tuple[Any, ...]:
    """All that a result depends on but Triton."""
    source = source_of(function_of(entry))
    return (source, entry.architecture, *arguments(entry, sizes), *sizes[-2:])


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def source_of(function: Any) -> str:
    """Hash of a kernel and of all that it calls, but for comments, docstrings and layout."""
    found, waiting = {}, [function]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src).body[0]
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:]
        found[function.__name__] = ast.unparse(tree)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, triton.JITFunction):
                if name not in found:
                    waiting.append(value)
            elif isinstance(value, (int, float, str, tl.constexpr)):
                found[name] = repr(value)
    return _hash(sorted(found.items()))


def _compile(entry: Entry, sizes: launches.Launch) -> Resources:
    result = triton.compile(
        ASTSource(function_of(entry), *arguments(entry, sizes)),
        target=GPUTarget("cuda", entry.architecture, 32),
        options={"num_warps": sizes.warps, "num_stages": sizes.stages},
    )
    registers, stack = _registers(result.asm["cubin"])
    shared = result.metadata.shared
    threads = 32 * sizes.warps
    programs = min(
        REGISTERS // (threads * -(-registers // 8) * 8),
        SHARED_OF_PROCESSOR[entry.architecture] // max(1, shared + 1024),
        WARPS // sizes.warps,
    )
    matrix = r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma"
    return Resources(
        registers, stack, shared, len(re.findall(matrix, result.asm["ptx"])),
        result.asm["ttgir"].count("async_copy_global"), programs * sizes.warps,
        len(re.findall(r"st\.global\S*\.v\d", result.asm["ptx"])),
        len(re.findall(r"wgmma\.mma_async", result.asm["ptx"])),
    )  # fmt: skip


def _read_cache() -> dict[str, list[int]]:
    return json.loads(CACHE.read_text()) if CACHE.exists() else {}


@functools.cache
def _cache() -> dict[str, list[int]]:
    """Results by the hash of what they were compiled from."""
    return _read_cache()


def _keep_cache() -> None:
    """Write the results, beside those that another process has written meanwhile."""
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.write_text(json.dumps(_read_cache() | _cache()))


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


def document(found: dict[Entry, Resources], entries: int) -> str:
    """Text of docs/triton_kernels.md: a line for all metrics of an entry."""
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Written by `python -m benchmarks.ahead_of_time`; `tests/test_triton_compiled.py` compiles",
        "a part of it again. No GPU has run these: the table says what they take of one. Bytes of",
        "stack are spilled registers. Where the metrics l2, sqeuclidean, dot and, of half points,",
        "cosine differ, their registers are given in this order; stack and shared memory are then",
        "the largest, resident warps (of 64 that a multiprocessor holds at most) and matrix",
        "instructions the fewest. A metric that these sizes do not suit has others, and a line of",
        "its own.",
        "",
        f"{len(found)} of {entries} entries, compiled by Triton {triton.__version__}. Of these, "
        f"{sum(r.spilled > 0 for r in found.values())} spill.",
        "",
        "Other versions: Triton 3.6 (torch 2.11) compiles what the tests check for sm_80 and",
        "sm_90, some of it with up to 72 bytes on the stack where there are none here. For sm_100",
        "the compilers of 3.6 and 3.7 fail, and `why_not` asks for 3.8, which does not.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    groups: dict[Entry, list[Resources]] = {}
    for entry, resources in found.items():
        merges = entry.metric in metrics_of(entry.kind) and not has_own_sizes(entry)
        merged = entry._replace(metric="") if merges else entry
        groups.setdefault(merged, []).append(resources)
    for e, group in groups.items():
        sizes = launch_of(e)
        registers, spilled, shared, matrix, _, warps, *_ = zip(*group, strict=True)
        shown = registers if len(set(registers)) > 1 else registers[:1]
        lines.append(
            f"| {e.architecture} | {name_of(e)} | {e.kind} | {e.dim or 'any'} | "
            f"{sizes.block} × {sizes.other} | {sizes.warps} | {', '.join(map(str, shown))} | "
            f"{max(spilled)} | {max(shared) / 1024:.0f} | {min(matrix)} | {min(warps)} |"
        )
    lines += [
        "",
        "What each kernel was compiled from, a hash of its source without comments and of all its",
        "launches: the tests fail where it is another one now.",
        "",
        "| kernel | compiled | entries | hash |",
        "| --- | --- | --- | --- |",
    ]
    for kernel, whole in by_kernel(every_entry()).items():
        compiled_ones = sum(e.kernel == kernel for e in found)
        lines.append(f"| {kernel} | {compiled_ones} | {len(whole)} | {fingerprint(whole)} |")
    return "\n".join(lines) + "\n"


def by_kernel(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each kernel, in their order."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.kernel, []).append(entry)
    return found


def fingerprint(entries: Iterable[Entry]) -> str:
    """Hash of all that the results of these entries depend on but Triton."""
    return _hash([_compiled_from(e, launch_of(e)) for e in entries])


def name_of(entry: Entry) -> str:
    """The kernel of an entry in the document."""
    if entry.kernel in patch_kernels.KERNELS:
        return f"{entry.kernel}, {entry.metric}"
    side = ""
    if entry.kernel in ("gradients", BOTH_GRADIENTS):
        side = " of rows" if entry.rows else " of columns"
    metric = f", {entry.metric}" if has_own_sizes(entry) else ""
    return entry.kernel + side + (", all options" if entry.many else "") + metric


def has_own_sizes(entry: Entry) -> bool:
    """Whether the launch table has other sizes for the entry's metric than for l2."""
    if entry.metric not in metrics_of(entry.kind):
        return False
    try:
        usual = launch_of(entry._replace(metric="l2"))
    except KeyError:  # which has none
        return True
    return launch_of(entry) != usual


def problem(entry: Entry, resources: Resources) -> str | None:
    """Why a launch of these resources is not to be made, or None."""
    if resources.spilled:
        return f"spills {resources.spilled} bytes of registers"
    if resources.shared > SHARED[entry.architecture]:
        return f"takes {resources.shared} bytes of shared memory"
    return None


def main() -> None:
    """Compile, and print JSON or write the document."""
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels for GPUs that are not here."
    )
    parser.add_argument("--subset", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--kernel", help="only kernels whose name starts so; no document")
    parser.add_argument("--metric", choices=(*METRICS, "cosine"), help="only this one; no document")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if options.subset:
        results = {e: compiled(e) for e in subset()}
        print(json.dumps([(e._asdict(), r._asdict()) for e, r in results.items()]))
        return
    entries = [
        e
        for e in every_entry()
        if e.kernel.startswith(options.kernel or "") and e.metric == (options.metric or e.metric)
    ]
    end, results = time.monotonic() + options.seconds, {}
    for entry in entries:
        if time.monotonic() < end or is_compiled(entry):
            results[entry] = compiled(entry)
    _keep_cache()
    for entry, resources in results.items():
        if reason := problem(entry, resources):
            print(f"{entry}: {launch_of(entry)} {reason}")
    if not (options.kernel or options.metric):
        TABLE.write_text(document(results, len(entries)))
    if len(results) < len(entries):
        sys.exit(f"{len(results)} of {len(entries)} entries compiled; run it again")


if __name__ == "__main__":
    main()
