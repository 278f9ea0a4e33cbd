"""The benchmark: its record, runs that end early, peers that fail, its page."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import comparison, limits, measure, peers, processes, record, report, suite
from benchmarks.cases import Work
from fastcontrast import cli

TESTS = Path(__file__).parent
ROWS = 24
PEERS = tuple(peers.PROVIDERS)  # without those that go wrong, which `broken` adds


@pytest.fixture(scope="module")
def broken():
    """The adapters of broken_peers.py, in this process as well."""
    before = dict(peers.PROVIDERS)
    import broken_peers

    yield broken_peers
    peers.PROVIDERS.clear()
    peers.PROVIDERS.update(before)


@pytest.fixture(scope="module")
def finished(broken, tmp_path_factory):
    """A run of one size with every broken peer: its folder and exit code."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PRELOADED", ("benchmarks.loss_cases", "broken_peers"))
        patch.setattr(suite, "CALL_LIMIT", {"quick": 2.0, "full": 2.0})
        patch.setenv("PYTHONPATH", str(TESTS))
        with processes.Measurer(returning=True) as measurer:  # one for all runs: it takes seconds
            patch.setattr(suite, "Measurer", lambda returning: nullcontext(measurer))
            yield folder, _bench(folder)


def _bench(folder, *flags):
    names = ["torch eager", "is large", "is absent", "raises", "eats", "dies", "hangs", "another"]
    arguments = ["memory", "--quick", "--sizes", str(ROWS), "--device", "cpu", "--threads", "1"]
    return suite.main([*arguments, "--peers", *names, "--out", str(folder), *flags])


@pytest.fixture
def results(finished):
    """A copy of the run's record."""
    return record.read(finished[0] / suite.FILE)


def _row(results, provider):
    return next(row for row in results["rows"] if row["provider"] == provider)


def test_a_run_measures_ours_and_a_peer(finished, results):
    assert finished[1] == 0
    for name in ("fastcontrast", "torch eager"):
        row = _row(results, name)
        assert row["status"] == "ok"
        assert row["minimum"] > 0
        assert row["error"]["gradient"] < 1e-5  # float32 on 24 rows


@pytest.mark.parametrize(
    ("provider", "status", "said"),
    [
        ("raises", "failed", "ValueError: it does not like these points"),
        ("eats memory", "out of memory", "can't allocate memory"),
        ("dies", "out of memory", "the system ended the process"),
        ("hangs", "failed", "not done after 2 s"),
        ("another job", "differs", "another job"),
        ("is large", "skipped", "GiB that are free"),
        ("is absent", "skipped", "not installed"),
    ],
)
def test_a_peer_that_fails_is_a_row(results, provider, status, said):
    row = _row(results, provider)
    assert row["status"] == status
    assert said in row["reason"]


def test_a_run_goes_on_where_it_ended(finished, results, capsys):
    path = finished[0] / suite.FILE
    ended = copy.deepcopy(results)
    ended["rows"] = [row for row in ended["rows"] if row["provider"] != "torch eager"]
    path.write_text(json.dumps(ended))
    assert _bench(finished[0]) == 0
    again = record.read(path)
    assert len(again["rows"]) == len(results["rows"])
    assert _row(again, "torch eager")["status"] == "ok"
    assert again["elapsed_seconds"] > results["elapsed_seconds"] > 0  # that of both parts
    assert "the run took: " in (finished[0] / "bench.md").read_text()
    kept = [row for row in again["rows"] if row["provider"] != "torch eager"]
    assert kept == ended["rows"]

    ended["environment"]["commit"] = "another"
    path.write_text(json.dumps(ended))
    assert _bench(finished[0]) == 2
    assert "commit was 'another'" in capsys.readouterr().err
    path.write_text(json.dumps(results))


def test_a_peer_that_fewer_rows_show_to_be_slow_is_a_row(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "PREDICTED_LIMIT", {"quick": 0.0})
    flags = ["--quick", "--device", "cpu", "--threads", "1", "--peers", "torch eager"]
    assert suite.main(["memory", *flags, "--sizes", "16", "24", "--out", str(tmp_path)]) == 0
    rows = record.read(tmp_path / suite.FILE)["rows"]
    found = {(row["provider"], row["case"]["rows"]): row for row in rows}
    assert [row["status"] for row in found.values()].count("ok") == 3
    assert "by what a smaller case took" in found["torch eager", 24]["reason"]


def test_more_dimensions_are_predicted_too():
    runner, row = object.__new__(suite.Run), {"provider": "KeOps", "status": "ok"}
    facts = {"job": "losses", "metric": "l2", "rows": 64, "dim": 8}
    sizes = ((64, 8), (32, 8), (64, 16), (128, 4), (16, 8))
    runner.record = {"rows": [row | {"case": facts | {"rows": r, "dim": d}} for r, d in sizes]}

    asked = SimpleNamespace(facts=facts | {"job": "memory", "dim": 16})
    found = runner._smaller_case(asked, "KeOps")
    assert found["case"] == facts
    assert found["more"] == 2.0
    assert runner._smaller_case(asked, "torch eager") is None


def test_the_last_case_ends_soon_after_the_time(results, tmp_path, monkeypatch):
    """What it cuts short is no row, and is measured when the run goes on."""
    monkeypatch.setattr(suite, "CALL_LIMIT", {"quick": 60.0, "full": 60.0})
    monkeypatch.setattr(suite, "LAST_CASE", 4.0)
    record.save(results | {"rows": []}, tmp_path / suite.FILE)
    original = suite.Run._case
    monkeypatch.setattr(suite.Run, "_out_of_time", lambda run: hasattr(run, "begun"))

    def case(run, found):
        run.begun = True
        original(run, found)

    monkeypatch.setattr(suite.Run, "_case", case)
    assert _bench(tmp_path, "--seconds", "1") == 0
    found = {r["provider"] for r in record.read(tmp_path / suite.FILE)["rows"]}
    assert "hangs" not in found
    assert "fastcontrast" in found


def test_a_run_that_fails_leaves_its_page(finished, results, tmp_path, monkeypatch, capsys):
    record.save(results, tmp_path / suite.FILE)

    def fails(run, case):
        raise RuntimeError("the measuring process has ended")

    monkeypatch.setattr(suite.Run, "_case", fails)
    assert _bench(tmp_path) == 2
    assert "the measuring process has ended" in capsys.readouterr().err
    assert "torch eager" in (tmp_path / "bench.html").read_text()


def test_memory_is_predicted_by_fewer_rows(finished, tmp_path, monkeypatch):
    """Not by a count of matrices that would be too many here."""
    large = peers.PROVIDERS["is large"]._replace(distribution="torch")
    flags = ["--quick", "--device", "cpu", "--threads", "1", "--peers", "torch eager"]
    assert suite.main(["memory", *flags, "--sizes", "16", "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(peers.PROVIDERS, "torch eager", large)
    assert suite.main(["memory", *flags, "--sizes", "24", "--out", str(tmp_path)]) == 0
    assert [r["status"] for r in record.read(tmp_path / suite.FILE)["rows"]] == ["ok"] * 4

    found = record.read(tmp_path / suite.FILE)
    for row in found["rows"]:
        if row["provider"] == "torch eager":
            row["peak_bytes"] = 1 << 50
    record.save(found, tmp_path / suite.FILE)
    assert suite.main(["memory", *flags, "--sizes", "32", "--out", str(tmp_path)]) == 0
    last = record.read(tmp_path / suite.FILE)["rows"][-1]
    assert "GiB that are free" in last["reason"]


def test_the_memory_job_takes_over_what_the_losses_have_measured(results, tmp_path):
    for row in results["rows"]:
        row |= {"job": "losses", "case": row["case"] | {"job": "losses"}}
        row |= {"peak_bytes": 12345} if row["status"] == "ok" else {}
    record.save(results, tmp_path / suite.FILE)
    assert _bench(tmp_path) == 0
    rows = [r for r in record.read(tmp_path / suite.FILE)["rows"] if r["job"] == "memory"]
    assert [r["peak_bytes"] for r in rows if r["status"] == "ok"] == [12345] * 2
    assert {r["provider"] for r in rows} == {r["provider"] for r in results["rows"]}


def test_no_case_begins_when_the_time_is_up(results, tmp_path):
    record.save(results | {"rows": []}, tmp_path / suite.FILE)
    assert _bench(tmp_path, "--seconds", "0") == 0
    assert not record.read(tmp_path / suite.FILE)["rows"]
    assert (tmp_path / "bench.html").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(schema=0), "schema is 0"),
        (lambda r: r.pop("rates"), "rates is missing"),
        (lambda r: r["rows"][0].update(status="fine"), "status is 'fine'"),
        (lambda r: r["rows"][0].pop("peak_bytes"), "rows[0]: peak_bytes is missing"),
        (lambda r: r["rows"][-1].pop("reason"), "reason is missing"),
    ],
)
def test_a_record_has_its_schema(results, change, said):
    results["rows"].sort(key=lambda row: row["status"] != "ok")
    record.check(results)
    change(results)
    with pytest.raises(ValueError, match=re.escape(said)):
        record.check(results)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(2.0, "slower"), (0.5, "faster"), (1.02, "same"), (1.25, "same")]
)
def test_only_what_is_beyond_noise_has_changed(results, factor, verdict):
    old = copy.deepcopy(results)
    for found in (old, results):
        _row(found, "fastcontrast").update(minimum=1e-3, median=1.3e-3)  # 30 % noise
    row = _row(results, "fastcontrast")
    row.update(minimum=factor * row["minimum"], median=factor * row["median"])
    changed = {c["provider"]: c["verdicts"] for c in comparison.compare(old, results)}
    assert changed["fastcontrast"] == ([] if verdict == "same" else [verdict])
    assert changed["torch eager"] == []


@pytest.mark.parametrize(
    ("field", "value", "verdict"),
    [
        ("peak_bytes", 600 << 20, "more memory"),
        ("peak_bytes", 6 << 20, "less memory"),
        ("peak_bytes", 63 << 20, None),  # 5 %
        ("error", {"loss": 1e-7, "gradient": 1e-2}, "larger error"),
        ("error", {"loss": 1e-7, "gradient": 2e-6}, "smaller error"),
        ("error", {"loss": 1e-7, "gradient": 1.1e-5}, None),
    ],
)
def test_memory_and_error_are_compared(results, field, value, verdict):
    _row(results, "fastcontrast").update(peak_bytes=60 << 20, error={"gradient": 1e-5})
    old = copy.deepcopy(results)
    _row(results, "fastcontrast")[field] = value
    changes = comparison.compare(old, results)
    assert [c["verdicts"] for c in changes if c["verdicts"]] == ([[verdict]] if verdict else [])
    assert (verdict or "0 changed beyond noise") in comparison.text(changes)
    assert comparison.is_worse(changes) == (verdict in ("more memory", "larger error"))


@pytest.mark.parametrize("provider", ["fastcontrast", "torch eager"])
def test_what_is_gone_is_a_change(results, provider):
    old = copy.deepcopy(results)
    results["rows"] = [row for row in results["rows"] if row["provider"] != provider]
    changes = comparison.compare(old, results)
    assert f"no longer measured  {provider}" in comparison.text(changes)
    assert comparison.is_worse(changes) == (provider == "fastcontrast")
    assert "1 no longer made" in comparison.text(changes)
    assert not any(c["verdicts"] for c in comparison.compare(old, results, ("losses",)))


def test_a_slower_peer_is_its_own_affair(results):
    old = copy.deepcopy(results)
    row = _row(results, "torch eager")
    row.update(minimum=99 * row["median"], median=99 * row["median"])
    changes = comparison.compare(old, results)
    assert changes[0]["verdicts"] == ["slower"]
    assert not comparison.is_worse(changes)


def test_what_no_longer_runs_is_a_change(results):
    old = copy.deepcopy(results)
    _row(results, "fastcontrast").update(status="failed", reason="broken")
    changes = comparison.compare(old, results)
    assert (changes[0]["provider"], changes[0]["verdicts"]) == ("fastcontrast", ["now failed"])
    assert "now failed" in comparison.text(changes)
    assert comparison.is_worse(changes)


def test_compare_says_it_by_the_exit_code(finished, results, tmp_path, capsys):
    for row in results["rows"]:
        if row["status"] == "ok":
            row.update(minimum=row["minimum"] / 10, median=row["minimum"] / 10)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(results))
    assert _bench(finished[0], "--compare", str(old)) == 1
    assert "slower" in capsys.readouterr().out
    assert "slower" in (finished[0] / "bench.html").read_text()


class _Page(html.parser.HTMLParser):
    """Counts tags, and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")
        ]


def test_the_page_needs_no_other_file(results, tmp_path):
    row = _row(results, "fastcontrast")
    for rows in (64, 128, 256):  # a ladder, and cases that the other pictures are drawn of
        case = row["case"] | {"rows": rows, "job": "losses"}
        for provider in ("fastcontrast", "torch eager"):
            more = row | {"job": "losses", "case": case, "name": f"M = {rows}"}
            results["rows"].append(more | {"provider": provider})
    series = {"values": [1.0, 0.1], "errors": [{"fastcontrast": [1e-7, 2e-7]}] * 2}
    results["numerics"] = {"distance": series, "temperature": series}
    written = report.write(results, tmp_path)
    page = _Page()
    page.feed((tmp_path / "bench.html").read_text())
    assert not page.fetched
    assert page.tags.count("svg") == sum(p.suffix == ".png" for p in written) == 6
    assert "<script" not in (tmp_path / "bench.html").read_text()
    table = (tmp_path / "bench.md").read_text()
    assert "not installed: is absent" in table
    assert "out of memory: RuntimeError" in table
    assert f"| fastcontrast {row['version']} |" in table


def test_providers_are_timed_in_turn():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    pace = measure.Pace(0.0, 5, 1)
    found = measure.in_turn(calls, pace, torch.device("cpu"), rounds=3, warm=0)
    assert order[-6:] == ["a", "b"] * 3
    assert [len(seconds) for seconds in found.values()] == [3, 3]
    figures = measure.figures([1.0, 1.0, 1.2, 4.0])
    assert (figures["minimum"], figures["outliers"]) == (1.0, 1)
    assert measure.drift_of([1.0, 1.2, 1.4]) == pytest.approx(0.2)


def test_the_limit_is_the_slowest_unit():
    rates = {
        "operations": {"float32": 100.0, "bfloat16": 400.0},
        "bytes": {"10": 50.0, "1000": 5.0},
        "specials": None,
    }
    facts = {"dtype": "float32", "device": "cpu", "precision": "auto"}
    assert limits.limit_of(Work(200, 20), facts, rates) == {"seconds": 2.0, "by": "products"}
    # 2000 bytes do not stay in the cache whose copies are ten times as fast
    assert limits.limit_of(Work(200, 2000), facts, rates) == {"seconds": 400.0, "by": "bytes"}
    threefold = facts | {"precision": "bf16x3"}
    assert limits.limit_of(Work(200, 20), threefold, rates)["seconds"] == 1.5
    slow = rates | {"operations": {"float32": 100.0, "bfloat16": 10.0}}  # no unit for bfloat16
    assert limits.limit_of(Work(200, 20), threefold, slow)["seconds"] == 2.0
    disturbed = rates | {"bytes": {"10": 1.0, "1000": 5.0}}
    assert limits.limit_of(Work(0, 20), facts, disturbed)["seconds"] == 4.0
    gpu = rates | {"specials": 1.0}
    assert limits.limit_of(Work(200, 20, 7), facts, gpu)["by"] == "special functions"


def test_a_peer_that_nobody_knows(capsys, tmp_path):
    assert suite.main(["losses", "--peers", "no-such", "--out", str(tmp_path)]) == 2
    assert "no peer 'no-such'; there are fastcontrast" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("report", "plots"):  # as in a process that has not imported them yet
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(f"benchmarks.{name}", raising=False)
    assert suite.main(["memory", "--quick", "--sizes", "4", "--out", str(tmp_path / "out")]) == 2
    assert "the report needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_clone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "fastcontrast" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "clone the project" in capsys.readouterr().err


def test_the_command_hands_over_to_the_clone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastcontrast", "bench", "--help"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert "--compare OLD.json" in done.stdout
    said = " ".join(done.stdout.split())  # names run on over the lines
    for word in (
        *suite.JOBS,
        *PEERS,
        "kornia, slice",
        "triton-augment",
        "now skipped or failed",
    ):
        assert word in said
