"""What a measurement was made on: every result file carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastcontrast.backends import native


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory(field: str) -> int:
    """Bytes of main memory: "MemTotal", or "MemAvailable" without swapping; 0 where unknown."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith(field + ":")), 0)


def commit() -> str:
    """Commit of the checkout, with "+" when the package's files differ from it."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "../csrc", "../fastcontrast", "."],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def describe() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    info = native.build_info()
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": info.get("active_isa"),
        "bf16_unit": info.get("active_bf16_unit"),
        "gpu": gpu.name if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else memory("MemTotal"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
