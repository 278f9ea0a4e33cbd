"""A process of its own for every measurement, forked from one that has imported the libraries.

The parent holds a `Measurer`; it starts ``python -m benchmarks.processes``, which imports torch,
ours and the peers, starts no thread and no device, and forks for each request (a line of JSON on
its standard input). What a measurement does to its process, running out of memory included, ends
with it; the answer says how it ended.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import environment

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "torch", "fastcontrast", "benchmarks.measure", "benchmarks.loss_cases",
    "benchmarks.patch_cases", "benchmarks.triplet_cases", "benchmarks.train_cases",
    "torch._dynamo", "torch._inductor.compile_fx", "pytorch_metric_learning.losses",
    "cut_cross_entropy", "liger_kernel.ops.fused_linear_scaled_cross_entropy",
)  # fmt: skip
# Memory goes back to the system when it is freed, so that the next peak starts from the ground;
# compiling starts no pool of processes.
MEASURING = {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "out of memory")
CUT_SHORT = "not done after"
FREE_SHARE = 0.9  # of the memory that is free: more is not given to a measurement


class Measurer:
    """The forking process, seen from the one that asks. A context manager.

    Args:
        returning: Whether freed memory goes back to the system at once, for peaks; it costs time.
    """

    def __init__(self, returning: bool) -> None:
        env = os.environ | MEASURING | (RETURNING if returning else {})
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.processes", *PRELOADED],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=env,
        )  # fmt: skip

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def ask(self, function: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Run one of FUNCTIONS in a process of its own.

        Args:
            function: Its name.
            limit: Seconds until the process is ended.
            arguments: What it takes, as JSON.

        Returns:
            ``status`` ("ok", "failed", "out of memory", "skipped") with ``result`` or ``reason``.

        Raises:
            RuntimeError: If the forking process has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"function": function, "limit": limit, "arguments": arguments}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; what follows says so
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the measuring process has ended: python -m benchmarks.processes")
        return json.loads(line)


def peak(facts: dict[str, Any], provider: str, pace: list[float]) -> dict[str, Any]:
    """See `measure.peak_of`."""
    from benchmarks import cases, measure

    case = cases.case_of(facts)
    if case.device.type == "cpu" and environment.memory("MemAvailable"):
        # An allocation beyond it fails in this process, and no other is ended for it.
        room = FREE_SHARE * environment.memory("MemAvailable")
        limit = measure.resident_bytes("VmSize") + int(room)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return measure.peak_of(case, provider, measure.Pace(*pace))._asdict()  # type: ignore[arg-type]


def times(facts: dict[str, Any], providers: dict[str, float], pace: list[float]) -> dict[str, Any]:
    """See `measure.times_of`."""
    from benchmarks import cases, measure

    return measure.times_of(cases.case_of(facts), providers, measure.Pace(*pace))  # type: ignore[arg-type]


def rates(device: str, quick: bool, threads: int) -> dict[str, Any]:
    """See `limits.measured`."""
    from benchmarks import limits

    return limits.measured(device, quick, threads)


def numerics() -> dict[str, Any]:
    """See `numerics.measure`."""
    from benchmarks import numerics as series

    found = series.measure()
    found.pop("environment")
    return found


def machine(device: str) -> dict[str, Any]:
    """What the measurements are made on, and the device's free memory."""
    import torch

    facts = environment.describe()
    free = environment.memory("MemAvailable")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        free = torch.cuda.mem_get_info()[0]
    return {"environment": facts, "free_bytes": free}


FUNCTIONS = {
    "peak": peak, "times": times, "rates": rates, "numerics": numerics, "machine": machine
}  # fmt: skip


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        result = FUNCTIONS[request["function"]](**request["arguments"])
    except (ImportError, NotImplementedError) as error:
        return {"status": "skipped", "reason": f"{type(error).__name__}: {error}"}
    except BaseException as error:  # whatever a peer does is its answer
        text = f"{type(error).__name__}: {error}"
        full = any(sign in text for sign in OUT_OF_MEMORY)
        return {"status": "out of memory" if full else "failed", "reason": text[:2000]}
    return {"status": "ok", "result": result}


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a fork, or how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)
        with os.fdopen(writing, "w") as pipe:
            json.dump(_answer(request), pipe)
        os._exit(0)
    os.close(writing)
    text, ends = b"", time.monotonic() + request["limit"]
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(ends - time.monotonic(), 0))[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            text += part
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"status": "failed", "reason": f"{CUT_SHORT} {request['limit']:.0f} s"}
    status = os.waitpid(child, 0)[1]
    if text:
        return json.loads(text)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return {"status": "out of memory", "reason": "the system ended the process"}
    return {"status": "failed", "reason": f"the process ended with status {status}"}


def serve(preloaded: list[str]) -> None:
    """Import these modules, then answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in preloaded:
        try:
            import_module(name)
        except (ImportError, RuntimeError):
            continue  # a peer that is absent says so where it is asked for
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
