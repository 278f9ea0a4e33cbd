"""What this machine can do at most, measured, and what a case must therefore take at least."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.cases import DTYPES, Work, case_of
from benchmarks.measure import LEAST_ROUNDS, Pace, in_turn

# On a GPU 16 special functions per clock and multiprocessor, as benchmarks/gpu_model.py has them.
SPECIALS_PER_CLOCK = 16
SIZE = {"cpu": 2048, "cuda": 8192}  # of the square product, and of the rows of those of points
DIMS = (128, 1024)
SMALL_SIZE = 256  # where torch multiplies one by one: halves, on CPUs without instructions for them
COPIES = [1 << k for k in range(14, 27, 3)]  # bytes: from the first cache to memory
LARGE_COPY = 1 << 29  # beyond the cache of a GPU
Rates = dict[str, Any]


def measured(device: str, quick: bool, threads: int) -> Rates:
    """Operations per second of products, bytes per second of copies and fills by their size."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    pace = Pace(1.0 if quick else 2.0, 10, threads)
    products: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        size = SIZE[device] // (2 if quick else 1)
        if device == "cpu" and _seconds_of(size, dtype) > pace.seconds / LEAST_ROUNDS:
            size = SMALL_SIZE
        products[name] = _products(size, dtype, pace, where)
    if device == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        size = SIZE[device] // (2 if quick else 1)
        products["tf32"] = _products(size, torch.float32, pace, where)
        torch.set_float32_matmul_precision(before)
    copies = {}
    for count in [*COPIES, *([LARGE_COPY] if device == "cuda" else [])]:
        source, target = torch.ones(2, count // 2, dtype=torch.uint8, device=where)
        calls = {
            "copy": lambda s=source, t=target: t.copy_(s),
            "fill": lambda s=source, t=target: (s.fill_(1), t.fill_(1)),
        }
        seconds = in_turn(calls, pace, where, warm=3)
        copies[str(count)] = count / min(min(times) for times in seconds.values())
    return {"operations": products, "bytes": copies, "specials": _special_functions(device)}


def _seconds_of(size: int, dtype: torch.dtype) -> float:
    """Of a square product on the CPU, by a small one."""
    a = torch.randn(SMALL_SIZE, SMALL_SIZE).to(dtype)
    once = Pace(0.0, 1, torch.get_num_threads())
    times = in_turn({"mm": lambda: torch.mm(a, a)}, once, a.device)["mm"]
    return min(times) * (size / SMALL_SIZE) ** 3


def _products(size: int, dtype: torch.dtype, pace: Pace, where: torch.device) -> float:
    """The best rate of a square product and of those that the losses are made of."""
    best = 0.0
    for rows, inner, columns in (
        (size, size, size), *((size, d, size) for d in DIMS), *((size, size, d) for d in DIMS)
    ):  # fmt: skip
        a = torch.randn(rows, inner, device=where).to(dtype)
        b = torch.randn(inner, columns, device=where).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=where)
        seconds = in_turn({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, pace, where)
        best = max(best, 2.0 * rows * inner * columns / min(seconds["mm"]))
    return best


def _special_functions(device: str) -> float | None:
    """Per second, by the clock; of a CPU they are vector operations like others."""
    if device != "cuda":
        return None
    gpu: Any = torch.cuda.get_device_properties(0)
    clock = getattr(gpu, "clock_rate", 0) * 1e3
    return gpu.multi_processor_count * clock * SPECIALS_PER_CLOCK or None


def best_of(one: Rates, other: Rates) -> Rates:
    """The higher of two rates of one machine."""
    found: Rates = {"specials": one["specials"]}
    for kind in ("operations", "bytes"):
        names = sorted({*one[kind], *other[kind]}, key=lambda n: (len(n), n))
        found[kind] = {n: max(one[kind].get(n, 0.0), other[kind].get(n, 0.0)) for n in names}
    return found


def seen(record: dict[str, Any]) -> Rates:
    """The rates of a record: as they were measured, or higher where a control reached more.

    Or, of bytes, where a provider did: stores that pass the caches by move more than a copy.
    """
    rates = record["rates"]
    done = [(row, case_of(row["case"])) for row in record["rows"] if row["status"] == "ok"]
    for row, case in done:
        if row["control"]:
            reached = _rate(case.control_work(), row["control"]["minimum"], row["case"]["dtype"])
            rates = best_of(rates, reached)
    for row, case in done:
        work, seconds = case.work(), row["minimum"]
        if not work.flops and seconds < limit_of(work, row["case"], rates)["seconds"]:
            rates = best_of(rates, _rate(work, seconds, row["case"]["dtype"]))
    return rates


def _rate(work: Work, seconds: float, dtype: str) -> Rates:
    found: Rates = {"operations": {}, "bytes": {}, "specials": None}
    if work.flops:
        found["operations"][dtype] = work.flops / seconds
    else:
        found["bytes"][str(int(work.bytes))] = work.bytes / seconds
    return found


def with_limits(record: dict[str, Any]) -> dict[str, Any]:
    """The record with ``limit`` and ``ratio`` in its measured rows, by all that it has seen."""
    rates = seen(record)
    rows, known = [], {}
    for row in record["rows"]:
        if row["status"] == "ok":
            key = json.dumps(row["case"], sort_keys=True)
            if key not in known:
                known[key] = limit_of(case_of(row["case"]).work(), row["case"], rates)
            row = row | {"limit": known[key], "ratio": known[key]["seconds"] / row["minimum"]}
        rows.append(row)
    return record | {"rates": rates, "rows": rows}


def _seconds_of_products(flops: float, facts: dict[str, Any], rates: dict[str, float]) -> float:
    """By the fastest unit that the dtype and the precision permit."""
    precision, cuda = facts.get("precision", "auto"), facts["device"] == "cuda"
    times = [flops / rates[facts["dtype"]]] if facts["dtype"] in rates else []
    if facts["dtype"] == "float16" and not cuda:
        times.append(flops / rates["float32"])
    if facts["dtype"] == "float32":
        if precision in ("bf16", "bf16x3"):
            times.append((3.0 if precision == "bf16x3" else 1.0) * flops / rates["bfloat16"])
        if precision == "tf32" and cuda:
            times.append(flops / rates["tf32"])
    return min(times)


def limit_of(work: Work, facts: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Seconds that the work takes at least, and what bounds it."""
    # A case whose bytes stay in a cache is held to copies of that size. Whoever moves more bytes
    # at a rate can move fewer: a small copy that was disturbed does not count.
    sizes = sorted(int(size) for size in rates["bytes"])
    size = max((s for s in sizes if s <= work.bytes), default=sizes[0])
    fastest = max(rates["bytes"][str(s)] for s in sizes if s >= size)
    bounds = {
        "products": _seconds_of_products(work.flops, facts, rates["operations"]),
        "bytes": work.bytes / fastest,
    }
    if rates["specials"]:
        bounds["special functions"] = work.specials / rates["specials"]
    by = max(bounds, key=lambda name: bounds[name])
    return {"seconds": bounds[by], "by": by}
