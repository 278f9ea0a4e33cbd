"""What the Triton kernels of `distance_softmax` must take at least, by their bytes and operations.

    python -m benchmarks.roofline                     M = N = 32768, bfloat16, on three GPUs

Per score the model counts matrix operations, special functions (sqrt, exp2) and other lane
operations of the inner loop, and per launch the bytes that cross the memory and the L2 cache. The
limit is the largest of these times: everything else overlaps it perfectly. The prediction is their
sum for the units of a multiprocessor, as if nothing overlapped inside one program, halved where two
programs are resident: between the two lies what a GPU will show. Nothing here was measured.
Below the table: up to which size the CUDA C++ kernels should be faster than Triton's.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple


class Device(NamedTuple):
    """Peak rates per second: dense bfloat16 FMA, special functions, float32 lanes, bytes."""

    name: str
    matrix: float
    special: float
    lanes: float
    memory: float
    cache: float


# Multiprocessors × clock × rate per clock; vendors' figures of the memories.
DEVICES = (
    Device("H200", 132 * 1.83e9 * 2048, 132 * 1.83e9 * 16, 132 * 1.83e9 * 128, 4.8e12, 5.5e12),
    Device("A100", 108 * 1.41e9 * 1024, 108 * 1.41e9 * 16, 108 * 1.41e9 * 64, 2.0e12, 4.0e12),
    Device("RTX 4090", 128 * 2.52e9 * 256, 128 * 2.52e9 * 16, 128 * 2.52e9 * 128, 1.0e12, 3.5e12),
)
# Inner loops of row_statistics.py and point_gradients.py, per score: special functions, lanes.
SCORE = {"l2": (1, 4), "sqeuclidean": (0, 3), "dot": (0, 2)}
STATISTICS = (1, 7)  # exp2; mask, maximum, difference, two sums, floor
GRADIENTS = (1, 9)  # exp2; mask, near test, log p in two parts, weight, rounding, two sums
# Each GEMM of 2MND operations: statistics have the scores, gradients the scores and the product.
PRODUCTS = {"statistics": 1, "gradients": 2}


class Time(NamedTuple):
    """Seconds of one launch: at the limit, and predicted."""

    limit: float
    predicted: float


def launch_time(
    device: Device, kernel: str, metric: str, points: int, dim: int, block: int, resident: int = 1
) -> Time:
    """One launch at M = N = ``points`` in bfloat16, ``block`` points to a program."""
    scores = float(points) * points
    special, lanes = SCORE[metric]
    extra = STATISTICS if kernel == "statistics" else GRADIENTS
    matrix = PRODUCTS[kernel] * scores * dim / device.matrix
    functions = scores * (special + extra[0]) / device.special
    others = scores * (lanes + extra[1]) / device.lanes
    operand = 2.0 * points * dim
    cache = operand * points / block / device.cache
    memory = (2 * operand + (4.0 * points * dim if kernel == "gradients" else 0)) / device.memory
    in_program = matrix + max(functions, others)
    limit = max(matrix, functions, others, cache, memory)
    return Time(limit, max(limit, in_program / min(resident, 2), cache))


# A loss with its gradients by differences (csrc/cuda/distance_softmax.cu): lane operations for each
# of the M·N·D products, 2 for the scores and 4 for either gradient, at half of the peak; and calls
# of kernels and operators of both backends, counted in their sources, at a host's 4 µs each.
LANES_OF_PRODUCT = 10
CALLS = {"native": 8, "triton": 50}
CALL = 4e-6


def differences_time(device: Device, products: float) -> float:
    """Seconds that the lanes take for a loss with its gradients by differences."""
    return LANES_OF_PRODUCT * products / (device.lanes / 2)


def small_problem(device: Device) -> float:
    """M·N·D at which that is what the calls take that Triton's way has more."""
    saved = (CALLS["triton"] - CALLS["native"]) * CALL
    return saved / differences_time(device, 1.0)


def few_columns(device: Device) -> float:
    """N at which differences take as long as memory does, for four reads or writes of the rows."""
    return 16.0 / device.memory / differences_time(device, 1.0)


def table(points: int, dims: tuple[int, ...], metrics: tuple[str, ...]) -> str:
    """Markdown table of forward and backward, and the ratio of the 8MND GEMMs to it."""
    lines = [
        "| GPU | metric | D | 8MND, ms | statistics | gradients, each side | all, limit | all, "
        "predicted | 8MND ÷ limit | 8MND ÷ predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device in DEVICES:
        for metric in metrics:
            for dim in dims:
                gemms = 4 * float(points) ** 2 * dim / device.matrix
                parts = [
                    launch_time(device, kernel, metric, points, dim, 128) for kernel in PRODUCTS
                ]
                limit = parts[0].limit + 2 * parts[1].limit
                predicted = parts[0].predicted + 2 * parts[1].predicted
                cells = [1e3 * gemms, *(1e3 * p.predicted for p in parts), 1e3 * limit]
                row = " | ".join(f"{value:.2f}" for value in [*cells, 1e3 * predicted])
                lines.append(
                    f"| {device.name} | {metric} | {dim} | {row} | {gemms / limit:.2f} | "
                    f"{gemms / predicted:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=32768)
    options = parser.parse_args()
    print(table(options.points, (64, 128, 256), tuple(SCORE)))
    print(
        "\nBy differences, in CUDA C++, where it is faster than Triton's launches, or memory-bound:"
    )
    for device in DEVICES:
        size, columns = small_problem(device), few_columns(device)
        print(f"{device.name}: up to M·N·D = 2^{math.log2(size):.1f}, or {columns:.0f} columns")


if __name__ == "__main__":
    main()
