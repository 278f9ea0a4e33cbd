"""The studies of docs/contrast.md: their commands, runs of two steps, and pages made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from mnist_files import write_mnist

from benchmarks import contrast_pages, contrast_runs, contrast_study
from benchmarks.contrast_runs import STUDIES, TASKS
from fastcontrast.data import load_sequence_set
from fastcontrast.train import plots

FULL = os.environ.get("FASTCONTRAST_DATA")
ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("contrast_*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_what_its_page_shows_and_its_command_repeats(path: Path) -> None:
    record = read(path)
    study = STUDIES[record["study"]]
    assert contrast_pages.stem(record) == path.stem
    page = (ROOT / "docs" / "contrast.md").read_text("utf-8")
    (shown,) = re.findall(rf"<!-- {path.stem} -->\n(.*)<!-- end of {path.stem} -->", page, re.S)
    images = re.findall(r"!\[[^]]*\]\(images/([^)]+)\)", shown)
    assert all((ROOT / "docs" / "images" / image).is_file() for image in images)
    assert shown.strip() == contrast_pages.section(record, study, images)
    words = shlex.split(contrast_pages.command(record, study))
    assert words[3:7] == [record["study"], "--data", words[5], "--out"]
    assert ("--steps" in words) == (
        not {(run["variant"], run["steps"]) for run in record["runs"]} <= set(study.points)
    )
    for run in record["runs"]:
        for found in run.get("nearest", {}).values():
            shape = (len(found), len(found[0]) - 1)
            assert shape == (contrast_runs.QUERIES, contrast_runs.FOUND)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout to render into, and budgets of two steps; pictures of runs are left."""
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    monkeypatch.setattr(contrast_runs, "FINE_TUNING", 2)
    small = {
        name: (dataclasses.replace(config, probe_frames=60), 2)
        for name, (config, _) in TASKS.items()
    }
    monkeypatch.setattr(contrast_runs, "TASKS", small)
    monkeypatch.setattr(contrast_study, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    return tmp_path


def run(tree: Path, study: str, data: Path | str, *more: str) -> dict[str, Any]:
    out = tree / "record.json"
    contrast_study.main([study, "--data", str(data), "--out", str(out), *more])
    return read(out)


def render(tree: Path, study: str, data: Path | str) -> str:
    """The page around the section stays; the picture is drawn, and the record kept."""
    name = contrast_pages.stem(read(tree / "record.json"))
    page = tree / "docs" / "contrast.md"
    page.write_text(
        f"before\n<!-- {name} -->\nwhat stood here\n<!-- end of {name} -->\nafter\n", "utf-8"
    )
    run(tree, study, data, "--render")
    assert read(tree / "benchmarks" / "results" / f"{name}.json") == read(tree / "record.json")
    assert (tree / "docs" / "images" / f"{name}.png").stat().st_size > 1000
    text = page.read_text("utf-8")
    assert text.startswith(f"before\n<!-- {name} -->\n\n### {STUDIES[study].title}")
    assert text.endswith(f"\n<!-- end of {name} -->\nafter\n")
    assert "what stood here" not in text
    return text


@pytest.mark.parametrize(
    ("study", "variants"),
    [
        ("triplet", ["uniform", "batch-hard"]),
        ("anchors", ["random", "class-mean"]),
        ("spatial", ["none", "queue"]),
    ],
)
def test_a_study_of_images_runs_resumes_and_is_rendered(
    study: str, variants: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_mnist(tree / "MNIST" / "raw", train=200, test=40)
    monkeypatch.setattr(contrast_runs, "LABELS_PER_CLASS", 10)
    more = ["--steps", "2", "--seeds", "0", "--variants", *variants]
    points = tuple((variant, 0 if variant == "none" else 1) for variant in variants)
    monkeypatch.setitem(STUDIES, study, STUDIES[study]._replace(points=points))
    if study == "spatial":
        more = more[2:]  # of "none" there are no steps to set
    record = run(tree, study, data, *more)
    assert [run["variant"] for run in record["runs"]] == variants
    assert all(STUDIES[study].figures.keys() <= run["figures"].keys() for run in record["runs"])

    # As if it had been stopped in its last run: that one alone is made again, and alike.
    contrast_study.save({**record, "runs": record["runs"][:-1]}, tree / "record.json")
    made = []
    run_one = contrast_study.run_one
    monkeypatch.setattr(
        contrast_study, "run_one", lambda *args: made.append(args[1]) or run_one(*args)
    )
    again = run(tree, study, data, *more)
    assert made == variants[-1:]
    figures = [[run["figures"] for run in found["runs"]] for found in (again, record)]
    assert figures[0] == figures[1]

    text = render(tree, study, data)
    assert f"| {variants[-1]} | {'1' if study == 'spatial' else '2'} |" in text
    assert "MNIST/raw" in text or study == "spatial"
    with pytest.raises(ValueError, match="wanted temporal on"):
        run(tree, "temporal", data)
    (tree / "docs" / "contrast.md").write_text("nothing here")
    with pytest.raises(ValueError, match="wanted one <!--"):
        run(tree, study, data, "--render")


# Task: training and test sequences, frames of the first of each, and classes.
REAL = {
    "objects": (20, 20, (50, 1, 32, 32), (12, 1, 32, 32), 20),
    "angles": (20, 20, (50, 1, 32, 32), (12, 1, 32, 32), 10),
    "motion": (1, 1, (5170, 9, 1, 64), (1744, 9, 1, 64), 4),
    "video": (1, 1, (597, 3, 96, 128), (198, 3, 96, 128), 0),
}


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="FASTCONTRAST_DATA names no folder with full data sets")
@pytest.mark.parametrize("task", REAL)
def test_the_study_of_time_on_its_own_data(task: str, tree: Path) -> None:
    """vtest, COIL-20 and Daphnet as the studies lay them out, and two steps on each."""
    data = Path(str(FULL)) / "temporal"
    folder = contrast_runs.write_sequences(data, task, tree / "sequences")
    found = load_sequence_set(str(folder), labels=task)
    train, test = (next(iter(split.values())) for split in (found.train, found.test))
    shapes = len(found.train), len(found.test), train.shape, test.shape, len(found.class_names)
    assert shapes == REAL[task]
    variant = f"{task}, contrast"
    record = run(tree, "temporal", data, "--steps", "2", "--seeds", "0", "--variants", variant)
    ((made,),) = [record["runs"]]
    assert ("1-NN, random network" in made["figures"]) == (task != "video")
    assert ("nearest" in made) == (task == "video")
