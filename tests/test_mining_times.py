"""benchmarks/mining.py: what it predicts of a size that is not run."""

from __future__ import annotations

import pytest

from benchmarks import mining as times


def test_two_sizes_predict_a_third() -> None:
    """Both grow with the pairs, beside what does not."""
    found = [
        {"miner": "m", "rows": rows, "seconds": 1 + 2e-6 * rows**2, "peak_bytes": 10 + 8 * rows**2}
        for rows in (2048, 4096)
    ]
    row = times.predicted("m", found, limit=8 * times.LARGE**2)
    assert row["seconds"] == pytest.approx(1 + 2e-6 * times.LARGE**2)
    assert row["peak_bytes"] == pytest.approx(10 + 8 * times.LARGE**2)
    assert not row["fits"]
    assert times.predicted("m", found, limit=10 * times.LARGE**2)["fits"]
