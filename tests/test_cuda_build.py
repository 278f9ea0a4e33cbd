"""What reads the compiler's output: spills, local memory, kernels and architectures that lack.

It takes minutes to compile every CUDA file for every architecture: .ci/run does so once, for the
wheel, any warning an error, and gives the output to ``benchmarks.kernel_resources --check``. Here
one file is compiled, where nvcc is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import kernel_resources  # noqa: E402

NVCC = kernel_resources.find_nvcc()

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstILi4EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstILi4EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90'
ptxas info    : Function properties for _Z6secondPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_the_reader_of_ptxas_sees_spills() -> None:
    first, second = kernel_resources.parse(PTXAS)
    assert first[1:] == (80, 32, 1024, 0, 0)
    assert second[1:] == (90, 255, 0, 16, 20)
    (problem,) = kernel_resources.problems([first, second])
    assert problem.endswith("on sm_90: 16 bytes of local memory, 20 of spills")


def entry(kernel: str, architecture: int, stack: int = 0) -> str:
    return (
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_{architecture}'\n"
        f"    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers\n"
    )


def test_a_build_has_every_kernel_for_every_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.md"
    table.write_text("| `a.cu` | `first` | 1 |\n| `b.cu` | `second` | 1 |\n")
    monkeypatch.setattr(kernel_resources, "TABLE", table)
    monkeypatch.setattr(kernel_resources, "ARCHITECTURES", (80, 90))
    log = tmp_path / "log"

    def check(text: str) -> str:
        log.write_text("[1/2] Building CUDA object\n" + text)
        monkeypatch.setattr(sys, "argv", ["kernel_resources", "--check", str(log)])
        try:
            kernel_resources.main()
        except SystemExit as error:
            return str(error)
        return ""

    whole = "".join(entry(f"_Z{n}Pf", a) for a in (80, 90) for n in ("5first", "6second"))
    assert check(whole) == ""
    assert check(whole + entry("_Z6secondPf", 90, stack=8)).startswith("second on sm_90: 8 bytes")
    assert check("") == "sm_80 lacks first, second\nsm_90 lacks first, second"
    assert check(whole + entry("_Z5thirdPf", 80)) == "sm_80 is not in the table: third"


@pytest.mark.skipif(NVCC is None, reason="no nvcc, so no CUDA file is compiled here")
def test_a_file_compiles_and_stays_in_registers() -> None:
    assert NVCC is not None
    (source,) = (p for p in kernel_resources.KERNEL_FILES if p.stem == "merge_statistics")
    found = kernel_resources.compile_for(source, NVCC, (90,))
    assert {r.architecture for r in found} == {90}
    assert not kernel_resources.problems(found)


def test_the_table_is_of_the_kernels_that_are_there() -> None:
    """Names alone: the numbers are those of the nvcc that made it."""
    table = re.findall(
        r"^\| `\w+\.cu` \| `(\w+)`", kernel_resources.TABLE.read_text(), re.MULTILINE
    )
    sources = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.*"))
    bounds = r"(?:__launch_bounds__\([^()]*(?:\([^()]*\)[^()]*)*\)\s+)?"
    kernels = re.findall(rf"__global__ void\s+{bounds}(\w+)\(", re.sub("//.*", "", sources))
    assert sorted(kernels) == sorted(table), "python -m benchmarks.kernel_resources"


def test_the_table_has_the_kernels_with_dynamic_shared_memory() -> None:
    """Those that ask for it, and within what their launchers allow."""
    bodies = "".join(p.read_text() for p in kernel_resources.KERNEL_FILES).split("__global__ void")
    dynamic = {
        name
        for body in bodies[1:]
        if "FASTCONTRAST_SHARED(" in body
        for name in re.findall(r"^[^{]*?\b([a-z_]+)\((?:const|Pairs)", body)
    }
    assert dynamic == kernel_resources.DYNAMIC.keys()
    limits = {"point_walk.h": 80, "distance_softmax_tensor.cu": 48}
    for file, limit in limits.items():
        text = (ROOT / "csrc" / "cuda" / file).read_text()
        assert f"MOST_SHARED = {limit} << 10;" in text
