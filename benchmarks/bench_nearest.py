"""The k nearest columns of every row, Euclidean distance: ours beside chunked PyTorch.

The control is the one GEMM that any search contains (2MND operations), in the chunks of the peer,
which takes distances by the Gram identity and ``topk``; neither keeps the M×N matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcontrast

DIM = 128
CHUNK = 512  # rows at a time
SAMPLE = 64  # rows compared with the reference in float64


def chunked_topk(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    y_sqnorm = y.square().sum(1)
    values, indices = [], []
    for part in x.split(CHUNK):
        found = torch.addmm(y_sqnorm, part, y.T, alpha=-2).topk(k, dim=1, largest=False)
        squared = found.values + part.square().sum(1, keepdim=True)
        values.append(squared.clamp_(min=0).sqrt_())
        indices.append(found.indices)
    return torch.cat(values), torch.cat(indices)


def assert_agrees(x: Tensor, y: Tensor, k: int) -> None:
    """Ours to the column and to the rounding of a value; the peer to what its identity allows."""
    sample = x[:SAMPLE]
    truth = fastcontrast.nearest(sample.double(), y.double(), k, backend="reference")
    mine = fastcontrast.nearest(x, y, k)
    assert torch.equal(mine.indices[:SAMPLE], truth.indices)
    torch.testing.assert_close(mine.values[:SAMPLE], truth.values.float(), rtol=2.0**-23, atol=0)
    torch.testing.assert_close(
        chunked_topk(sample, y, k)[0], truth.values.float(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("rows", [4096, 16384])
def test_nearest(rows: int, k: int, race: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, DIM, generator=generator) for _ in range(2))
    assert_agrees(x, y, k)
    scores = torch.empty(CHUNK, rows)

    def gemm() -> None:
        for part in x.split(CHUNK):
            torch.mm(part, y.T, out=scores)

    race(
        f"nearest, M = N = {rows}, D = {DIM}, k = {k}, float32",
        lambda: fastcontrast.nearest(x, y, k),
        {"GEMMs": gemm, "torch mm + topk": lambda: chunked_topk(x, y, k)},
    )
