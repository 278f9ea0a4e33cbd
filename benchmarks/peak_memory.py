"""Peak memory of one loss, forward and backward, each implementation in a process of its own.

``python -m benchmarks.peak_memory --rows 16384`` prints a table; ``--json FILE`` keeps it.
The peak is the resident memory above inputs and gradients, as Linux counts it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("eager", "fastcontrast")


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(implementation: str, rows: int, dim: int, threads: int) -> dict[str, Any]:
    """Run once in this process: loss, time, peak memory, and a fingerprint of the gradients."""
    import torch
    import torch.nn.functional as F

    import fastcontrast

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, dim, generator=generator).div_(dim**0.25).requires_grad_()
        for _ in range(2)
    )
    target = torch.randperm(rows, generator=generator)
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)

    def run(rows: int) -> float:
        a, b, t = x[:rows], y[:rows], target[:rows] % rows
        if implementation == "eager":
            loss = F.cross_entropy(-torch.cdist(a, b), t)
        else:
            loss = fastcontrast.info_nce_loss(a, b, t)
        loss.backward()
        return loss.item()

    run(1024)  # libraries load, start their threads and allocate their buffers
    x.grad.zero_()
    y.grad.zero_()
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    loss = run(rows)
    seconds = time.perf_counter() - start
    return {
        "implementation": implementation,
        "loss": loss,
        "seconds": seconds,
        "peak_mib": resident_mib("VmHWM") - before,
        "grad_norms": [x.grad.norm().item(), y.grad.norm().item()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384, help="M = N (default: 16384)")
    parser.add_argument("--dim", type=int, default=128, help="D (default: 128)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        result = measure(arguments.child, arguments.rows, arguments.dim, arguments.threads)
        print(json.dumps(result))
        return
    results = []
    for implementation in IMPLEMENTATIONS:
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--child", implementation]
        for name in ("rows", "dim", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    print(f"M = N = {arguments.rows}, D = {arguments.dim}, float32, forward and backward")
    print(f"{'':14}{'loss':>12}{'peak MiB':>12}{'seconds':>10}")
    for r in results:
        print(f"{r['implementation']:14}{r['loss']:12.6f}{r['peak_mib']:12.0f}{r['seconds']:10.2f}")
    if arguments.json:
        from benchmarks.environment import describe

        record = {
            "command": " ".join(["python -m benchmarks.peak_memory", *sys.argv[1:]]),
            "environment": describe(),
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
