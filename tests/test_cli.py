"""The command line: help, errors in one line, the train extras, Ctrl-C, and resuming by flags."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from mnist_files import NAMES, write_mnist
from runs_of import assert_same_run

from fastcontrast import cli
from fastcontrast.train import checkpoints, plots, runs, semisup
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.config import SemisupConfig
from fastcontrast.train.runs import RunFolder, read_metrics

TINY = ["--labels-per-class", "2", "--batch-size", "4", "--device", "cpu", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small data set in ``data``."""
    write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])


def _train(*flags):
    return cli.main(["train", "semisup", "--data", "data", *TINY, *flags])


def _error(capsys):
    """The one line on standard error."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("fastcontrast: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "train RECIPE"),
        (["-h"], "doctor"),
        (["train", "--help"], "semisup"),
        (["doctor", "--help"], "usage: fastcontrast doctor"),
        (["--version"], "fastcontrast "),
    ],
)
def test_help_and_version(arguments, said, capsys):
    assert cli.main(arguments) == 0
    assert said in capsys.readouterr().out


def test_help_of_the_recipe_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "semisup", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(SemisupConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "--preset" in text
    assert "--config" in text
    assert "cifar10-code" in text


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_an_unfinished_command_shows_its_help(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "no command 'trian'"),
        (["train", "tripler"], "no recipe 'tripler'"),
        (["--version", "foo"], "--version: takes no arguments, got 'foo'"),
        (["doctor", "now"], "takes no arguments, got 'now'"),
        (["train", "semisup", "--data", "absent"], "absent: no such folder"),
        (["train", "semisup", "--resume"], "there is no run to resume"),
        (["train", "semisup", "--labels-per-class", "1000"], "leaves no image without a label"),
    ],
)
def test_errors_are_one_line(arguments, said, here, capsys):
    assert cli.main(arguments) == 2
    assert said in _error(capsys)
    assert not (here / "runs").exists()


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--name", "a/b"], ["--no-such-flag"]])
def test_wrong_flags_exit_with_2(flags, here, capsys):
    with pytest.raises(SystemExit) as caught:
        _train(*flags)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_data_file_is_one_line_that_names_it(here, capsys):
    path = here / "data" / NAMES["test_images"]
    path.write_bytes(path.read_bytes()[:-5])
    assert _train() == 2
    assert f"{NAMES['test_images']}: truncated" in _error(capsys)


def test_a_run_its_refusal_and_its_extension(here, capsys, no_pictures):
    flags = ("--steps", "2", "--log-every", "1", "--name", "mine")
    assert _train(*flags) == 0
    output = capsys.readouterr().out
    assert "raw pixels" in output
    assert "1-NN     3-NN     5-NN" in output
    assert "runs/mine/config.json" in output
    assert "step 2/2   loss " in output  # plain lines: standard output is no terminal here
    assert "\x1b" not in output

    assert _train(*flags) == 2
    assert "--resume" in _error(capsys)
    assert _train(*flags, "--resume", "--seed", "1") == 2
    assert "was started with --seed 0, not 1" in _error(capsys)

    # Only what grows is said again: everything else is as the run was started.
    again = ["train", "semisup", "--name", "mine", "--resume", "--steps", "3"]
    assert cli.main(again) == 0
    run = RunFolder(here / "runs" / "mine")
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3]
    assert json.loads(run.config.read_text())["config"]["batch_size"] == 4
    assert _train("--steps", "1", "--name", "mine", "--overwrite") == 0
    assert [r["step"] for r in read_metrics(run)] == [1]


def test_what_was_left_open_is_saved_as_it_was_found(here, no_pictures):
    """And the preset, from a file too."""
    (here / "run.toml").write_text('preset = "mnist-code"\nsteps = 1\n')
    assert _train("--config", "run.toml", "--name", "mine") == 0
    config = RunFolder(here / "runs" / "mine").config
    saved = json.loads(config.read_text())
    assert saved["config"]["preset"] == "mnist-code"
    found = {"dataset": "mnist", "network": "mnist", "device": "cpu", "threads": 1, "ranks": 1}
    assert saved["resolved"] == found
    again = ["train", "semisup", "--name", "mine", "--resume", "--steps", "2", "--threads", "2"]
    assert cli.main(again) == 0
    saved = json.loads(config.read_text())
    assert saved["config"]["preset"] == "mnist-code"
    assert [r["resolved"] for r in saved["resumed"]] == [{**found, "threads": 2}]


def test_a_foreign_folder_and_damaged_files_are_one_line(here, capsys, no_pictures):
    foreign = here / "runs" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for flags in ((), ("--overwrite",)):
        assert _train("--name", "foreign", *flags) == 2
        error = _error(capsys)
        assert "not a run of this command; choose another --name or --out-dir" in error
        assert "--overwrite" not in error
    assert _train("--name", "foreign", "--resume") == 2
    assert "config.json" in _error(capsys)

    flags = ("--steps", "1", "--name", "mine")
    assert _train(*flags) == 0
    run = RunFolder(here / "runs" / "mine")
    run.metrics.write_text("{}\n")
    assert _train(*flags, "--resume") == 2
    assert "metrics.jsonl: line 1" in _error(capsys)
    (latest_checkpoint(run.checkpoints) / "training.pt").write_bytes(b"?")
    assert _train(*flags, "--resume") == 2
    assert "training.pt: cannot be loaded" in _error(capsys)
    run.config.write_text("{")
    assert _train(*flags, "--overwrite") == 2
    assert "remove the folder by hand" in _error(capsys)


def test_the_default_name_says_data_and_seed(here, no_pictures):
    assert _train("--steps", "1", "--seed", "7") == 0
    assert (here / "runs" / "semisup-data-seed7" / "metrics.jsonl").exists()


def test_nan_is_one_line_and_exit_code_1(here, capsys, no_pictures):
    assert _train("--steps", "1", "--learning-rate", "1e38") == 1
    error = _error(capsys)
    assert "NaN or infinite" in error
    assert "start again with --overwrite and a lower rate" in error


def test_what_to_do_about_nan_can_be_done(here, capsys, no_pictures, monkeypatch):
    flags = ["--steps", "4", "--eval-every", "2", "--log-every", "1"]
    right, calls = semisup.semisup_loss, []

    def lose(*arguments, **options):
        loss, parts = right(*arguments, **options)
        calls.append(None)
        return (loss, parts * math.nan) if len(calls) == 4 else (loss, parts)

    with monkeypatch.context() as patch:
        patch.setattr(semisup, "semisup_loss", lose)
        assert _train(*flags, "--name", "lost") == 1
    advice = _error(capsys).partition("start another run: ")[2].split()
    weights = "runs/lost/checkpoint/step-0000002/model.safetensors"
    assert advice == [*("--learning-rate", "RATE", "--init-from", weights), "--name", "NAME"]
    advice = ["0.01" if word == "RATE" else "other" if word == "NAME" else word for word in advice]
    assert _train(*flags, *advice) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "training.pt", "results.json.partial"])
def test_what_to_do_about_a_full_disk_can_be_done(here, capsys, no_pictures, monkeypatch, name):
    def open_full(path, mode="r", **options):
        return open("/dev/full" if path.name == name else path, mode, **options)

    with monkeypatch.context() as patch:
        for module in (runs, checkpoints):
            patch.setattr(module, "open", open_full, raising=False)
        assert _train("--steps", "2", "--name", "full") == 1
    error = _error(capsys)
    assert "step-0000002" in error if name == "training.pt" else name.partition(".p")[0] in error
    assert "No space left" in error or name == "training.pt"  # of which torch.save does not say so
    assert "free space there" in error
    command = error.partition("then fastcontrast ")[2].split()
    assert command == ["train", "semisup", "--resume", "--name", "full"]
    assert cli.main(command) == 0


def _command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fastcontrast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_run_goes_on_from_there(here, capsys, number, monkeypatch):
    if number == signal.SIGTERM:
        flags = ("--steps", "100000", "--log-every", "2", "--eval-every", "50000")
    else:
        flags = ("--steps", "250", "--log-every", "2", "--eval-every", "1000")
    process = _command("train", "semisup", "--data", "data", *TINY, *flags, "--name", "stopped")
    for line in process.stdout:
        if line.startswith("step") and int(line.split("/")[0].split()[1]) >= 10:
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors == ""
    assert "Stopped after step" in output
    assert "fastcontrast train semisup --resume --name stopped" in output
    run = RunFolder(here / "runs" / "stopped")
    stopped_at = int(latest_checkpoint(run.checkpoints).name.removeprefix("step-"))
    assert 10 <= stopped_at < 250
    for path in (run.embeddings, run.curve, run.embedding):
        assert path.stat().st_size > 1000
    if number == signal.SIGTERM:
        return
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    assert cli.main(["train", "semisup", "--resume", "--name", "stopped"]) == 0
    assert _train(*flags, "--name", "straight") == 0
    metrics, straight = (
        [
            {k: v for k, v in record.items() if k not in ("seconds", "speed")}
            for record in read_metrics(RunFolder(here / "runs" / name))
        ]
        for name in ("stopped", "straight")
    )
    assert metrics == straight
    weights = [
        (here / "runs" / name / "checkpoint/step-0000250/model.safetensors").read_bytes()
        for name in ("stopped", "straight")
    ]
    assert weights[0] == weights[1]


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(here, no_pictures):
    """SIGKILL in mid-run, which leaves it no time to save anything."""
    flags = ("--steps", "200", "--log-every", "16", "--eval-every", "20")
    process = _command("train", "semisup", "--data", "data", *TINY, *flags, "--name", "killed")
    for line in process.stdout:
        if line.startswith("step") and int(line.split("/")[0].split()[1]) >= 20:
            process.kill()
            break
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    killed = RunFolder(here / "runs" / "killed")
    saved = int(latest_checkpoint(killed.checkpoints).name.removeprefix("step-"))
    assert 20 <= saved < 200
    assert cli.main(["train", "semisup", "--resume", "--name", "killed"]) == 0
    assert json.loads(killed.config.read_text())["resumed"][0]["from_step"] == saved
    assert _train(*flags, "--name", "straight") == 0
    assert_same_run(killed, RunFolder(here / "runs" / "straight"))


_WITHOUT_EXTRAS = """
import sys
for name in ("tyro", "rich", "matplotlib", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError, as if not installed
from fastcontrast.cli import main
for arguments in (["--help"], ["--version"], ["train", "--help"], ["train", "semisup", "--help"]):
    print(main(arguments))
"""


def test_without_the_train_extras():
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRAS], capture_output=True, text=True, check=True
    )
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["0", "0", "0", "2"]
    assert done.stderr == (
        "fastcontrast: train needs tyro, rich, matplotlib, safetensors: "
        'pip install "fastcontrast[train]"\n'
    )


def test_doctor_prints_the_report(capsys):
    pytest.importorskip("fastcontrast.doctor")
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.strip()
