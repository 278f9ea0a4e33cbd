"""Hard negatives, anchors, class-balanced batches and the momentum encoder."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from mining_cases import METRICS, farness
from torch import nn
from variants import on_every_backend

import fastcontrast as fc
from fastcontrast import mining


@on_every_backend("nearest")
@pytest.mark.parametrize("metric", METRICS)
def test_hard_negatives_are_their_definition(backend: str, metric: str) -> None:
    query, key = torch.randn(9, 5), torch.randn(20, 5)
    d = farness(query, key, metric)
    found = mining.hard_negatives(query, key, 4, skip=2, metric=metric, backend=backend)
    for i in range(9):
        order = [j for j in np.argsort(d[i], kind="stable") if j != i]
        assert found[i].tolist() == order[2:6]
    labels, names, target = torch.arange(9) % 3, torch.arange(20) % 3, torch.arange(9) + 11
    found = mining.hard_negatives(
        query, key, 3, target=target, labels=labels, key_labels=names, metric=metric,
        backend=backend,
    )  # fmt: skip
    for i in range(9):
        order = [j for j in np.argsort(d[i], kind="stable") if j != i + 11 and j % 3 != i % 3]
        assert found[i].tolist() == order[:3]


def test_info_nce_against_all_hard_negatives_is_info_nce() -> None:
    query, key = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    hard = mining.hard_negatives(query, key, 5)
    loss = fc.info_nce_loss(query, key, negatives=key[hard], in_batch=False)
    # The same terms in another order, in float64.
    torch.testing.assert_close(loss, fc.info_nce_loss(query, key), rtol=1e-12, atol=0)


@on_every_backend("nearest")
def test_nearest_anchors_are_their_definition(backend: str) -> None:
    x, labelled = torch.randn(13, 4), torch.randn(17, 4)
    labels = torch.arange(17).flip(0) % 3
    found = mining.nearest_anchors(x, labelled, labels, 3, backend=backend)
    d = farness(x, labelled, "l2")
    for i in range(13):
        for c in range(3):
            columns = [j for j in range(17) if labels[j] == c]
            assert found[i, c] == min(columns, key=lambda j, i=i: d[i, j])
    own = torch.arange(17)
    found = mining.nearest_anchors(labelled, labelled, labels, 3, own=own, backend=backend)
    assert (found != own[:, None]).all()
    assert mining.nearest_anchors(x[:0], labelled, labels, 3).shape == (0, 3)


def test_class_means() -> None:
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0, 1, 1, 2, 2, 0, 2, 2, 2])
    means = mining.class_means(x, labels, 3)
    for c in range(3):
        torch.testing.assert_close(means[c], x[labels == c].mean(0))
    torch.autograd.gradcheck(lambda x: mining.class_means(x, labels, 3), x)
    # Sums in float32, one rounding to half: half an eps, with room for the mean's own rounding.
    half = mining.class_means(x.half(), labels, 3)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), means, rtol=1e-3, atol=1e-3)


# Batches.


def test_batches_are_balanced_and_reach_everyone() -> None:
    labels = torch.tensor([7] * 30 + [-2] * 3 + [9] * 8 + [4] * 8)
    sampler = mining.ClassBalancedSampler(labels, 3, 4, seed=11, batches=600)
    classes, examples = Counter(), Counter()
    for batch in sampler:
        per_class = Counter(labels[batch].tolist())
        assert sorted(per_class.values()) == [4, 4, 4]
        classes.update(per_class.keys())
        examples.update(batch)
        for c in per_class:
            distinct = {i for i in batch if labels[i] == c}
            assert len(distinct) == (3 if c == -2 else 4)  # three members give a fourth again
    # 600 times 3 of 4: mean 450, standard deviation 10.6.
    assert all(abs(count - 450) < 53 for count in classes.values())
    assert len(classes) == 4
    assert len(examples) == 49
    of_seven = [examples[i] for i in range(30)]  # mean 450 * 4 / 30, standard deviation 7.2
    assert all(abs(count - classes[7] * 4 / 30) < 36 for count in of_seven)


def test_batches_are_a_function_of_seed_and_step_and_resume() -> None:
    labels = [i % 5 for i in range(40)]
    make = lambda seed=3: mining.ClassBalancedSampler(labels, 3, 2, seed=seed, batches=4)  # noqa: E731
    whole = make()
    epochs = [list(whole), list(whole)]
    assert [len(e) for e in epochs] == [4, 4]
    assert epochs[0] != epochs[1]
    assert epochs[1][2] == make().batch(6)
    assert list(make(4)) != epochs[0]
    first, second = make(), make(9)
    iterator = iter(first)
    assert [next(iterator), next(iterator)] == epochs[0][:2]
    second.load_state_dict(first.state_dict())
    assert list(second) == epochs[0][2:]
    assert list(second) == epochs[1]
    assert len(mining.ClassBalancedSampler(labels, 5, 8, seed=0)) == 1
    loader = torch.utils.data.DataLoader(torch.arange(40), batch_sampler=make())  # pyright: ignore
    assert [batch.tolist() for batch in loader] == epochs[0]
    every = mining.ClassBalancedSampler(labels, 5, 8, seed=0).batch(0)
    assert sorted(every) == list(range(40))


# The momentum encoder.


def test_momentum_encoder_follows() -> None:
    encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    follower = mining.MomentumEncoder(encoder, 0.9)
    start = {name: p.clone() for name, p in follower.encoder.named_parameters()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    follower.update(encoder)
    follower.update(encoder, momentum=0.5)
    for name, p in encoder.named_parameters():
        now = dict(follower.encoder.named_parameters())[name]
        torch.testing.assert_close(now, 0.45 * start[name] + 0.55 * p)
        assert not now.requires_grad
    x = torch.randn(8, 4)
    assert not follower(x).requires_grad
    means = [m[1].running_mean for m in (encoder, follower.encoder)]  # pyright: ignore
    assert not torch.equal(*means)  # its own batches, not the encoder's
    follower.update(encoder, momentum=0)
    assert not torch.equal(*means)
    again = mining.MomentumEncoder(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    again.load_state_dict(follower.state_dict())
    torch.testing.assert_close(again.eval()(x), follower.eval()(x), rtol=0, atol=0)


def test_the_documented_cross_batch_memory_runs_from_its_first_step() -> None:
    page = Path(__file__).parents[1] / "docs" / "contrast.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (loop,) = [block for block in blocks if "queue.enqueue(x, y)" in block]
    names: dict[str, Any] = {"mining": mining, "triplet_margin_loss": fc.triplet_margin_loss}
    names |= {"queue": fc.MemoryQueue(12), "y": torch.arange(8) % 3}
    found = []
    for _ in range(3):
        names["x"] = torch.randn(8, 5, requires_grad=True)
        exec(loop, names)
        names["loss"].backward()
        found.append((len(names["chosen"].anchor), len(names["queue"])))
    assert found == [(0, 8), (8, 12), (8, 12)]


def test_momentum_contrast_learns_with_a_queue() -> None:
    """MoCo's Eq. 1 and 2 at every step, over entries that the queue has dropped again too."""
    encoder = nn.Linear(6, 3).double()
    follower, queue = mining.MomentumEncoder(encoder, 0.9), fc.MemoryQueue(32)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    followed = [p.detach().clone() for p in encoder.parameters()]
    kept = torch.empty(0, 3, dtype=torch.float64)
    losses = []
    for _ in range(40):
        x = torch.randn(16, 6, dtype=torch.float64)
        follower.update(encoder)
        followed = [
            0.9 * k + 0.1 * q.detach() for k, q in zip(followed, encoder.parameters(), strict=True)
        ]
        view = torch.cat([x[:, :3], torch.randn_like(x[:, 3:])], 1)  # half of it is the example's
        query, key = encoder(x), follower(view)
        loss = fc.info_nce_loss(
            query, key, queue=queue, in_batch=False, metric="cosine", temperature=0.2
        )
        q, positive, negative = (F.normalize(part) for part in (query, key, kept))
        logits = torch.cat([(q * positive).sum(1, keepdim=True), q @ negative.T], 1) / 0.2
        truth = F.cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
        torch.testing.assert_close(loss, truth)
        expected = torch.autograd.grad(truth, list(encoder.parameters()), retain_graph=True)
        optimizer.zero_grad()
        loss.backward()
        for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        optimizer.step()
        queue.enqueue(key)
        kept = torch.cat([kept, key])[-32:]
        losses.append(loss.item())
    for mine, true in zip(follower.encoder.parameters(), followed, strict=True):
        torch.testing.assert_close(mine, true)
    full = losses[2:]  # before, there are fewer negatives
    assert sum(full[-10:]) < 0.8 * sum(full[:10])


def test_cross_batch_memory_equals_pytorch_metric_learning() -> None:
    """Its memory takes the batch first, and leaves out each row's own entry."""
    distances, losses, miners, reducers = (
        peers.peer(f"pytorch_metric_learning.{part}")
        for part in ("distances", "losses", "miners", "reducers")
    )
    distance = distances.LpDistance(normalize_embeddings=False)
    theirs = losses.CrossBatchMemory(
        losses.TripletMarginLoss(margin=0.2, distance=distance, reducer=reducers.MeanReducer()),
        embedding_size=5, memory_size=24, miner=miners.BatchHardMiner(distance=distance),
    )  # fmt: skip
    queue = fc.MemoryQueue(24)
    for step in range(7):  # a queue that fills, and is written over twice
        x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
        y = torch.randint(0, 4, (8,))
        queue.enqueue(x, y)
        own = (8 * step + torch.arange(8)) % 24
        chosen = mining.batch_hard_triplets(x, y, queue.embeddings, queue.labels, own=own)
        loss = fc.triplet_margin_loss(*chosen.take(x, queue.embeddings), margin=0.2)
        their = theirs(x, y)
        assert loss.item() > 0
        torch.testing.assert_close(loss, their)
        torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (loss, their)))
