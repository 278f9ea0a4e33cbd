"""What a finished run can be asked for: eval, embed, plot; and TensorBoard's figures."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_pictures
from mnist_files import write_mnist

from fastcontrast import cli
from fastcontrast.train import plots
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TripletConfig
from fastcontrast.train.evaluation import Figure
from fastcontrast.train.reports import embed_run, evaluate_run, load_run
from fastcontrast.train.runs import open_run
from fastcontrast.train.semisup import train_semisup
from fastcontrast.train.spatial import train_spatial
from fastcontrast.train.triplet import train_triplet

COMMON = {"device": "cpu", "threads": 1, "steps": 2, "batch_size": 8, "name": "run"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_mnist(tmp_path / "data", train=120))


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_triplet_run_is_evaluated_as_it_was(data, tmp_path, no_pictures, ema):
    result = train_triplet(
        TripletConfig(data=data, out_dir=tmp_path, held_out=0.3, eval_every=1, ema=ema, **COMMON)
    )
    loaded = load_run(result.run.path)
    assert loaded.source.name == "step-0000002"
    assert evaluate_run(loaded) == result.figures[1:]  # all but the triplets
    best = load_run(result.run.path, "best")
    assert best.source == latest_checkpoint(result.run.checkpoints, "best")
    shapes = embed_run(loaded, tmp_path / "x.npz")
    assert shapes["train_embeddings"] == (120, 128)
    with np.load(tmp_path / "x.npz") as arrays, np.load(result.run.embeddings) as saved:
        np.testing.assert_array_equal(arrays["test_embeddings"], saved["test_embeddings"])
        assert arrays["labelled_indices"].tolist() == list(range(120))


@pytest.mark.parametrize("pretrained_only", [False, True])
def test_a_spatial_run_is_evaluated_by_its_features(data, tmp_path, no_pictures, pretrained_only):
    result = train_spatial(
        SpatialConfig(
            data=data, out_dir=tmp_path, pretraining_steps=2, baseline=False, labels_per_class=4,
            **COMMON,
        )
    )  # fmt: skip
    if pretrained_only:
        for checkpoint in (result.run.path / "finetuned" / "checkpoint").iterdir():
            checkpoint.rename(tmp_path / "elsewhere")
    loaded = load_run(result.run.path)
    assert loaded.source.parts[-3] == ("pretraining" if pretrained_only else "finetuned")
    figures = evaluate_run(loaded)
    assert len(loaded.labelled) == 40
    assert all("40 training images" in figure.protocol for figure in figures)
    test = loaded.embed(loaded.job.dataset.test_images)
    assert test.shape == (20, 64)
    if not pretrained_only:
        with np.load(result.run.embeddings) as saved:
            np.testing.assert_array_equal(test.numpy(), saved["test_embeddings"])


def test_the_commands(data, tmp_path, capsys):
    """On one's own pictures, from training to the pictures of the run."""
    write_pictures(tmp_path / "pictures", classes=3, count=30)
    config = SemisupConfig(data="pictures", labels_per_class=3, network="mnist", **COMMON)
    run = train_semisup(config).run
    capsys.readouterr()
    assert cli.main(["eval", "runs/run"]) == 0
    out = capsys.readouterr().out
    assert "linear SVM" in out
    assert "frozen embeddings of 9 training images" in out
    assert cli.main(["embed", "runs/run", "--out=x.npz", "--device", "cpu"]) == 0
    assert "train_embeddings: 30 x 128" in capsys.readouterr().out
    with np.load("x.npz") as arrays:
        assert len(arrays["labelled_indices"]) == 9
    pictures = [run.curve, run.embedding, run.confusion, run.neighbours]
    for path in pictures:
        path.unlink()
    assert cli.main(["plot", "runs/run"]) == 0
    assert all(path.stat().st_size > 5000 for path in pictures)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "absent"], "absent/config.json: no such file; wanted the folder of a run"),
        (["eval", "--checkpoint", "first", "run"], "--checkpoint is 'first'; wanted last or best"),
        (["eval", "run", "--out", "x"], "eval: does not take '--out'"),
        (["eval", "run", "more"], "does not take 'more'"),
        (["embed", "run"], "embed: wants --out FILE.npz"),
        (["embed", "--out"], "--out wants a value"),
        (["plot", "--method", "umap"], "plot: wants the folder of a run"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_of_the_reports(capsys):
    assert cli.main(["eval"]) == 2
    assert "usage: fastcontrast eval RUN" in capsys.readouterr().err
    assert cli.main(["plot", "--help"]) == 0
    assert "usage: fastcontrast eval RUN" in capsys.readouterr().out


def test_a_run_without_what_is_asked_for(data, tmp_path, no_pictures, capsys):
    run = train_semisup(SemisupConfig(data=data, labels_per_class=2, **COMMON)).run
    assert cli.main(["eval", str(run.path), "--checkpoint", "best"]) == 2
    assert "holds no best checkpoint" in capsys.readouterr().err
    content = json.loads(run.config.read_text())
    run.config.write_text(json.dumps({**content, "recipe": "another"}))
    assert cli.main(["eval", str(run.path)]) == 2
    assert "not a configuration of this version" in capsys.readouterr().err


def test_a_method_that_is_not_installed_says_what_to_install(data, no_pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs openTSNE: pip .*fastcontrast\[plots\]"):
        plots.plot_embedding(
            torch.randn(9, 3), torch.zeros(9).long(), None, None, ("a",), "", None, "tsne"
        )


def test_other_methods_draw_pictures_of_their_own(data, monkeypatch, capsys):
    """By stand-ins, which put a known cloud where the packages would put theirs."""
    drawn = []

    class TSNE:
        def __init__(self, random_state):
            assert random_state == 0

        def fit(self, rows):
            drawn.append(rows.shape)
            return rows[:, :2]

    class UMAP(TSNE):
        fit_transform = TSNE.fit

    for name, kind in (("openTSNE", TSNE), ("umap", UMAP)):
        module = types.ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_run", lambda *_: [])
        config = SemisupConfig(data=data, labels_per_class=2, **COMMON)
        run = train_semisup(config).run
    run.embedding.write_bytes(b"by pca")
    for method in ("tsne", "umap"):
        assert cli.main(["plot", "runs/run", "--method", method]) == 0
        assert f"runs/run/embedding_{method}.png\n" in capsys.readouterr().out
        assert run.embedding_by(method).stat().st_size > 5000
    assert drawn == [(20 + 20, 128)] * 2  # test images, then the labelled ones
    assert run.embedding.read_bytes() == b"by pca"
    assert {run.embedding_by(m) for m in ("tsne", "umap")} < {*run.written}
    open_run(dataclasses.replace(config, overwrite=True))
    assert [path.name for path in run.path.iterdir() if path.is_file()] == ["config.json"]


_ON_A_TERMINAL = """
import sys
from fastcontrast.train import plots
plots.plot_run = lambda *_: []
from fastcontrast import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar(data, tmp_path):
    import pty

    ours, theirs = pty.openpty()
    flags = "--data data --labels-per-class 2 --batch-size 4 --steps 4 --eval-every 2 --threads 1"
    with subprocess.Popen(
        [sys.executable, "-c", _ON_A_TERMINAL, "train", "semisup", "--device", "cpu",
         *flags.split()],
        stdout=theirs, stderr=subprocess.STDOUT, env={**os.environ, "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # Linux's way of saying that the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0, said
    text = said.decode()
    assert "\x1b[" in text
    assert "step 4/4" in text
    assert "1-NN test error" in text  # the lines of evaluations stay


def test_results_hold_every_figure_with_its_protocol(data, no_pictures):
    result = train_semisup(SemisupConfig(data=data, labels_per_class=2, **COMMON))
    saved = json.loads(result.run.results.read_text())
    assert saved["step"] == 2
    assert [Figure(**figure) for figure in saved["figures"]] == result.figures
    assert len(saved["figures"]) == 6


def test_the_mean_over_subsets_of_labels_is_taken_as_documented(tmp_path):
    document = Path(__file__).parents[1] / "docs" / "reproduction.md"
    (script,) = re.findall(r"^python -c '\n(.*?)^'$", document.read_text("utf-8"), re.M | re.S)
    for subset, errors in enumerate([(0.01, 0.5), (0.02, 0.5), (0.06, 0.5)]):
        figures = [{"name": name, "value": e} for name, e in zip("ab", errors, strict=True)]
        folder = tmp_path / "runs" / f"subset{subset}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"figures": figures}))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"}, encoding="utf-8",
    )  # fmt: skip
    assert done.stdout == "a 3.00% ± 2.65% of 3\nb 50.00% ± 0.00% of 3\n"


def test_figures_go_to_tensorboard_where_it_is_installed(data, no_pictures, monkeypatch):
    written, calls = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = SemisupConfig(data=data, labels_per_class=2, log_every=1, **COMMON)
    run = train_semisup(config).run
    assert calls == [(str(run.tensorboard), 0), "closed"]
    assert {("loss", 1), ("loss", 2), ("error_1nn", 2), ("images_per_second", 2)} <= {*written}
    train_semisup(dataclasses.replace(config, resume=True, steps=3))
    assert calls[2] == (str(run.tensorboard), 2)


def test_the_switches_reach_the_network(data, no_pictures, monkeypatch):
    """Autocast and compilation, without the minute that a real compiler takes here."""
    modes = []

    def compile_nothing(model, options):
        modes.append(options)
        return lambda images: seen.append(torch.is_autocast_enabled("cpu")) or model(images)

    seen = []
    monkeypatch.setattr(torch, "compile", compile_nothing)
    config = SemisupConfig(data=data, labels_per_class=2, amp=True, compile="default", **COMMON)
    result = train_semisup(config)
    assert modes == [{"fallback_random": True}]
    assert seen == [True, True]
    assert result.step == 2
