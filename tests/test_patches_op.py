"""The op around the kernels of patches: gradients, torch.compile, transforms, and every error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from variants import on_every_backend

from fastcontrast import RandomPatches, extract_patches, random_patches, sample_coords

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def overlapping(b: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes of 5x6 in images of 8x9: all of them overlap, some pixels stay uncovered."""
    return sample_coords(b, k, (8, 9), (5, 6), hflip=0.5, vflip=0.5, seed=seed)


def slices(images: Tensor, coords: Tensor, flips: Tensor) -> Tensor:
    rows = []
    for b in range(coords.shape[0]):
        for k in range(coords.shape[1]):
            y0, x0, h, w = coords[b, k].tolist()
            axes = [axis for axis, bit in ((2, 1), (1, 2)) if int(flips[b, k]) & bit]
            rows.append(images[b, :, y0 : y0 + h, x0 : x0 + w].flip(axes))
    return torch.stack(rows).unflatten(0, coords.shape[:2])


@pytest.mark.parametrize("grad_layout", ["dense", "constant", "permuted"])
@pytest.mark.parametrize("grad_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_backend("extract_patches")
def test_gradient_is_that_of_slicing(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype, grad_layout: str
) -> None:
    images = torch.randn(3, 3, 8, 9).to(dtype).requires_grad_()
    coords, flips = overlapping(3, 4)
    result = extract_patches(
        images, coords, flips=flips, mean=MEAN, std=STD, dtype=grad_dtype, backend=backend
    )
    upstream = torch.randn(result.shape).to(grad_dtype)
    if grad_layout == "constant":  # what .sum() sends: stride 0
        upstream = torch.full((), 0.7, dtype=grad_dtype).expand(result.shape)
    elif grad_layout == "permuted":
        upstream = upstream.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    (grad,) = torch.autograd.grad(result, images, upstream)
    double = images.detach().double().requires_grad_()
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    (exact,) = torch.autograd.grad(slices(double, coords, flips) / std, double, upstream.double())
    assert grad.dtype == dtype
    assert bool((grad[exact == 0] == 0).all())
    # At most 4 terms are added in float32 (float64 where one is), and one rounding ends it.
    arithmetic = torch.float64 if torch.float64 in (dtype, grad_dtype) else torch.float32
    limit = 4 * torch.finfo(arithmetic).eps * exact.abs().max() + (
        torch.finfo(dtype).eps * 0.51 * exact.abs()
    )
    assert bool(((grad.double() - exact).abs() <= limit).all())


@on_every_backend("extract_patches")
def test_half_gradients_are_summed_in_float32(backend: str) -> None:
    """512 ones at one pixel: a bfloat16 sum would stop at 256."""
    images = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    coords = torch.tensor([0, 0, 1, 1], dtype=torch.int32).expand(1, 512, 4)
    extract_patches(images, coords, backend=backend).sum().backward()
    assert images.grad is not None
    assert float(images.grad) == 512.0


@pytest.mark.parametrize("options", [{}, {"mean": MEAN, "std": STD}], ids=["plain", "normalised"])
@on_every_backend("extract_patches")
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    coords, flips = overlapping(2, 3)

    def cut(x: Tensor) -> Tensor:
        return extract_patches(x, coords, flips=flips, backend=backend, **options)

    assert torch.autograd.gradcheck(cut, images)
    assert torch.autograd.gradgradcheck(cut, images)
    # Linear: the second derivative of a cubic is 6x where covered, however it is arrived at.
    loss = extract_patches(images, coords, backend=backend).pow(3).sum()
    (first,) = torch.autograd.grad(loss, images, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), images)
    count = torch.autograd.grad(extract_patches(images, coords).sum(), images)[0]
    torch.testing.assert_close(second, 6 * images.detach() * count)


@on_every_backend("extract_patches")
def test_gradient_is_the_same_bits_each_time(backend: str) -> None:
    """Also where torch is told to refuse anything that is not."""
    images = torch.randn(4, 3, 64, 64, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # the fixture resets it
    grads = []
    for _ in range(2):
        data = random_patches(images, 8, 40, hflip=0.5, seed=0, backend=backend).data
        grads.append(torch.autograd.grad(data.square().sum(), images)[0])
    assert torch.equal(*grads)


@on_every_backend("extract_patches")
def test_no_gradient_where_there_is_none(backend: str) -> None:
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    patches = random_patches(images, 2, 2, seed=0, backend=backend)
    assert not patches.data.requires_grad
    weight = torch.ones((), requires_grad=True)
    (patches.data * weight).sum().backward()
    floating = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert random_patches(floating, 2, 2, seed=0, backend=backend).data.requires_grad
    with torch.no_grad():
        assert not random_patches(floating, 2, 2, seed=0, backend=backend).data.requires_grad
    with torch.inference_mode():
        random_patches(floating, 2, 2, seed=0, backend=backend)


@on_every_backend("extract_patches")
def test_autocast_changes_nothing(backend: str) -> None:
    images = torch.randn(2, 3, 8, 9, requires_grad=True)
    coords, flips = overlapping(2, 3)
    plain = extract_patches(images, coords, flips=flips, mean=MEAN, std=STD, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = extract_patches(images, coords, flips=flips, mean=MEAN, std=STD, backend=backend)
        (grad,) = torch.autograd.grad(cast.sum(), images)
    assert torch.equal(cast, plain)
    assert grad.dtype == torch.float32


@on_every_backend("extract_patches")
def test_functional_transforms(backend: str) -> None:
    """torch.func.grad works; vmap, for which there is no rule, says so."""
    images = torch.randn(2, 3, 8, 9)
    coords, flips = overlapping(2, 3)

    def total(x: Tensor) -> Tensor:
        return extract_patches(x, coords, flips=flips, backend=backend).square().sum()

    source = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(source), source)
    assert torch.equal(torch.func.grad(total)(images), expected)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(total)(images[None])


# Registration


def op_arguments(
    backend: str, dtype: torch.dtype, requires_grad: bool, size: tuple, interpolation: str = "none"
) -> tuple:
    images = torch.randn(2, 3, 9, 8).to(dtype).transpose(2, 3)
    coords, flips = overlapping(2, 3)
    return (
        images.requires_grad_(requires_grad), coords, flips, torch.tensor([1, 0]), list(size),
        [0.5, 1.0, 2.0], [0.1], interpolation, True, "constant", [0.5], torch.float32, True,
        backend,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@on_every_backend("extract_patches")
def test_opcheck(backend: str, requires_grad: bool) -> None:
    ops = torch.ops.fastcontrast
    dtype = torch.bfloat16
    torch.library.opcheck(
        ops.extract_patches.default, op_arguments(backend, dtype, requires_grad, (5, 6))
    )
    torch.library.opcheck(
        ops.extract_patches.default,
        op_arguments(backend, torch.float32, requires_grad, (3, 4), "bilinear"),
    )
    images, coords, flips, index, _, scale, offset, *_ = op_arguments(backend, dtype, False, (5, 6))
    grad = torch.randn(2, 3, 3, 5, 6, requires_grad=requires_grad)
    how = ("bilinear", True, "error")
    torch.library.opcheck(
        ops.extract_patches_backward.default,
        (grad, coords, flips, index, [2, 8, 9], scale, *how, torch.bfloat16, backend),
    )
    out = torch.empty(2, 3, 3, 5, 6)
    torch.library.opcheck(
        ops.extract_patches_out.default,
        (out, images, coords, None, None, scale, offset, *how, [], backend),
    )
    for ids, key in ((None, None), (torch.tensor([5, 2**39]), torch.tensor([-1, 2**47]))):
        torch.library.opcheck(
            ops.sample_coords.default,
            (ids, key, 1, 2, 0, 2, 3, [8, 9], [5, 6], [2**31, 2**32], [1, 0], [1, 1], [0.2, 1.0],
             [0.75, 1.5], 4, 2**29, torch.device("cpu"), backend),
        )  # fmt: skip


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@on_every_backend("extract_patches")
def test_compile_extract_patches(backend: str) -> None:
    coords, flips = overlapping(2, 3)
    options = dict(flips=flips, mean=MEAN, std=STD, backend=backend)

    def loss(x: Tensor) -> Tensor:
        return extract_patches(x, coords, (5, 6), **options).square().sum()

    images = torch.randn(2, 3, 8, 9, requires_grad=True)
    (eager,) = torch.autograd.grad(loss(images), images)
    (result,) = torch.autograd.grad(compiled(loss)(images), images)
    torch.testing.assert_close(result, eager)
    # What cannot be checked while tracing is checked while running.
    bad = coords.clone()
    bad[1, 2, 0] = 4
    with pytest.raises(ValueError, match=r"coords\[1, 2\]"):
        compiled(lambda x: extract_patches(x, bad, (5, 6), backend=backend))(images.detach())


@on_every_backend("extract_patches")
def test_compile_random_patches(backend: str) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)

    def cut(x: Tensor, step: int) -> Any:
        return random_patches(
            x, 4, 8, hflip=0.5, mean=MEAN, std=STD, seed=2**63 + 5, step=step, backend=backend
        )

    fast = compiled(cut)
    for step in range(4):
        for a, b in zip(fast(images, step), cut(images, step), strict=True):
            assert torch.equal(a, b)
    out = torch.empty(3, 4, 3, 8, 8)
    into = compiled(lambda x, o: random_patches(x, 4, 8, seed=1, out=o, backend=backend).coords)
    into(images, out)
    assert torch.equal(out, random_patches(images, 4, 8, seed=1).data)


def test_compile_without_recompiling() -> None:
    """A step that advances and a batch that shrinks once do not compile anew for ever."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    module = torch.compile(RandomPatches(2, 4, hflip=0.5, seed=3), fullgraph=True, backend=counter)
    twin = RandomPatches(2, 4, hflip=0.5, seed=3)
    for step in range(12):
        images = torch.randn(8 if step < 6 else 5, 3, 9, 9)
        assert torch.equal(module(images).data, twin(images).data)
    assert counter.frame_count <= 2
    # Seeds from torch's generator are drawn inside of the graph.
    drawn = compiled(lambda x: random_patches(x, 2, 4).coords)
    images = torch.randn(4, 1, 200, 200)
    torch.manual_seed(0)
    first, second = drawn(images), drawn(images)
    torch.manual_seed(0)
    assert torch.equal(drawn(images), first)
    assert not torch.equal(first, second)


# Errors


def patches_error(message: str, error: type[Exception] = ValueError, **wrong: Any) -> None:
    arguments = dict(images=torch.zeros(2, 3, 8, 9), num_patches=2, size=4, seed=0) | wrong
    with pytest.raises(error, match=message):
        random_patches(**arguments)


def extract_error(message: str, error: type[Exception] = ValueError, **wrong: Any) -> None:
    arguments = dict(images=torch.zeros(2, 3, 8, 9), coords=overlapping(2, 3)[0]) | wrong
    with pytest.raises(error, match=message):
        extract_patches(**arguments)


def test_errors_of_images_and_sizes() -> None:
    patches_error("images must be a tensor, got list", TypeError, images=[1])
    patches_error("images must be uint8 or floating point, got torch.int32", TypeError,
                  images=torch.zeros(1, 1, 8, 8, dtype=torch.int32))  # fmt: skip
    patches_error(r"images must have shape \[B, C, H, W\], got \[3, 8, 9\]",
                  images=torch.zeros(3, 8, 9))  # fmt: skip
    patches_error("patches of 9x9 pixels are larger than images of 8x9", size=9)
    patches_error("patches of 1x10 pixels are larger than images of 8x9", size=(1, 10))
    patches_error("size must be at least 1x1 pixels, got 0x4", size=(0, 4))
    patches_error("size must be an int or a pair", TypeError, size=None)
    patches_error("num_patches must be at least 0 .*, got -2", num_patches=-2)
    patches_error("num_patches must be an int, got float", TypeError, num_patches=2.0)
    patches_error(r"sample_ids must have shape \[2\], got \[3\]", sample_ids=torch.arange(3))


def test_errors_of_randomness() -> None:
    generator = torch.Generator()
    patches_error("generator and seed exclude each other, got seed=0", generator=generator)
    patches_error("generator must be a torch.Generator, got int", TypeError, generator=1, seed=None)
    patches_error("hflip must be a probability from 0 to 1, got 2", hflip=2)
    patches_error("seed must be an int, got str", TypeError, seed="0")
    patches_error("step must be an int, got str", TypeError, step="0")
    with pytest.raises(TypeError, match="seed must be an int"):
        RandomPatches(1, 2, seed=0.5)
    with pytest.raises(TypeError, match="unknown option 'flip'; a module takes antialias, dtype"):
        RandomPatches(1, 2, flip=0.5)
    with pytest.raises(ValueError, match="vflip must be a probability"):
        RandomPatches(1, 2, vflip=7)


def test_errors_of_normalisation() -> None:
    patches_error("mean must have one number or one per channel of the images, 3, got 2",
                  mean=(0.5, 0.5))  # fmt: skip
    patches_error("std must have one number or one per channel of the images, 3, got 1", std=[0.5])
    patches_error("std must be positive, got 0", std=0.0)
    patches_error("std must be positive, got", std=(1.0, 1.0, -1.0))
    patches_error("std must be finite, got inf", std=float("inf"))
    patches_error("mean must be finite, got nan", mean=float("nan"))
    patches_error("mean must be a number or a list of 3 numbers", TypeError, mean=torch.zeros(3))
    patches_error("mean must be a number or a list of 3 numbers", TypeError, mean=("a", "b", "c"))
    uint8 = torch.zeros(2, 3, 8, 9, dtype=torch.uint8)
    patches_error("dtype must be floating point with mean or std, got torch.uint8",
                  images=uint8, dtype=torch.uint8, mean=0.5)  # fmt: skip
    patches_error("dtype must be floating point for images of torch.float32, got uint8", TypeError,
                  dtype=torch.uint8)  # fmt: skip
    patches_error("dtype must be uint8 or floating point, got torch.int64", TypeError,
                  dtype=torch.int64)  # fmt: skip
    patches_error("dtype must be a torch.dtype, got str", TypeError, dtype="float32")


def test_errors_of_coords_and_flips() -> None:
    coords, flips = overlapping(2, 3)
    extract_error("coords must be a tensor .* got list", TypeError, coords=[[0, 0, 4, 4]])
    extract_error(r"coords must be a tensor \[B, K, 4\] of torch.int32, got torch.float32",
                  TypeError, coords=coords.float())  # fmt: skip
    extract_error(r"coords must have shape \[2, K, 4\] for images \[2, 3, 8, 9\], got \[1, 3, 4\]",
                  coords=coords[:1])  # fmt: skip
    extract_error(r"coords must have shape \[2, K, 4\]", coords=coords[..., :2])
    extract_error("size must be given for empty coords", coords=coords[:, :0])
    extract_error("patches of 9x6 pixels are larger than images of 8x9", size=(9, 6))
    extract_error(r"flips must be a tensor \[B, K\] of torch.uint8, got torch.bool", TypeError,
                  flips=flips.bool())  # fmt: skip
    extract_error(r"flips must have shape \[2, 3\] like coords, got \[2, 2\]", flips=flips[:, :2])
    extract_error("backend must be None or one of", backend="nobody")


# One pixel beyond each side, the far ends of int32, an empty box, and one of another size.
BAD_BOXES = [
    (-1, 0, 5, 6), (4, 0, 5, 6), (0, -1, 5, 6), (0, 4, 5, 6), (2**31 - 1, 0, 5, 6),
    (0, -(2**31), 5, 6), (0, 0, 0, 6), (0, 0, 5, -6), (0, 0, 5, 5), (0, 0, 2**31 - 1, 6),
]  # fmt: skip


@pytest.mark.parametrize("box", BAD_BOXES)
@on_every_backend("extract_patches")
def test_boxes_outside_the_image(backend: str, box: tuple[int, ...]) -> None:
    y0, x0, height, width = box
    for b, k in ((0, 2), (1, 0), (1, 2)):
        coords = overlapping(2, 3)[0]
        coords[b, k] = torch.tensor(box, dtype=torch.int32)
        extract_error(
            rf"coords\[{b}, {k}\] = \(y0 {y0}, x0 {x0}, height {height}, width {width}\) must lie "
            "inside the image, 8x9 pixels, and have the height and width of the patches, 5x6",
            coords=coords,
            backend=backend,
        )
    # The first box may be the wrong one, and its size is not taken from it if one is given.
    coords = overlapping(2, 3)[0]
    coords[0, 0] = torch.tensor(box, dtype=torch.int32)
    extract_error(r"coords\[0, 0\] = ", coords=coords, size=(5, 6), backend=backend)


def test_errors_of_out() -> None:
    images = torch.zeros(2, 3, 8, 9)
    out = torch.zeros(2, 2, 3, 4, 4)
    patches_error("out must be a tensor, got list", TypeError, out=[])
    patches_error(r"out must have dtype torch.float32 \(or pass dtype=\), got torch.float64",
                  TypeError, out=out.double())  # fmt: skip
    patches_error(r"out must have shape \[2, 2, 3, 4, 4\], got \[4, 3, 4, 4\]",
                  out=out.flatten(0, 1))  # fmt: skip
    patches_error("out must be contiguous, got strides", out=out.transpose(3, 4))
    patches_error("out must be on cpu with the images, got meta", out=out.to("meta"))
    source = images.clone().requires_grad_()
    patches_error("out cannot be used where images requires a gradient", images=source, out=out)
    patches_error("out cannot be used where out requires a gradient",
                  out=out.clone().requires_grad_())  # fmt: skip
    with torch.no_grad():
        random_patches(source, 2, 4, seed=0, out=out)
    arena = torch.zeros(2000)
    shared = arena[:432].view(2, 3, 8, 9)
    patches_error("out must share no memory with images, but the two overlap",
                  images=shared, out=arena[431 : 431 + 192].view_as(out))  # fmt: skip
    coords = torch.zeros(1000, dtype=torch.int32)
    coords.view(-1, 4)[:] = torch.tensor([0, 0, 4, 4])
    extract_error("out must share no memory with coords", coords=coords[:16].view(2, 2, 4),
                  out=coords.view(torch.float32)[:192].view_as(out))  # fmt: skip


def test_named_backend_says_why_not() -> None:
    meta = torch.zeros(1, 1, 4, 4, device="meta")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run extract_patches here"):
        random_patches(meta, 1, 2, seed=0, backend="native")
