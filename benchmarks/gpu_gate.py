"""One command for a machine with a GPU: ``make gpu``.

``python -m benchmarks.gpu_gate [FOLDER]`` builds the native module with nvcc, runs the conformance
suite and the GPU tests on the device, the timings, what fits of the benchmark
(benchmarks/suite.py; its page is in FOLDER/bench) and compute-sanitizer on small cases, within nine
minutes and without a package registry. Results go to FOLDER/gpu_gate.json (default:
build/gpu_gate) after every step, so that a run that is cut short leaves what it had. Needs torch
with CUDA, nvcc, CMake, pybind11, pytest and hypothesis. The exit status is 0 where every step
passed, or says why it could not run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520  # seconds in all, under nine minutes with what starts and ends the process
BENCH = 150  # of them are the benchmark's, whatever the steps before it take
LAST_CASE = 45  # seconds that the benchmark's last case and its report may take
SANITIZING = (
    60  # seconds that the benchmark leaves to the sanitizers where there is more than BENCH
)
TAIL = 4000  # characters of a step's output that are kept
# A small case of each kernel in every dtype, for the sanitizers, which make kernels 10 to 100
# times slower; the conformance suite has the rest.
SANITIZED = "tests/test_gpu.py"
SANITIZED_TESTS = (
    "triplets_on_the_gpu or patches_on_the_gpu or nearest_on_the_gpu or losses_on_the_gpu"
)


class Gate:
    """The steps, what they said, and the time that is left."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.start = folder, time.monotonic()
        self.steps: dict[str, dict[str, Any]] = {}
        self.reserved = BENCH
        self.env = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return BUDGET - (time.monotonic() - self.start)

    def run(self, name: str, command: list[str], limit: float, **env: str) -> bool:
        """Run one step for ``limit`` seconds at most; whether it ended well."""
        limit = min(limit, self.left() - self.reserved)
        started = time.monotonic()
        print(f"=== {name}: {' '.join(command)}", flush=True)
        step: dict[str, Any] = {"command": command}
        if limit < 5:
            step |= {"ok": False, "reason": "no time left"}
        else:
            with (self.folder / f"{name}.log").open("w+") as log:
                try:
                    step |= self._wait(command, log, limit, self.env | env)
                except OSError as error:
                    step |= {"ok": False, "reason": str(error)}
                log.seek(0)
                step["output"] = log.read()[-TAIL:]
        step["seconds"] = round(time.monotonic() - started, 1)
        self.note(name, step)
        return step["ok"]

    @staticmethod
    def _wait(command: list[str], log: IO[str], limit: float, env: dict[str, str]) -> dict:
        """Status of a command; at the limit it ends with all processes that it started."""
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"ok": False, "reason": f"not done after {limit:.0f} s"}
        return {"ok": status == 0, "status": status}

    def note(self, name: str, step: dict[str, Any]) -> None:
        """Keep a step's result, and everything so far, in the file."""
        self.steps[name] = step
        text = json.dumps({"seconds": time.monotonic() - self.start, "steps": self.steps}, indent=1)
        (self.folder / "gpu_gate.json").write_text(text + "\n")
        print(f"--- {name}: {'ok' if step['ok'] else 'NOT ok'}", flush=True)
        if not step["ok"]:
            print(step.get("reason", ""), step.get("output", ""), flush=True)


def facts(gate: Gate) -> str | None:
    """Versions and devices; the compute capability as torch writes it, or None without a GPU."""
    import torch

    step: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    step |= {"python": sys.version, "cores": os.cpu_count(), "ok": torch.cuda.is_available()}
    capability = None
    if step["ok"]:
        major, minor = torch.cuda.get_device_capability()
        capability = f"{major}.{minor}"
        free, total = torch.cuda.mem_get_info()
        step |= {"gpu": torch.cuda.get_device_name(), "capability": capability}
        step |= {"free_bytes": free, "total_bytes": total}
    else:
        step["reason"] = "torch finds no CUDA device"
    for tool in ("nvcc", "cmake", "ninja", "compute-sanitizer"):
        step[tool] = _tool(tool)
    gate.note("facts", step)
    return capability


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def build(gate: Gate, capability: str) -> bool:
    """Install in place without a registry; by CMake alone where pip cannot."""
    python = sys.executable
    options = {
        "FASTCONTRAST_NATIVE": "require",
        "FASTCONTRAST_CUDA": "on",
        "TORCH_CUDA_ARCH_LIST": f"{capability}+PTX",
    }
    install = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    if gate.run("build", [*install, "-e", "."], 200, **options):
        return True
    # An older setuptools does not read pyproject.toml; the module itself needs none of it.
    find = "import pybind11; print(pybind11.get_cmake_dir())"
    done = subprocess.run([python, "-c", find], capture_output=True, text=True, check=False)
    folder = str(ROOT / "build" / "gpu_gate_cmake")
    configure = [
        "cmake", f"-S{ROOT}", f"-B{folder}", "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={done.stdout.strip()}",
        f"-DFASTCONTRAST_OUTPUT_DIR={ROOT / 'fastcontrast'}", "-DFASTCONTRAST_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={_tool('nvcc')}",
        f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}",
    ]  # fmt: skip
    make = ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)]
    return gate.run("configure", configure, 60) and gate.run("compile", make, 200)


def test(gate: Gate, name: str, arguments: list[str], limit: float) -> bool:
    """Run pytest; counts and the names of what failed go to the step."""
    report = gate.folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    ok = gate.run(name, command, limit)
    if report.exists():
        suite = next(ET.parse(report).getroot().iter("testsuite"))
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        gate.note(name, gate.steps[name] | counts | {"failed": failed})
    return ok


def conformance_files() -> list[str]:
    """The test files whose tests run on every backend."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "on_every_backend" in f.read_text()]


def sanitize(gate: Gate, tool: str) -> bool:
    """compute-sanitizer on small cases; a reason, and no failure, where it cannot run at all."""
    name = f"sanitizer-{tool}"
    program = _tool("compute-sanitizer")
    if program is None:
        gate.note(name, {"ok": True, "reason": "no compute-sanitizer on this machine"})
        return True
    command = [
        program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
        "-x", SANITIZED, "-k", SANITIZED_TESTS,
    ]  # fmt: skip
    ok = gate.run(name, command, 90)
    step = gate.steps[name]
    if not ok and re.search(r"Device not supported|error 999", step.get("output", "")):
        step |= {"ok": True, "reason": "compute-sanitizer does not support this machine"}
        gate.note(name, step)
    return step["ok"]


def bench(gate: Gate) -> bool:
    """The benchmark's quick cases in the time that is left; its record is written as it goes."""
    gate.reserved = 0
    limit = max(gate.left() - SANITIZING, min(BENCH, gate.left()))
    flags = ["--quick", "--device", "cuda", "--seconds", f"{limit - LAST_CASE:.0f}"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.suite",
        *flags,
        "--out",
        str(gate.folder / "bench"),
    ]
    return gate.run("bench", command, limit)


def page(gate: Gate) -> None:
    """The page of a benchmark that was ended before it wrote its own."""
    out = gate.folder / "bench"
    if (out / "bench.json").exists() and not (out / "bench.html").exists():
        command = [sys.executable, "-m", "benchmarks.report", str(out)]
        subprocess.run(command, cwd=ROOT, env=gate.env, timeout=60, check=False)


def main() -> int:
    """Run the steps in the order of what they tell."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "gpu_gate"
    gate = Gate(folder.resolve())
    capability = facts(gate)
    if capability is None or not build(gate, capability):
        return 1
    parallel = []
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
        parallel = ["-n", str(min(8, os.cpu_count() or 1))]
    ok = test(gate, "gpu-tests", ["tests/test_gpu.py", "tests/test_gpu_mining.py"], 90)
    conformance = [*conformance_files(), "-k", "native-cuda or triton-cuda", *parallel]
    ok &= test(gate, "conformance", conformance, 200)
    timings = [sys.executable, "-m", "benchmarks.gpu_timings", str(gate.folder / "timings.json")]
    ok &= gate.run("timings", timings, 100)
    try:
        ok &= bench(gate)
    finally:
        page(gate)
    ok &= sanitize(gate, "memcheck")
    ok &= sanitize(gate, "racecheck")
    print(f"{'passed' if ok else 'FAILED'} in {BUDGET - gate.left():.0f} s: {gate.folder}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
