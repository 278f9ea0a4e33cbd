"""Losses over two and three gloo ranks, against one process with the whole batch.

A spawn serves many checks, because starting a process costs seconds. The workers hold each other to
the timeout of their group, so that a failure of one ends the test.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastcontrast as fc
from fastcontrast.distributed import Ranks, gather

# Rows of each rank: uneven, with an empty one; and even ones, which need no comparing.
UNEVEN, EVEN = (5, 0, 3), (3, 3)
STATISTICS = ("lse", "entropy", "rank", "top1", "recall@2", "alignment", "uniformity")
# Gloo gives up when nothing has come for so long; far above what a busy machine takes to answer.
TIMEOUT = timedelta(seconds=60)


class Batch:
    """A batch of inputs, and what every rank holds: a network, a temperature, a queue."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(1112)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.inputs = {name: random(rows, 6) for name in ("a", "b", "hard")}
        self.weight = random(rows).square()
        self.labels = torch.randint(3, (rows,), generator=generator)
        self.network, self.anchors = random(6, 4), random(3, 6)
        self.log_temperature = torch.tensor(-0.3, dtype=torch.float64)
        self.queue = fc.MemoryQueue(4)
        self.queue.enqueue(random(4, 4), torch.tensor([0, 1, 2, 1]))


class Part:
    """The rows of a rank, as leaves, with the network's embeddings of them."""

    def __init__(self, batch: Batch, rows: slice, first_target: int) -> None:
        self.leaves = {
            name: value[rows].clone().requires_grad_() for name, value in batch.inputs.items()
        }
        self.network = batch.network.clone().requires_grad_()
        self.log_temperature = batch.log_temperature.clone().requires_grad_()
        self.a, self.b, self.hard = (value @ self.network for value in self.leaves.values())
        self.anchors = batch.anchors @ self.network
        self.temperature = self.log_temperature.exp()
        self.weight, self.labels, self.queue = batch.weight[rows], batch.labels[rows], batch.queue
        # Rows of a rank point to each other's keys; every fourth one pays nothing.
        count = self.a.shape[0]
        self.target = torch.arange(count).flip(0) + first_target
        self.target[3::4] = -100
        self.unlabelled = torch.where(torch.arange(count) % 2 == 0, self.labels, -1)


def targets_of_the_whole(counts: tuple[int, ...]) -> Tensor:
    parts = []
    for rank, count in enumerate(counts):
        target = torch.arange(count).flip(0) + sum(counts[:rank])
        target[3::4] = -100
        parts.append(target)
    return torch.cat(parts)


Loss = Callable[[Part, dict[str, Any]], Any]
CASES: dict[str, Loss] = {
    "info_nce": lambda p, o: fc.info_nce_loss(
        p.a, p.b, p.target, row_weight=p.weight, negatives=p.hard, temperature=p.temperature, **o
    ),
    "symmetric, queue": lambda p, o: fc.info_nce_loss(
        p.a, p.b, metric="cosine", symmetric=True, queue=p.queue, temperature=p.temperature, **o
    ),
    "sums": lambda p, o: fc.info_nce_loss(
        p.a, p.b, symmetric=True, reduction="sum", metric="sqeuclidean", **o
    ),
    "queue alone": lambda p, o: fc.info_nce_loss(
        p.a, p.b, in_batch=False, queue=p.queue, negatives=p.hard, **o
    ),
    "reweighted": lambda p, o: fc.info_nce_loss(
        p.a, p.b, symmetric=True, tau_plus=0.1, hardness=0.5, temperature=p.temperature, **o
    ),
    "figures": lambda p, o: fc.info_nce_loss(
        p.a, p.b, negatives=p.hard[:, None], label_smoothing=0.1, return_stats=STATISTICS, **o
    ),
    "figures by classes": lambda p, o: fc.nca_loss(
        p.a, p.labels, queue=p.queue, return_stats=STATISTICS, **o
    ),
    "nt_xent": lambda p, o: fc.nt_xent_loss(
        p.a, p.b, queue=p.queue, temperature=p.temperature, **o
    ),
    "clip": lambda p, o: fc.clip_loss(p.a, p.b, p.temperature, normalize=True, **o),
    "supcon": lambda p, o: fc.supcon_loss(p.a, p.labels, temperature=p.temperature, **o),
    "supcon, queue": lambda p, o: fc.supcon_loss(
        p.a, p.labels, queue=p.queue, form="in", reduction="sum", metric="l2", **o
    ),
    "nca": lambda p, o: fc.nca_loss(p.a, p.labels, p.b, p.labels, temperature=p.temperature, **o),
    "spatial": lambda p, o: fc.SpatialContrastingLoss(symmetric=True, **o)(p.a, p.b),
    "ranking": lambda p, o: fc.multiple_negatives_ranking_loss(p.a, p.b, p.hard, **o),
    "embedding": lambda p, o: fc.metric_embedding_loss(
        p.a, p.anchors, p.unlabelled, temperature=p.temperature, **o
    ),
}


def gradients(loss: Tensor, part: Part) -> dict[str, Tensor]:
    """Of the parameters, summed over ranks by the caller, and of the inputs, which are rows."""
    wanted = {"network": part.network, "temperature": part.log_temperature, **part.leaves}
    found = torch.autograd.grad(
        loss, list(wanted.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(wanted, found, strict=True))


def check_losses(rank: int, counts: tuple[int, ...], strategy: str, backend: str | None) -> None:
    """Value and every gradient, after the mean over ranks, are those of one process."""
    world, batch = len(counts), Batch(sum(counts))
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    even = min(counts) == max(counts)
    for name, function in CASES.items():
        whole = Part(batch, slice(None), 0)
        whole.target = targets_of_the_whole(counts)
        if name == "embedding":  # every other row of each rank
            whole.unlabelled = torch.cat(
                [Part(batch, slice(sum(counts[:r]), sum(counts[: r + 1])), 0).unlabelled
                 for r in range(world)]
            )  # fmt: skip
        part = Part(batch, rows, 0)
        truth = function(whole, {})
        mine = function(part, {"ranks": Ranks(strategy, even=even), "backend": backend})
        if name.startswith("figures"):
            check_figures(mine.stats, truth.stats, rows)
            truth, mine = truth.loss, mine.loss
        where = f"{name}, {strategy}, rank {rank} of {world}, {backend}"
        assert relative_error(mine, truth) < VALUE_FLOOR[torch.float64], where
        expected = gradients(truth, whole)
        for key, found in gradients(mine, part).items():
            if key in part.leaves:  # the mean divides it
                found, true = found / world, expected[key][rows]
            else:
                dist.all_reduce(found)
                found, true = found / world, expected[key]
            assert relative_error(found, true) < GRADIENT_FLOOR[torch.float64], f"{where}: {key}"


def check_figures(mine: fc.LossStatistics, truth: fc.LossStatistics, rows: slice) -> None:
    for name in ("lse", "entropy", "rank"):
        torch.testing.assert_close(getattr(mine, name), getattr(truth, name)[rows])
    for name in ("top1", "alignment", "uniformity"):
        torch.testing.assert_close(getattr(mine, name), getattr(truth, name))
    assert mine.recall is not None
    assert truth.recall is not None
    torch.testing.assert_close(mine.recall[2], truth.recall[2])


def check_rows(rank: int, counts: tuple[int, ...], strategy: str) -> None:
    """With reduction="none" a rank has its rows, and what it makes of them is summed over ranks."""
    batch = Batch(sum(counts))
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for symmetric in (False, True):
        whole, part = Part(batch, slice(None), 0), Part(batch, rows, 0)
        options = {"symmetric": symmetric, "reduction": "none"}
        truth = fc.info_nce_loss(whole.a, whole.b, **options)
        mine = fc.info_nce_loss(part.a, part.b, ranks=Ranks(strategy), **options)
        assert relative_error(mine, truth[rows]) < VALUE_FLOOR[torch.float64]
        (true,) = torch.autograd.grad((truth * batch.weight).sum(), whole.leaves["b"])
        (found,) = torch.autograd.grad((mine * part.weight).sum(), part.leaves["b"])
        assert relative_error(found / len(counts), true[rows]) < GRADIENT_FLOOR[torch.float64]


def check_gather(rank: int, counts: tuple[int, ...]) -> None:
    """Rows of any shape and dtype in the order of the ranks, and whose gradients come back."""
    parts = [torch.full((count, 2, 3), float(r)) for r, count in enumerate(counts)]
    mine = parts[rank].clone().requires_grad_()
    for gradient in ("all", "own", "none"):
        found = gather(mine, gradients=gradient)
        assert torch.equal(found, torch.cat(parts))
        assert found.requires_grad == (gradient != "none")
        if gradient != "none":
            # Each rank weighs all rows by its number plus one.
            (grad,) = torch.autograd.grad(found.sum() * (rank + 1), mine)
            factor = sum(range(1, len(counts) + 1)) if gradient == "all" else rank + 1
            assert torch.equal(grad, torch.full_like(mine, factor))
    labels = gather(torch.full((counts[rank],), rank))
    assert labels.tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(gather(mine).sum(), mine, create_graph=True)


def check_data_parallel(rank: int, strategy: str) -> None:
    """DistributedDataParallel over the network and the loss's temperature."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(6, 4, dtype=torch.float64)
            self.log_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.network(a), self.network(b), self.log_scale.exp()

    torch.manual_seed(5)
    model, a, b = Model(), *torch.randn(2, 8, 6, dtype=torch.float64)
    truth = torch.autograd.grad(fc.clip_loss(*model(a, b)), list(model.parameters()))
    rows = slice(0, 5) if rank == 0 else slice(5, 8)
    parallel = DistributedDataParallel(model)
    fc.clip_loss(*parallel(a[rows], b[rows]), ranks=Ranks(strategy)).backward()
    for parameter, true in zip(model.parameters(), truth, strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, true) < GRADIENT_FLOOR[torch.float64]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def check_memory(rank: int, counts: tuple[int, ...]) -> None:
    """The ring makes no tensor of the size of the batch; gathering does."""
    dim, largest = 128, {}  # a block of scores is smaller than the embeddings
    for strategy in ("ring", "gather"):
        x = torch.randn(8 * counts[rank], dim, requires_grad=True)
        labels = torch.arange(x.shape[0]) % 3
        with LargestTensor() as mode:
            loss = fc.nt_xent_loss(x, x + 1, ranks=Ranks(strategy))
            loss = loss + fc.supcon_loss(x, labels, ranks=Ranks(strategy))
            loss = loss + fc.clip_loss(x, x + 1, 1.0, ranks=Ranks(strategy))
            loss.backward()
        largest[strategy] = mode.elements
    # Two views of the largest rank's rows, and the same of every rank's.
    assert largest["ring"] == 2 * 8 * max(counts) * dim, largest
    assert largest["gather"] >= 2 * 8 * sum(counts) * dim, largest


def check_two_runs_are_equal(rank: int, counts: tuple[int, ...]) -> None:
    batch = Batch(sum(counts))
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for strategy in ("ring", "gather"):
        results = []
        for _ in range(2):
            part = Part(batch, rows, 0)
            loss = fc.nt_xent_loss(part.a, part.b, ranks=Ranks(strategy))
            results.append([loss, *gradients(loss, part).values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_mistakes(rank: int) -> None:
    """A call unlike the others' is an error on every rank, and nobody waits."""
    for strategy in ("ring", "gather"):
        x = torch.randn(3, 4 + rank)
        with pytest.raises(ValueError, match=r"every rank must make the same call.* \[\*, "):
            fc.info_nce_loss(x, x, ranks=Ranks(strategy))
        x = torch.randn(3, 4, requires_grad=rank == 0)
        with pytest.raises(ValueError, match=r"every rank must make the same call.*gradients"):
            fc.info_nce_loss(x, x, ranks=Ranks(strategy))
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(fc.nca_loss(x, torch.arange(3) % 2, ranks=Ranks("ring")), x,
                            create_graph=True)  # fmt: skip


@contextmanager
def unanswered(within: float) -> Iterator[None]:
    """The block has to end with the error about a silent rank, in so many seconds."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 had no answer from the other ranks to "):
        yield
    assert time.monotonic() - start < within


def check_silent_rank(rank: int, folder: Path) -> None:
    """A rank that stays away, and then one that is gone, ends the other with an error."""
    x = torch.randn(3, 4, requires_grad=True)
    for strategy in ("ring", "gather"):
        group: Any = dist.new_group(timeout=timedelta(seconds=1))
        ranks = Ranks(strategy, group)
        loss = fc.info_nce_loss(x, x, ranks=ranks)
        if rank == 0:
            with unanswered(within=30):
                loss.backward()  # the other one has no backward pass
            (folder / strategy).touch()
        while not (folder / strategy).exists():
            time.sleep(0.01)
    if rank == 1:
        os._exit(0)
    with unanswered(within=30):  # well before the timeout of a minute: the connection is closed
        fc.info_nce_loss(x, x, ranks=Ranks("ring"))


def work_evenly(rank: int, folder: Path) -> None:
    with process_group(rank, len(EVEN), folder):
        for strategy in ("gather", "ring"):
            check_losses(rank, EVEN, strategy, None)
            check_data_parallel(rank, strategy)
        check_mistakes(rank)
        check_silent_rank(rank, folder)


def work_unevenly(rank: int, folder: Path) -> None:
    with process_group(rank, len(UNEVEN), folder):
        for strategy in ("gather", "ring"):
            check_losses(rank, UNEVEN, strategy, None)
            check_rows(rank, UNEVEN, strategy)
        check_losses(rank, UNEVEN, "ring", "reference")  # its kernels, handed statistics of all
        check_gather(rank, UNEVEN)
        check_memory(rank, UNEVEN)
        check_two_runs_are_equal(rank, UNEVEN)


@contextmanager
def process_group(rank: int, world: int, folder: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    where = (folder / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("worker", "world"), [(work_unevenly, len(UNEVEN)), (work_evenly, len(EVEN))],
    ids=["uneven", "even"],
)  # fmt: skip
def test_ranks_agree_with_one_process(worker: Any, world: int, tmp_path: Path) -> None:
    spawn(worker, (tmp_path,), nprocs=world)


@pytest.mark.parametrize("available", [True, False])
def test_one_process_is_a_world_of_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: available)  # False: torch without it
    x = torch.randn(4, 3, requires_grad=True)
    for strategy in ("gather", "ring"):
        loss = fc.nt_xent_loss(x, x.flip(0), ranks=Ranks(strategy))
        assert torch.equal(loss, fc.nt_xent_loss(x, x.flip(0)))
    assert gather(x) is x
    assert not gather(x, gradients="none").requires_grad


def test_mistakes_that_one_rank_sees_alone() -> None:
    x = torch.randn(4, 3)
    wrong: Any = "ring"
    with pytest.raises(ValueError, match="strategy must be one of gather, ring, got 'star'"):
        Ranks("star")
    for call in (
        lambda: fc.info_nce_loss(x, x, ranks=wrong),
        lambda: fc.nca_loss(x, torch.arange(4), ranks=wrong),
        lambda: fc.metric_embedding_loss(x, x, torch.arange(4), ranks=wrong),
    ):
        with pytest.raises(TypeError, match="ranks must be a fastcontrast"):
            call()
    with pytest.raises(ValueError, match="gradients must be one of all, own, none, got 'some'"):
        gather(x, gradients="some")
    with pytest.raises(ValueError, match="x must have rows, got a 0-dim tensor"):
        gather(torch.tensor(1.0))
