"""The emulation of CUDA itself: it computes what a GPU would, and finds the mistakes it claims to.

And what it is for beyond the conformance suite, where its kernels are one of the variants: results
that do not depend on the order in which threads take their turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import cuda_emulation
import on_cuda
import pytest
import torch
from cuda_emulation.guarded import PAGE, guarded_bytes
from torch import Tensor
from variants import active, variants

import fastcontrast as fc
from fastcontrast.backends import native
from fastcontrast.backends.patch_sets import Draws, Pixels

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
IN = list(range(7, 7 + 128))

REASON = cuda_emulation.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def probe(name: str, values: list[int], order: str = "ascending") -> list[int]:
    with cuda_emulation.active(ORDERS[order]):
        return cuda_emulation.module().probe(name, values)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_shared_memory(order: str) -> None:
    expected = IN[63::-1] + IN[:63:-1]
    assert probe("reverse<true>", IN, order)[:128] == expected


def test_a_missing_barrier_shows_in_some_order() -> None:
    expected = IN[63::-1] + IN[:63:-1]
    results = [probe("reverse<false>", IN, order)[:128] for order in ORDERS]
    assert all(result != expected for result in results[:2])


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(order: str) -> None:
    values = [3 * i % 17 for i in range(64)]
    found = probe("warp_exchanges", values, order)
    for thread in range(64):
        warp = values[thread // 32 * 32 :][:32]
        assert found[thread] == sum(warp)
        ballot = sum((value % 2) << lane for lane, value in enumerate(warp))
        assert found[64 + thread] % 2**32 == ballot
        assert found[128 + thread] == warp[5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_thread_leaves", "waits at a barrier of its block that other threads never reach"),
        ("half_a_warp_shuffles", "waits at a barrier of its warp that other threads never reach"),
        ("writes_beyond_shared", "a write 0 bytes beyond dynamic shared memory"),
        ("loads_unaligned", "access to 16 bytes at an address that is .* beyond a multiple"),
    ],
)
def test_mistakes_are_found(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name} of 2x1x1 blocks of 64 threads: .*{message}"):
        probe(name, IN)


def test_a_launch_that_fails_names_kernel_and_shape() -> None:
    """And leaves no error behind, which the next launch would find."""
    check = cuda_emulation.module().check_launch
    assert check(False) == 0
    message = (
        r"^cut_patches<float> could not be launched in 7 blocks of 256 threads: "
        r"invalid configuration argument$"
    )
    with pytest.raises(RuntimeError, match=message):
        check(True)


@pytest.mark.parametrize(("begin", "thread"), [(0, None), (1, 63), (16, 48), (-1024, 0)])
@pytest.mark.parametrize("writes", [False, True])
def test_access_beyond_a_tensor_is_found(writes: bool, begin: int, thread: int | None) -> None:
    """The words from ``begin`` on of 64: all there, one and 16 too many, and a page too early."""
    inside, tensor = (guarded_bytes(256).view(torch.int32) for _ in range(2))
    addresses = [inside.data_ptr(), tensor.data_ptr() + 4 * begin]
    copy = cuda_emulation.module().copy_words
    if thread is None:
        inside.copy_(torch.arange(64))
        copy(*addresses)
        assert torch.equal(tensor, inside)
        return
    message = f"copy_each of 1x1x1 blocks of 64 threads: thread {thread} accesses memory beyond"
    with cuda_emulation.active(), pytest.raises(RuntimeError, match=message):
        copy(*(addresses if writes else addresses[::-1]))


def test_kernels_get_guarded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points and results of the conformance suite: one row more than there is would be found."""
    (emulated,) = (v for v in variants("triplet_distances") if v.device == "emulated_cuda")
    points, words = [torch.randn(40, 16) for _ in range(3)], set()

    def forward(addresses: tuple[int, ...], *rest: Any) -> None:
        (distances, _), rows = rest[-2:], 40
        for address, size in [*((a, 64 * rows) for a in addresses), (distances[0], 4 * rows)]:
            words.add((address + size) % PAGE)

    with active(emulated):
        module = native.devices.kernels(points[0])
        monkeypatch.setattr(module, "triplet_distances_forward", forward)
        fc.triplet_distances(*points, backend="native")
    assert words == {0}


def test_copies_arrive_when_they_are_waited_for() -> None:
    """Where two groups may stay under way, nothing has arrived; the second half closed only one."""
    numbers = [0 if i == 5 else value for i, value in enumerate(IN[:64])]
    nothing = [-1] * 64  # NaN, as a float
    for pending, arrived in ((0, 64), (1, 32), (2, 0)):
        found = probe(f"copies_asynchronously<{pending}>", IN)[:64]
        assert found == numbers[:arrived] + nothing[arrived:]


@pytest.mark.parametrize(("name", "depth"), [("multiplies<true>", 8), ("multiplies<false>", 16)])
def test_products_of_a_warp(name: str, depth: int) -> None:
    """The PTX ISA's layout of sums: lane 4 g + t has (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)."""
    for k, n in ((0, 0), (1, 2), (depth - 1, 7), (depth // 2, 5)):
        found = probe(name, [k, n] + [0] * 126)[:128]
        for lane in range(32):
            for i in range(4):
                row, column = lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2
                expected = 0.5 + (16 * row + k if column == n else 0)
                assert found[4 * lane + i] == 2 * expected, (k, n, lane, i)


def test_transposed_matrices() -> None:
    found = probe("loads_transposed", IN)[:128]
    for lane in range(32):
        for m in range(4):
            low, high = (64 * m + 8 * (lane % 4 * 2 + i) + lane // 4 for i in range(2))
            assert found[4 * lane + m] == high << 16 | low


def test_division_by_multiplication() -> None:
    top = 2**31 - 1
    random = torch.randint(1, top, (200,)).tolist()
    for d in (1, 2, 3, 7, 64, 65, 2**16 - 1, 2**16, 2**30 + 1, top, *random[:20]):
        for n in (0, 1, d - 1, d, d + 1, 7 * d - 1, top, *random):
            if n <= top:
                assert cuda_emulation.module().quotient(n, d) == n // d, (n, d)


def triplet_results() -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    for dtype, dim in ((torch.float32, 33), (torch.bfloat16, 64), (torch.float64, 2)):
        points = [torch.randn(9, dim).to(dtype).requires_grad_() for _ in range(3)]
        found = fc.triplet_distances(*points, between=True, backend="native")
        distances = [distance for distance in found if distance is not None]
        results += [*distances, *torch.autograd.grad(distances, points, [d * d for d in distances])]
    return results


def patch_results() -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    for shape in ((2, 3, 9, 20), (1, 70, 6, 5)):
        images = torch.randn(shape, requires_grad=True)
        patches = fc.random_patches(images, 3, (5, 4), hflip=0.5, vflip=0.5, mean=[0.5] * shape[1],
                                    std=0.5, seed=3, backend="native")  # fmt: skip
        (grad,) = torch.autograd.grad(patches.data.square().sum(), images)
        results += [patches.data.detach(), patches.coords, patches.flips, grad]
        patches = fc.random_patches(images, 3, (5, 4), scale=(0.1, 0.4), max_iou=0.6, padding=2,
                                    padding_mode="edge", seed=3, backend="native")  # fmt: skip
        (grad,) = torch.autograd.grad(patches.data.square().sum(), images)
        results += [patches.data.detach(), patches.coords, grad]
    return results


# Options of random_patches, and launches forward and backward.
CALLS: dict[str, tuple[dict[str, Any], int, int]] = {
    "boxes": ({}, 1, 1),
    "random sizes": (dict(scale=(0.2, 0.9)), 1, 2),
    "padding": (dict(padding=2, padding_mode="reflect"), 1, 2),
    "a grid": (dict(grid=(2, 2)), 1, 1),
    "apart": (dict(max_iou=0.3), 2, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_patches_are_drawn_and_cut_in_two_launches_at_most(call: str) -> None:
    """And are those of the CPU."""
    wish, forward, backward = CALLS[call]
    images = torch.randn(3, 2, 30, 33, requires_grad=True)
    options: dict[str, Any] = dict(
        num_patches=4, size=8, hflip=0.5, vflip=0.25, mean=[0.1, 0.2], std=0.5, seed=5
    )
    options |= wish
    truth = fc.random_patches(images, **options, backend="native")
    (exact,) = torch.autograd.grad(truth.data.square().sum(), images)
    with cuda_emulation.active():
        cuda_emulation.module().launches()
        found = fc.random_patches(images, **options, backend="native")
        assert cuda_emulation.module().launches() == forward
        (grad,) = torch.autograd.grad(found.data.square().sum(), images)
        assert cuda_emulation.module().launches() == backward
    assert torch.equal(found.coords, truth.coords)
    assert torch.equal(found.flips, truth.flips)
    # A few roundings of values up to 10 in float32, and their sums.
    torch.testing.assert_close(found.data, truth.data, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("own_numbers", "forward", "backward"), [(True, 4, 4), (False, 1, 1)])
def test_many_channels_and_images_by_index(own_numbers: bool, forward: int, backward: int) -> None:
    """The limit that docs/patches.md states: a launch for each 64 channels with their own numbers.

    Images by index take no launch more, but torch's sort of the index backward.
    """
    images = torch.randn(3, 200, 9, 10, requires_grad=True)
    std = [0.5 + 0.01 * c for c in range(200)] if own_numbers else 0.5
    options: dict[str, Any] = dict(
        num_patches=2, size=4, index=torch.tensor([2, 0, 2, 2]), mean=0.1, std=std, seed=5
    )
    results = []
    for where in (nullcontext(), cuda_emulation.active()):
        with where:
            cuda_emulation.module().launches()
            data = fc.random_patches(images, **options, backend="native").data
            made = [cuda_emulation.module().launches()]
            (grad,) = torch.autograd.grad(data.square().sum(), images)
            results.append([data, grad])
            made.append(cuda_emulation.module().launches())
    assert made == [forward, backward]
    for found, true in zip(results[1], results[0], strict=True):
        # A few roundings of values up to 10 in float32, and sums of six of them.
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [None, (0.05, 1.0)])
def test_a_million_draws_are_those_of_the_cpu(scale: tuple[float, float] | None) -> None:
    """Integers decide; in the kernels that cut, for fewer, where a block draws each."""
    ids = torch.arange(8000) * 137438953
    how: dict[str, Any] = dict(scale=scale, hflip=0.5, vflip=0.25, seed=2**64 - 7, step=2**47 + 5)
    truth = fc.sample_coords(8000, 125, (480, 641), 32, sample_ids=ids, backend="native", **how)
    with cuda_emulation.active():
        found = fc.sample_coords(8000, 125, (480, 641), 32, sample_ids=ids, backend="native", **how)
    assert torch.equal(found[0], truth[0])
    assert torch.equal(found[1], truth[1])
    image, first = torch.zeros(1, 1, 480, 641, dtype=torch.uint8), torch.zeros(400).long()
    options = how | {"interpolation": "nearest", "index": first}
    cut = [truth_or_found(image, ids[:400], options, emulated) for emulated in (False, True)]
    assert torch.equal(cut[0].coords, cut[1].coords)
    assert torch.equal(cut[0].flips, cut[1].flips)


def truth_or_found(image: Tensor, ids: Tensor, options: dict, emulated: bool) -> fc.Patches:
    with cuda_emulation.active() if emulated else nullcontext():
        return fc.random_patches(image, 9, 1, sample_ids=ids, **options, backend="native")


def test_a_patch_without_a_place_is_reported_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a GPU has not finished by the time that its call returns."""
    from fastcontrast.backends.native import extract_patches as patch_kernels

    how: dict[str, Any] = dict(image_size=(40, 48), size=20, max_iou=0, seed=0, backend="native")
    monkeypatch.setattr(patch_kernels, "_taken", lambda word, num_patches: -1)
    with cuda_emulation.active():
        coords, flips = fc.sample_coords(4, 9, **how)
        message = r"patch \d of image \d of an earlier call on cpu found no place"
        with pytest.raises(ValueError, match=message):
            fc.sample_coords(4, 1, **how)
        fc.sample_coords(4, 1, **how)  # once is enough
    lost = flips >= patch_kernels.NO_PLACE
    iou = fc.Patches(torch.empty(0), coords, flips).overlap().tril(-1)
    assert torch.equal(iou.amax(-1) > 0, lost)
    assert bool(lost.any(1).all())


def nearest_results() -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    ids = dict(keep="different", row_ids=torch.arange(70) % 3, column_ids=torch.arange(1100) % 5)
    cases: list[tuple[torch.dtype, int, int, dict[str, Any]]] = [
        (torch.float32, 9, 5, {"exclude": torch.arange(70)}),
        (torch.bfloat16, 2, 40, {"metric": "cosine", **ids}),  # ties, by direct differences
        (torch.float64, 3, 300, {"metric": "dot", "farthest": True}),  # two searches
    ]
    for dtype, dim, k, options in cases:
        x, y = torch.randn(70, dim).to(dtype), torch.randn(1100, dim).to(dtype)
        results += fc.nearest(x, y, k, backend="native", **options)
        results += fc.nearest(x[:5], y, k, backend="native", metric="sqeuclidean")
    return results


def test_the_step_is_read_from_memory() -> None:
    """A captured graph reads it when it is replayed, so that new boxes are drawn."""
    truth = fc.sample_coords(2, 3, (30, 31), 7, hflip=0.5, seed=-5, step=2**40 + 3)
    later = fc.sample_coords(2, 3, (30, 31), 7, hflip=0.5, seed=-5, step=2**40 + 4)
    draws = Draws(
        seed=0, step=0, first_patch=0, image_size=(30, 31), size=(7, 7), thresholds=(2**31, 0),
        padding=(0, 0), grid=(1, 1), area=(0, 0), factors=None, limits=(0, 0, 0), min_distance=0,
        max_iou=-1,
    )  # fmt: skip
    for patched in (nullcontext(), cuda_emulation.active()):  # the CPU's entry takes a key as well
        coords = torch.zeros(2, 3, 4, dtype=torch.int32)
        flips = torch.zeros(2, 3, dtype=torch.uint8)
        key = torch.tensor([-5, 2**40 + 3])
        images, pixels = torch.zeros(2, 1, 30, 31), Pixels([], [], "none", False, "error", [])
        with patched:
            native.sample_coords(coords, flips, None, key, draws)
            assert torch.equal(coords, truth[0])
            assert torch.equal(flips, truth[1])
            key.copy_(torch.tensor([-5, 2**40 + 4]))
            out = torch.empty(2, 3, 1, 7, 7)
            native.random_patches_forward(
                images, coords, flips, None, key, draws, None, pixels, out
            )
        assert torch.equal(coords, later[0])
        assert torch.equal(flips, later[1])


def test_patches_in_any_layout_of_the_output() -> None:
    """Channels last among them: the kernels write to the strides that they are given."""
    images = torch.randint(0, 256, (2, 4, 9, 20), dtype=torch.uint8)
    coords, flips = fc.sample_coords(2, 3, (9, 20), (4, 8), hflip=0.5, seed=1)
    pixels = Pixels([0.5, 1.0, 2.0, 4.0], [1.0], "none", False, "error", [])
    truth = torch.empty(2, 3, 4, 4, 8)
    native.extract_patches_forward(images, coords, flips, None, pixels, truth)
    for order in itertools.permutations((0, 1, 2)):
        shape = [(4, 4, 8)[axis] for axis in order]
        inverse = [2 + order.index(axis) for axis in range(3)]
        out = torch.full((2, 3, *shape), torch.nan).permute(0, 1, *inverse)
        assert out.shape == truth.shape
        with cuda_emulation.active():
            native.extract_patches_forward(images, coords, flips, None, pixels, out)
        assert torch.equal(out, truth)


def test_copies_of_storages_keep_layouts_and_bring_results_back() -> None:
    """What on_cuda.py does, from CPU to CPU."""
    parent = torch.arange(40.0).view(5, 8)
    views = (parent[1:4, 2::2], parent[0].expand(3, 8), torch.ones(2))
    copies = on_cuda.Copies("cpu")
    found = [copies.of(view) for view in views]
    for copy, view in zip(found, views, strict=True):
        assert copy.stride() == view.stride()
        assert torch.equal(copy, view)
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    found[0].fill_(-1)  # a kernel writes
    assert float(parent[1, 2]) == 10
    copies.write_back()
    assert torch.equal(parent[1:4, 2::2], -torch.ones(3, 3))
    assert float(parent[1, 3]) == 11


@pytest.mark.parametrize("results", [triplet_results, patch_results, nearest_results])
def test_results_do_not_depend_on_the_order_of_threads(results: Callable[[], list]) -> None:
    rows = []
    for order in ORDERS.values():
        with cuda_emulation.active(order):
            rows.append(results())
    for row in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], row, strict=True))


def test_unaligned_points_take_the_kernel_for_single_elements() -> None:
    """One element off 16 bytes, or rows that are: the checks of the emulation would raise."""
    memory = torch.randn(3, 8 * 20 + 1)
    with cuda_emulation.active():
        for begin, width in ((0, 16), (1, 16), (0, 18)):
            points = [m[begin : begin + 8 * width].view(8, width)[:, :16] for m in memory]
            found = fc.triplet_distances(*points, backend="native")
            truth = torch.linalg.vector_norm(points[0].double() - points[1].double(), dim=1)
            # 16 squares and a root in float32, at the worst in one direction.
            torch.testing.assert_close(found.positive, truth.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real,90-real,100-real,100-virtual", (8, 0), True),
        ("80-real,90-real,100-real,100-virtual", (8, 6), True),  # machine code of sm_80
        ("80-real,90-real,100-real,100-virtual", (7, 5), False),
        ("80-real,90-real,100-real,100-virtual", (12, 0), True),  # PTX of sm_100
        ("80-real,90-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("90a-real,90a-virtual", (9, 0), True),
        ("90a-real,90a-virtual", (10, 0), False),
        ("100f-real", (10, 3), True),
    ],
)
def test_which_gpus_a_build_runs_on(
    architectures: str, capability: tuple[int, int], runs: bool
) -> None:
    assert native.devices.runs_on(architectures, capability) == runs
