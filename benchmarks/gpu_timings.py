"""Times of the CUDA kernels on a GPU, beside eager PyTorch and the copy of as many bytes.

``python -m benchmarks.gpu_timings FILE`` writes them as JSON; ``benchmarks/gpu_gate.py`` calls it.
Every case is captured into a CUDA graph of several calls, so that the host's part is left out, and
timed by events, implementations in turn; the host's part is measured apart, without a graph.
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

CALLS, ROUNDS = 10, 15
Job = dict[str, Callable[[], Any]]


def triplet_jobs() -> Iterator[tuple[dict[str, Any], int, Job]]:
    """Facts of a case, the bytes that it has to move, and its implementations."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, dim in ((1024, 128), (65536, 128), (65536, 512), (1 << 20, 128)):
            points = [
                torch.randn(rows, dim, device="cuda", dtype=dtype).requires_grad_()
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
    """As above, for patches of 256 images of 96x96 pixels."""
    images = torch.randint(0, 256, (256, 3, 96, 96), dtype=torch.uint8, device="cuda")
    floats = images.float().requires_grad_()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for k, size in ((2, 32), (8, 32), (2, 64), (8, 64)):
        coords, flips = fastcontrast.sample_coords(
            256, k, 96, size, hflip=0.5, seed=0, device="cuda", backend="native"
        )
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(256, k, 3, size, size, dtype=dtype, device="cuda")

            def ours(out: Tensor = out, k: int = k, size: int = size) -> Any:
                return fastcontrast.random_patches(
                    images, k, size, hflip=0.5, mean=mean, std=std, dtype=out.dtype, seed=0,
                    out=out, backend="native",
                )  # fmt: skip

            y = (coords[..., 0, None] + torch.arange(size, device="cuda")).long()
            x = (coords[..., 1, None] + torch.arange(size, device="cuda")).long()
            b = torch.arange(256, device="cuda")[:, None, None, None, None]
            c = torch.arange(3, device="cuda")[:, None, None]
            a = torch.tensor(std, device="cuda").mul(255).reciprocal()[:, None, None]
            shift = torch.tensor(mean, device="cuda").div(-torch.tensor(std, device="cuda"))

            def eager(
                y: Tensor = y, x: Tensor = x, b: Tensor = b, c: Tensor = c, a: Tensor = a,
                shift: Tensor = shift, dtype: torch.dtype = dtype,
            ) -> Any:  # fmt: skip
                cut = images[b, c, y[:, :, None, :, None], x[:, :, None, None, :]]
                return (cut * a + shift[:, None, None]).to(dtype)

            moved = out.numel() * out.element_size() + min(images.numel(), out.numel())
            facts = {"op": "random_patches", "k": k, "size": size, "dtype": str(dtype)}
            yield facts, moved, {"native": ours, "eager": eager}
        upstream = torch.randn(256, k, 3, size, size, device="cuda")

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
    """Seconds per call of every implementation, in each round."""
    replays = {name: captured(function) for name, function in job.items()}
    times: dict[str, list[float]] = {name: [] for name in job}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / CALLS)
    return times


def host_seconds(function: Callable[[], Any]) -> float:
    """Time that a call takes of the host, the least of some rounds."""
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        found.append((time.perf_counter() - start) / CALLS)
    return min(found)


def main(target: Path) -> None:
    """Run all cases; the file holds those that are done."""
    record: dict[str, Any] = {"environment": describe(), "cases": []}
    for jobs in (triplet_jobs, patch_jobs):
        for facts, moved, job in jobs():
            buffers = [torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2)]

            def copy(buffers: list[Tensor] = buffers) -> Any:
                return buffers[0].copy_(buffers[1])

            times = time_in_turn(job | {"copy of the bytes": copy})
            best = {name: min(seconds) for name, seconds in times.items()}
            row = facts | {
                "bytes": moved,
                "seconds": best,
                "median_seconds": {name: statistics.median(s) for name, s in times.items()},
                "host_seconds": {name: host_seconds(function) for name, function in job.items()},
                "native_bytes_per_second": moved / best["native"],
                "copy_over_native": best["copy of the bytes"] / best["native"],
            }
            record["cases"].append(row)
            target.write_text(json.dumps(record, indent=1) + "\n")
            print(facts, {name: f"{1e6 * s:.1f} us" for name, s in best.items()}, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
