"""What every miner of triplets does where there is little to choose from, and with mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from mining_cases import cloud, listed
from torch import nn

import fastcontrast as fc
from fastcontrast import mining

NONE = torch.empty(0, dtype=torch.int64)


MINERS: dict[str, Callable[..., mining.Triplets]] = {
    "batch hard": mining.batch_hard_triplets,
    "semi-hard": mining.semi_hard_triplets,
    "distance weighted": lambda *a, **k: mining.distance_weighted_triplets(*a, seed=0, **k),
    "inverse distance": lambda *a, **k: mining.inverse_distance_triplets(*a, seed=0, **k),
}


@pytest.mark.parametrize("name", MINERS)
def test_batches_without_triplets(name: str) -> None:
    mine, x = MINERS[name], torch.randn(5, 3)
    assert listed(mine(x[:0], NONE)) == []
    assert listed(mine(x, torch.zeros(5, dtype=torch.int64))) == []  # one class
    assert listed(mine(x, torch.arange(5))) == []  # no positives
    assert listed(mine(x, torch.zeros(5, dtype=torch.int32), x[:0], NONE)) == []
    queue = fc.MemoryQueue(4)  # an empty one has neither a D nor the embeddings' device
    found = mine(x, torch.arange(5) % 2, queue.embeddings, queue.labels)
    assert listed(found) == []
    assert [part.shape for part in found.take(x, queue.embeddings)] == 3 * [(0, 3)]
    anchor, positive, negative = mine(x[:0], NONE).take(x)
    assert fc.triplet_margin_loss(anchor, positive, negative).item() == 0


@pytest.mark.parametrize("name", MINERS)
def test_a_class_of_one_member_gives_no_anchor_but_negatives(name: str) -> None:
    x = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]]))
    found = MINERS[name](x, torch.tensor([-7, -7, 2**40]))
    assert set(found.anchor.tolist()) <= {0, 1}
    assert set(found.negative.tolist()) == {2}


@pytest.mark.parametrize("name", MINERS)
def test_duplicates_tie_and_give_finite_losses(name: str) -> None:
    x = torch.ones(6, 4).requires_grad_()
    found = MINERS[name](x, torch.arange(6) % 2)
    # Nothing is farther than a positive at distance 0; the others choose among equals.
    assert len(found.anchor) == (0 if name == "semi-hard" else 6)
    if name == "batch hard":
        assert listed(found)[:3] == [(0, 2, 1), (1, 3, 0), (2, 0, 1)]
    fc.triplet_margin_loss(*found.take(x)).backward()
    assert x.grad is None or torch.equal(x.grad, torch.zeros(6, 4))


@pytest.mark.parametrize("name", MINERS)
def test_a_nan_row_reaches_the_loss_and_no_other_draw(name: str) -> None:
    x, labels = F.normalize(torch.randn(12, 3)), torch.arange(12) % 3
    x[4] = torch.nan
    found = MINERS[name](x, labels)
    assert 4 in found.anchor
    assert fc.triplet_margin_loss(*found.take(x)).isnan()
    healthy = (found.anchor != 4) & (found.positive != 4)
    assert (found.negative[healthy] != 4).all()
    assert healthy.sum() > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MINERS)
def test_other_dtypes_and_layouts_mine_what_their_numbers_say(
    name: str, dtype: torch.dtype
) -> None:
    x, labels = torch.randn(30, 5).to(dtype), torch.arange(30) % 4
    expected = listed(MINERS[name](x.double(), labels))
    assert listed(MINERS[name](x, labels.int())) == expected
    transposed = x.T.contiguous().T.requires_grad_()
    assert listed(MINERS[name](transposed, labels)) == expected


def test_every_loss_takes_what_is_mined() -> None:
    x, labels = cloud(30, 5)
    x.requires_grad_()
    queue = fc.MemoryQueue(64)
    queue.enqueue(torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 5)
    memory, names = queue.embeddings, queue.labels
    found = mining.batch_hard_triplets(x, labels, memory, names)
    anchor, positive, negative = found.take(x, memory)
    assert names is not None
    assert torch.equal(names[found.positive], labels[found.anchor])
    rows, columns, same = found.pairs()
    losses = {
        "margin": fc.triplet_margin_loss(anchor, positive, negative),
        "ratio": fc.triplet_ratio_loss(anchor, positive, negative),
        "siamese": fc.siamese_contrastive_loss(x[rows], memory[columns], same),
        "info_nce": fc.info_nce_loss(anchor, positive, negatives=negative[:, None], in_batch=False),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    distances, losses_of, reducers = (
        peers.peer(f"pytorch_metric_learning.{part}")
        for part in ("distances", "losses", "reducers")
    )
    their = losses_of.TripletMarginLoss(
        margin=1.0,
        distance=distances.LpDistance(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )
    within = mining.batch_hard_triplets(x, labels)
    torch.testing.assert_close(  # both in float64; theirs subtracts distances of a matrix product
        their(x, labels, within), fc.triplet_margin_loss(*within.take(x)), rtol=1e-9, atol=0
    )


def test_pairs_name_each_pair_once() -> None:
    found = mining.Triplets(
        torch.tensor([0, 0, 2]), torch.tensor([1, 1, 3]), torch.tensor([4, 5, 4])
    )
    rows, columns, same = found.pairs()
    assert list(zip(rows.tolist(), columns.tolist(), same.tolist(), strict=True)) == [
        (0, 1, True), (2, 3, True), (0, 4, False), (0, 5, False), (2, 4, False),
    ]  # fmt: skip


# Mistakes.

X, Y = torch.randn(4, 3), torch.randn(6, 3)
LABELS, IDS = torch.arange(4), torch.arange(6)
BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "labels shape": (
        lambda: mining.batch_hard_triplets(X, IDS), ValueError, r"labels must have shape \[4\]",
    ),
    "half of the references": (
        lambda: mining.semi_hard_triplets(X, LABELS, Y), ValueError, "must be given together",
    ),
    "own without references": (
        lambda: mining.batch_hard_triplets(X, LABELS, own=LABELS), ValueError, "own needs refer",
    ),
    "own shape": (
        lambda: mining.batch_hard_triplets(X, LABELS, Y, IDS, own=IDS), ValueError, "own must have",
    ),
    "positive": (
        lambda: mining.semi_hard_triplets(X, LABELS, positive="hard"), ValueError,
        "positive must be one of all, nearest, farthest, got 'hard'",
    ),
    "margin": (
        lambda: mining.semi_hard_triplets(X, LABELS, margin=0), ValueError, "margin must be posit",
    ),
    "metric": (
        lambda: mining.batch_hard_triplets(X, LABELS, metric="l1"), ValueError, "metric must be",
    ),
    "a line is no sphere": (
        lambda: mining.distance_weighted_triplets(X[:, :1], LABELS, seed=0), ValueError,
        "at least 2 columns D",
    ),
    "cutoff": (
        lambda: mining.distance_weighted_triplets(X, LABELS, cutoff=1.5, seed=0), ValueError,
        "max_distance must be above the cutoff, 1.5, and at most 2, got 1.4",
    ),
    "per anchor": (
        lambda: mining.inverse_distance_triplets(X, LABELS, per_anchor=0, seed=0), ValueError,
        "per_anchor must be at least 1",
    ),
    "seed": (
        lambda: mining.inverse_distance_triplets(X, LABELS, seed=2**64), ValueError, "seed must be",
    ),
    "step": (
        lambda: mining.distance_weighted_triplets(X, LABELS, seed=0, step=-1), ValueError,
        "step must be at least 0",
    ),
    "step type": (
        lambda: mining.distance_weighted_triplets(X, LABELS, seed=0, step=1.0), TypeError,
        "step must be an int, got float",
    ),
    "too few negatives": (
        lambda: mining.hard_negatives(X, Y, 5, skip=1), ValueError,
        "got 5 \\+ 1 where query 0 has 5",
    ),
    "skip": (lambda: mining.hard_negatives(X, Y, skip=-1), ValueError, "skip must be at least 0"),
    "fewer keys": (lambda: mining.hard_negatives(Y, X), ValueError, "needs N >= M, got M=6, N=4"),
    "half of the labels": (
        lambda: mining.hard_negatives(X, Y, labels=LABELS), ValueError, "given together",
    ),
    "target": (
        lambda: mining.hard_negatives(X, Y, target=LABELS + 4), ValueError, "target must lie in",
    ),
    "a class without anchor": (
        lambda: mining.nearest_anchors(X, Y, IDS % 2 * 2, 3), ValueError, "got none of class 1",
    ),
    "only itself": (
        lambda: mining.nearest_anchors(X, X, LABELS, 4, own=LABELS), ValueError,
        "class 0 must have an example besides",
    ),
    "class out of range": (
        lambda: mining.class_means(X, LABELS, 3), ValueError, "labels must lie in 0..2",
    ),
    "too many classes": (
        lambda: mining.ClassBalancedSampler([0, 1], 3, 1, seed=0), ValueError,
        "classes must be at most the number of classes, 2, got 3",
    ),
    "labels of floats": (
        lambda: mining.ClassBalancedSampler([0.5, 1.0], 1, 1, seed=0),  # pyright: ignore
        TypeError, "labels must be integers",
    ),
    "state": (
        lambda: mining.ClassBalancedSampler([0, 1], 1, 1, seed=0).load_state_dict({"step": 3}),
        ValueError, "state must hold seed and step, got step",
    ),
    "state out of range": (
        lambda: mining.ClassBalancedSampler([0, 1], 1, 1, seed=0).load_state_dict(
            {"seed": 0, "step": -1}
        ),
        ValueError, "step must be at least 0",
    ),
    "momentum": (
        lambda: mining.MomentumEncoder(nn.Linear(2, 2), 1.1), ValueError, "momentum must be",
    ),
    "half parameters": (
        lambda: mining.MomentumEncoder(nn.Linear(2, 2).bfloat16()), TypeError,
        "got torch.bfloat16 in weight",
    ),
    "another encoder": (
        lambda: mining.MomentumEncoder(nn.Linear(2, 2)).update(nn.Linear(3, 2)), ValueError,
        r"weight was \[2, 2\] and is \[2, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
