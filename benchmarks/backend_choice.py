"""Where CUDA C++ is faster than Triton by the model: what the table of the backends goes by.

A loss or a search by CUDA C++ saves calls of the host, and is faster until its arithmetic takes as
long as they did. ``benchmarks/roofline.py`` writes it into its page; ``tests/test_roofline.py``
holds the table to it.
"""

from __future__ import annotations

import math

from benchmarks import pair_model
from benchmarks.gpu_model import CALL, DEVICES, Counts, Device, milliseconds, total
from benchmarks.pair_model import Shape
from fastcontrast.backends import native

POINTS = 32768
# A loss with its gradients by differences (csrc/cuda/distance_softmax.cu): lane operations for each
# of the M·N·D products, 2 for the scores and 4 for either gradient, at half of the peak.
LANES_OF_PRODUCT = 10
# Of nearest, likewise (csrc/cuda/nearest.cu).
LANES_OF_SEARCH = 2
# The loops of distance_softmax_tensor.cu have not been counted as compiled: where it has to be
# compared, so many times the least that the source says, as the compiled loops of Triton take.
AS_COMPILED = 2
# Calls of kernels and operators: of a loss forward and backward by the CUDA C++ kernels, and of
# their nearest ("search"), counted in the sources; by Triton's, of nearest and a triplet loss,
# counted in a run (tests/test_triton_counts.py); of patches, the kernel and a table, and those of
# autograd.
CALLS = {
    "native": 8, "triton": 62, "search": 8, "nearest": 50, "triplets": 20, "patches": 2, "back": 4,
}  # fmt: skip


def differences_time(device: Device, products: float) -> float:
    """Seconds that the lanes take for a loss with its gradients by differences."""
    return LANES_OF_PRODUCT * products / (device.rate("floats") / 2)


def search_time(device: Device, products: float) -> float:
    """Seconds that the lanes take for the differences of nearest."""
    return LANES_OF_SEARCH * products / (device.rate("floats") / 2)


def largest_differences(device: Device) -> float:
    """M·N·D at which that of a loss is what the calls take that Triton's way has more."""
    saved = (CALLS["triton"] - CALLS["native"]) * CALL
    return saved / differences_time(device, 1.0)


def largest_search(device: Device) -> float:
    """The same of nearest."""
    return (CALLS["nearest"] - CALLS["search"]) * CALL / search_time(device, 1.0)


def largest_products(device: Device) -> float:
    """M·N·D at which a loss by mma.sync takes what Triton's calls do: l2, bfloat16, D = 128."""
    shape = Shape(POINTS, POINTS, 128)
    per_product = AS_COMPILED * native_loss(shape, device) / (POINTS**2 * 128.0)
    return CALLS["triton"] * CALL / per_product


def few_columns(device: Device) -> float:
    """N at which differences take as long as memory does, for four reads or writes of the rows."""
    return 16.0 / device.memory / differences_time(device, 1.0)


def native_loss(shape: Shape, device: Device) -> float:
    """Seconds at least of the CUDA C++ kernels: by differences, or by mma.sync where that pays.

    csrc/cuda/distance_softmax_tensor.cu: 64 owners a block, others from the L2 cache. Launches that
    round points and merge parts are left out.
    """
    scores = float(shape.m) * shape.n
    products, calls = scores * shape.dim, CALLS["native"] * CALL
    if products < native.TENSOR_MINIMUM:
        return max(calls, differences_time(device, products))
    traffic = Counts(cache=2.0 * products / 64)
    rows = pair_model.units(pair_model.SCORE[shape.metric], scores)
    rows = rows + pair_model.units(pair_model.STATISTICS[shape.metric], scores)
    side = pair_model.units(pair_model.GRADIENTS[shape.metric], scores)
    seconds = device.overlapped(traffic + rows + {"matrix": products / device.warp_products})
    matrix = {"matrix": 2 * products / device.warp_products}
    return max(calls, seconds + 2 * device.overlapped(traffic + side + matrix))


def choice_table() -> str:
    """At least, in milliseconds: CUDA C++ and Triton, over M = N at D = 128, l2, bfloat16."""
    sizes = (256, 1024, 2048, 4096, 8192, POINTS)
    lines = [
        "| GPU | way | " + " | ".join(f"M = {m}" for m in sizes) + " |",
        "| --- | --- " + "| --- " * len(sizes) + "|",
    ]
    for device in DEVICES:
        shapes = [Shape(m, m, 128) for m in sizes]
        own = " | ".join(milliseconds(native_loss(shape, device)) for shape in shapes)
        pairs = [total(pair_model.loss(s, device), device, CALLS["triton"]) for s in shapes]
        other = " | ".join(f"{milliseconds(a)} to {milliseconds(b)}" for a, b in pairs)
        lines += [f"| {device.name} | CUDA C++ | {own} |", f"| | Triton | {other} |"]
    return "\n".join(lines)


def bounds_table() -> str:
    """M·N·D up to which CUDA C++ is faster, on every device, and what the backends' table has."""
    lines = [
        "| op | " + " | ".join(d.name for d in DEVICES) + " | table |",
        "| --- | " + "--- | " * len(DEVICES) + "--- |",
    ]
    for name, largest, bound in BOUNDS:
        cells = [f"2^{math.log2(largest(device)):.1f}" for device in DEVICES]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | 2^{bound.bit_length() - 1} |")
    return "\n".join(lines)


# M·N·D at which CUDA C++ and Triton take as long, and what the table of the backends has.
BOUNDS = (
    ("a loss by differences", largest_differences, native.DIFFERENCES_ON_CUDA),
    ("a loss in matrix units", largest_products, native.PRODUCTS_ON_CUDA),
    ("`nearest`", largest_search, native.SEARCH_ON_CUDA),
)
