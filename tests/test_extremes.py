"""Numbers at the edge of what a dtype or an address holds, on every backend.

Part of the list of traps in ``test_traps.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor
from variants import on_every_backend

from fastcontrast import distance_softmax, info_nce_loss

every_backend = on_every_backend("distance_softmax")


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_confident_rows_in_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Losses of about e^-27, far below the eps of each dtype, from the points as rounded."""
    y = (20 * torch.eye(6, 8)).to(dtype)
    x = (20 * torch.eye(6, 8) + 0.01 * torch.randn(6, 8)).to(dtype).requires_grad_()
    loss = info_nce_loss(x, y, reduction="none", backend=backend)
    exact = x.detach().double().requires_grad_()
    s = -(exact[:, None] - y.double()).square().sum(2).sqrt()
    others = s.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).logsumexp(1)
    truth = F.softplus(others - s.diagonal(), threshold=700.0)
    assert float(truth.detach().max()) < 1e-11
    # A score of size 28 is rounded to 28 eps of the accumulator.
    floor = 40 * torch.finfo(loss.dtype).eps + VALUE_FLOOR[dtype]
    assert relative_error(loss, truth) < floor
    (a,), (b,) = gradients(2.0**36 * loss.sum(), x), gradients(2.0**36 * truth.sum(), exact)
    assert relative_error(a, b) < floor + GRADIENT_FLOOR[dtype]


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_squares_that_overflow_float16(metric: str, backend: str) -> None:
    """Squared distances of about 10^6, where float16 ends at 65504."""
    x, y = ((200 * torch.randn(9, 16)).half().requires_grad_() for _ in range(2))
    loss = info_nce_loss(x, y, metric=metric, temperature=1e4, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    truth = info_nce_loss(*wide, metric=metric, temperature=1e4, backend="reference")
    assert relative_error(loss, truth) < 1e-5  # scores of 100, rounded to eps
    for a, b in zip(
        gradients(2.0**12 * loss, x, y), gradients(2.0**12 * truth, *wide), strict=True
    ):
        assert relative_error(a, b) < GRADIENT_FLOOR[torch.float16]


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_probabilities_keep_their_gradients(reduction: str, backend: str) -> None:
    """None is too small to be worth its arithmetic: those of e^-5 to e^-80, each by itself."""
    distances = torch.tensor([1.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0])
    y = torch.zeros(7, 3)
    y[:, 1] = distances
    y.requires_grad_()
    loss = info_nce_loss(torch.zeros(1, 3), y, reduction=reduction, backend=backend).sum()
    p = torch.softmax(-distances.double(), 0)
    p[0] = p[0] - 1
    # A score of 80 is rounded to 80 eps, which is an error of its probability.
    torch.testing.assert_close(gradients(loss, y)[0][:, 1].double(), -p, rtol=2e-5, atol=0)


@every_backend
def test_rows_further_apart_than_32_bits(tmp_path: Path, backend: str) -> None:
    """Strides of 2^30 elements, in a file of which only the pages of four rows exist."""
    stride, dim = 2**30, 5
    memory = torch.from_file(
        str(tmp_path / "memory"), shared=True, size=3 * stride + dim, dtype=torch.float32
    )
    far = memory.as_strided((4, dim), (stride, 1))
    far.copy_(torch.randn(4, dim))
    near = far.detach().clone().requires_grad_()
    far.requires_grad_()
    y = torch.randn(6, dim)
    for metric in ("l2", "dot"):
        for left, right in ((far, y), (y[:4], far)):
            same = [near if t is far else t for t in (left, right)]
            a = info_nce_loss(left, right, metric=metric, backend=backend)
            b = info_nce_loss(*same, metric=metric, backend=backend)
            assert torch.equal(a, b)
            assert torch.equal(gradients(a, far)[0], gradients(b, near)[0])


@every_backend
def test_a_score_that_equals_the_threshold_does_not_rank(backend: str) -> None:
    """Products of small integers are exact on every unit, and so ties are ties."""
    x, y = torch.randint(-3, 4, (9, 5)).float(), torch.randint(-3, 4, (23, 5)).float()
    s = x @ y.T
    threshold = s[:, 7]
    exclude = torch.arange(9)  # some of them above the threshold
    r = distance_softmax(
        x, y, metric="dot", exclude=exclude, threshold=threshold, precision="ieee", backend=backend
    )
    above = s > threshold[:, None]
    above[torch.arange(9), exclude] = False
    assert torch.equal(r.rank, above.sum(1))
    assert int((s == threshold[:, None]).sum()) > 9  # more than each row's own
