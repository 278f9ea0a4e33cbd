"""The host waits for the device once per log line, and not in between."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from mnist_files import write_mnist
from torch import Tensor

from fastcontrast.train import batches, loop, plots
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TripletConfig
from fastcontrast.train.semisup import train_semisup
from fastcontrast.train.spatial import train_spatial
from fastcontrast.train.triplet import train_triplet

COMMON: dict[str, Any] = {
    "threads": 1,
    "batch_size": 8,
    "log_every": 2,
    "eval_every": 6,
    "learning_rate": 1e-3,
}
TRIPLET = {"steps": 6, "test_triplets": 99}
RECIPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "triplet": (train_triplet, TripletConfig, {"schedule": "constant", **TRIPLET}),
    "siamese": (train_triplet, TripletConfig, {"loss": "siamese", **TRIPLET}),
    "spatial": (
        train_spatial,
        SpatialConfig,
        {"pretraining_steps": 6, "steps": 6, "labels_per_class": 2, "head_dropout": 0.5},
    ),
    "semisup": (train_semisup, SemisupConfig, {"steps": 6, "labels_per_class": 2, "ema": 0.9}),
}


def train(tmp_path, recipe: str, device: str) -> None:
    call, kind, options = RECIPES[recipe]
    data = str(write_mnist(tmp_path / "data", train=120))
    call(kind(data=data, out_dir=tmp_path, name="run", device=device, **COMMON, **options))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_wait_per_log_line(tmp_path, monkeypatch, recipe):
    """Counted on CPU: what would wait for a GPU is asking for numbers, or making a tensor there."""
    asked, lines, boxes = Counter(), [], []

    def counted(name: str) -> None:
        right = getattr(Tensor, name)

        def call(self: Tensor, *arguments: Any) -> Any:
            asked[name] += 1
            return right(self, *arguments)

        monkeypatch.setattr(Tensor, name, call)

    def append(run: Any, record: dict[str, Any]) -> None:
        lines.append((record["step"], asked.total()))

    extract = batches.extract_patches
    monkeypatch.setattr(
        batches,
        "extract_patches",
        lambda images, coords, *rest, **options: (
            boxes.append(coords.data_ptr()) or extract(images, coords, *rest, **options)
        ),
    )
    monkeypatch.setattr(loop, "append_metrics", append)
    for name in ("tolist", "item", "__bool__", "__float__"):
        counted(name)
    train(tmp_path, recipe, "cpu")
    waits = {step: count for step, count in lines if step < 6}
    assert waits[4] - waits[2] == 1
    assert len(set(boxes)) == 1  # the box of a whole image is made once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_a_step_does_not_wait(tmp_path, monkeypatch, recipe):
    """From the batch to the update, once the first step has filled the caches."""

    class Watched(loop.Clock):
        def start(self) -> None:
            torch.cuda.set_sync_debug_mode("error" if self._warm else "default")
            super().start()

        def end(self) -> None:
            super().end()
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "Clock", Watched)
    try:
        train(tmp_path, recipe, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
