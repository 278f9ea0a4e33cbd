"""--compile and --amp change how a step is carried out, and its results by rounding alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mnist_files import write_mnist
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcontrast.train import models, plots
from fastcontrast.train.batches import Pixels
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.config import TripletConfig
from fastcontrast.train.runs import read_metrics
from fastcontrast.train.triplet import build_model, train_triplet


def small_network(name: str, channels: int, dropout: float) -> nn.Sequential:
    """What the papers' networks are made of, in little: the compiler takes its time."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 5, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(dropout), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.fixture
def first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function: loss of a run of one step, carried out so, and how it moved weights."""
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    monkeypatch.setattr(models, "triplet_network", small_network)
    data = str(write_mnist(tmp_path / "data", train=120))

    def run(name: str, **switches: Any) -> tuple[float, Tensor]:
        config = TripletConfig(
            data=data, out_dir=tmp_path, name=name, device="cpu", threads=1, steps=1, batch_size=8,
            held_out=0.3, test_triplets=99, dampening=0.0, **switches,
        )  # fmt: skip
        run = train_triplet(config).run
        saved = latest_checkpoint(run.checkpoints)
        assert saved is not None
        weights, begin = load_file(saved / "model.safetensors"), build_model(config, "", 1)
        moved = [(weights[name] - p).flatten() for name, p in begin.named_parameters()]
        return read_metrics(run)[0]["loss"], torch.cat(moved).detach()

    return run


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FASTCONTRAST_COMPILE"),
    reason="half a minute of compiling; FASTCONTRAST_COMPILE=1 runs it",
)
def test_a_compiled_step_is_the_eager_one(first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its dropout masks; in float64, where a mistake does not look like rounding."""
    cut, build = Pixels.cut, models.build
    monkeypatch.setattr(Pixels, "cut", lambda *args, **options: cut(*args, **options).double())
    monkeypatch.setattr(models, "build", lambda make, seed: build(make, seed).double())
    (loss, moved), (true_loss, truth) = first_step("c", compile="default"), first_step("e")
    assert loss == pytest.approx(true_loss, rel=1e-6)  # summed in float32
    assert float((moved - truth).norm() / truth.norm()) < 1e-9


def test_amp_rounds_the_network_alone(first_step: Any) -> None:
    """Weights stay float32, and the step is the eager one's up to what bfloat16 rounds."""
    (loss, moved), (true_loss, truth) = first_step("a", amp=True), first_step("e")
    assert moved.dtype == torch.float32
    # Outputs of two convolutions, each rounded to 2**-8 of itself.
    assert loss == pytest.approx(true_loss, rel=0.01)
    assert loss != true_loss
    assert 0 < float((moved - truth).norm() / truth.norm()) < 0.1
