"""What is said of a record: its page and pictures, and what README quotes of the committed one."""

from __future__ import annotations

import re

import pytest

from benchmarks import limits, numerics, patch_cases, peers, plots, record, report
from benchmarks.cases import all_cases, case_of
from benchmarks.processes import ROOT

README = (ROOT / "README.md").read_text()
QUOTED = limits.with_limits(record.read(ROOT / "benchmarks" / "results" / "cpu" / "bench.json"))
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
    for name, seconds, ratio, memory in table:
        row = _quoted_row(NAMES.get(name, name))
        assert float(seconds) == pytest.approx(row["minimum"], rel=5e-3)
        assert float(ratio) == pytest.approx(row["ratio"], abs=6e-3)
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


def test_nothing_is_beyond_the_machine():
    found = {(r["name"], r["provider"]): r["ratio"] for r in plots.measured(QUOTED["rows"])}
    assert max(found.values()) < 1.02, max(found, key=lambda name: found[name])
    # The run's one product at the start was slower than its controls.
    rates = record.read(ROOT / "benchmarks" / "results" / "cpu" / "bench.json")["rates"]
    for name, rate in rates["operations"].items():
        assert QUOTED["rates"]["operations"][name] >= rate


def test_rates_are_the_highest_of_both():
    one = {"operations": {"float32": 2.0}, "bytes": {"10": 1.0}, "specials": None}
    other = {"operations": {"float32": 1.0, "tf32": 5.0}, "bytes": {"9": 3.0}, "specials": None}
    best = {"operations": {"tf32": 5.0, "float32": 2.0}, "bytes": {"9": 3.0, "10": 1.0}}
    assert limits.best_of(one, other) == best | {"specials": None}


def test_controls_count_as_what_they_do():
    for job in ("losses", "patches", "triplet", "train"):
        case = case_of(all_cases(job, True, "cpu", [8])[0])
        work = case.control_work()
        assert (work.flops > 0) != (work.bytes > 0)


@pytest.mark.parametrize("provider", patch_cases.OWN_DRAWS)
def test_who_draws_its_own_crops_says_so_in_its_row(provider):
    facts = next(
        f for f in all_cases("patches", False, "cpu") if provider in patch_cases.KINDS[f["kind"]]
    )
    remark = case_of(facts).remark(provider)
    assert "its own crops" in remark
    row = next(r for r in QUOTED["rows"] if r["provider"] == provider and r["status"] == "ok")
    assert remark in report.cells(row | {"remark": remark})[-1]
    assert not case_of(facts).remark("fastcontrast")


def test_every_peer_of_a_cpu_can_be_installed():
    extras = (ROOT / "pyproject.toml").read_text()
    bench = extras[extras.index("\nbench = [") :].split("]", 1)[0]
    alone = re.search(
        r"pip install --no-deps (.+)`", (ROOT / "docs" / "performance.md").read_text()
    )
    assert alone is not None
    assert alone[0].strip("`") in extras  # the comment there says the same
    wanted = {p.distribution for p in peers.PROVIDERS.values() if not p.needs_cuda}
    wanted |= set(patch_cases.PatchCase.distributions.values()) - {patch_cases.TRITON_AUGMENT}
    for name in wanted - {"torch", "fastcontrast"}:
        named = name.replace("_", "-") in bench.replace("_", "-")
        assert named or f"{name}==" in alone[1], name


def _contrast(one, other):
    """WCAG 2's ratio of luminances."""
    light = []
    for color in (one, other):
        srgb = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in srgb]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("paper", ["#ffffff", "#14181c"])
def test_lines_stand_out_from_light_and_dark_pages(paper):
    assert paper.replace("#ffffff", "#fff") in report.STYLE
    colors = [*plots.COLORS, plots.OURS_COLOR, plots.PEER_COLOR, plots.LIMIT]
    colors += [color for color, _, _ in numerics.STYLES.values()]
    assert {c: _contrast(c, paper) for c in colors if _contrast(c, paper) < 3} == {}


def test_no_provider_beats_its_limit() -> None:
    """Of bytes by construction, of products because a GEMM of the run has the rate."""
    assert max(row["ratio"] for row in QUOTED["rows"] if "ratio" in row) <= 1.02
