"""What only a GPU can show: graphs, streams, that nothing waits for the device, and CUDA tensors
through the public functions.

Values are held by the conformance suite, where the GPU's kernels are one of the variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

import fastcontrast as fc
from fastcontrast import backends
from fastcontrast.backends import native

DEVICE = "cuda"
LOSS_KERNELS = "fastcontrast.backends.native.distance_softmax_cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(autouse=True)
def _waiting_is_allowed_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def needs(op: str) -> None:
    reason = backends.why_not("native", op, torch.empty(0, device="cuda"))
    if reason is not None:
        pytest.skip(reason)


def points(dtype: torch.dtype = torch.float32, rows: int = 1000, dim: int = 128) -> list[Tensor]:
    return [torch.randn(rows, dim, dtype=dtype, device="cuda") for _ in range(3)]


def loss_and_gradients(inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = fc.triplet_ratio_loss(*leaves, backend="native")
    return [loss, *torch.autograd.grad(loss, leaves)]


def assert_a_capture_is_eager(call: Callable[[], Sequence[Tensor]]) -> None:
    """Replays of a captured call give the tensors of an eager one, to the bit."""
    truth = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = call()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_triplets_on_the_gpu(dtype: torch.dtype) -> None:
    needs("triplet_distances")
    inputs = points(dtype)
    found = loss_and_gradients(inputs)
    truth = [x.cpu().double() for x in inputs]
    leaves = [x.requires_grad_() for x in truth]
    loss = fc.triplet_ratio_loss(*leaves, backend="reference")
    for ours, true in zip(found, [loss, *torch.autograd.grad(loss, leaves)], strict=True):
        # A sum of 128 squares, a root and a sigmoid in float32; one rounding to a half dtype.
        limit = 1e-5 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
        error = (ours.cpu().double() - true).norm() / true.norm()
        assert float(error) < limit


PATCHES = {
    "boxes": {},
    "random sizes": dict(scale=(0.1, 1.0)),
    "padding": dict(padding=8, padding_mode="reflect"),
    "apart": dict(min_distance=12.0),
}


@pytest.mark.parametrize("wish", PATCHES)
def test_patches_on_the_gpu_are_those_of_the_cpu(wish: str) -> None:
    needs("extract_patches")
    images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    options = dict(hflip=0.5, vflip=0.5, mean=(0.5, 0.4, 0.3), std=0.25, seed=7, step=3)
    options |= PATCHES[wish]
    truth = fc.random_patches(images, 8, 32, **options, backend="reference")
    found = fc.random_patches(images.cuda(), 8, 32, **options, backend="native")
    assert torch.equal(found.coords.cpu(), truth.coords)
    assert torch.equal(found.flips.cpu(), truth.flips)
    # The multiplication and addition may be one instruction; weights of resized pixels are rounded.
    torch.testing.assert_close(found.data.cpu(), truth.data, rtol=1e-6, atol=2e-6)


def test_a_patch_without_a_place_is_reported_once_the_device_got_there() -> None:
    needs("extract_patches")

    def draw(num_patches: int) -> Tensor:
        found = fc.sample_coords(
            4, num_patches, (40, 48), 20, max_iou=0, seed=0, device="cuda", backend="native"
        )
        torch.cuda.synchronize()
        return found[1]

    def draw_twice() -> None:
        assert bool((draw(9) >= 128).any())
        draw(1)

    with pytest.raises(ValueError, match="found no place"):
        draw_twice()
    assert bool((draw(1) < 128).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nearest_on_the_gpu(dtype: torch.dtype) -> None:
    needs("nearest")
    for rows, k in ((300, 10), (3, 300)):  # one block for a row; several, and two searches
        x, y = torch.randn(rows, 40).to(dtype), torch.randn(5000, 40).to(dtype)
        for metric in ("l2", "dot"):
            own = torch.arange(rows)
            truth = fc.nearest(
                x.double(), y.double(), k, metric=metric, exclude=own, backend="reference"
            )
            found = fc.nearest(
                x.cuda(), y.cuda(), k, metric=metric, exclude=own.cuda(), backend="native"
            )
            assert torch.equal(found.indices.cpu(), truth.indices)
            # Taken in float64 and rounded once; float64 itself sums in another order.
            limit = 1e-13 if dtype == torch.float64 else 2.0**-24
            values = found.values.cpu().double()
            torch.testing.assert_close(values, truth.values, rtol=limit, atol=limit)


# Types of points, how products may be rounded, rows and columns, and the relative error allowed:
# 64 units in the last place of what is not rounded, and of rounded scores of size 20 as many units.
LOSSES = {
    "differences": (torch.float32, "ieee", 140, 1100, 2.0**-18),
    "columns in shared memory": (torch.float32, "ieee", 140, 200, 2.0**-18),
    "double": (torch.float64, "ieee", 70, 150, 2.0**-46),
    "bfloat16": (torch.bfloat16, "auto", 140, 200, 2.0**-6),
    "float16": (torch.float16, "auto", 140, 200, 2.0**-9),
    "tf32": (torch.float32, "tf32", 140, 200, 20 * 2.0**-11),
    "bf16x3": (torch.float32, "bf16x3", 140, 200, 20 * 2.0**-16),
    "bf16": (torch.float32, "bf16", 140, 200, 20 * 2.0**-8),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("kernels", LOSSES)
def test_losses_on_the_gpu(kernels: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of points with near pairs; by few blocks, each with several groups of rows, and by many."""
    needs("distance_softmax")
    monkeypatch.setattr(LOSS_KERNELS + ".TENSOR_MINIMUM", 0)
    dtype, precision, m, n, limit = LOSSES[kernels]
    x, y = torch.randn(m, 70), torch.randn(n, 70)
    y[: m // 2] = x[: m // 2] + 1e-3 * torch.randn(m // 2, 70)
    x, y = x.to(dtype), y.to(dtype)
    for metric in ("l2", "dot"):

        def loss_of(
            x: Tensor, y: Tensor, backend: str, precision: str, metric: str = metric
        ) -> list[Tensor]:
            a, b = x.requires_grad_(), y.requires_grad_()
            loss = fc.info_nce_loss(
                a, b, metric=metric, temperature=3.0, symmetric=symmetric, precision=precision,
                backend=backend,
            )  # fmt: skip
            return [loss.detach(), *torch.autograd.grad(loss, [a, b])]

        truth = loss_of(x.double(), y.double(), "reference", "ieee")
        for processors in (1, 1000):
            monkeypatch.setattr(native.devices, "processors", lambda _, count=processors: count)
            found = loss_of(x.clone().to(DEVICE), y.clone().to(DEVICE), "native", precision)
            for mine, true in zip(found, truth, strict=True):
                assert relative_error(mine.cpu(), true) < limit


def test_a_captured_softmax_loss_is_that_of_an_eager_call(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("distance_softmax")
    monkeypatch.setattr(LOSS_KERNELS + ".TENSOR_MINIMUM", 0)
    x, y, _ = points(rows=200)

    def loss_of(precision: str) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in (x, y)]
        loss = fc.info_nce_loss(*leaves, symmetric=True, precision=precision, backend="native")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for precision in ("ieee", "tf32", "bf16x3"):
        assert_a_capture_is_eager(partial(loss_of, precision))


def test_a_captured_search_is_that_of_an_eager_call() -> None:
    needs("nearest")
    x, y, _ = points()
    truth = fc.nearest(x[:100], y, 300, metric="cosine", backend="native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = fc.nearest(x[:100], y, 300, metric="cosine", backend="native")
    for _ in range(2):
        graph.replay()
        assert torch.equal(found.indices, truth.indices)
        assert torch.equal(found.values, truth.values)


def test_nothing_waits_for_the_device() -> None:
    needs("distance_softmax")
    needs("extract_patches")
    needs("nearest")
    needs("triplet_distances")
    images = torch.rand(4, 3, 32, 32, device="cuda", requires_grad=True)
    module = fc.RandomPatches(4, 8, hflip=0.5, mean=0.5, std=0.5, seed=1, backend="native").cuda()
    inputs = points()
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    for mode in ("default", "error"):  # a table of ratios is copied at its first call
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        loss_and_gradients(inputs)
        fc.nearest(inputs[0], inputs[1], 300, metric="cosine", backend="native")
        fc.nearest(inputs[0], inputs[1], 3)
        for precision in ("ieee", "bf16"):
            leaves = [x.requires_grad_() for x in inputs[:2]]
            fc.info_nce_loss(*leaves, precision=precision, backend="native").backward()
        module(images).data.sum().backward()
        for wish in PATCHES.values():
            fc.random_patches(images, 4, 8, seed=1, step=step, **wish).data.sum().backward()


def test_a_replayed_graph_draws_new_patches() -> None:
    needs("extract_patches")
    images = torch.rand(4, 3, 32, 32, device="cuda")
    module = fc.RandomPatches(4, 8, hflip=0.5, seed=1, backend="native").cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(images)  # warms up what is loaded at the first call
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        patches = module(images)
    for step in range(1, 4):
        graph.replay()
        truth = fc.random_patches(images, 4, 8, hflip=0.5, seed=1, step=step, backend="reference")
        assert torch.equal(patches.coords, truth.coords)
        assert torch.equal(patches.data, truth.data)


def test_a_captured_loss_is_that_of_an_eager_call() -> None:
    needs("triplet_distances")
    inputs = points()
    assert_a_capture_is_eager(partial(loss_and_gradients, inputs))


def test_kernels_run_on_the_current_stream() -> None:
    """Behind work that takes long there: on another stream they would read zeros."""
    needs("triplet_distances")
    inputs = [torch.zeros(64, 128, device="cuda") for _ in range(3)]
    values = points(rows=64)
    truth = torch.linalg.vector_norm(values[0] - values[1], dim=1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(inputs, values, strict=True):
            x.copy_(value)
        found = fc.triplet_distances(*inputs, backend="native").positive
    stream.synchronize()
    torch.testing.assert_close(found, truth)


def test_offsets_beyond_32_bits() -> None:
    """Rows that start behind 2³¹ elements: 5 GB of bfloat16."""
    needs("triplet_distances")
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB of free GPU memory")
    rows, dim = 3, 128
    memory = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    wide = memory.as_strided((rows, dim), (2**30, 1))
    wide.copy_(torch.randn(rows, dim, device="cuda"))
    others = [x.bfloat16() for x in points(rows=rows)[:2]]
    found = fc.triplet_distances(wide, *others, backend="native").positive
    truth = fc.triplet_distances(wide.contiguous(), *others, backend="native").positive
    assert torch.equal(found, truth)


def test_a_launch_that_fails_is_an_error_with_its_shape() -> None:
    """A device that is not there: the current device stays, and the message names the kernel."""
    needs("triplet_distances")
    kernels = native.devices.kernels(torch.empty(0, device="cuda"))
    addresses, strides = (0, 0, 0), (1, 1, 1)
    before = torch.cuda.current_device()
    with pytest.raises(RuntimeError, match="could not"):
        kernels.triplet_distances_forward(
            addresses, strides, 3, 1, 1, 0, (torch.cuda.device_count(), 0), addresses, 0
        )
    assert torch.cuda.current_device() == before
