"""The ways in which patch libraries are known to go wrong: graphs, memory and numerics.

Graphs and compilation 15-17, memory 18-24, numerics 25-30; 1-14 are in test_patch_traps.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from test_patch_traps import box, every_backend
from test_patches import assert_same_bits, sliced
from torch import Tensor

from fastcontrast import RandomPatches, extract_patches, random_patches, sample_coords


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_15_a_graph_draws_new_patches_whenever_its_step_advances() -> None:
    """Seed and step enter a compiled graph as tensors: nothing of them is frozen or read back."""
    torch._dynamo.reset()
    seed, step = torch.tensor(7), torch.tensor(0)
    images = torch.rand(2, 1, 64, 64)

    def cut(x: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        coords = random_patches(x, 3, 8, scale=(0.1, 0.5), seed=seed, step=step).coords
        step.add_(1)
        return coords

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cut, fullgraph=True, backend=counter)
    for number in range(4):
        expected = random_patches(images, 3, 8, scale=(0.1, 0.5), seed=7, step=number).coords
        assert torch.equal(compiled(images, seed, step), expected)
    assert counter.frame_count == 1


def test_16_compiles_whole_with_every_option() -> None:
    torch._dynamo.reset()
    images = torch.randn(3, 3, 24, 25, requires_grad=True)
    options: dict[str, Any] = dict(
        scale=(0.2, 1.0), hflip=0.5, mean=0.1, std=0.5, padding=2, padding_mode="reflect",
        max_iou=0.9, memory_format=torch.channels_last, seed=3,
    )  # fmt: skip

    def loss(x: Tensor) -> Tensor:
        return random_patches(x, 2, (8, 6), **options).data.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(images), images)
    (result,) = torch.autograd.grad(compiled(images), images)
    torch.testing.assert_close(result, expected)


def test_17_the_last_small_batch_compiles_nothing_anew() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = RandomPatches(2, 8, scale=(0.2, 1.0), seed=1)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch in [8] * 10 + [5, 3] + [8] * 8:
        compiled(torch.rand(batch, 3, 16, 16))
    assert counter.frame_count <= 2  # once for the first size, once for any


@every_backend
def test_18_offsets_are_64_bits_wide(backend: str) -> None:
    """Strides that reach 2³² elements away, in a sparse file: only touched pages exist."""
    with tempfile.TemporaryFile() as file:
        size = 2**32 + 4096
        file.truncate(size)
        array = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
        base = torch.from_numpy(array)
        images = base.as_strided((2, 1, 4, 8), (2**32, 64, 64, 1))
        images[0] = torch.arange(32).reshape(4, 8).to(torch.uint8)
        images[1] = 100 + torch.arange(32).reshape(4, 8).to(torch.uint8)
        coords = box(1, 2, 2, 3).expand(2, 1, 4)
        result = extract_patches(images, coords, dtype=torch.uint8, backend=backend)
        assert result.flatten().tolist() == [
            10, 11, 12, 18, 19, 20, 110, 111, 112, 118, 119, 120,
        ]  # fmt: skip
        del images, base, array


@pytest.mark.parametrize("scale", [None, (0.2, 0.9)])
@every_backend
def test_19_any_strides(backend: str, scale: Any) -> None:
    dense = torch.rand(3, 4, 20, 24)
    views = {
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "sliced": F.pad(dense, (3, 2, 1, 1))[:, :, 1:21, 3:27],
        "transposed": dense.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.cat([torch.zeros(1), dense.flatten()])[1:].view_as(dense),
        "every second": dense.repeat_interleave(2, 3)[..., ::2],
    }
    options: dict[str, Any] = dict(scale=scale, hflip=0.5, vflip=0.5, seed=1, backend=backend)
    expected = random_patches(dense, 3, 9, **options).data
    for name, view in views.items():
        assert torch.equal(random_patches(view, 3, 9, **options).data, expected), name
    row = dense[:, :1, :1].expand(3, 4, 20, 24)
    cut = random_patches(row, 3, 9, **options).data
    assert torch.equal(cut, random_patches(row.contiguous(), 3, 9, **options).data)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64, 513])
@every_backend
def test_20_tails_of_every_length(backend: str, channels: int) -> None:
    images = torch.randint(0, 256, (1, channels, 5, 70), dtype=torch.uint8)
    for width in (1, 5, 16, 17, 47, 70) if channels < 64 else (1, 17):
        coords = box(1, 70 - width, 3, width)
        result = extract_patches(images, coords, dtype=torch.float64, backend=backend) * 255
        assert torch.equal(result.round(), sliced(images, coords).double())
        single = extract_patches(images, coords, backend=backend)
        torch.testing.assert_close(single.double() * 255, result, rtol=0, atol=1e-4)


@every_backend
def test_21_out_is_checked(backend: str) -> None:
    images = torch.rand(2, 3, 8, 8)
    out = torch.empty(2, 1, 4, 4, 3)
    with pytest.raises(ValueError, match=r"out must have shape \[2, 1, 3, 4, 4\], got"):
        random_patches(images, 1, 4, out=out, backend=backend)
    with pytest.raises(ValueError, match="out must have channels last in memory"):
        random_patches(
            images, 1, 4, out=torch.empty(2, 1, 3, 4, 4), memory_format=torch.channels_last,
            backend=backend,
        )  # fmt: skip
    with pytest.raises(ValueError, match="out must share no memory with images"):
        random_patches(images, 1, (8, 8), out=images[:, None], backend=backend)
    with pytest.raises(ValueError, match="images requires a gradient"):
        random_patches(images.requires_grad_(), 1, 4, layout="NHWC", out=out, backend=backend)
    fresh = [random_patches(images.detach(), 1, 4, seed=0, backend=backend).data for _ in range(2)]
    assert fresh[0].data_ptr() != fresh[1].data_ptr()


@pytest.mark.parametrize("options", [{}, dict(scale=(0.1, 1.0)), dict(layout="NHWC")], ids=str)
@every_backend
def test_22_nothing_to_do(backend: str, options: dict[str, Any]) -> None:
    for b, k, c in ((0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)):
        images = torch.rand(b, c, 6, 7, requires_grad=True)
        patches = random_patches(images, k, (3, 4), seed=0, backend=backend, **options)
        shape = (b, k, 3, 4, c) if "layout" in options else (b, k, c, 3, 4)
        assert patches.data.shape == shape
        assert patches.coords.shape == (b, k, 4)
        (grad,) = torch.autograd.grad(patches.data.sum(), images)
        assert torch.equal(grad, torch.zeros_like(images))
    few = torch.rand(2, 3, 6, 7)
    none = random_patches(few, 2, 3, index=torch.empty(0, dtype=torch.int64), backend=backend)
    assert none.data.shape == (0, 2, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.uint8])
@every_backend
def test_23_outputs_beyond_the_caches_are_the_same(backend: str, dtype: torch.dtype) -> None:
    """Streamed from 12 MiB on: every patch equals the one cut alone, flipped ones included."""
    images = torch.randint(0, 256, (40, 3, 96, 96), dtype=torch.uint8)
    options: dict[str, Any] = dict(dtype=dtype, backend=backend)
    if dtype != torch.uint8:
        options |= dict(mean=0.4, std=0.3)
    coords, flips = sample_coords(40, 36, 96, 64, hflip=0.5, vflip=0.5, seed=0)
    large = extract_patches(images, coords, 64, flips=flips, **options)
    assert large.nbytes > 12 << 20
    for b in (0, 17, 39):
        alone = extract_patches(images[b : b + 1], coords[b : b + 1], 64, flips=flips[b : b + 1],
                                **options)  # fmt: skip
        assert_same_bits(large[b : b + 1], alone)
    if dtype.is_floating_point:
        source = torch.rand(300, 3, 64, 64).to(dtype).requires_grad_()
        boxes, turns = sample_coords(300, 2, 64, (16, 64), hflip=0.5, seed=1)
        upstream = torch.rand(300, 2, 3, 16, 64).to(dtype)
        result = extract_patches(source, boxes, flips=turns, backend=backend)
        (grad,) = torch.autograd.grad(result, source, upstream)
        part = source[7:8].detach().requires_grad_()
        result = extract_patches(part, boxes[7:8], flips=turns[7:8], backend=backend)
        (alone,) = torch.autograd.grad(result, part, upstream[7:8])
        assert_same_bits(grad[7:8], alone)


@pytest.mark.usefixtures("two_threads")
@every_backend
def test_24_threads_are_those_of_torch(backend: str) -> None:
    images = torch.rand(6, 3, 64, 64, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        data = random_patches(
            images, 5, 40, scale=(0.2, 1.0), hflip=0.5, padding=4, padding_mode="edge", seed=0,
            backend=backend,
        ).data  # fmt: skip
        results.append((data.detach(), torch.autograd.grad(data.square().sum(), images)[0]))
    for data, grad in results[1:]:
        assert torch.equal(data, results[0][0])
        assert torch.equal(grad, results[0][1])


@every_backend
def test_25_one_rounding_at_the_end(backend: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    whole = box(0, 0, 16, 16)
    exact = ((images.double() / 255) - 0.485) / 0.229
    single = extract_patches(images, whole, mean=0.485, std=0.229, backend=backend)[0]
    assert float((single.double() - exact).abs().max()) <= 5e-7
    for dtype in (torch.float16, torch.bfloat16):
        half = extract_patches(images, whole, mean=0.485, std=0.229, dtype=dtype, backend=backend)[
            0
        ]
        assert torch.equal(half, single.to(dtype))


@every_backend
def test_26_half_gradients_are_summed_in_float32(backend: str) -> None:
    images = torch.zeros(1, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    coords = box(0, 0, 2, 2).expand(1, 4096, 4)
    data = extract_patches(images, coords, backend=backend)
    (grad,) = torch.autograd.grad(data, images, torch.full_like(data, 1.0))
    assert grad.dtype == torch.float16
    assert grad.flatten().tolist() == [4096.0] * 4  # a float16 sum of ones stops at 2048


@every_backend
def test_27_uncovered_pixels_get_zero(backend: str) -> None:
    images = torch.rand(2, 2, 30, 31, requires_grad=True)
    for options in ({}, {"interpolation": "bilinear"}):
        coords = box(10, 11, 7, 8).expand(2, 3, 4)
        data = extract_patches(images, coords, (7, 8) if not options else 5, backend=backend,
                               **options)  # fmt: skip
        (grad,) = torch.autograd.grad(data.sum(), images)
        inside = torch.zeros_like(grad, dtype=torch.bool)
        inside[..., 10:17, 11:19] = True
        assert bool((grad[~inside] == 0).all())
        assert bool((grad[inside] != 0).all())


@every_backend
def test_28_deterministic_mode_has_nothing_to_refuse(backend: str) -> None:
    torch.use_deterministic_algorithms(True)  # the fixture resets it
    images = torch.rand(3, 2, 20, 20, requires_grad=True)
    grads = []
    for _ in range(2):
        data = random_patches(images, 6, 12, scale=(0.1, 1.0), seed=0, backend=backend).data
        grads.append(torch.autograd.grad(data.square().sum(), images)[0])
    assert torch.equal(*grads)


@every_backend
def test_29_autocast_and_inference_mode_change_nothing(backend: str) -> None:
    images = torch.rand(2, 3, 16, 16)
    options: dict[str, Any] = dict(scale=(0.2, 1.0), mean=0.5, seed=1, backend=backend)
    expected = random_patches(images, 2, 8, **options).data
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(random_patches(images, 2, 8, **options).data, expected)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: random_patches(x, 2, 8, **options).data)(images[None])


@every_backend
def test_30_coordinates_are_integers_of_32_bits(backend: str) -> None:
    """257 is no bfloat16 and 2049 no float16: boxes never pass through the images' dtype."""
    images = torch.zeros(1, 1, 1, 2100, dtype=torch.bfloat16)
    images[..., 257], images[..., 2049] = 1.0, 2.0
    coords = torch.tensor([[[0, 257, 1, 1], [0, 2049, 1, 1]]], dtype=torch.int32)
    assert extract_patches(images, coords, backend=backend).flatten().tolist() == [1.0, 2.0]
    for wrong in (torch.float16, torch.int64):
        with pytest.raises(TypeError, match=r"coords must be a tensor .* torch.int32"):
            extract_patches(images, coords.to(wrong), backend=backend)
