"""What is said of a record: its page and pictures, and what README quotes of the committed one."""

from __future__ import annotations

import re

import pytest

from benchmarks import plots, record
from benchmarks.processes import ROOT

README = (ROOT / "README.md").read_text()
QUOTED = record.read(ROOT / "benchmarks" / "results" / "cpu" / "bench.json")
NAMES = {"`torch.compile` of eager": "torch.compile"} | {
    "torch, checkpointed by blocks of rows": "torch checkpoint"
}


def _quoted_row(provider):
    name = "l2, M = N = 16384, D = 128, float32"
    return next(
        row
        for row in QUOTED["rows"]
        if (row["job"], row["name"], row["provider"]) == ("losses", name, provider)
    )


@pytest.mark.parametrize(
    ("word", "provider"), [("before", "torch eager"), ("after", "fastcontrast")]
)
def test_readme_tells_the_memory_of_the_record(word, provider):
    said = re.search(rf"# {word}: ([\d.]+) GB", README)
    assert said is not None
    assert said[1] == f"{_quoted_row(provider)['peak_bytes'] / 1e9:.{len(said[1]) - 2}f}"


def test_readme_has_the_table_of_the_record():
    table = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) MiB \|$", README, re.M)
    assert len(table) == 6
    for name, seconds, _, memory in table:
        row = _quoted_row(NAMES.get(name, name))
        assert float(seconds) == pytest.approx(row["minimum"], rel=5e-3)
        assert memory == f"{row['peak_bytes'] / 2**20:,.0f}"


def test_every_case_has_its_bar():
    for job in ("losses", "patches", "triplet", "train"):
        rows = [row for row in plots.measured(QUOTED["rows"]) if row["job"] == job]
        names = {row["name"] for row in rows}
        drawn = []
        for group in plots.bar_groups(rows):
            figure = plots.ratio_bars(rows, job, group)
            drawn += [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(drawn) == len(names)
        assert set(drawn) == names
