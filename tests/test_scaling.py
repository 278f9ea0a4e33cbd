"""The model of many ranks, and the run that it is set beside (benchmarks/scaling.py)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import scaling  # noqa: E402
from benchmarks.scaling import CLUSTERS, STRATEGIES, Cluster, balance, loss_step  # noqa: E402


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: c.name)
def test_at_the_balance_sending_takes_as_long_as_computing(cluster: Cluster, strategy: str) -> None:
    """The document's table against the model of a step: what waits there, and hides beyond."""
    still = cluster._replace(latency=0.0)
    rows = math.ceil(balance(still, strategy, 2))
    step = loss_step(still, 4096, rows, 512, strategy, 2)
    if strategy == "gather":
        assert step.waiting == pytest.approx(step.compute, rel=2e-3)
    else:  # from there on only the last gradients' way home is waited for
        home = rows * 512 * 4 / still.link
        assert step.waiting == pytest.approx(home, rel=0.2)
        assert loss_step(still, 4096, rows // 2, 512, strategy, 2).waiting > 100 * home / 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_waits_for_nobody(strategy: str) -> None:
    step = loss_step(CLUSTERS[2], 1, 4096, 512, strategy, 2)
    assert step.waiting == 0.0
    assert step.seconds == step.compute > 0.0


def test_what_does_not_overlap_takes_longer() -> None:
    steps = [
        loss_step(CLUSTERS[0], 8, 4096, 512, "ring", 2, overlap=overlap)
        for overlap in (True, False)
    ]
    assert steps[0].compute == steps[1].compute
    assert steps[0].waiting < steps[1].waiting


def test_memory_of_the_ring_does_not_grow_with_ranks() -> None:
    ring, gather = (
        [loss_step(CLUSTERS[0], w, 4096, 512, s, 2).memory for w in (8, 4096)]
        for s in ("ring", "gather")
    )
    assert ring[0] == ring[1]
    assert gather[1] > 100 * gather[0]


def test_tables_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = scaling.tables(4096, 512, 2)
    page = (ROOT / "docs" / "scaling.md").read_text()
    for line in text.splitlines():
        assert not line or line in page
    scaling.draw(4096, 512, 2, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ranks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "scaling.json"
    scaling.measure(96, 16, [2], path)
    results = json.loads(path.read_text())["results"]
    assert [(r["ranks"], r["strategy"]) for r in results] == [
        (1, "gather"), (2, "gather"), (2, "ring")
    ]  # fmt: skip
    assert results[0]["model_seconds"] == pytest.approx(min(results[0]["seconds"]))
    for row in results:
        assert min(row["seconds"] + row["all_gather"] + row["gemm"]) > 0
        assert row["bytes"] >= 0
