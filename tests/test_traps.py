"""What losses of this kind get wrong elsewhere, one named test each.

Coincident and near pairs, offsets, confident rows, padding, temperatures, empty rows, precision,
determinism, 64-bit offsets and non-finite inputs are in ``test_numerics.py``; second derivatives
in ``test_double_backward.py``; the gradient of every row on its own in ``test_losses.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from variants import on_every_backend

import fastcontrast as fc

every_backend = on_every_backend("distance_softmax")
IDS = torch.arange(8) % 3

# Every loss of two matrices; a path of its own each.
LOSSES: dict[str, Any] = {
    "mean": fc.info_nce_loss,
    "rows": lambda x, y, **o: fc.info_nce_loss(x, y, reduction="none", **o).sum(),
    "symmetric": lambda x, y, **o: fc.info_nce_loss(x, y, symmetric=True, **o),
    "smoothed": lambda x, y, **o: fc.info_nce_loss(x, y, label_smoothing=0.1, **o),
    "debiased": lambda x, y, **o: fc.info_nce_loss(x, y, tau_plus=0.01, hardness=0.5, **o),
    "bank": lambda x, y, **o: fc.info_nce_loss(x, y[: len(x)], negatives=y, in_batch=False, **o),
    "nt_xent": lambda x, y, **o: fc.nt_xent_loss(x, y[: len(x)], metric="l2", **o),
    "supcon": lambda x, y, **o: fc.supcon_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, metric="l2", **o
    ),
    "nca": lambda x, y, **o: fc.nca_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, **o
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def pair(m: int = 8, n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(m, 5, dtype=dtype), torch.randn(n, 5, dtype=dtype)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@every_backend
@every_loss
def test_a_second_backward_pass_gives_the_same(name: str, backend: str) -> None:
    """retain_graph, and autograd.grad twice: gradients taken in the forward pass stay."""
    x, y = (t.requires_grad_() for t in pair())
    loss = LOSSES[name](x, y, backend=backend)
    first, second = gradients(loss, x, y), gradients(loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss.backward()
    assert torch.equal(x.grad, first[0])


@every_backend
@every_loss
def test_a_scaler_scales(name: str, backend: str) -> None:
    """The upstream gradient, 2^16 here, multiplies before float16 rounds."""
    x, y = (t.half().requires_grad_() for t in pair())
    scaler = torch.amp.GradScaler("cpu")
    loss = LOSSES[name](x, y, backend=backend)
    (scaled,) = torch.autograd.grad(scaler.scale(loss), x)
    wide = x.detach().float().requires_grad_()
    truth = 2.0**16 * torch.autograd.grad(LOSSES[name](wide, y.float(), backend=backend), wide)[0]
    representable = truth.abs() < torch.finfo(torch.float16).max
    # One rounding to float16.
    torch.testing.assert_close(
        scaled[representable].float(), truth[representable], rtol=1e-3, atol=1e-2
    )


@every_backend
@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_nothing(dtype: torch.dtype, name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in pair())
    plain = LOSSES[name](x, y, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        loss = LOSSES[name](x, y, backend=backend)
    assert torch.equal(loss, plain)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(loss, x, y), gradients(plain, x, y), strict=True)
    )


@every_backend
@every_loss
def test_second_derivatives_are_right(name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in pair(4, 4, torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda x, y: LOSSES[name](x, y, temperature=0.8, backend=backend), (x, y)
    )


@every_backend
@every_loss
def test_a_query_that_is_its_key_receives_both_gradients(name: str, backend: str) -> None:
    """And nothing is left out because two arguments are one object."""
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    copy = x.detach().clone().requires_grad_()
    together = LOSSES[name](x, x, backend=backend)
    apart = LOSSES[name](x, copy, backend=backend)
    torch.testing.assert_close(together, apart)
    (both,) = gradients(together, x)
    torch.testing.assert_close(both, sum(gradients(apart, x, copy)))


@every_backend
@every_loss
def test_layouts_do_not_matter(name: str, backend: str) -> None:
    """Columns of a wider matrix, every other row, transposed, expanded with stride 0."""
    wide, tall, turned = torch.randn(8, 12), torch.randn(17, 5), torch.randn(5, 8)
    row = torch.randn(1, 5)
    for view in (wide[:, 1:11:2], tall[1::2], turned.T, row.expand(8, 5)):
        y = torch.randn(8, 5)
        a = view.clone().requires_grad_()
        base = view.detach().requires_grad_()
        left, right = LOSSES[name](a, y, backend=backend), LOSSES[name](base, y, backend=backend)
        assert torch.equal(left, right)
        assert torch.equal(gradients(left, a)[0], gradients(right, base)[0])


@every_backend
@every_loss
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_numbers_show(value: float, name: str, backend: str) -> None:
    """A NaN key reaches the loss; an infinitely far query alone does not pass unnoticed."""
    x, y = pair()
    y[2, 1] = value
    loss = LOSSES[name](x, y, backend=backend)
    if torch.isnan(torch.tensor(value)):
        assert bool(torch.isnan(loss))
    else:  # the positive at infinity costs infinitely much, or its class goes on without it
        assert bool(torch.isinf(loss) | torch.isnan(loss)) or name in ("supcon", "nca")


@every_backend
def test_a_mask_and_a_learnt_temperature(backend: str) -> None:
    """Masked columns are -inf: dividing those by the temperature gives it a NaN gradient."""
    x, y = pair(8, 11, torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 2, 3, -100, 5, 6, 10])
    own = torch.zeros(8, dtype=torch.int32)
    for loss in (
        lambda t: fc.info_nce_loss(x, y, target, temperature=t, backend=backend),
        lambda t: fc.supcon_loss(x, IDS, temperature=t, backend=backend),
        lambda t: fc.nca_loss(x, own, temperature=t, backend=backend),
        lambda t: fc.info_nce_loss(x[:1], y[:1], label_smoothing=0.5, temperature=t),
    ):
        assert torch.autograd.gradcheck(loss, temperature)


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine", "dot"])
def test_equal_keys_share_and_ties_do_not_rank(metric: str, backend: str) -> None:
    x = torch.randn(1, 5).expand(6, 5).contiguous().requires_grad_()
    loss, stats = fc.info_nce_loss(
        x, x, metric=metric, return_stats=("rank", "top1", "entropy"), backend=backend
    )
    assert loss.item() == pytest.approx(torch.log(torch.tensor(6.0)).item(), rel=1e-6)
    assert stats.entropy.tolist() == pytest.approx([loss.item()] * 6, rel=1e-6)
    if metric in ("l2", "sqeuclidean"):
        assert stats.rank.tolist() == [0] * 6  # none is strictly nearer
        assert torch.equal(gradients(loss, x)[0], torch.zeros_like(x))


@every_backend
def test_zero_vectors_have_no_direction(backend: str) -> None:
    """F.normalize gives them a gradient of 1e12; here the cosine is 0 and its gradient too."""
    x, y = pair()
    x[3] = 0
    x.requires_grad_()
    for loss in (fc.nt_xent_loss(x, y, backend=backend), fc.supcon_loss(x, IDS, backend=backend)):
        (gradient,) = gradients(loss, x)
        assert bool(gradient.isfinite().all())
        assert gradient[3].abs().max().item() == 0.0


@every_backend
@pytest.mark.parametrize("scale", [1e3, 1e-20])
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 100.0])
def test_cosine_at_every_temperature_and_size(
    temperature: float, scale: float, backend: str
) -> None:
    """A fixed maximum of 1 / temperature underflows below 0.008; a norm squared below 1e-19."""
    x, y = (scale * t for t in pair(20, 20))
    x.requires_grad_()
    loss = fc.nt_xent_loss(x, y, temperature=temperature, backend=backend)
    z = F.normalize(torch.cat([x, y]).detach().double() / scale)
    s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    truth = F.cross_entropy(s, torch.arange(40).roll(20))
    # Cosines are rounded to eps, scores to eps / temperature.
    assert abs(loss.item() - truth.item()) < 2e-6 * truth.item() + 4e-7 / temperature
    assert bool(gradients(loss, x)[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integers_of_both_widths(dtype: torch.dtype) -> None:
    x, y = pair()
    target = torch.tensor([1, 2, -100, 4, 5, 6, 7, 0])
    assert torch.equal(fc.info_nce_loss(x, y, target.to(dtype)), fc.info_nce_loss(x, y, target))
    assert torch.equal(fc.supcon_loss(x, IDS.to(dtype)), fc.supcon_loss(x, IDS))


def test_a_class_id_may_be_any_integer() -> None:
    """-100 is ignore_index of a target; a class id of that value is a class."""
    x, _ = pair()
    assert torch.equal(fc.supcon_loss(x, torch.where(IDS == 0, -100, IDS)), fc.supcon_loss(x, IDS))
    far = torch.where(IDS == 0, torch.iinfo(torch.int64).min, IDS)
    assert torch.equal(fc.supcon_loss(x, far), fc.supcon_loss(x, IDS))


@every_loss
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(8, 6), "same number of columns D"),
        (torch.empty(8, 5, device="meta"), "must be on one device"),
    ],
    ids=["D", "device"],
)
def test_operands_that_do_not_fit(bad: Tensor, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name](torch.randn(8, 5), bad)


@every_loss
def test_functional_transforms_raise_clearly(name: str) -> None:
    x, y = pair()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: LOSSES[name](x, y))(x)


@pytest.mark.parametrize("name", ["symmetric", "smoothed", "nt_xent", "supcon"])
def test_compiled_whole_for_every_batch_size(name: str) -> None:
    """Nothing compiled anew for 20 batch sizes, and the values and gradients of eager mode."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend=graphs)
    for m in range(6, 26):
        x, y = (t.requires_grad_() for t in pair(m, m))
        value = loss(x, y)
        # The graph of the loss, and that of its gradient.
        assert graphs.frame_count <= 2, m
    torch.testing.assert_close(value, LOSSES[name](x, y))
    eager = torch.autograd.grad(LOSSES[name](x, y), [x, y])
    for a, b in zip(torch.autograd.grad(value, [x, y]), eager, strict=True):
        torch.testing.assert_close(a, b)
