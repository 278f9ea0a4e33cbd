"""Checkpoints: what comes back, and that no crash or full disk loses the one before."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastcontrast.train import checkpoints
from fastcontrast.train.checkpoints import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

CPU = torch.device("cpu")


def _model_and_optimizer(seed, steps=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 5, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _state(step):
    sums = torch.tensor([1.5, 2.5])
    return TrainingState(step, sums, 3, 12.25, interval=2 * sums, interval_steps=7, watched=(0.5,))


def _assert_holds(path, model, optimizer, state):
    """The checkpoint restores exactly this into a differently initialised pair."""
    other, other_optimizer = _model_and_optimizer(seed=99)
    restored = load_checkpoint(path, other, other_optimizer, CPU)
    assert (restored.step, restored.summed_steps, restored.seconds) == (state.step, 3, 12.25)
    assert (restored.interval_steps, restored.watched) == (7, (0.5,))
    assert torch.equal(restored.sums, state.sums)
    assert torch.equal(restored.interval, state.interval)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    buffers = [
        [s["momentum_buffer"] for s in o.state.values()] for o in (optimizer, other_optimizer)
    ]
    assert len(buffers[0]) == len(buffers[1]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_round_trip_is_exact_and_only_the_latest_is_kept(tmp_path):
    for step in (2, 10, 9_999_999, 10_000_000):  # the last outgrows the padded name
        model, optimizer = _model_and_optimizer(seed=step, steps=2)
        path = save_checkpoint(tmp_path, model, optimizer, _state(step))
        assert latest_checkpoint(tmp_path) == path
        _assert_holds(path, model, optimizer, _state(step))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_best_is_kept_beside_the_last_with_the_average(tmp_path):
    pairs = {step: _model_and_optimizer(seed=step, steps=1) for step in (2, 4, 6)}
    average = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    for step, best in ((2, True), (4, True), (6, False)):
        save_checkpoint(tmp_path, *pairs[step], _state(step), average, best=best)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-0000004", "step-0000006"]
    _assert_holds(latest_checkpoint(tmp_path, "best"), *pairs[4], _state(4))
    _assert_holds(latest_checkpoint(tmp_path), *pairs[6], _state(6))
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    load_checkpoint(latest_checkpoint(tmp_path), *_model_and_optimizer(9), CPU, other)
    assert torch.equal(other[0].weight, average[0].weight)


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "optimiser", "flush", "rename"])
def test_a_full_disk_keeps_the_previous_one(tmp_path, monkeypatch, where):
    model, optimizer = _model_and_optimizer(seed=1, steps=1)
    before = save_checkpoint(tmp_path, model, optimizer, _state(5))
    later, later_optimizer = _model_and_optimizer(seed=2, steps=1)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr("safetensors.torch.save", _full)
        elif where == "optimiser":
            patch.setattr(torch, "save", _full)
        else:
            patch.setattr(os, {"flush": "fsync", "rename": "replace"}[where], _full)
        with pytest.raises(OSError, match=r"No space left.*step-0000005 is still there") as caught:
            save_checkpoint(tmp_path, later, later_optimizer, _state(6))
    assert "step-0000006" in str(caught.value)
    assert list(tmp_path.iterdir()) == [before]
    _assert_holds(before, model, optimizer, _state(5))
    after = save_checkpoint(tmp_path, later, later_optimizer, _state(6))
    _assert_holds(after, later, later_optimizer, _state(6))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_met_inside_torch_save_is_an_oserror_too(tmp_path, monkeypatch):
    model, optimizer = _model_and_optimizer(seed=1, steps=1)
    before = save_checkpoint(tmp_path, model, optimizer, _state(5))

    def open_full(path, mode):
        return open("/dev/full" if path.name == "training.pt" else path, mode)

    monkeypatch.setattr(checkpoints, "open", open_full, raising=False)
    with pytest.raises(OSError, match="could not write the checkpoint"):
        save_checkpoint(tmp_path, model, optimizer, _state(6))
    assert list(tmp_path.iterdir()) == [before]


_DIE_WHILE_SAVING = """
import os, shutil, signal, sys
from pathlib import Path
from test_train_checkpoints import _model_and_optimizer, _state
from fastcontrast.train.checkpoints import save_checkpoint

def save_and_die(folder, module, name):
    save_checkpoint(folder, *_model_and_optimizer(1, steps=1), _state(5))
    def die(*arguments, **_):
        if name != "rmtree" or str(arguments[0]).endswith("0000005"):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, die)
    save_checkpoint(folder, *_model_and_optimizer(2, steps=1), _state(6))

for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
    child = os.fork()
    if child == 0:
        save_and_die(Path(sys.argv[1]) / name, module, name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_a_complete_one(tmp_path):
    """Killed for real: at the first flush, at the rename, before the old one is removed."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run(
        [sys.executable, "-c", _DIE_WHILE_SAVING, str(tmp_path)], env=environment, check=True
    )
    for name, seed, step in (("fsync", 1, 5), ("replace", 1, 5), ("rmtree", 2, 6)):
        path = latest_checkpoint(tmp_path / name)
        assert path.name == f"step-{step:07d}"
        _assert_holds(path, *_model_and_optimizer(seed, steps=1), _state(step))
        path = save_checkpoint(tmp_path / name, *_model_and_optimizer(3, steps=1), _state(7))
        assert list((tmp_path / name).iterdir()) == [path]  # what the crash left is gone


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_file_is_named(tmp_path, file, damage):
    path = save_checkpoint(tmp_path, *_model_and_optimizer(1, steps=1), _state(5))
    content = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"?")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_checkpoint(path, *_model_and_optimizer(2), CPU)
    assert str(path / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1], None, {"optimizer": [1]}, {"step": 1}])
def test_a_training_file_that_holds_something_else_is_named(tmp_path, content):
    path = save_checkpoint(tmp_path, *_model_and_optimizer(1, steps=1), _state(5))
    torch.save(content, path / "training.pt")
    with pytest.raises(ValueError, match=r"training\.pt: cannot be loaded") as caught:
        load_checkpoint(path, *_model_and_optimizer(2), CPU)
    assert "\n" not in str(caught.value)


def test_another_models_weights_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, *_model_and_optimizer(1, steps=1), _state(5))
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be loaded"):
        load_checkpoint(path, model, torch.optim.SGD(model.parameters()), CPU)


def test_write_atomically_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
