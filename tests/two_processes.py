"""Losses that gather the batches of all processes, run by two: ours, and the libraries' own.

Each process writes what it found to a file, which ``test_compat_gathered.py`` reads. A module of
its own, because the processes import it anew.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.compat import grad_cache, lightly, open_clip

WORLD, ROWS, DIM = 2, 5, 4
SECONDS = 60  # the processes get this long; alone they take four
OPEN_CLIP = {
    f"open_clip {'local' if local else 'all'}, {'gradients' if gradients else 'constants'}": {
        "local_loss": local, "gather_with_grad": gradients, "world_size": WORLD,
    }
    for local in (False, True) for gradients in (False, True)
}  # fmt: skip
LIGHTLY: dict[str, dict[str, Any]] = {
    "lightly gathers": {"gather_distributed": True},
    "lightly does not gather": {"gather_distributed": False},
    "lightly bank": {"gather_distributed": True, "memory_bank_size": (3 * ROWS, DIM)},
}
CASES = (*OPEN_CLIP, *LIGHTLY, "grad_cache", "sentence_transformers")


def batch(rank: int) -> list[Tensor]:
    """Two views [ROWS, DIM] of one process, of length 1, float64."""
    generator = torch.Generator().manual_seed(rank)
    views = torch.randn(2, ROWS, DIM, dtype=torch.float64, generator=generator)
    return list(F.normalize(views, dim=2))


def together() -> list[Tensor]:
    """Both views of all processes [WORLD · ROWS, DIM]."""
    return [torch.cat(parts) for parts in zip(*map(batch, range(WORLD)), strict=True)]


def dense_on_all(x: Tensor, y: Tensor) -> Tensor:
    """GradCache's distributed loss: every row, but gradients to this process's alone."""
    rank = dist.get_rank()
    x, y = (
        torch.cat([own if r == rank else batch(r)[k] for r in range(WORLD)])
        for k, own in enumerate((x, y))
    )
    return F.cross_entropy(x @ y.T, torch.arange(len(x)))


def _open_clip(ours: bool, options: dict[str, Any]) -> Callable[..., Tensor]:
    module = open_clip if ours else peers.open_clip_loss()
    loss = module.ClipLoss(rank=dist.get_rank(), **options)
    return lambda x, y: loss(x, y, torch.tensor(5.0, dtype=torch.float64))


def _lightly(ours: bool, options: dict[str, Any]) -> Callable[..., Tensor]:
    loss = (lightly if ours else peers.lightly_loss()).NTXentLoss(temperature=0.3, **options)
    if "memory_bank_size" not in options:
        return loss
    generator = torch.Generator().manual_seed(7)
    loss.memory_bank.bank = F.normalize(torch.randn(3 * ROWS, DIM, generator=generator)).double()

    def twice(x: Tensor, y: Tensor) -> Tensor:
        """The second call contrasts with the first one's keys, of all processes."""
        loss(x, y)
        return loss(x, y)

    return twice


def _sentence_transformers(ours: bool) -> Callable[..., Tensor]:
    theirs = peers.peer("sentence_transformers.sentence_transformer").losses
    if ours:
        from fastcontrast.compat import sentence_transformers as theirs
    loss = theirs.MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True)
    return lambda x, y: loss.compute_loss_from_embeddings([x, y], torch.empty(0))


def implementation(name: str, *, ours: bool) -> Callable[..., Tensor]:
    """The loss of two views of a case; skips without its library."""
    if name in OPEN_CLIP:
        return _open_clip(ours, OPEN_CLIP[name])
    if name in LIGHTLY:
        return _lightly(ours, LIGHTLY[name])
    if name == "grad_cache":
        return grad_cache.DistributedContrastiveLoss() if ours else dense_on_all
    return _sentence_transformers(ours)


def found_by(name: str, *, ours: bool) -> list[Tensor] | str:
    """Loss and gradients of both views, or why there are none."""
    try:
        loss = implementation(name, ours=ours)
    except pytest.skip.Exception as reason:
        return str(reason)
    views = [view.requires_grad_() for view in batch(dist.get_rank())]
    value = loss(*views)
    return [value.detach(), *torch.autograd.grad(value, views)]


def refusal() -> str:
    """What a second differentiation of a gathered batch says."""
    views = [view.requires_grad_() for view in batch(dist.get_rank())]
    loss = lightly.NTXentLoss(gather_distributed=True)(*views)
    try:
        torch.autograd.grad(loss, views, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    """Run every case in a process group and write the results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        found = {
            (name, ours): found_by(name, ours=ours) for name in CASES for ours in (True, False)
        }
        found["refusal", True] = refusal()
        torch.save(found, Path(folder) / f"found_by_{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(folder: Path) -> list[dict]:
    """What each process found, by (case, ours or not)."""
    context: Any = torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD, join=False)
    end = time.monotonic() + SECONDS + 30
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"two processes took more than {SECONDS + 30} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"found_by_{rank}.pt") for rank in range(WORLD)]
