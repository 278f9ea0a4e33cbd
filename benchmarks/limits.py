"""What this machine can do at most, measured, and what a case must therefore take at least."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import DTYPES, Work
from benchmarks.measure import Pace, in_turn

# On a GPU 16 special functions per clock and multiprocessor, as benchmarks/gpu_model.py has them.
SPECIALS_PER_CLOCK = 16
SIZE = {"cpu": 2048, "cuda": 8192}  # of the square product whose rate counts
COPIES = [1 << k for k in range(14, 27, 3)]  # bytes: from the first cache to memory
LARGE_COPY = 1 << 29  # beyond the cache of a GPU


def measured(device: str, quick: bool, threads: int) -> dict[str, Any]:
    """Operations per second of square products, bytes per second of copies by their size."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    pace = Pace(1.0 if quick else 3.0, 10, threads)
    size = SIZE[device] // (2 if quick else 1)
    products: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        if device == "cpu" and name == "float16":
            continue  # torch multiplies it one by one there
        a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = in_turn({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, pace, where)
        products[name] = 2 * size**3 / min(seconds["mm"])
    if device == "cuda":
        products |= _tf32(size, pace, where)
    copies = {}
    for count in [*COPIES, *([LARGE_COPY] if device == "cuda" else [])]:
        source, target = torch.ones(2, count // 2, dtype=torch.uint8, device=where)
        seconds = in_turn({"copy": lambda s=source, t=target: t.copy_(s)}, pace, where)
        copies[str(count)] = count / min(seconds["copy"])
    return {"operations": products, "bytes": copies, "specials": _special_functions(device)}


def _tf32(size: int, pace: Pace, where: torch.device) -> dict[str, float]:
    a, b = (torch.randn(size, size, device=where) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seconds = in_turn({"mm": lambda: a @ b}, pace, where)
    torch.set_float32_matmul_precision(before)
    return {"tf32": 2 * size**3 / min(seconds["mm"])}


def _special_functions(device: str) -> float | None:
    """Per second, by the clock; of a CPU they are vector operations like others."""
    if device != "cuda":
        return None
    gpu: Any = torch.cuda.get_device_properties(0)
    clock = getattr(gpu, "clock_rate", 0) * 1e3
    return gpu.multi_processor_count * clock * SPECIALS_PER_CLOCK or None


def units_of(facts: dict[str, Any]) -> tuple[str, float]:
    """The rate that a case's products are held to, and how many products each of them is."""
    precision = facts.get("precision", "auto")
    if facts["dtype"] == "float32" and precision in ("bf16", "bf16x3"):
        return "bfloat16", 3.0 if precision == "bf16x3" else 1.0
    if facts["dtype"] == "float32" and precision == "tf32" and facts["device"] == "cuda":
        return "tf32", 1.0
    return facts["dtype"], 1.0


def limit_of(work: Work, facts: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """Seconds that the work takes at least, and what bounds it."""
    unit, products = units_of(facts)
    # A case whose bytes stay in a cache is held to the rate of a copy of that size.
    sizes = sorted(int(size) for size in rates["bytes"])
    size = max((s for s in sizes if s <= work.bytes), default=sizes[0])
    bounds = {
        "products": products * work.flops / rates["operations"][unit],
        "bytes": work.bytes / rates["bytes"][str(size)],
    }
    if rates["specials"]:
        bounds["special functions"] = work.specials / rates["specials"]
    by = max(bounds, key=lambda name: bounds[name])
    return {"seconds": bounds[by], "by": by}
