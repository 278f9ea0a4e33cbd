"""Miners and what is learnt from time, on CUDA tensors: all that they are made of beside kernels.

Sorts, searches and draws are torch's on the device; what they find is what the CPU finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mining_cases import METRICS
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor

import fastcontrast as fc
from fastcontrast import mining, temporal

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

LABELS, NAMES = torch.randint(0, 9, (90,)), torch.randint(0, 9, (120,))
OWN = torch.arange(90)
MINERS: dict[str, Callable[..., mining.Triplets]] = {
    **{
        f"batch hard, {metric}": lambda *a, m=metric, **o: mining.batch_hard_triplets(
            *a, metric=m, **o
        )
        for metric in METRICS
    },
    "semi-hard": mining.semi_hard_triplets,
    "semi-hard of the nearest": lambda *a, **o: mining.semi_hard_triplets(
        *a, positive="nearest", margin=1.0, **o
    ),
    "distance weighted": lambda *a, **o: mining.distance_weighted_triplets(
        *a, seed=3, step=2, per_anchor=3, **o
    ),
    "inverse distance": lambda *a, **o: mining.inverse_distance_triplets(
        *a, seed=3, step=2, per_anchor=3, **o
    ),
}


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", MINERS)
def test_triplets_are_those_of_the_cpu(name: str) -> None:
    x, y = torch.randn(90, 16), torch.randn(120, 16)
    y[:90] = x
    for arguments, options in (
        ((x, LABELS), {}),
        ((x, LABELS, y, NAMES), {}),
        ((x, LABELS, y, torch.cat([LABELS, NAMES[90:]])), {"own": OWN}),
    ):
        truth = MINERS[name](*arguments, **options)
        moved = {key: on_device(value) for key, value in options.items()}
        found = MINERS[name](*map(on_device, arguments), **moved)
        assert len(truth.anchor) > 50
        for part, true in zip(found, truth, strict=True):
            assert part.device.type == DEVICE
            assert torch.equal(part.cpu(), true)


def test_negatives_anchors_and_means_are_those_of_the_cpu() -> None:
    x, y = torch.randn(90, 16), torch.randn(120, 16)
    for function, arguments, options in (
        (mining.hard_negatives, (x, y, 5), {"skip": 2}),
        (mining.hard_negatives, (x, y, 5), {"target": OWN + 7, "labels": LABELS,
                                            "key_labels": NAMES}),
        (mining.nearest_anchors, (x, y, NAMES, 9), {"own": OWN}),
        (mining.class_means, (y, NAMES, 9), {}),
    ):  # fmt: skip
        truth = function(*arguments, **options)
        moved = {key: on_device(value) for key, value in options.items()}
        found = function(*map(on_device, arguments), **moved)
        torch.testing.assert_close(found.cpu(), truth)


def test_a_memory_that_is_not_moved_follows_its_first_entries() -> None:
    """The documented loop of cross-batch memory, and a momentum encoder, on the device."""
    queue, encoder = fc.MemoryQueue(64), torch.nn.Linear(8, 16).to(DEVICE)
    follower = mining.MomentumEncoder(encoder, 0.5)
    counts = []
    for _ in range(3):
        follower.update(encoder)
        x, y = encoder(torch.randn(32, 8, device=DEVICE)), torch.arange(32, device=DEVICE) % 7
        chosen = mining.batch_hard_triplets(x, y, queue.embeddings, queue.labels)
        fc.triplet_margin_loss(*chosen.take(x, queue.embeddings), margin=0.2).backward()
        queue.enqueue(follower(torch.randn(32, 8, device=DEVICE)), y)
        counts.append(len(chosen.anchor))
    assert counts == [0, 32, 32]
    assert queue.embeddings.device.type == DEVICE


IDS, TIMES = torch.arange(90) % 5, torch.arange(90) // 5 * 2 + torch.arange(90) % 3
WEIGHT = torch.randn(2, 16, 16) / 4
LOSSES: dict[str, Callable[..., Tensor]] = {
    "margin": lambda x, place: temporal.temporal_contrasting_loss(
        x, place(IDS), place(TIMES), window=3, margin=8, temperature=0.5
    ),
    "no margin": lambda x, place: temporal.temporal_contrasting_loss(
        x, place(IDS), place(TIMES), window=3, margin=None, metric="cosine", temperature=0.5
    ),
    "prediction": lambda x, place: temporal.temporal_prediction_loss(
        x, x.flip(0), place(IDS), place(TIMES), place(WEIGHT).to(x.dtype)
    ),
    "neighborhood": lambda x, place: temporal.temporal_neighborhood_loss(
        *(2 * (x * F).sum(1) for F in (x.flip(0), x.roll(3, 0)))
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_temporal_losses_are_those_of_the_cpu(name: str) -> None:
    x = torch.randn(90, 16)
    wide, own = x.double().requires_grad_(), x.to(DEVICE).requires_grad_()
    truth, loss = LOSSES[name](wide, lambda t: t), LOSSES[name](own, on_device)
    assert relative_error(loss.cpu(), truth) < VALUE_FLOOR[torch.float32]
    (found,), (true,) = torch.autograd.grad(loss, own), torch.autograd.grad(truth, wide)
    assert relative_error(found.cpu(), true) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize("negatives", temporal.triplets.NEGATIVES)
def test_temporal_triplets_are_those_of_the_cpu(negatives: str) -> None:
    options: dict[str, Any] = {"window": 3, "margin": 8, "negatives": negatives, "per_anchor": 4}
    truth = temporal.temporal_triplets(IDS, TIMES, seed=1, step=9, **options)
    found = temporal.temporal_triplets(on_device(IDS), on_device(TIMES), seed=1, step=9, **options)
    assert len(truth.anchor) > 200
    for part, true in zip(found, truth, strict=True):
        assert torch.equal(part.cpu(), true)


def test_slow_features_are_those_of_the_cpu() -> None:
    frames = torch.randn(90, 8).cumsum(0)
    truth = temporal.slow_features(frames, IDS, TIMES, 3)
    found = temporal.slow_features(*map(on_device, (frames, IDS, TIMES)), 3)
    for part, true in zip(found, truth, strict=True):
        torch.testing.assert_close(part.cpu(), true, rtol=1e-8, atol=1e-8)
    near = found.transform(on_device(frames)).cpu()
    torch.testing.assert_close(near, truth.transform(frames), rtol=1e-5, atol=1e-5)
