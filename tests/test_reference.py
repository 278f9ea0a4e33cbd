"""The reference backend in float64 against the oracle's loops: second link of the truth chain."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import MASKS, METRICS, case

from fastcontrast import distance_softmax
from fastcontrast.backends.reference.distance_softmax import differentiable_statistics
from fastcontrast.backends.scores import Scores

# Both sides are float64 over at most 20 columns; scores reach 60, so 60 eps = 1.4e-14 and a margin.
ORACLE = 1e-12


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape", ["one by one", "one column", "vector minus one", "vector plus one"]
)
def test_statistics_equal_the_equations(shape: str, metric: str, mask: str) -> None:
    c = case(shape, mask, torch.float64)
    scale = 0.8
    threshold = torch.full((c.x.shape[0],), -1.5, dtype=torch.float64)
    result = distance_softmax(
        c.x, c.y, metric=metric, scale=scale, threshold=threshold, score_sum=True,
        backend="reference", **c.options,
    )  # fmt: skip
    exclude = c.options.get("exclude")
    if exclude is not None:
        exclude = exclude.reshape(c.x.shape[0], -1).tolist()
    ids = [c.options[k].tolist() if k in c.options else None for k in ("row_ids", "column_ids")]

    def counting(row: int) -> list[int]:
        return oracle.columns_that_count(
            row, c.y.shape[0], exclude, *ids, c.options.get("keep", "all")
        )

    truth = oracle.row_statistics(
        c.x.tolist(), c.y.tolist(), metric, scale, counting, threshold.tolist()
    )
    for i, (lse, entropy, mean, rank, total, count) in enumerate(truth):
        assert result.lse[i].item() == pytest.approx(lse, rel=ORACLE, abs=ORACLE)
        assert result.entropy[i].item() == pytest.approx(entropy, rel=ORACLE, abs=ORACLE)
        if count:
            assert result.mean_score[i].item() == pytest.approx(mean, rel=ORACLE, abs=ORACLE)
        assert result.score_sum[i].item() == pytest.approx(total, rel=ORACLE, abs=ORACLE)
        assert (result.rank[i].item(), result.column_count[i].item()) == (rank, count)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_equal_differences(metric: str, mask: str) -> None:
    """Gradients by autograd against central differences of the forward pass."""
    c = case("few", mask, torch.float64)
    x, y = c.x.clone().requires_grad_(), c.y.clone().requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def statistics(x, y, scale):
        r = distance_softmax(
            x, y, metric=metric, scale=scale, score_sum=True, backend="reference", **c.options
        )
        lse = torch.where(torch.isinf(r.lse), 0.0, r.lse)
        return lse, r.entropy, r.score_sum

    assert torch.autograd.gradcheck(statistics, (x, y, scale))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "dot"])
def test_gradients_equal_autograd(metric: str, mask: str) -> None:
    """The formula of the backward pass against autograd through the dense definition."""
    c = case("vector plus one", mask, torch.float64)  # with coincident points
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = (c.x.clone().requires_grad_(), c.y.clone().requires_grad_(), scale)
    r = distance_softmax(
        *inputs[:2], metric=metric, scale=scale, score_sum=True, backend="reference", **c.options
    )
    exclude = c.options.get("exclude")
    scores = Scores(
        metric,
        scale,
        None if exclude is None else exclude.reshape(c.x.shape[0], -1),
        c.options.get("row_ids"),
        c.options.get("column_ids"),
        c.options.get("keep", "all"),
        "ieee",
    )
    truth = differentiable_statistics(*inputs[:2], scores)
    upstream = [torch.randn_like(v) for v in truth]
    mine = torch.autograd.grad((r.lse, r.entropy, r.score_sum), inputs, upstream)
    for a, b in zip(mine, torch.autograd.grad(truth, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=ORACLE, atol=ORACLE)
