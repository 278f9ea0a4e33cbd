"""Every CUDA file compiles without a warning, and no kernel spills registers: where nvcc is there.

For the oldest and the newest architecture and PTX, as it takes minutes; .ci/run builds the wheel
for those between, and ``python -m benchmarks.kernel_resources`` does all and writes its table.
"""

from __future__ import annotations

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


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc, so the CUDA files are not compiled here")
@pytest.mark.parametrize("source", kernel_resources.KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_compile_and_stay_in_registers(source: Path) -> None:
    assert NVCC is not None
    architectures = kernel_resources.ARCHITECTURES[0], kernel_resources.ARCHITECTURES[-1]
    found = kernel_resources.compile_for(source, NVCC, architectures)
    assert {r.architecture for r in found} == set(architectures)
    assert not kernel_resources.problems(found)
    # The table names every kernel, whatever this nvcc's numbers are.
    text = kernel_resources.TABLE.read_text()
    for kernel in {r.kernel.split("<")[0] for r in found}:
        assert f"| `{source.name}` | `{kernel}` |" in text, "python -m benchmarks.kernel_resources"
