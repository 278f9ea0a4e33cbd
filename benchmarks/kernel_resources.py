"""Registers, shared memory and spills of the CUDA kernels, as nvcc's assembler reports them.

``python -m benchmarks.kernel_resources`` compiles csrc/cuda/*.cu for every architecture, fails if a
kernel spills registers or has local memory, and writes docs/kernel_resources.md. It needs nvcc and
no GPU. ``--check LOG`` reads what a build printed (NVCC_APPEND_FLAGS="-Xptxas=-v") and holds it to
the same, for every architecture and every kernel of that page; .ci/run does so with the wheel's.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = sorted(p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.stem != "device")
ARCHITECTURES = (80, 86, 90, 100)
TABLE = ROOT / "docs" / "kernel_resources.md"

# KiB of shared memory that a launch may add to what the compiler knows: the launchers' own limits.
DYNAMIC = {
    "point_gradients": 80, "row_statistics": 80,  # MOST_SHARED of csrc/cuda/point_walk.h
    "tensor_point_gradients": 48, "tensor_row_statistics": 48,  # of distance_softmax_tensor.cu
    "search_rows": 44,  # of 48 with its static memory, csrc/cuda/nearest.cu
}  # fmt: skip

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


class Resources(NamedTuple):
    """What one kernel takes on one architecture."""

    kernel: str  # with its template arguments
    architecture: int
    registers: int
    shared: int  # bytes of static shared memory of a block
    stack: int  # bytes of local memory of a thread
    spills: int  # bytes stored and loaded


def find_nvcc() -> str | None:
    """Path of nvcc on PATH or in the usual folder."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_for(
    source: Path, nvcc: str, architectures: tuple[int, ...] = ARCHITECTURES
) -> list[Resources]:
    """Compile one file for these architectures and PTX of the last, any warning an error."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings", "-Xptxas=-v",
             *targets, "-fatbin", str(source), "-o", str(Path(folder, "out.fatbin"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def parse(output: str) -> list[Resources]:
    """Read what ptxas -v prints."""
    found: list[Resources] = []
    name, architecture, stack, spills = "", 0, 0, 0
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            name, architecture = match[1], int(match[2])
        elif match := _STACK.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            found.append(
                Resources(name, architecture, int(match[1]), int(match[2] or 0), stack, spills)
            )
    names = _demangled([r.kernel for r in found])
    return [r._replace(kernel=name) for r, name in zip(found, names, strict=True)]


def problems(found: list[Resources]) -> list[str]:
    """Kernels that use memory where registers were meant."""
    return [
        f"{r.kernel} on sm_{r.architecture}: {r.stack} bytes of local memory, {r.spills} of spills"
        for r in found
        if r.stack or r.spills
    ]


def shortcomings(log: str) -> list[str]:
    """What is wrong with a build that should hold all kernels for all architectures."""
    found = parse(log)
    lines = problems(found)
    kernels = set(re.findall(r"^\| `\w+\.cu` \| `(\w+)` \|", TABLE.read_text(), re.MULTILINE))
    for architecture in ARCHITECTURES:
        compiled = {r.kernel.split("<")[0] for r in found if r.architecture == architecture}
        for what, names in (
            ("lacks", kernels - compiled),
            ("is not in the table:", compiled - kernels),
        ):
            if names:
                lines.append(f"sm_{architecture} {what} {', '.join(sorted(names))}")
    return lines


def _demangled(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in done.stdout.splitlines():
        line = re.sub(r"\([\w:]+\)(?=\d)", "", line)  # the type of an enumerator, (Kind)1
        line = re.sub(r"\((?!anonymous).*$", "", line.replace("(anonymous namespace)::", ""))
        short.append(
            re.sub(r"^void ", "", line).replace("fastcontrast::", "").replace("cuda::", "")
        )
    return short


def table(by_file: dict[str, list[Resources]]) -> str:
    """The text of docs/kernel_resources.md: one line per kernel template and file."""
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        "Written by `python -m benchmarks.kernel_resources` from what `nvcc -Xptxas -v` says; not",
        "measured on a GPU. Registers of a thread: least to most over the kernel's variants",
        "(element types, vector widths). No kernel spills registers or has local memory; `.ci/run`",
        "holds this where nvcc is installed. With up to 32 registers a multiprocessor can be full.",
        "Shared memory of a block: static, as the compiler has it, and what a launch adds at most,",
        "by its own limit.",
        "",
        "| file | kernel | variants | "
        + " | ".join(f"sm_{a}" for a in ARCHITECTURES)
        + " | static shared, bytes | dynamic, up to |",
        "| --- | --- | ---: |" + " ---: |" * (len(ARCHITECTURES) + 2),
    ]
    for file, found in by_file.items():
        groups: dict[str, list[Resources]] = defaultdict(list)
        for r in found:
            groups[r.kernel.split("<")[0]].append(r)
        for kernel, rows in groups.items():
            cells = [f"`{file}`", f"`{kernel}`", str(len({r.kernel for r in rows}))]
            for a in ARCHITECTURES:
                used = [r.registers for r in rows if r.architecture == a]
                cells.append(f"{min(used)}–{max(used)}" if min(used) < max(used) else f"{used[0]}")
            cells.append(str(max(r.shared for r in rows)))
            cells.append(f"{DYNAMIC[kernel]} KiB" if kernel in DYNAMIC else "0")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, check, write the table; or check what a build printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="LOG", help="output of a build")
    log = parser.parse_args().check
    if log is not None:
        wrong = shortcomings(log.read_text())
        if wrong:
            raise SystemExit("\n".join(wrong))
        print("CUDA kernels: every architecture, no spills, no local memory")
        return
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc on PATH or in /usr/local/cuda/bin")
    by_file = {source.name: compile_for(source, nvcc) for source in KERNEL_FILES}
    found = [line for rows in by_file.values() for line in problems(rows)]
    if found:
        raise SystemExit("\n".join(found))
    TABLE.write_text(table(by_file))
    print(f"{TABLE.relative_to(ROOT)}: {sum(map(len, by_file.values()))} kernels")


if __name__ == "__main__":
    main()
