"""Whole runs on a tiny set: resuming bit for bit, refusals, NaN, a full disk, and what is left."""

import dataclasses
import errno
import json
import math
import shutil

import numpy as np
import pytest
import torch
from mnist_files import write_mnist

from fastcontrast.train import loop, plots, runs, semisup, stage
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.config import SemisupConfig
from fastcontrast.train.loop import NonFiniteLossError
from fastcontrast.train.runs import append_metrics, open_run, read_config, read_metrics
from fastcontrast.train.semisup import train_semisup


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_mnist(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, request):
    if "pictures" not in request.keywords:  # drawing takes longer than these runs
        monkeypatch.setattr(plots, "plot_run", lambda *_: [])


@pytest.fixture
def config(data, tmp_path):
    return SemisupConfig(
        data=data,
        labels_per_class=2,
        batch_size=4,
        steps=4,
        log_every=1,
        eval_every=2,
        out_dir=tmp_path / "runs",
        device="cpu",
        threads=1,
        name="run",
    )


def _checkpoint_files(result):
    path = latest_checkpoint(result.run.checkpoints)
    training = torch.load(path / "training.pt", weights_only=True)
    del training["seconds"]
    return (path / "model.safetensors").read_bytes(), training


def _metrics(result):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "speed")}
        for r in read_metrics(result.run)
    ]


def _assert_same_run(one, other):
    (weights, training), (other_weights, other_training) = map(_checkpoint_files, (one, other))
    assert weights == other_weights
    torch.testing.assert_close(training, other_training, rtol=0, atol=0)
    assert _metrics(one) == _metrics(other)
    assert one.errors == other.errors
    a, b = np.load(one.run.embeddings), np.load(other.run.embeddings)
    assert all(np.array_equal(a[name], b[name]) for name in a.files)


def _stop_after(monkeypatch, count):
    """Stand for a Ctrl-C that arrives during the step with this number."""
    asked = iter(range(1, 10**6))

    @loop.contextmanager
    def stop():
        yield lambda: next(asked) >= count

    monkeypatch.setattr(stage, "stop_on_signal", stop)


def test_two_runs_are_bit_equal(config):
    _assert_same_run(
        train_semisup(config), train_semisup(dataclasses.replace(config, name="again"))
    )


def test_extending_two_steps_by_two_equals_four(config):
    drops = dataclasses.replace(config, lr_drops=(3,))
    straight = train_semisup(drops)
    half = train_semisup(dataclasses.replace(drops, steps=2, name="half"))
    assert half.step == 2
    whole = train_semisup(dataclasses.replace(drops, name="half", resume=True))
    assert whole.step == 4
    _assert_same_run(straight, whole)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("log_every", [1, 3])
def test_interrupted_and_resumed_equals_straight(config, monkeypatch, stop, log_every):
    config = dataclasses.replace(config, steps=6, log_every=log_every)
    straight = train_semisup(config)
    with monkeypatch.context() as patch:
        _stop_after(patch, stop)
        part = train_semisup(dataclasses.replace(config, name="part"))
    assert part.interrupted
    assert part.step == stop
    assert part.run.embeddings.exists()
    whole = train_semisup(dataclasses.replace(config, name="part", resume=True))
    assert not whole.interrupted
    _assert_same_run(straight, whole)
    record = json.loads(whole.run.config.read_text())
    assert [r["from_step"] for r in record["resumed"]] == [stop]


def test_a_crash_between_checkpoints_repeats_the_lost_steps(config, monkeypatch):
    config = dataclasses.replace(config, steps=6)
    straight = train_semisup(config)

    def crash_at_5(run, record):
        append_metrics(run, record)
        if record["step"] == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_metrics", crash_at_5)
        with pytest.raises(RuntimeError, match="power cut"):
            train_semisup(dataclasses.replace(config, name="crashed"))
    crashed = runs.folder_of(dataclasses.replace(config, name="crashed"))
    assert latest_checkpoint(crashed.checkpoints).name == "step-0000004"
    with open(crashed.metrics, "a") as file:
        file.write('{"step": 6, "lo')  # the line that the crash cut short
    whole = train_semisup(dataclasses.replace(config, name="crashed", resume=True))
    _assert_same_run(straight, whole)


def test_every_form_of_a_step_trains(config):
    """The code's batches, statistics of each stream apart, squares, another choice of labels."""
    changes = (
        {}, {"batches": "code"}, {"separate_norms": True}, {"squared": True}, {"label_seed": 5},
    )  # fmt: skip
    losses = set()
    for number, change in enumerate(changes):
        result = train_semisup(dataclasses.replace(config, name=str(number), steps=1, **change))
        losses.add(read_metrics(result.run)[0]["loss"])
    assert len(losses) == len(changes)


@pytest.mark.parametrize("anchors", ["nearest", "class-mean"])
def test_chosen_anchors_resume_bit_equal(config, monkeypatch, anchors):
    config = dataclasses.replace(config, anchors=anchors, anchor_images=3)
    straight = train_semisup(config)
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        train_semisup(dataclasses.replace(config, name="part"))
    whole = train_semisup(dataclasses.replace(config, name="part", resume=True))
    _assert_same_run(straight, whole)


@pytest.mark.parametrize("deleted", [False, True])
def test_resuming_without_a_checkpoint_starts_over_and_says_so(config, capsys, deleted):
    if deleted:
        run = train_semisup(config).run
        shutil.rmtree(run.checkpoints)
    else:
        run, _ = open_run(config)
    assert "starting over" not in capsys.readouterr().out
    resumed = train_semisup(dataclasses.replace(config, resume=True))
    said = f"\nno checkpoint in {run.checkpoints}: starting over from step 0\n"
    assert said in capsys.readouterr().out
    assert resumed.step == 4
    _assert_same_run(resumed, train_semisup(dataclasses.replace(config, name="straight")))
    assert run.path == resumed.run.path


def test_resuming_a_finished_run_changes_nothing(config):
    first = train_semisup(config)
    again = train_semisup(dataclasses.replace(config, name="again"))
    again = train_semisup(dataclasses.replace(config, name="again", resume=True))
    _assert_same_run(first, again)


def test_rate_drops_stay_where_they_were_when_steps_grow(config):
    _, started = open_run(dataclasses.replace(config, steps=30))
    assert started.lr_drops == (15, 23)
    _, resumed = open_run(dataclasses.replace(config, steps=90, resume=True))
    assert resumed.lr_drops == (15, 23)
    assert resumed.steps == 90


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 3}, "--steps 4, not 3; it can only grow"),
        ({"batch_size": 8}, "--batch-size 4, not 8"),
        ({"squared": True}, "--squared False, not True"),
        ({"lr_drops": (1,)}, "--lr-drops"),
        ({"data": "sample"}, "--data"),
        ({"seed": 1}, "--seed 0, not 1"),
    ],
    ids=str,
)
def test_resuming_with_another_configuration_is_refused(config, change, said):
    open_run(config)
    with pytest.raises(ValueError, match=said):
        open_run(dataclasses.replace(config, resume=True, **change))


def test_how_a_run_is_carried_out_may_change_when_resumed(config):
    open_run(config)
    change = {"threads": 2, "log_every": 7, "eval_every": 9, "device": "auto"}
    _, resumed = open_run(dataclasses.replace(config, resume=True, **change))
    assert {name: getattr(resumed, name) for name in change} == change


def test_an_existing_run_is_refused_or_replaced(config):
    first = train_semisup(config)
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        open_run(config)
    assert latest_checkpoint(first.run.checkpoints).name == "step-0000004"
    kept = [first.run.path / "notes.txt", first.run.checkpoints / "best" / "w.bin"]
    kept[1].parent.mkdir()
    for path in kept:
        path.write_text("mine")
    (first.run.checkpoints / "step-0000003.partial").mkdir()
    second = train_semisup(dataclasses.replace(config, steps=2, overwrite=True))
    assert latest_checkpoint(second.run.checkpoints).name == "step-0000002"
    assert [r["step"] for r in read_metrics(second.run)] == [1, 2]
    assert [path.read_text() for path in kept] == ["mine", "mine"]
    assert {path.name for path in first.run.checkpoints.iterdir()} == {"best", "step-0000002"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "run: the folder exists and is not a run of this command; choose another --name"),
        ('{"model_type": "bert"}', "run: the folder exists and is not a run of this command"),
        ('{"recipe": "another"}', "run: the folder exists and is not a run of this command"),
        ("[]", "run: the folder exists and is not a run of this command"),
        ("{", r"config\.json: damaged .*; remove the folder by hand or choose another --name"),
        (b"\xff", r"config\.json: damaged .*; remove the folder by hand or choose another --name"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_never_overwritten(config, content, said, overwrite):
    folder = config.out_dir / "run"
    files = {
        folder / "metrics.jsonl": b"someone else's",
        folder / "checkpoint" / "w.bin": b"weights",
        folder / "checkpoint" / "step-0000004" / "w.bin": b"weights",
    }
    if content is not None:
        files[folder / "config.json"] = content if isinstance(content, bytes) else content.encode()
    for path, held in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held)
    with pytest.raises(ValueError, match=said) as caught:
        open_run(dataclasses.replace(config, overwrite=overwrite))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    with pytest.raises((FileNotFoundError, ValueError), match=r"no run to resume|not a config"):
        open_run(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"[1]\n", 'line 2 is not an object with a "step"'),
        (b'{"loss": 1.0}\n', 'line 2 is not an object with a "step"'),
        (b'{"step": "1"}\n', 'line 2 is not an object with a "step"'),
        (b'{"step": 1, "\xff": 2}\n', "damaged"),
    ],
)
def test_damaged_metrics_are_named(config, damage, said):
    run, _ = open_run(config)
    append_metrics(run, {"step": 1})
    with open(run.metrics, "ab") as file:
        file.write(damage)
    held = run.metrics.read_bytes()
    with pytest.raises(ValueError, match=said) as caught:
        train_semisup(dataclasses.replace(config, resume=True))
    assert str(run.metrics) in str(caught.value)
    assert run.metrics.read_bytes() == held


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}', '{"config": {"lr_drops": [0]}}'])
def test_a_damaged_configuration_is_named(config, content):
    run, _ = open_run(config)
    run.config.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not a configuration of this version"):
        read_config(run, SemisupConfig)


def test_nan_stops_with_the_last_good_checkpoint(config, monkeypatch):
    right, calls = semisup.semisup_loss, []

    def lose(embeddings, labels, **options):
        loss, parts = right(embeddings, labels, **options)
        calls.append(None)
        return (loss * math.nan, parts * math.nan) if len(calls) == 4 else (loss, parts)

    with monkeypatch.context() as patch:
        patch.setattr(semisup, "semisup_loss", lose)
        with pytest.raises(NonFiniteLossError, match=r"at step 4;.*checkpoint.step-0000002"):
            train_semisup(config)
    run = runs.folder_of(config)
    assert latest_checkpoint(run.checkpoints).name == "step-0000002"
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3]
    assert train_semisup(dataclasses.replace(config, resume=True)).step == 4


def test_infinite_weights_behind_a_finite_loss_are_not_checkpointed(config):
    # An absurd rate: the first loss is finite, the weights after its step are not.
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
        train_semisup(dataclasses.replace(config, learning_rate=1e38, steps=1))
    assert latest_checkpoint(runs.folder_of(config).checkpoints) is None


def test_a_disk_that_fills_up_during_the_run_keeps_the_last_checkpoint(config, monkeypatch):
    replace, calls = loop.save_checkpoint, []

    def full_the_second_time(folder, model, optimizer, state, *rest, **options):
        calls.append(state.step)
        if len(calls) == 2:
            patch.setattr("os.fsync", _full)
        return replace(folder, model, optimizer, state, *rest, **options)

    def _full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full_the_second_time)
        with pytest.raises(OSError, match="step-0000002 is still there"):
            train_semisup(config)
    resumed = train_semisup(dataclasses.replace(config, resume=True))
    assert resumed.step == 4


def test_the_callers_random_state_and_threads_are_left_alone(config):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train_semisup(dataclasses.replace(config, threads=threads + 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(config):
    with pytest.raises(ValueError, match=r"device is cuda, but torch .* sees no CUDA device"):
        train_semisup(dataclasses.replace(config, device="cuda"))
    assert not config.out_dir.exists()


def test_it_learns_and_leaves_everything(config):
    config = dataclasses.replace(config, steps=60, batch_size=16, log_every=20, eval_every=30)
    result = train_semisup(config)
    records = read_metrics(result.run)
    assert [r["step"] for r in records] == [20, 30, 40, 60]
    assert records[-1]["loss_labelled"] < 0.3 * records[0]["loss_labelled"]
    for record in records:
        if "loss" in record:
            parts = record["loss_labelled"] + record["loss_unlabelled"]
            assert record["loss"] == pytest.approx(parts, rel=1e-5)
    assert records[-1]["error_1nn"] == result.errors[1]
    assert set(result.errors) == set(result.pixel_errors) == {1, 3, 5}
    saved = json.loads(result.run.config.read_text())
    assert saved["seed"] == 0
    assert saved["config"]["steps"] == 60
    assert saved["versions"]["torch"] == torch.__version__
    assert "commit" in saved
    arrays = np.load(result.run.embeddings)
    assert arrays["test_embeddings"].shape == (20, 128)
    assert arrays["labelled_embeddings"].shape == (20, 128)
    assert arrays["test_labels"].tolist() == [i % 10 for i in range(20)]
    assert (arrays["labelled_indices"] % 10 == arrays["labelled_labels"]).all()


@pytest.mark.slow
def test_hundred_labels_of_the_sample_beat_raw_pixels(tmp_path):
    config = SemisupConfig(steps=150, out_dir=tmp_path, eval_every=150, device="cpu")
    result = train_semisup(config)
    assert 0.25 < result.pixel_errors[1] < 0.33
    assert result.errors[1] < 0.75 * result.pixel_errors[1]
