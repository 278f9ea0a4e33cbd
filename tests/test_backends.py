"""The backend table: choice, reasons, and the doctor's report."""

from __future__ import annotations

import importlib
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from variants import variants

import fastcontrast
from fastcontrast import backends, doctor
from fastcontrast.backends import native, triton
from fastcontrast.doctor import report


def test_the_fastest_that_can_run_is_taken() -> None:
    can = [
        b
        for b in backends.BACKENDS
        if backends.why_not(b, "distance_softmax", torch.empty(0)) is None
    ]
    assert fastcontrast.available_backends() == tuple(can)
    assert backends.resolve("distance_softmax", torch.empty(0)) == can[0]
    assert can[-1] == "reference"


def test_a_named_backend_runs_or_says_why_not() -> None:
    meta = torch.empty(0, device="meta")
    reason = backends.why_not("native", "distance_softmax", meta)
    assert reason is not None
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run distance_softmax here: "):
        backends.resolve("distance_softmax", meta, "native")
    assert backends.resolve("distance_softmax", meta) == "reference"
    with pytest.raises(
        ValueError, match="backend must be None or one of native, triton, reference, got 'cpp'"
    ):
        backends.resolve("distance_softmax", meta, "cpp")
    with pytest.raises(ValueError, match="op must be one of distance_softmax, extract_patches"):
        fastcontrast.available_backends("distances")


def test_interpreted_kernels_run_only_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "why_not", lambda op, tensor: None)
    monkeypatch.setattr(native, "why_not", lambda op, tensor: "not built")
    assert backends.resolve("distance_softmax", torch.empty(0)) == "reference"
    assert backends.resolve("distance_softmax", torch.empty(0), "triton") == "triton"
    meta = torch.empty(0, device="meta")  # stands for any device that is not a CPU
    assert backends.resolve("distance_softmax", meta) == "triton"


@pytest.mark.parametrize(
    ("interpreted", "device", "reason"),
    [
        (False, "cpu", "Triton kernels run on CUDA tensors, got a cpu tensor"),
        (True, "meta", "TRITON_INTERPRET=1 runs kernels on CPU tensors, got a meta one"),
        (True, "cpu", None),
    ],
)
def test_triton_says_why_not(
    interpreted: bool, device: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "IMPORT_PROBLEM", None)
    monkeypatch.setattr(triton, "INTERPRETED", interpreted)
    monkeypatch.setattr(triton, "DTYPES", {"distance_softmax": (torch.float32,)})
    found = triton.why_not("distance_softmax", torch.empty(0, device=device))
    assert str(found).startswith(str(reason))
    assert (
        triton.why_not("extract_patches", torch.empty(0)) == "extract_patches has no Triton kernel"
    )
    integers = torch.empty(0, dtype=torch.int8, device=device)
    assert "no Triton kernel for torch.int8" in str(triton.why_not("distance_softmax", integers))
    monkeypatch.setattr(triton, "IMPORT_PROBLEM", "triton is not installed")
    assert triton.why_not("distance_softmax", torch.empty(0)) == "triton is not installed"
    assert "Triton\n  not available: triton is not installed" in report()


def test_why_a_cuda_tensor_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.IMPORT_PROBLEM is not None:
        pytest.skip(native.IMPORT_PROBLEM)
    with FakeTensorMode():
        tensor = torch.empty(3, device="cuda")
    monkeypatch.setattr(native.devices, "BUILD_PROBLEM", "built without CUDA kernels")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    native.devices._architecture_problem.cache_clear()

    def reason(op: str, x: Tensor = tensor) -> str | None:
        return backends.why_not("native", op, x)

    monkeypatch.delitem(native.CUDA_DTYPES, "distance_softmax")
    assert reason("distance_softmax") == (
        "distance_softmax has a C++ kernel for CPU tensors only, got a cuda tensor"
    )
    assert reason("triplet_distances") == "built without CUDA kernels"
    monkeypatch.setattr(native.devices, "BUILD_PROBLEM", None)
    monkeypatch.setattr(native.devices, "ARCHITECTURES", "90-real,90-virtual")
    assert 'this GPU is sm_86; reinstall fastcontrast with TORCH_CUDA_ARCH_LIST="8.6"' in str(
        reason("triplet_distances")
    )
    native.devices._architecture_problem.cache_clear()
    monkeypatch.setattr(native.devices, "ARCHITECTURES", "80-real")
    assert reason("triplet_distances") is None
    with FakeTensorMode():
        integers = torch.empty(3, device="cuda", dtype=torch.int32)
    assert reason("extract_patches", integers) == (
        "extract_patches has no CUDA kernel for torch.int32"
    )
    native.devices._architecture_problem.cache_clear()


def test_large_problems_on_cuda_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(native, "why_not", lambda op, tensor: None)
    monkeypatch.setattr(triton, "why_not", lambda op, tensor: None)

    def chosen(m: int, n: int, op: str = "distance_softmax", **how: Any) -> str:
        dtype = how.pop("dtype", torch.float32)
        with FakeTensorMode():
            x, y = (torch.empty(size, 128, dtype=dtype, device="cuda") for size in (m, n))
        return backends.resolve(op, x, others=y, **how)

    assert chosen(1024, 2048) == "native"  # 2^28 with 2^7 dimensions
    assert chosen(1025, 2048) == "triton"
    assert chosen(1 << 20, 16) == "native"
    assert chosen(1 << 20, 1 << 20, "triplet_distances") == "native"
    assert chosen(1 << 20, 1 << 20, backend="native") == "native"
    rounded: tuple[dict[str, Any], ...] = ({"dtype": torch.bfloat16}, {"precision": "tf32"})
    for how in rounded:
        assert chosen(4096, 8192, **how) == "native"
        assert chosen(4097, 8192, **how) == "triton"
    assert chosen(1025, 2048, precision="auto") == "triton"
    assert chosen(1025, 2048, dtype=torch.float64, precision="tf32") == "triton"
    assert chosen(2048, 4096, "nearest") == "native"
    assert chosen(2049, 4096, "nearest") == "triton"
    capturing[0] = True  # Triton's search waits for the device
    assert chosen(1 << 20, 1 << 20, "nearest") == "native"
    assert chosen(1 << 20, 1 << 20) == "triton"
    capturing[0] = False
    cpu = torch.empty(1, 1).expand(1 << 20, 128)
    assert backends.resolve("distance_softmax", cpu, others=cpu) == "native"
    monkeypatch.setattr(triton, "why_not", lambda op, tensor: "not installed")
    assert chosen(1025, 2048) == "native"


def test_every_pairwise_call_brings_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and precision, once "auto" is known: what the choice is made by."""
    seen: list[tuple[str, int | None, str]] = []
    resolve = backends.resolve

    def spied(op: str, tensor: Tensor, backend: str | None = None, **how: Any) -> str:
        others = how.get("others")
        seen.append((op, None if others is None else others.shape[0], how.get("precision", "")))
        return resolve(op, tensor, backend, **how)

    monkeypatch.setattr(backends, "resolve", spied)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2)
    fastcontrast.distance_softmax(x, y, precision="auto")
    fastcontrast.info_nce_loss(x, y, precision="auto")
    fastcontrast.nearest(x, y, 1)
    assert seen == [
        ("distance_softmax", 5, "tf32"), ("distance_softmax", 5, "tf32"), ("nearest", 5, ""),
    ]  # fmt: skip


def test_the_report_says_where_triton_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "why_not", lambda op, tensor: None)
    monkeypatch.setattr(triton, "why_not", lambda op, tensor: None)
    with FakeTensorMode():
        lines = list(doctor._backends())
    assert [line for line in lines if line.startswith("  by size: triton beyond M·N·D = 2^")] == [
        "  by size: triton beyond M·N·D = 2^28 (2^32 of half points or with rounded products), "
        "but for up to 16 columns",
        "  by size: triton beyond M·N·D = 2^30, but for graphs and compiled code",
    ]
    assert "  by size" in lines[lines.index("nearest on cuda: native") + 1]


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU; going back to it in C++ would make a context there."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    entry = lambda tensor: list(current)  # noqa: E731
    monkeypatch.setattr(backends.BACKENDS["reference"], "nearest_columns", entry)
    with FakeTensorMode():
        tensors = [torch.empty(3, device=name) for name in ("cpu", "cuda:0", "cuda:1")]
    found = [backends.run("reference", "nearest_columns", tensor) for tensor in tensors]
    assert found == [[0], [0], [0, 1]]
    assert current == [0]


def test_an_error_in_a_backend_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fall-back on an exception: the user would get another result's speed without a word."""

    def broken(*_: object) -> None:
        raise RuntimeError("kernel failed")

    first = backends.resolve("distance_softmax", torch.empty(0))
    monkeypatch.setattr(backends.BACKENDS[first], "distance_softmax_forward", broken)
    with pytest.raises(RuntimeError, match="kernel failed"):
        fastcontrast.info_nce_loss(torch.randn(3, 2), torch.randn(3, 2))


def test_a_missing_native_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "IMPORT_PROBLEM", "fastcontrast._C is not built (no compiler)")
    monkeypatch.setattr(native, "_C", None)
    assert fastcontrast.available_backends() == ("reference",)
    loss = fastcontrast.info_nce_loss(torch.zeros(2, 2), torch.zeros(2, 2))
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    text = report()
    assert "fastcontrast._C is not built (no compiler)" in text
    assert "distance_softmax on cpu: reference" in text


def test_every_entry_exists_in_every_backend() -> None:
    entries = {
        "distance_softmax": (
            "distance_softmax_forward", "distance_softmax_backward", "softmax_loss",
        ),
        "extract_patches": (
            "sample_coords", "first_invalid_box", "extract_patches_forward",
            "extract_patches_backward",
        ),
        "nearest": ("nearest_columns",),
        "triplet_distances": (
            "triplet_distances_forward", "triplet_distances_backward",
            "triplet_difference_forward", "triplet_difference_backward",
        ),
    }  # fmt: skip
    assert tuple(entries) == backends.OPS
    for op, functions in entries.items():
        for name, module in backends.BACKENDS.items():
            if backends.why_not(name, op, torch.empty(0)) is None:
                assert all(callable(getattr(module, f)) for f in functions), (name, op)
    # One that a backend may have: it draws and cuts at once.
    for name in ("native", "triton"):
        if backends.why_not(name, "extract_patches", torch.empty(0)) is None:
            assert backends.has(name, "random_patches_forward")


def test_the_tests_cover_every_backend() -> None:
    for op in backends.OPS:
        assert {v.backend for v in variants(op)} == set(backends.BACKENDS)


def test_the_report_names_what_runs() -> None:
    text = report()
    assert f"torch        {torch.__version__}" in text
    for op in backends.OPS:
        runs = backends.resolve(op, torch.empty(0))
        assert f"{op} on cpu: {runs}" in text


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
def test_an_instruction_set_that_is_missing_is_refused() -> None:
    module = importlib.import_module("fastcontrast._C")
    with pytest.raises(ValueError, match="'sse9' is none of portable, avx2, avx512"):
        module.set_active_isa("sse9")
    assert module.active_isa() == native.build_info()["detected_isa"]


@pytest.mark.skipif(native.IMPORT_PROBLEM is not None, reason=str(native.IMPORT_PROBLEM))
def test_forked_workers_compute_the_same() -> None:
    """As in a DataLoader: the parent has started its threads, the child must not wait for them."""
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    expected = fastcontrast.distance_softmax(x, x, backend="native").lse
    received, sent = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)  # as DataLoader does; OpenMP's threads do not survive a fork
        sent.send(fastcontrast.distance_softmax(x, x, backend="native").lse.tolist())

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        assert received.poll(60), "the forked process hangs"
        assert received.recv() == expected.tolist()
    finally:
        process.kill()
        process.join()
