"""The studies of docs/contrast.md: their commands, runs of two steps, and pages made of them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contrast_pages, contrast_runs
from benchmarks.contrast_runs import STUDIES

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
