"""Instructions of the inner loops of the Triton kernels, as their compiler made them for a GPU.

    python -m benchmarks.compiled_loops    the tables COMPILED of pair_model.py and row_model.py

What the source says a score takes (benchmarks/pair_model.py) is a lower bound: the compiler moves
tiles between layouts and may compute a value twice. Triton brings assembler and disassembler, so
that no GPU is needed. Counted is the way through the loop on which no pair is near.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import patch_kernels
from benchmarks.triton_entries import (
    BOTH_GRADIENTS,
    BOTH_SIDES,
    Entry,
    metrics_of,
)
from benchmarks.triton_launches import arguments, function_of, launch_of
from fastcontrast.backends.triton.launch_table import SIZES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = re.compile(r"\b(HGMMA|HMMA|DMMA|IMMA)\b")
# Instructions of the pipe of quarter rate, and of that of floating-point sums and products; what is
# neither, nor moves data or steers the program, is for the pipe of integers and comparisons.
SPECIAL = ("MUFU", "F2F", "F2I", "I2F")
FLOATING = ("FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2")
COMPARING = (
    "FMNMX", "FSEL", "FSETP", "FSET", "ISETP", "SEL", "LOP3", "SHF", "IADD3", "VIADD", "VIMNMX",
    "VIMNMX3", "VIADDMNMX", "IMNMX", "PRMT", "LEA", "PLOP3", "P2R", "R2P", "IABS", "SGXT", "POPC",
)  # fmt: skip


class Loop(NamedTuple):
    """Instructions of a thread in one pass, and the scores that it has there."""

    names: Counter[str]
    scores: int

    def of(self, *names: str) -> int:
        """Instructions with these names, whatever follows the first dot."""
        return sum(n for name, n in self.names.items() if name.partition(".")[0] in names)

    def per_score(self) -> tuple[float, ...]:
        """All instructions, and those of the pipes of integers, sums and special functions."""
        parts = (self.names.total(), self.of(*COMPARING), self.of(*FLOATING), self.of(*SPECIAL))
        return tuple(part / self.scores for part in parts)


def loop_of(entry: Entry) -> Loop:
    """Compile an entry and count its loop; of patches all of it, a pixel for a score."""
    sizes = launch_of(entry)
    result = triton.compile(
        ASTSource(function_of(entry), *arguments(entry, sizes)),
        target=GPUTarget("cuda", entry.architecture, 32),
        options={"num_warps": sizes.warps, "num_stages": sizes.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
    scores = sizes.block * sizes.other // (32 * sizes.warps)
    way = _code(done.stdout)[0] if entry.kernel in patch_kernels.KERNELS else _way(done.stdout)
    return Loop(Counter(_names(way)), scores)


def _names(instructions: list[str]) -> Iterator[str]:
    for text in instructions:
        yield re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _code(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and where labels point to."""
    code: list[str] = []
    places: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(found[1])
    return code, places


def _way(text: str) -> list[str]:
    """Instructions of the loop with the products where nothing rare happens."""
    code, places = _code(text)

    def target(at: int) -> int | None:
        found = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", code[at])
        return places[found[1]] if found else None

    products = {at for at, text in enumerate(code) if PRODUCT.search(text)}
    backward = [(to, at) for at in range(len(code)) if (to := target(at)) is not None and to < at]
    loops = [(begin, end) for begin, end in backward if products & set(range(begin, end))]
    if not loops:
        raise ValueError("no loop of the kernel has products")
    begin, end = min(loops)
    if any(begin < inner for inner, _ in loops):
        raise ValueError("the products are in a loop of their own, as often as dimensions want it")
    # The shortest way from there to the branch back: what is rare lies beside it.
    lengths: dict[int, tuple[int, int | None]] = {}  # to the end, and where it goes on
    for at in range(end, begin - 1, -1):
        to = target(at)
        if to == begin:
            lengths[at] = (1, None)
            continue
        diverges = ".DIV" in code[at]  # where threads part, which they do not
        always = to is not None and not diverges and not code[at].startswith("@")
        follows = [] if always else [at + 1]
        if to is not None and to > at and not diverges:
            follows.append(to)
        found = [(lengths[place][0] + 1, place) for place in follows if place in lengths]
        if found:
            lengths[at] = min(found)
    way, at = [], begin
    while at is not None:
        way.append(code[at])
        at = lengths[at][1]
    if not any(PRODUCT.search(text) for text in way):
        raise ValueError("the shortest way through the loop has no products")
    return way


def entries() -> Iterator[Entry]:
    """Of the targets' shapes: bfloat16, 128 dimensions; patches of uint8 images, as they are."""
    for arch in (80, 90):
        for metric in metrics_of("bfloat16"):
            yield Entry(arch, "statistics", "bfloat16", 128, metric)
            yield Entry(arch, BOTH_SIDES, "bfloat16", 128, metric)
            if (arch, "gradients", "bfloat16", 128) in SIZES:
                for kernel, rows in itertools.product(("gradients", BOTH_GRADIENTS), (True, False)):
                    yield Entry(arch, kernel, "bfloat16", 128, metric, rows=rows)
    for kernel in ("patches cut", "patches drawn and cut", "patches gathered"):
        yield Entry(90, kernel, "ieee", 32, "plain")


def name_of(entry: Entry) -> str:
    """As the models name the launch."""
    if entry.kernel not in ("gradients", BOTH_GRADIENTS):
        return entry.kernel
    side = "rows" if entry.rows else "columns"
    return f"gradients of {side}" + (", symmetric" if entry.kernel == BOTH_GRADIENTS else "")


def main() -> None:
    """Print the table."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for entry in entries():
        name = name_of(entry)
        numbers = ", ".join(f"{n:.1f}" for n in loop_of(entry).per_score())
        print(f'    ({entry.architecture}, "{name}", "{entry.metric}"): ({numbers}),')


if __name__ == "__main__":
    main()
