"""GPUs as rates of their units, and how long a launch takes that asks so much of each.

Nothing here was measured. Between :meth:`Device.overlapped` and :meth:`Device.in_turn` lies what a
GPU is expected to show.
"""

from __future__ import annotations

from typing import NamedTuple


class Counts(dict[str, float]):
    """What a launch asks of each unit; the units are in PER_CLOCK and OF_GPU."""

    def __add__(self, other: dict[str, float]) -> Counts:
        return Counts({unit: self.get(unit, 0) + other.get(unit, 0) for unit in {**self, **other}})

    def times(self, factor: float) -> Counts:
        """As many of each."""
        return Counts({unit: factor * count for unit, count in self.items()})


# Of a multiprocessor: multiplications of the matrix unit, in bfloat16 with float32 sums; special
# functions and conversions between types, which share a pipe; float32 sums and products; integers,
# comparisons, choices; sums, and conversions to and from float64; bytes of shared memory;
# instructions for a lane.
PER_CLOCK = (
    "matrix", "special", "floats", "integers", "doubles", "conversions", "shared", "slots",
)  # fmt: skip
OF_GPU = ("memory", "cache")
PRODUCTS = ("matrix", "shared")
TRAFFIC = OF_GPU


class Device(NamedTuple):
    """Rates of a GPU.

    Attributes:
        name: As nvidia-smi has it.
        capability: Major and minor.
        processors: Multiprocessors.
        clock: Hz, boosted.
        per_clock: Of a multiprocessor, as PER_CLOCK names them.
        memory: Bytes per second.
        cache: Bytes per second of the L2 cache.
        cache_bytes: Its size.
        warp_products: Share of ``matrix`` that mma.sync reaches, which CUDA C++ here uses.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float
    per_clock: tuple[float, ...]
    memory: float
    cache: float
    cache_bytes: int
    warp_products: float = 1.0

    def rate(self, unit: str) -> float:
        """Of the whole GPU per second."""
        if unit in OF_GPU:
            return self.memory if unit == "memory" else self.cache
        return self.processors * self.clock * self.per_clock[PER_CLOCK.index(unit)]

    def seconds(self, counts: Counts) -> dict[str, float]:
        """That each unit takes."""
        return {unit: count / self.rate(unit) for unit, count in counts.items()}

    def overlapped(self, counts: Counts) -> float:
        """Seconds of a launch in which the slowest unit never waits."""
        return max(self.seconds(counts).values())

    def in_turn(self, counts: Counts) -> float:
        """The same where products wait for the rest and the rest for products; traffic does not.

        So it is where a multiprocessor holds one program, whose warps meet at barriers: which is
        what nearly all kernels with products do (docs/triton_kernels.md, resident warps).
        """
        seconds = self.seconds(counts)
        products = max((s for u, s in seconds.items() if u in PRODUCTS), default=0.0)
        traffic = max((s for u, s in seconds.items() if u in TRAFFIC), default=0.0)
        rest = (s for u, s in seconds.items() if u not in (*PRODUCTS, *TRAFFIC))
        return max(traffic, products + max(rest, default=0.0))

    def bound(self, counts: Counts) -> str:
        """The unit that takes longest."""
        seconds = self.seconds(counts)
        return max(seconds, key=lambda unit: seconds[unit])


# Clocks, multiprocessors, memories and caches' sizes: the vendor's data sheets. Rates per clock:
# the table of arithmetic throughput in the CUDA programming guide for 9.0, 8.0 and 8.9; bfloat16
# from the data sheets (989, 312 and 165 TFLOP/s with float32 sums). Bandwidth of the caches, and
# what mma.sync reaches of wgmma's rate on Hopper: published microbenchmarks, to about a fifth.
DEVICES = (
    Device(
        "H200", (9, 0), 132, 1.83e9, (2048, 16, 128, 64, 64, 16, 128, 128), 4.8e12, 5.5e12,
        50 << 20, 0.63,
    ),
    Device(
        "A100", (8, 0), 108, 1.41e9, (1024, 16, 64, 64, 32, 16, 128, 128), 2.0e12, 4.0e12, 40 << 20
    ),
    Device(
        "RTX 4090", (8, 9), 128, 2.52e9, (256, 16, 128, 64, 2, 2, 128, 128), 1.0e12, 3.5e12,
        72 << 20,
    ),
)  # fmt: skip
# Seconds that the host takes for a call of a kernel or an operator.
CALL = 4e-6


class Launch(NamedTuple):
    """One launch, or several alike: what the source says, and what the compiler made of it."""

    name: str
    counts: Counts
    compiled: Counts | None = None

    def low(self, device: Device) -> float:
        """Seconds at least: by the source, all units at once."""
        return device.overlapped(self.counts)

    def high(self, device: Device) -> float:
        """Seconds as compiled, where that is known, products and the rest in turn."""
        return max(self.low(device), device.in_turn(self.counts + (self.compiled or {})))


def total(launches: list[Launch], device: Device, calls: int) -> tuple[float, float]:
    """Seconds of launches one after the other, least and most; or of the host, who makes calls."""
    low, high = (sum(f(launch) for launch in launches) for f in (
        lambda launch: launch.low(device), lambda launch: launch.high(device)
    ))  # fmt: skip
    return max(low, calls * CALL), max(high, calls * CALL)


def milliseconds(seconds: float | None) -> str:
    """As the page has them; a dash for what is not known."""
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.3f}" if seconds < 1e-3 else f"{1e3 * seconds:.2f}"
