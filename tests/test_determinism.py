"""Rule 6 of docs/design.md section 3: bit-equal runs, and passes, at any number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import on_every_backend

from fastcontrast import distance_softmax, info_nce_loss
from fastcontrast.backends import native

every_backend = on_every_backend("distance_softmax")


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_two_runs_and_thread_counts_are_bit_equal(
    metric: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.randn(700, 33), torch.randn(2500, 33)
    y[:300] = x[:300] + 1e-3 * torch.randn(300, 33)  # near pairs have a path of their own

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        r = distance_softmax(a, b, metric=metric, backend=backend)
        return [r.lse, r.entropy, *torch.autograd.grad((r.lse + 0.3 * r.entropy).sum(), (a, b))]

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            for a, b in zip(run(count), run(count), strict=True):
                assert torch.equal(a, b)
        if backend == "reference":  # PyTorch's own reductions do not promise more
            return
        products_on_one_thread(monkeypatch)
        for a, b in zip(run(1), run(2), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def products_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's products on one thread: MKL's bits depend on the number, on Intel's processors.

    What is left are the passes of the native kernels, which do not.
    """
    if native.IMPORT_PROBLEM is not None:
        return
    products = importlib.import_module("fastcontrast.backends.native.products").Products
    for name in ("scores", "add_gradients"):
        given = getattr(products, name)

        def alone(*args: Any, given: Callable[..., None] = given, **kwargs: Any) -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            given(*args, **kwargs)
            torch.set_num_threads(threads)

        monkeypatch.setattr(products, name, alone)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2000, 7, 512), (7, 2000, 64), (300, 400, 20)])
def test_runs_are_bit_equal_without_deterministic_mode(
    shape: tuple[int, int, int], reduction: str, backend: str
) -> None:
    """As users run: torch's deterministic mode, which poisons memory here, also hides atomics."""
    torch.use_deterministic_algorithms(False)
    m, n, d = shape
    x, y, target = torch.randn(m, d), torch.randn(n, d), torch.randint(n, (m,))

    def run() -> list[Tensor]:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = info_nce_loss(a, b, target, reduction=reduction, backend=backend)
        return [loss, *torch.autograd.grad(loss.sum(), (a, b))]

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
