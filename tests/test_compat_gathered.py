"""The drop-ins that gather batches, in two processes: as their libraries, and as one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from two_processes import CASES, OPEN_CLIP, ROWS, WORLD, run, together

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
# float64 on both sides, sums of tens of terms.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, found: list[dict]) -> None:
    """Values and gradients on each process are the library's."""
    for rank in range(WORLD):
        ours, theirs = found[rank][name, True], found[rank][name, False]
        if isinstance(theirs, str):
            pytest.skip(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def clip(u: Tensor, v: Tensor) -> Tensor:
    s, target = 5 * u @ v.T, torch.arange(len(u))
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2


def nt_xent(u: Tensor, v: Tensor) -> Tensor:
    z = torch.cat([u, v])
    z = z / z.norm(dim=1, keepdim=True)
    s = (z @ z.T / 0.3).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(z)).roll(len(u)))


def nce(u: Tensor, v: Tensor) -> Tensor:
    return F.cross_entropy(u @ v.T, torch.arange(len(u)))


# How many times the gradient that one process would find each process hands to its rows. A mean
# over the processes, as DistributedDataParallel takes, divides it by their number.
SCALES = {
    "open_clip all, gradients": WORLD,
    "open_clip all, constants": 1,
    "open_clip local, gradients": WORLD,
    "lightly gathers": WORLD,
    "grad_cache": 1,
}


@pytest.mark.parametrize("name", SCALES)
def test_two_processes_are_one(name: str, found: list[dict]) -> None:
    """The mean of the losses, and the gradients of all rows, are those of one process."""
    loss = clip if name in OPEN_CLIP else nce if name == "grad_cache" else nt_xent
    views = [view.requires_grad_() for view in together()]
    value = loss(*views)
    truth = torch.autograd.grad(value, views)
    mine = [found[rank][name, True] for rank in range(WORLD)]
    mean = torch.stack([part[0] for part in mine]).mean()
    torch.testing.assert_close(mean, value, **EXACT)
    for k, gradient in enumerate(truth, start=1):
        rows = torch.cat([part[k] for part in mine])
        assert rows.shape == (WORLD * ROWS, gradient.shape[1])
        torch.testing.assert_close(rows / SCALES[name], gradient, **EXACT)


def test_gathered_batches_are_not_differentiated_twice(found: list[dict]) -> None:
    """A second derivative would need those of the other processes: none rather than a part."""
    for rank in range(WORLD):
        assert "cannot be differentiated twice" in found[rank]["refusal", True]
