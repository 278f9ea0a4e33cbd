"""The model of the Triton kernels' bytes and operations against the kernels themselves.

Compiled for GPUs that are not here, the instructions of their loops are counted; what they do under
the interpreter, in tests/test_triton_counts.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastcontrast.backends import native, triton
from fastcontrast.backends.triton import launch as launches

if triton.IMPORT_PROBLEM is not None:
    pytest.skip(triton.IMPORT_PROBLEM, allow_module_level=True)

from benchmarks import backend_choice, pair_model, roofline
from benchmarks.gpu_model import DEVICES, Counts, Device
from benchmarks.pair_model import Shape

ROOT = Path(__file__).resolve().parents[1]
H200, A100 = DEVICES[0], DEVICES[1]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("dim", [32, 128, 256, 1024])
@pytest.mark.parametrize("metric", pair_model.SCORE)
def test_no_loss_beats_its_limit(metric: str, dim: int, device: Device) -> None:
    """That of the products, 6MND, and no launch is predicted to beat its slowest unit."""
    found = pair_model.loss(Shape(4096, 4096, dim, metric), device)
    low, high = sum(f.low(device) for f in found), sum(f.high(device) for f in found)
    assert 3 * 4096.0**2 * dim / device.rate("matrix") <= low <= high


def test_a_launch_by_hand() -> None:
    """Of 2 ms of products and 1 ms of sums, 3 ms of traffic: overlapped 3, in turn 3, then 4."""
    counts = Counts(matrix=2e-3 * H200.rate("matrix"), floats=1e-3 * H200.rate("floats"))
    slow = counts + {"memory": 3e-3 * H200.memory}
    assert H200.overlapped(slow) == pytest.approx(3e-3)
    assert H200.in_turn(slow) == pytest.approx(3e-3)
    assert H200.in_turn(slow + {"special": 2e-3 * H200.rate("special")}) == pytest.approx(4e-3)
    # Of the data sheets: 989 TFLOP/s, and special functions at 3.87e12 a second.
    assert 2 * H200.rate("matrix") == pytest.approx(989e12, rel=0.01)
    assert H200.rate("special") == pytest.approx(3.87e12, rel=0.01)


def test_the_page_is_todays() -> None:
    assert roofline.PAGE.read_text() == roofline.page(), "run python -m benchmarks.roofline"


def test_measured_times_are_those_of_the_case_and_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = next(roofline.losses())
    row = {"case": job.facts, "provider": "fastcontrast", "status": "ok", "minimum": 2e-3}
    other = row | {"case": {**(job.facts or {}), "dim": 1}, "minimum": 1e-3}
    record = {"environment": {"gpu": "NVIDIA H200"}, "rows": [row, other]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "older.json").write_text(json.dumps({"cases": []}))
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    assert roofline.measured(job, H200) == 2e-3
    assert roofline.measured(job, A100) is None


def test_the_choice_of_cuda_kernels_is_what_the_model_says() -> None:
    """The power of two in the middle of GPUs this unlike, and within a factor of three of each."""
    for name, largest, bound in backend_choice.BOUNDS:
        sizes = [math.log2(largest(device)) for device in DEVICES]
        assert bound == 1 << round(sum(sizes) / len(sizes)), name
        assert all(abs(size - math.log2(bound)) < math.log2(3) for size in sizes), name
    for device in DEVICES:
        assert 1 / 5 < native.FEW_COLUMNS / backend_choice.few_columns(device) < 5


LOOPS = [
    (90, "statistics", "l2", True),
    (90, "gradients", "l2", True),
    (80, "gradients", "sqeuclidean", False),
]
COUNT = """
import json, sys, triton
from benchmarks.compiled_loops import loop_of
from benchmarks.triton_entries import Entry
from benchmarks.triton_launches import launch_of
found = []
for arch, kernel, metric, rows in json.loads(sys.argv[1]):
    entry = Entry(arch, kernel, "bfloat16", 128, metric, rows)
    loop = loop_of(entry)
    found.append([dict(loop.names), loop.per_score(), launch_of(entry)])
print(json.dumps([triton.__version__, found]))
"""


@pytest.mark.slow
def test_the_compiled_loops_are_those_of_the_model() -> None:
    """Products and operands to the instruction; other units take no less than the source says."""
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(LOOPS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    version, found = json.loads(done.stdout)
    for (arch, kernel, metric, rows), (names, per_score, sizes) in zip(LOOPS, found, strict=True):
        size, device = launches.Launch(*sizes), H200 if arch == 90 else A100
        shape = Shape(size.block, size.other, 128, metric)
        if kernel == "statistics":
            model, name = pair_model.statistics(shape, device), kernel
        else:
            model = pair_model.gradients(shape if rows else shape.exchanged(), device, rows=rows)
            name = f"gradients of {'rows' if rows else 'columns'}"
        kept = pair_model.COMPILED[arch, name, metric]
        if version == "3.9.0":  # the version that the table is of
            assert [round(n, 1) for n in per_score] == list(kept), (arch, name)
        scores = size.block * size.other
        for unit, made in zip(("integers", "floats", "special"), per_score[1:], strict=True):
            assert model.counts[unit] / scores <= made, (unit, arch, name)
        multiplied = 0
        for text, count in names.items():
            if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text):  # by four warps
                multiplied += count * size.warps // 4 * math.prod(map(int, wide.groups()))
            elif text.startswith("HMMA.16816"):
                multiplied += count * size.warps * 16 * 8 * 16
        assert multiplied == model.counts["matrix"], (arch, name)
        if arch == 80:  # fragments come through ldmatrix, 512 bytes of a warp
            read = sum(n for text, n in names.items() if re.match(r"LDSM\S*\.4", text))
            assert 512 * read * size.warps == pytest.approx(model.counts["shared"], rel=0.05)
        to_double = sum(n for text, n in names.items() if text.startswith("F2F.F64"))
        doubles = sum(n for text, n in names.items() if re.match(r"D(ADD|FMA|MUL)", text))
        threads = 32 * size.warps
        assert to_double * threads == model.counts["conversions"], (arch, name)
        assert doubles * threads == model.counts["doubles"], (arch, name)
