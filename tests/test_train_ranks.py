"""Training over gloo ranks, against one process: gradients, whole runs, stops and lost ranks.

One spawn serves the comparisons, because starting a process costs seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mnist_files import write_mnist
from runs_of import assert_same_run as assert_bit_equal
from runs_of import stop_after
from safetensors.torch import load_file
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from fastcontrast import cli
from fastcontrast.train import models, plots, semisup, spatial, stage, temporal, triplet
from fastcontrast.train.batches import Pixels
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.clock import Clock
from fastcontrast.train.config import (
    RunConfig,
    SemisupConfig,
    SpatialConfig,
    TemporalConfig,
    TripletConfig,
)
from fastcontrast.train.loop import train_step
from fastcontrast.train.ranks import Shares, spread_layers
from fastcontrast.train.runs import RunFolder, read_metrics

WORLD = 3
SHARED: dict[str, Any] = {"device": "cpu", "threads": 1, "log_every": 1, "eval_every": 2}
# Batches that three ranks share out unevenly, anchors of ten classes among them; dropout, batch
# normalisation over all images and apart, shifts and mirrors, an average of the weights, a plateau,
# a queue.
CONFIGS: dict[str, RunConfig] = {
    "triplet": TripletConfig(
        batch_size=8, steps=4, held_out=0.3, test_triplets=200, schedule="plateau", patience=1,
        ema=0.9, **SHARED,
    ),
    "siamese": TripletConfig(loss="siamese", batch_size=5, steps=2, test_triplets=99, **SHARED),
    "spatial": SpatialConfig(
        batch_size=8, pretraining_steps=3, steps=2, labels_per_class=2, shift=2, mirror=True,
        head_dropout=0.5, contrast="queue", queue_size=12, **SHARED,
    ),
    "crops": SpatialConfig(
        patches="images", patch_size=20, batch_size=7, pretraining_steps=2, steps=1, mirror=True,
        baseline=False, labels_per_class=2, **SHARED,
    ),
    "semisup": SemisupConfig(batch_size=8, steps=4, labels_per_class=2, **SHARED),
    "separate": SemisupConfig(
        batches="code", separate_norms=True, squared=True, batch_size=4, steps=2,
        labels_per_class=2, **SHARED,
    ),
    "temporal": TemporalConfig(batch_size=4, clip_length=2, steps=1, **SHARED),
    "prediction": TemporalConfig(
        objective="prediction", predicted=2, batch_size=4, clip_length=3, steps=1, **SHARED
    ),
    "neighborhood": TemporalConfig(  # its discriminator has dropout
        objective="neighborhood", batch_size=4, clip_length=2, steps=1, **SHARED
    ),
}  # fmt: skip
RECIPES: dict[str, Any] = {
    "triplet": triplet, "spatial": spatial, "semisup": semisup, "temporal": temporal
}  # fmt: skip
# Of runs in float64. A step differs by 1e-15 of the largest gradient, and the next ones, at rates
# that make losses jump, carry it on: a hundredfold each. In float32 that would hide a mistake.
AGREE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
WHOLE = ("triplet", "spatial", "semisup")  # runs to the end; of the others the first step is seen


def run(config: RunConfig, folder: Path, name: str, **changes: Any) -> Any:
    place: dict[str, Any] = {"out_dir": folder / "runs", "name": name}
    if config.recipe != "temporal":  # whose own sequences are made in a second
        place["data"] = str(folder / "data")
    config = dataclasses.replace(config, **place, **changes)
    module = RECIPES[config.recipe]
    return module.train(module.prepare(config))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Networks and their images are float64; pictures, which take longer than a run, are left."""
    cut, build = Pixels.cut, models.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pixels, "cut", lambda *args, **options: cut(*args, **options).double())
        patch.setattr(models, "build", lambda make, seed: build(make, seed).double())
        patch.setattr(plots, "plot_run", lambda *_: [])
        yield


class FirstStep(Exception):
    """Carries what a recipe's first step computed out of the recipe."""


def first_steps(folder: Path, kind: str) -> dict[str, list[Tensor]]:
    """The loss's parts, gradients and statistics of the first step of every recipe, in float64."""

    def capture(job: Any, folder: Any, model: Any, task: Any, *_: Any, **__: Any) -> None:
        spread_layers(model.train(), task.shares, task.learnt)
        batch = task.batch_at(0)
        batch = batch._replace(images=batch.images.double())  # of crops
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        parts = train_step(model, batch, task, optimizer, Clock(job.device, task.shares.total))
        raise FirstStep([parts, *(p.grad for p in model.parameters()), *model.buffers()])

    found = {}
    tuning = dataclasses.replace(CONFIGS["spatial"], pretraining_steps=0)  # its head has dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_stage", capture)
        patch.setattr(spatial, "_probe", lambda *_: [])
        for name, config in {**CONFIGS, "fine-tuning": tuning}.items():
            with pytest.raises(FirstStep) as caught:
                run(config, folder, f"{name}-first-{kind}")
            found[name] = caught.value.args[0]
    return found


def check_first_steps(folder: Path) -> None:
    """Loss, every gradient and running statistic are those of one process, on every rank."""
    truth = torch.load(folder / "first_steps.pt")
    wrong = []
    for name, found in first_steps(folder, "ranks").items():
        (mine, true), *others = zip(found, truth[name], strict=True)
        wrong += [name] * (relative_error(mine, true) > VALUE_FLOOR[torch.float64])
        # Against all of them: biases before batch normalisation have a gradient of 0, but for
        # rounding.
        size = sum(true.double().norm() for _, true in others)
        for number, (mine, true) in enumerate(others):
            error = (mine.double() - true.double()).norm() / size
            if error > GRADIENT_FLOOR[torch.float64]:
                wrong.append(f"{name}, {number}: {error:.1e}")
    assert not wrong


def check_refusals(folder: Path) -> None:
    """The same error on every rank, and nobody waits."""
    with pytest.raises(ValueError, match="there is a run already"):
        run(CONFIGS["semisup"], folder, "semisup-ranks")
    with pytest.raises(ValueError, match="2 images cannot be shared out among 3 ranks"):
        Shares(2)
    with pytest.raises(ValueError, match="compile is 'default'; wanted 'off' on 3 ranks"):
        run(CONFIGS["semisup"], folder, "compiled", compile="default")


def check_stop(rank: int, folder: Path) -> None:
    """A signal that reaches one rank, and reaches it again, stops all after the same step."""
    sample_step = semisup.sample_step

    def signalled(*arguments: Any) -> Any:
        if arguments[3] == 1 and rank == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return sample_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semisup, "sample_step", signalled)
        result = run(CONFIGS["semisup"], folder, "stopped")
    assert (result.step, result.interrupted) == (2, True)


def check_resumption(rank: int, folder: Path) -> None:
    """Runs that were stopped in as many processes, and in one, go on in these."""
    runs = folder / "runs"
    if rank == 0:
        shutil.copytree(runs / "stopped", runs / "resumed-ranks")
    dist.barrier()
    for name in ("resumed-ranks", "stopped-one"):
        assert run(CONFIGS["semisup"], folder, name, resume=True).step == 4
    if rank == 0:
        assert_bit_equal(RunFolder(runs / "resumed-ranks"), RunFolder(runs / "semisup-ranks"))
    dist.barrier()


def check_dead_rank(rank: int, folder: Path) -> None:
    """The others end at once, with one line and exit code 1; what was written stays."""
    sample_step = semisup.sample_step

    def dying(*arguments: Any) -> Any:
        if arguments[3] == 3 and rank == 1:
            os._exit(0)
        return sample_step(*arguments)

    semisup.sample_step = dying
    flags = f"--data {folder / 'data'} --out-dir {folder / 'runs'} --name dead --device cpu"
    flags += " --labels-per-class 2 --batch-size 4 --eval-every 2"
    start, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["train", "semisup", *flags.split()]) == 1
    assert f"rank {rank} of {WORLD} had no answer from the other ranks" in said.getvalue()
    assert said.getvalue().count("\n") == 1
    assert time.monotonic() - start < 30  # well before the group's timeout
    saved = latest_checkpoint(folder / "runs" / "dead" / "checkpoint")
    assert saved is not None
    assert saved.name == "step-0000002"


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = (folder / "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    with in_float64():
        check_first_steps(folder)
        for name in WHOLE:
            run(CONFIGS[name], folder, f"{name}-ranks")
        check_refusals(folder)
        check_stop(rank, folder)
        check_resumption(rank, folder)
    check_dead_rank(rank, folder)
    dist.destroy_process_group()


def assert_same_run(mine: RunFolder, true: RunFolder) -> None:
    """Weights, averages, the loss of every step and embeddings, in every stage."""
    assert [p.name for p in mine.stages] == [p.name for p in true.stages]
    folders = zip([mine, *map(RunFolder, mine.stages)], [true, *map(RunFolder, true.stages)],
                  strict=True)  # fmt: skip
    for one, other in folders:
        losses = [torch.tensor([r["loss"] for r in read_metrics(each)]) for each in (one, other)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # as float32
        left, right = (latest_checkpoint(each.checkpoints) for each in (one, other))
        assert (left is None) == (right is None)
        if left is None or right is None:
            continue
        assert left.name == right.name
        for path in left.glob("*.safetensors"):
            weights, truth = load_file(path), load_file(right / path.name)
            assert weights.keys() == truth.keys()
            for key, tensor in truth.items():
                torch.testing.assert_close(weights[key], tensor, **AGREE)
    points = [torch.from_numpy(np.load(r.embeddings)["test_embeddings"]) for r in (mine, true)]
    torch.testing.assert_close(*points, **AGREE)
    assert mine.results.exists()


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    with in_float64():
        torch.save(first_steps(tmp_path, "one"), tmp_path / "first_steps.pt")
        straight = {name: run(CONFIGS[name], tmp_path, name) for name in WHOLE}
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 2)
            assert run(CONFIGS["semisup"], tmp_path, "stopped-one").interrupted
        spawn(work, (tmp_path,), nprocs=WORLD)
        # A run goes on in another number of processes: only seed and step are its state.
        resumed = run(CONFIGS["semisup"], tmp_path, "stopped", resume=True)
    assert_same_run(resumed.run, straight["semisup"].run)
    assert_same_run(RunFolder(tmp_path / "runs" / "stopped-one"), straight["semisup"].run)
    for name, result in straight.items():
        assert_same_run(RunFolder(tmp_path / "runs" / f"{name}-ranks"), result.run)


def test_a_rank_that_nobody_joins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives up after --rank-timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    assert cli.main(["train", "semisup", "--device", "cpu", "--rank-timeout", "1"]) == 1
    assert time.monotonic() - start < 20
    assert "rank 0 could not join the others" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    assert cli.main(["train", "semisup", "--device", "cpu", "--rank-timeout", "1"]) == 2
    assert "environment variable RANK expected" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_torchrun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "fastcontrast", "train", "semisup", "--data", "data", "--device", "cpu"),
        *("--labels-per-class", "2", "--batch-size", "4", "--steps", "1000000"),
        *("--log-every", "1", "--eval-every", "1", "--name", "run"),
    ]  # fmt: skip
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            while process.poll() is None and not metrics.exists():
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            variables = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
            (second,) = [pid for pid, content in variables.items() if b"\0RANK=1\0" in content]
            os.kill(int(second), signal.SIGKILL)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert "fastcontrast: rank 0 of 2 had no answer from the other ranks" in said
    assert said.count("steps of 4 labelled") == 1  # one rank alone prints
    assert latest_checkpoint(metrics.parent / "checkpoint") is not None
