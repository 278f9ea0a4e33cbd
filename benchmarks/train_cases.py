"""Job "train": one update as each recipe makes it, our losses and patches beside eager ones.

One small network stands for the recipes' own; it, the optimizer and the images are the same for
all, and only the loss and the cutting of patches differ. The
control is the update with a loss that costs nothing; the limit takes the network's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastcontrast
from benchmarks.cases import Call, Case, Control, Work, generator
from benchmarks.patch_cases import gathered
from benchmarks.peers import OURS
from benchmarks.triplet_cases import eager_ratio
from fastcontrast.temporal import temporal_contrasting_loss

CLASSES, SIDE, PATCH = 10, 28, 28
CANVAS = 40  # side of the images that patches are cut from
SMALL_BATCH = 8
FRAMES = 2  # of a clip


def network() -> nn.Module:
    """Three convolutions and a mean over pixels, 128 numbers an image; always the same weights."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for channels, out in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def semisup(ours: bool, embeddings: Tensor) -> Tensor:
    """Labelled and unlabelled rows against one anchor per class."""
    x, anchors = embeddings[:-CLASSES], embeddings[-CLASSES:]
    labels = torch.arange(len(x) // 2, device=x.device) % CLASSES
    if ours:
        targets = torch.cat([labels, labels.new_full((len(x) - len(labels),), -1)])
        return fastcontrast.metric_embedding_loss(x, anchors, targets)
    scores = -torch.cdist(x, anchors).square()
    log_p = scores[len(labels) :].log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    labelled = F.cross_entropy(scores[: len(labels)], labels, reduction="none")
    return labelled.mean() + entropy.mean()


def triplet(ours: bool, embeddings: Tensor) -> Tensor:
    """Anchors, positives and negatives, a third of the batch each."""
    a, p, n = embeddings.chunk(3)
    return fastcontrast.triplet_ratio_loss(a, p, n) if ours else eager_ratio(a, p, n)


def spatial(ours: bool, embeddings: Tensor) -> Tensor:
    """Two patches of each image."""
    x, y = embeddings[0::2], embeddings[1::2]
    if ours:
        return fastcontrast.spatial_contrasting_loss(x, y)
    return F.cross_entropy(-torch.cdist(x, y), torch.arange(len(x), device=x.device))


def temporal(ours: bool, embeddings: Tensor) -> Tensor:
    """Clips of FRAMES frames, each frame with its neighbours against those of other clips."""
    frame = torch.arange(len(embeddings), device=embeddings.device)
    clip, time = frame // FRAMES, frame % FRAMES
    if ours:
        return temporal_contrasting_loss(embeddings, clip, time, window=1, margin=None)
    scores = -torch.cdist(embeddings, embeddings)
    same = clip[:, None] == clip
    positive = same & ((time[:, None] - time).abs() == 1)
    others = scores.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    nll = F.softplus(others - scores) * positive
    return (nll.sum(1) / positive.sum(1)).mean()


RECIPES: dict[str, Callable[[bool, Tensor], Tensor]] = {
    "semisup": semisup,
    "triplet": triplet,
    "spatial": spatial,
    "temporal": temporal,
}


class TrainCase(Case):
    """Facts: kind (the recipe), batch, dtype."""

    distributions: ClassVar[dict[str, str]] = {OURS: "fastcontrast"}

    @property
    def name(self) -> str:
        return f"step of {self.facts['kind']}, batch {self.facts['batch']}"

    def providers(self) -> Sequence[str]:
        return (OURS, "torch eager")

    def _count(self) -> int:
        """Images that go through the network in a step."""
        batch = self.facts["batch"]
        return {
            "semisup": 2 * batch + CLASSES,
            "triplet": 3 * batch,
            "spatial": 2 * batch,
            "temporal": FRAMES * batch,
        }[self.facts["kind"]]

    def _pixels(self) -> Callable[[bool], Tensor]:
        """Gives a step's images; those of the spatial recipe are cut from larger ones."""
        source = generator(0, self.device)
        if self.facts["kind"] != "spatial":
            shape = (self._count(), 1, SIDE, SIDE)
            x = torch.randn(shape, generator=source, device=self.device)
            return lambda ours: x
        shape = (self.facts["batch"], 1, CANVAS, CANVAS)
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source, device=self.device)
        coords, _ = fastcontrast.sample_coords(len(x), 2, CANVAS, PATCH, seed=0, device=self.device)

        def cut(ours: bool) -> Tensor:
            if ours:
                drawn = fastcontrast.random_patches(x, 2, PATCH, mean=(0.5,), std=(0.5,), seed=0)
                return drawn.data.flatten(0, 1)
            return gathered(x, coords, PATCH).float().div_(255).sub_(0.5).div_(0.5)

        return cut

    def _step(self, loss: Callable[[Tensor], Tensor], ours: bool) -> Call:
        model, pixels = network().to(self.device), self._pixels()
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

        def run() -> None:
            value = loss(model(pixels(ours)))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

        return run

    def build(self, provider: str) -> Call:
        recipe, mine = RECIPES[self.facts["kind"]], provider == OURS
        return self._step(lambda e: recipe(mine, e), mine)

    def work(self) -> Work:
        with FlopCounterMode(display=False) as counter:
            model = network()
            model(torch.zeros(1, 1, SIDE, SIDE)).sum().backward()
        size = sum(p.numel() for p in model.parameters())
        # Weights, gradients and momenta read and written by the optimizer.
        return Work(float(counter.get_total_flops()) * self._count(), 4.0 * 6 * size)

    def control(self) -> Control:
        return Control("network alone", self._step(torch.sum, False))

    def control_work(self) -> Work:
        return Work(self.work().flops, 0.0)

    def errors(self, provider: str) -> dict[str, float]:
        """Of the loss and of the embeddings' gradient, given the network's embeddings."""
        mine = provider == OURS
        recipe = RECIPES[self.facts["kind"]]
        with torch.no_grad():
            found = network().to(self.device).eval()(self._pixels()(mine))
        results = []
        for x, own in ((found, mine), (found.double(), False)):
            x = x.detach().requires_grad_()
            loss = recipe(own, x)
            results.append((loss.double(), torch.autograd.grad(loss, x)[0].double()))
        (loss, gradient), (truth, exact) = results
        return {
            "loss": float(((loss - truth).abs() / truth.abs()).detach()),
            "gradient": float((gradient - exact).norm() / exact.norm()),
        }

    def smaller(self) -> Case:
        return TrainCase(self.facts | {"batch": min(self.facts["batch"], SMALL_BATCH)})

    def needs(self, provider: str) -> float:
        return 4e6 * self._count()  # activations of the network and their gradients


CASE = TrainCase


def all_cases(
    job: str, quick: bool, device: str, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Facts of the job's cases; ``sizes`` are batches."""
    batches = sizes or ((100,) if quick else (100, 400))
    return [
        {"job": job, "kind": kind, "batch": batch, "dtype": "float32", "device": device}
        for batch in batches
        for kind in RECIPES
    ]
