"""Times of the CUDA kernels on a GPU, beside Triton's, eager PyTorch and the copy of as many bytes.

``python -m benchmarks.gpu_timings FILE`` writes them as JSON; ``benchmarks/gpu_gate.py`` calls it.
Every case is captured into a CUDA graph of several calls, so that the host's part is left out, and
timed by events, implementations in turn; calls without a graph, whole and the host's part alone,
are measured apart. Losses and searches are there on both sides of the sizes at which the table of
the backends goes from CUDA C++ to Triton, whose calls are timed without a graph.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcontrast
from benchmarks.environment import describe
from fastcontrast import backends

DEVICE = "cuda"
CALLS, ROUNDS = 10, 15
TRIPLETS = ((1024, 128), (65536, 128), (65536, 512), (1 << 20, 128))  # rows and dimensions
PATCHES = ((2, 32), (8, 32), (2, 64), (8, 64))  # for each image, and their sides
BATCH, SIDE = 256, 96
# Rows, columns, dimensions; points of float32 are multiplied without rounding, but by "tf32".
LOSSES = (
    (1024, 1024, 128), (2048, 2048, 128), (4096, 4096, 128), (8192, 8192, 128),
    (32768, 32768, 128), (65536, 16, 128),
)  # fmt: skip
ROUNDING = (("bfloat16", "auto"), ("float32", "tf32"), ("float32", "ieee"))
SEARCHES = (
    (64, 65536, 128, 10), (2048, 2048, 128, 10), (4096, 4096, 128, 10), (16384, 16384, 128, 10),
)  # fmt: skip
EAGER_SCORES = 1 << 26  # that eager PyTorch is asked to write
Job = dict[str, Callable[[], Any]]


def triplet_jobs() -> Iterator[tuple[dict[str, Any], int, Job]]:
    """Facts of a case, the bytes that it has to move, and its implementations."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, dim in TRIPLETS:
            points = [
                torch.randn(rows, dim, device=DEVICE, dtype=dtype).requires_grad_()
                for _ in range(3)
            ]

            def ours(points: list[Tensor] = points) -> Any:
                loss = fastcontrast.triplet_ratio_loss(*points, backend="native")
                return torch.autograd.grad(loss, points)

            def eager(points: list[Tensor] = points) -> Any:
                a, p, n = points
                difference = (a - p).norm(dim=1) - (a - n).norm(dim=1)
                return torch.autograd.grad(difference.sigmoid().square().mean(), points)

            moved = 9 * points[0].numel() * points[0].element_size()
            facts = {"op": "triplet_ratio_loss", "rows": rows, "dim": dim, "dtype": str(dtype)}
            yield facts, moved, {"native": ours, "eager": eager}


def patch_jobs() -> Iterator[tuple[dict[str, Any], int, Job]]:
    """As above, for patches of images of 96x96 pixels."""
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, device=DEVICE)
    floats = images.float().requires_grad_()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for k, size in PATCHES:
        coords, flips = fastcontrast.sample_coords(
            BATCH, k, SIDE, size, hflip=0.5, seed=0, device=DEVICE, backend="native"
        )
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(BATCH, k, 3, size, size, dtype=dtype, device=DEVICE)

            def ours(out: Tensor = out, k: int = k, size: int = size) -> Any:
                return fastcontrast.random_patches(
                    images, k, size, hflip=0.5, mean=mean, std=std, dtype=out.dtype, seed=0,
                    out=out, backend="native",
                )  # fmt: skip

            y = (coords[..., 0, None] + torch.arange(size, device=DEVICE)).long()
            x = (coords[..., 1, None] + torch.arange(size, device=DEVICE)).long()
            b = torch.arange(BATCH, device=DEVICE)[:, None, None, None, None]
            c = torch.arange(3, device=DEVICE)[:, None, None]
            a = torch.tensor(std, device=DEVICE).mul(255).reciprocal()[:, None, None]
            shift = torch.tensor(mean, device=DEVICE).div(-torch.tensor(std, device=DEVICE))

            def eager(
                y: Tensor = y, x: Tensor = x, b: Tensor = b, c: Tensor = c, a: Tensor = a,
                shift: Tensor = shift, dtype: torch.dtype = dtype,
            ) -> Any:  # fmt: skip
                cut = images[b, c, y[:, :, None, :, None], x[:, :, None, None, :]]
                return (cut * a + shift[:, None, None]).to(dtype)

            moved = out.numel() * out.element_size() + min(images.numel(), out.numel())
            facts = {"op": "random_patches", "k": k, "size": size, "dtype": str(dtype)}
            yield facts, moved, {"native": ours, "eager": eager}
        upstream = torch.randn(BATCH, k, 3, size, size, device=DEVICE)

        def both(
            coords: Tensor = coords, flips: Tensor = flips, size: int = size,
            upstream: Tensor = upstream,
        ) -> Any:  # fmt: skip
            # Forward as well: autograd goes back on the stream that it came on, here the graph's.
            data = fastcontrast.extract_patches(floats, coords, size, flips=flips, backend="native")
            return torch.autograd.grad(data, floats, upstream)

        facts = {"op": "extract_patches and back", "k": k, "size": size, "dtype": "torch.float32"}
        moved = 4 * (2 * upstream.numel() + min(floats.numel(), upstream.numel()) + floats.numel())
        yield facts, moved, {"native": both}


def on_backends(op: str, call: Callable[[str], Any]) -> Job:
    """``call`` by the CUDA C++ kernels, and by Triton's where they can run."""
    job: Job = {"native": lambda: call("native")}
    if backends.why_not("triton", op, torch.empty(0, device=DEVICE)) is None:
        job["triton"] = lambda: call("triton")
    return job


def loss_jobs() -> Iterator[tuple[dict[str, Any], int, Job]]:
    """As above, for a loss with its gradients: points in, gradients out."""
    for dtype, precision in ROUNDING:
        for rows, columns, dim in LOSSES:
            if precision == "ieee" and rows * columns > EAGER_SCORES:
                continue  # a tenth of a second for each call
            x, y = (
                torch.randn(n, dim, device=DEVICE, dtype=getattr(torch, dtype)).requires_grad_()
                for n in (rows, columns)
            )
            target = torch.arange(rows, device=DEVICE) % columns

            def ours(
                backend: str, x: Tensor = x, y: Tensor = y, target: Tensor = target,
                precision: str = precision,
            ) -> Any:  # fmt: skip
                loss = fastcontrast.info_nce_loss(
                    x, y, target=target, temperature=1.0, precision=precision, backend=backend
                )
                return loss.detach(), *torch.autograd.grad(loss, [x, y])

            def eager(x: Tensor = x, y: Tensor = y, target: Tensor = target) -> Any:
                scores = -torch.cdist(x.float(), y.float())
                loss = torch.nn.functional.cross_entropy(scores, target)
                return loss.detach(), *torch.autograd.grad(loss, [x, y])

            job = on_backends("distance_softmax", ours)
            if rows * columns <= EAGER_SCORES:
                job["eager"] = eager
            facts = {
                "op": "info_nce_loss", "rows": rows, "columns": columns, "dim": dim,
                "dtype": dtype, "precision": precision,
            }  # fmt: skip
            yield facts, 2 * (x.numel() + y.numel()) * x.element_size(), job


def nearest_jobs() -> Iterator[tuple[dict[str, Any], int, Job]]:
    """As above, for the nearest columns of every row."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns, dim, k in SEARCHES:
            x, y = (torch.randn(n, dim, device=DEVICE, dtype=dtype) for n in (rows, columns))

            def ours(backend: str, x: Tensor = x, y: Tensor = y, k: int = k) -> Any:
                return fastcontrast.nearest(x, y, k, backend=backend)

            def eager(x: Tensor = x, y: Tensor = y, k: int = k) -> Any:
                return torch.cdist(x.float(), y.float()).topk(k, largest=False)

            job = on_backends("nearest", ours)
            if rows * columns <= EAGER_SCORES:
                job["eager"] = eager
            facts = {
                "op": "nearest", "rows": rows, "columns": columns, "dim": dim, "k": k,
                "dtype": str(dtype),
            }  # fmt: skip
            moved = (x.numel() + y.numel()) * x.element_size() + 12 * rows * k
            yield facts, moved, job


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """A graph of :data:`CALLS` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            function()
    return graph.replay


def time_in_turn(job: Job) -> dict[str, list[float]]:
    """Seconds per call of every implementation but Triton's, in each round."""
    replays = {name: captured(function) for name, function in job.items() if name != "triton"}
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / CALLS)
    return times


def call_seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Times of a call without a graph: the host's part, and until the device is done, the least."""
    host, whole = [], []
    function()  # what is compiled at the first call
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        host.append((time.perf_counter() - start) / CALLS)
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - start) / CALLS)
    return min(host), min(whole)


def main(target: Path) -> None:
    """Run all cases; the file holds those that are done."""
    record: dict[str, Any] = {"environment": describe(), "cases": []}
    for jobs in (triplet_jobs, patch_jobs, loss_jobs, nearest_jobs):
        for facts, moved, job in jobs():
            buffers = [torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2)]

            def copy(buffers: list[Tensor] = buffers) -> Any:
                return buffers[0].copy_(buffers[1])

            times = time_in_turn(job | {"copy of the bytes": copy})
            best = {name: min(seconds) for name, seconds in times.items()}
            calls = {name: call_seconds(function) for name, function in job.items()}
            row = facts | {
                "bytes": moved,
                "seconds": best,
                "median_seconds": {name: statistics.median(s) for name, s in times.items()},
                "host_seconds": {name: host for name, (host, _) in calls.items()},
                "call_seconds": {name: whole for name, (_, whole) in calls.items()},
                "native_bytes_per_second": moved / best["native"],
                "copy_over_native": best["copy of the bytes"] / best["native"],
            }
            record["cases"].append(row)
            target.write_text(json.dumps(record, indent=1) + "\n")
            print(facts, {name: f"{1e6 * s:.1f} us" for name, s in best.items()}, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
