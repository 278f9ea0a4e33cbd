"""Job "triplet": triplet losses forward and backward, mean reduction.

The control copies as many bytes as a loss has to move: three points read in each direction and
three gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast
from benchmarks.cases import Call, Case, Control, Work, generator, relative_errors
from benchmarks.peers import OURS

MATRICES_MOVED = 9
EXACT_ROWS = 1024
# It takes the distances of all pairs of rows and picks the triplets' from them.
METRIC_LEARNING_ROWS = 4096
Loss = Callable[..., Tensor]


def eager_ratio(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """The triplet ratio loss by differences."""
    to_positive = torch.linalg.vector_norm(a - p, dim=1)
    to_negative = torch.linalg.vector_norm(a - n, dim=1)
    return torch.sigmoid(to_positive - to_negative).square().mean()


def metric_learning(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """pytorch-metric-learning's TripletMarginLoss of given triplets."""
    from pytorch_metric_learning import distances, losses, reducers

    if len(a) > METRIC_LEARNING_ROWS:
        raise NotImplementedError(f"it takes all pairs; run up to M = {METRIC_LEARNING_ROWS}")
    module: Any = losses.TripletMarginLoss(
        margin=1.0,
        distance=distances.LpDistance(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )
    index = torch.arange(len(a), device=a.device)
    triplets = (index, index, index + len(a))
    return module(a, indices_tuple=triplets, ref_emb=torch.cat([p, n]))


EAGER: dict[str, Loss] = {"ratio": eager_ratio, "margin": F.triplet_margin_loss}
OWN: dict[str, Loss] = {
    "ratio": fastcontrast.triplet_ratio_loss,
    "margin": fastcontrast.triplet_margin_loss,
}


class TripletCase(Case):
    """Facts: kind ("ratio" or "margin"), rows, dim, dtype."""

    distributions: ClassVar[dict[str, str]] = {
        OURS: "fastcontrast",
        "pytorch-metric-learning": "pytorch-metric-learning",
    }

    @property
    def name(self) -> str:
        f = self.facts
        return f"triplet {f['kind']}, M = {f['rows']}, D = {f['dim']}, {f['dtype']}"

    def providers(self) -> Sequence[str]:
        peers = [OURS, "torch eager", "torch.compile"]
        return [*peers, "pytorch-metric-learning"] if self.facts["kind"] == "margin" else peers

    def _loss(self, provider: str) -> Loss:
        if provider == "pytorch-metric-learning":
            return metric_learning
        if provider == OURS:
            return OWN[self.facts["kind"]]
        eager = EAGER[self.facts["kind"]]
        return torch.compile(eager, dynamic=False) if provider == "torch.compile" else eager

    def _points(self, rows: int) -> list[Tensor]:
        source, dim = generator(0, self.device), self.facts["dim"]
        return [
            torch.randn(rows, dim, generator=source, device=self.device)
            .div_(dim**0.25)
            .to(self.dtype)
            .requires_grad_()
            for _ in range(3)
        ]

    def build(self, provider: str) -> Call:
        loss, points = self._loss(provider), self._points(self.facts["rows"])

        def run() -> None:
            for p in points:
                p.grad = None
            loss(*points).backward()

        return run

    def work(self) -> Work:
        size = self.facts["rows"] * self.facts["dim"]
        return Work(0.0, MATRICES_MOVED * size * self.dtype.itemsize)

    def control(self) -> Control:
        count = MATRICES_MOVED * self.facts["rows"] * self.facts["dim"] // 2
        source, target = torch.ones(2, count, dtype=self.dtype, device=self.device)
        return Control("copy", lambda: target.copy_(source))

    def control_work(self) -> Work:
        return self.work()

    def errors(self, provider: str) -> dict[str, float]:
        points = self._points(min(self.facts["rows"], EXACT_ROWS))
        exact = [p.detach().double().requires_grad_() for p in points]
        truth, mine = EAGER[self.facts["kind"]](*exact), self._loss(provider)(*points)
        return relative_errors(
            [mine.detach(), *torch.autograd.grad(mine, points)],
            [truth.detach(), *torch.autograd.grad(truth, exact)],
        )

    def smaller(self) -> Case:
        return TripletCase(self.facts | {"rows": min(self.facts["rows"], 128)})

    def needs(self, provider: str) -> float:
        pairs = 4.0 * 4 * self.facts["rows"] * 2 * self.facts["rows"]
        return 3 * self.work().bytes + (pairs if provider == "pytorch-metric-learning" else 0)


CASE = TripletCase


def all_cases(
    job: str, quick: bool, device: str, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Facts of the job's cases."""
    shapes = [(1024, 128), (16384, 128)] if quick else [
        (rows, dim) for rows in (128, 1024, 16384) for dim in (64, 128, 512)
    ]  # fmt: skip
    if device == "cuda" and not quick:
        shapes.append((1 << 20, 128))
    shapes = [(rows, 128) for rows in sizes] if sizes else shapes
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    return [
        {"job": job, "kind": kind, "rows": m, "dim": d, "dtype": dtype, "device": device}
        for m, d in shapes
        for kind in ("ratio", "margin")
        for dtype in dtypes
    ]
