"""What the Triton kernels load, store and compute under the interpreter, and the model of it.

Counted are elements: those that masks let through, and those that go into special functions and
products; around the kernels the operators of torch. tests/test_roofline.py has the other half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcontrast
from fastcontrast.backends import triton
from fastcontrast.backends.triton import launch as launches

if triton.IMPORT_PROBLEM is not None:
    pytest.skip(triton.IMPORT_PROBLEM, allow_module_level=True)

from benchmarks import pair_model, roofline, row_model
from benchmarks.gpu_model import DEVICES, Counts
from benchmarks.pair_model import Shape

pytestmark = pytest.mark.skipif(
    not triton.INTERPRETED, reason="counts what the interpreter does: TRITON_INTERPRET=1"
)
A100 = next(device for device in DEVICES if device.name == "A100")


class Tally(TorchDispatchMode):
    """What kernels do under the interpreter, and what torch does around them.

    Attributes:
        done: Elements of each kind of operation of all kernels, and bytes by the pointers' types.
        kernels: Launches.
        calls: Operators outside of kernels that are neither views nor allocations.
        products: Multiplications of torch's GEMMs.
        peak: Most bytes of tensors made here that lived at one time.
    """

    FREE = ("empty", "new_empty", "view", "slice", "select", "t", "transpose", "permute", "detach",
            "alias", "expand", "unsqueeze", "squeeze", "unbind", "split", "as_strided",
            "_unsafe_view", "promote_types", "lift_fresh", "scalar_tensor", "set_")  # fmt: skip

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime import interpreter

        self.done: Counter[str] = Counter()
        self.kernels = self.calls = self.live = self.peak = 0
        self.products, self.inside = 0.0, False
        builder: Any = interpreter.InterpreterBuilder
        for name, kind in (("exp2", "special"), ("sqrt", "special"), ("rsqrt", "special")):
            self._wrap(patch, builder, f"create_{name}", lambda a, k=kind: {k: a[0].data.size})
        self._wrap(patch, builder, "create_dot", lambda a: {
            "products": a[0].data.shape[-2] * a[0].data.shape[-1] * a[1].data.shape[-1]
        })  # fmt: skip
        self._wrap(patch, builder, "create_masked_load", lambda a: {
            f"load {a[0].get_element_ty()}": int(a[1].data.sum())
        })  # fmt: skip
        self._wrap(patch, builder, "create_masked_store", lambda a: {
            f"store {a[0].get_element_ty()}": int(a[2].data.sum())
        })  # fmt: skip
        launch = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **options: Any) -> Any:
            self.kernels, self.inside = self.kernels + 1, True
            try:
                return launch(executor, *args, **options)
            finally:
                self.inside = False

        patch.setattr(interpreter.GridExecutor, "__call__", counted)

    def _wrap(
        self,
        patch: pytest.MonkeyPatch,
        builder: Any,
        name: str,
        of: Callable[[Any], dict[str, int]],
    ) -> None:
        original = getattr(builder, name)

        def counted(own: Any, *args: Any) -> Any:
            self.done.update(of(args))
            return original(own, *args)

        patch.setattr(builder, name, counted)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if self.inside:
            return result
        self.calls += name not in self.FREE
        if name in ("mm", "addmm_"):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tally]:
    """Of kernels with the interpreter's sizes, which the model is told."""
    monkeypatch.setattr(pair_model, "launch", lambda *_, **__: launches.INTERPRETED)
    with Tally(monkeypatch) as counting:
        yield counting


def points(m: int, n: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Leaves far apart, so that no pair is near."""
    x, y = (4 * torch.randn(k, dim).to(dtype) for k in (m, n))
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_loss_does_what_the_model_counts(metric: str, symmetric: bool, tally: Tally) -> None:
    """Products, special functions and loaded operands, in whole tiles."""
    m, n, dim = 128 if symmetric else 192, 128, 32
    x, y = points(m, n, dim)
    fastcontrast.info_nce_loss(
        x, y, torch.arange(m) % n, metric=metric, symmetric=symmetric, temperature=4.0,
        backend="triton",
    ).backward()  # fmt: skip
    model = Counts()
    for part in pair_model.loss(Shape(m, n, dim, metric), A100, symmetric=symmetric):
        if part.name != "norms, positives, sums":
            model = model + part.counts
    assert tally.done["products"] == model["matrix"]
    # Once a row or tile there are a few more: new maxima, near limits, merging.
    special = model["special"]
    assert special <= tally.done["special"] <= 1.1 * special
    # Beside the model's: norms of both sides, positives twice and a gradient's owners once more.
    operands, sides = 2 * tally.done["load bf16"], 2.0 * dim * (m + n)
    assert model["cache"] <= operands <= model["cache"] + 8 * sides


@pytest.mark.parametrize(("symmetric", "gemms"), [(False, 3), (True, 5)])
def test_a_wide_loss_is_so_many_gemms(symmetric: bool, gemms: int, tally: Tally) -> None:
    x, y = points(24, 40, 272)
    fastcontrast.info_nce_loss(
        x, y, torch.arange(24), symmetric=symmetric, backend="triton"
    ).backward()
    found = pair_model.loss(Shape(24, 40, 272), A100, symmetric=symmetric)
    wanted = sum(f.counts.get("matrix", 0) for f in found)
    assert tally.products == wanted == gemms * 24 * 40 * 272


def test_calls_of_the_host(tally: Tally) -> None:
    """A quarter more or less: some operators of torch launch nothing, others twice."""

    def triplets() -> None:
        points_of = (*points(16, 16, 16), points(16, 16, 16)[0])
        fastcontrast.triplet_ratio_loss(*points_of, backend="triton").backward()

    jobs: dict[str, Callable[[], Any]] = {
        "triton": lambda: fastcontrast.info_nce_loss(
            *points(16, 16, 16), backend="triton"
        ).backward(),
        "nearest": lambda: fastcontrast.nearest(
            *(p.detach() for p in points(16, 16, 16)), 2, backend="triton"
        ),
        "triplets": triplets,
    }
    for name, job in jobs.items():
        before = tally.calls + tally.kernels
        job()
        made = tally.calls + tally.kernels - before
        assert 0.75 < made / roofline.CALLS[name] < 1.25, (name, made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_of_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's tracker, kernels left out: they allocate nothing."""
    from torch.distributed._tools.mem_tracker import MemTracker
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    m, n, dim, device = 1024, 1024, 256, torch.device("cpu")
    x, y = points(m, n, dim, dtype)
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    tracker = MemTracker()
    tracker.track_external(x, y)
    with tracker:
        before = tracker.get_tracker_snapshot()[device]["Total"]
        loss = fastcontrast.info_nce_loss(x, y, precision="tf32", backend="triton")
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[device]["Total"] - before
    # Half a percent: numbers, not rows.
    assert peak == pytest.approx(pair_model.peak_bytes(m, n, dim, dtype != torch.float32), rel=5e-3)


def test_triplets_and_patches_move_what_the_model_says(tally: Tally) -> None:
    a, p = points(64, 64, 48, torch.float32)
    fastcontrast.triplet_ratio_loss(
        a, p, (a + p).detach().requires_grad_(), backend="triton"
    ).backward()
    forward, _, backward = row_model.triplets(64, 48, 4)
    moved = 4 * (tally.done["load fp32"] + tally.done["store fp32"])
    assert moved == pytest.approx(forward.counts["memory"] + backward.counts["memory"], rel=0.02)

    tally.done.clear()
    job = row_model.Patches(3, 3, 24, 4, 8)
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    fastcontrast.random_patches(
        images, 4, 8, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0, backend="triton"
    )
    assert tally.done["load uint8"] == tally.done["store fp32"] == job.pixels

    tally.done.clear()
    floats = images.float().requires_grad_()
    coords = fastcontrast.sample_coords(3, 4, 24, 8, seed=0, backend="triton")[0]
    data = fastcontrast.extract_patches(floats, coords, 8, backend="triton")
    tally.done.clear()
    data.sum().backward()
    (back,) = row_model.patch_gradients(job, 4)
    moved = 4 * (tally.done["load fp32"] + tally.done["store fp32"])
    assert moved == back.counts["memory"] - 17 * 3 * 4
