"""Losses with one positive per row, and all that can be added to them, against their equations."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from variants import on_every_backend

import fastcontrast as fc
from fastcontrast.ops.precision import of_widened

every_backend = on_every_backend("distance_softmax")
METRICS = ("l2", "sqeuclidean", "cosine", "dot")
# Both sides in float64; the oracle's sums are naive.
ORACLE = {"rel": 1e-10, "abs": 1e-11}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores_of(x: Tensor, y: Tensor, metric: str, temperature: float) -> list[list[float]]:
    return [[oracle.score(a, b, metric, 1 / temperature) for b in y.tolist()] for a in x.tolist()]


def check_gradients(function: Any, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, tuple(t.clone().requires_grad_() for t in inputs))


# InfoNCE: smoothing, ignored rows, weights, corrections


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_info_nce_with_ignored_weighted_and_smoothed_rows(
    metric: str, symmetric: bool, backend: str
) -> None:
    x, y = random(5, 3), random(7, 3)
    target = torch.tensor([6, -100, 0, 3, 2])
    weight = torch.tensor([0.5, 9.0, 0.0, 2.0, 1.0])
    options: dict[str, Any] = {
        "metric": metric, "temperature": 0.7, "symmetric": symmetric, "row_weight": weight,
        "label_smoothing": 0.1, "backend": backend,
    }  # fmt: skip
    s = scores_of(x, y, metric, 0.7)
    rows = []
    for i, t in enumerate(target.tolist()):
        if t < 0:
            rows.append(0.0)
            continue
        loss = oracle.smoothed_cross_entropy(s[i], t, 0.1)
        if symmetric:
            back = oracle.smoothed_cross_entropy([row[t] for row in s], i, 0.1)
            loss = (loss + back) / 2
        rows.append(weight[i].item() * loss)
    assert fc.info_nce_loss(x, y, target, reduction="none", **options).tolist() == pytest.approx(
        rows, **ORACLE
    )
    mean = fc.info_nce_loss(x, y, target, **options).item()
    assert mean == pytest.approx(sum(rows) / 3.5, **ORACLE)
    check_gradients(lambda x, y: fc.info_nce_loss(x, y, target, **options), x, y)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_without_smoothing(reduction: str, backend: str) -> None:
    """The path with the gradients taken in the forward pass."""
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    target = torch.tensor([3, -1, 5, 0, -1, 10, 2, 2, 7])
    a = fc.info_nce_loss(x, y, target, ignore_index=-1, reduction=reduction, backend=backend)
    b = F.cross_entropy(
        -torch.cdist(x.double(), y.double()), target, ignore_index=-1, reduction=reduction
    )
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    for left, right in zip(
        torch.autograd.grad(a.sum(), [x, y]), torch.autograd.grad(b.sum(), [x, y]), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(smoothing: float, reduction: str, backend: str) -> None:
    """Loss 0 and gradients 0, where F.cross_entropy gives NaN."""
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    temperature = torch.tensor(0.5, requires_grad=True)
    loss = fc.info_nce_loss(
        x, y, torch.full((4,), -100), label_smoothing=smoothing, temperature=temperature,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), [x, y, temperature]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_backend
@pytest.mark.parametrize("correction", [(0.1, 0.0), (0.0, 0.5), (0.1, 2.0), (0.7, 0.0)])
@pytest.mark.parametrize("metric", METRICS)
def test_debiased_and_hard_negatives(
    correction: tuple[float, float], metric: str, backend: str
) -> None:
    tau_plus, hardness = correction
    x, y = random(5, 3), random(7, 3)
    options: dict[str, Any] = {
        "metric": metric, "temperature": 0.8, "tau_plus": tau_plus, "hardness": hardness,
        "reduction": "none", "backend": backend,
    }  # fmt: skip
    lowest = -1 / 0.8 if metric in ("cosine", "dot") else -math.inf
    truth = [
        oracle.corrected_cross_entropy(row, i, tau_plus, hardness, lowest)
        for i, row in enumerate(scores_of(x, y, metric, 0.8))
    ]
    assert fc.info_nce_loss(x, y, **options).tolist() == pytest.approx(truth, **ORACLE)
    check_gradients(lambda x, y: fc.info_nce_loss(x, y, **options), x, y)


def test_the_temperature_of_a_clamped_row_has_a_finite_gradient() -> None:
    x = 0.1 * random(4, 3)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = fc.info_nce_loss(x, x, tau_plus=0.9, temperature=temperature)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, temperature)[0].item() == 0.0


# Negatives, queue, in_batch


@every_backend
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("kind", ["shared", "own", "queue", "none"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_further_negatives(metric: str, kind: str, in_batch: bool, backend: str) -> None:
    x, y, more, own = random(4, 3), random(4, 3), random(5, 3), random(4, 2, 3)
    queue = fc.MemoryQueue(9)
    queue.enqueue(more)
    arguments: dict[str, Any] = {
        "shared": {"negatives": more}, "own": {"negatives": own}, "queue": {"queue": queue},
        "none": {},
    }[kind]  # fmt: skip
    truth = []
    for i in range(4):
        keys = y.tolist() if in_batch else [y[i].tolist()]
        keys = keys + {"own": own[i].tolist(), "none": []}.get(kind, more.tolist())
        s = [oracle.score(x[i].tolist(), k, metric, 2.0) for k in keys]
        truth.append(oracle.cross_entropy(s, i if in_batch else 0))
    options: dict[str, Any] = {
        "metric": metric, "temperature": 0.5, "in_batch": in_batch, "reduction": "none",
        "backend": backend,
    }  # fmt: skip
    loss, stats = fc.info_nce_loss(x, y, return_stats=("lse", "rank"), **arguments, **options)
    assert loss.tolist() == pytest.approx(truth, **ORACLE)
    assert fc.info_nce_loss(x, y, **arguments, **options).tolist() == pytest.approx(truth, **ORACLE)
    assert stats.lse.isfinite().all()
    check_gradients(lambda x, y: fc.info_nce_loss(x, y, **arguments, **options), x, y)
    if kind == "own":
        check_gradients(lambda n: fc.info_nce_loss(x, y, negatives=n, **options), own)


def test_a_symmetric_loss_with_a_queue_contrasts_queries_alone_with_it() -> None:
    x, y, more = random(4, 3), random(4, 3), random(5, 3)
    queue = fc.MemoryQueue(5)
    queue.enqueue(more)
    a = fc.info_nce_loss(x, y, queue=queue, symmetric=True)
    b = fc.info_nce_loss(x, y, queue=queue) / 2 + fc.info_nce_loss(y, x) / 2
    torch.testing.assert_close(a, b)


def test_the_queue_is_first_in_first_out() -> None:
    queue = fc.MemoryQueue(5)
    assert len(queue) == 0
    assert queue.labels.tolist() == []
    held: list[int] = []
    start = 0
    for count in (2, 2, 3, 0, 7, 1):
        ids = torch.arange(start, start + count)
        queue.enqueue(ids[:, None].float(), ids)
        start += count
        held = (held + ids.tolist())[-5:]
        assert sorted(queue.embeddings[:, 0].tolist()) == held
        assert torch.equal(queue.labels, queue.embeddings[:, 0].long())
    copy = fc.MemoryQueue(5)
    copy.load_state_dict(queue.state_dict())
    copy.enqueue(torch.tensor([[99.0]]), torch.tensor([99]))
    assert sorted(copy.embeddings[:, 0].tolist()) == [*held[1:], 99]
    queue.clear()
    assert len(queue) == 0


def test_enqueueing_does_not_disturb_a_graph() -> None:
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    queue = fc.MemoryQueue(3)
    queue.enqueue(y)
    loss = fc.info_nce_loss(x, y, queue=queue, reduction="none").sum()
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    queue.enqueue(torch.randn(3, 2))
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


# NT-Xent, CLIP, MNRL


@every_backend
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_nt_xent_is_the_equation(metric: str, with_queue: bool, backend: str) -> None:
    a, b, more = random(4, 3), random(4, 3), random(3, 3)
    queue = fc.MemoryQueue(3)
    queue.enqueue(more)
    options: dict[str, Any] = {
        "metric": metric, "temperature": 0.6, "queue": queue if with_queue else None,
        "backend": backend,
    }  # fmt: skip
    z = torch.cat([a, b])
    columns = torch.cat([z, more]) if with_queue else z
    truth = []
    for i, row in enumerate(scores_of(z, columns, metric, 0.6)):
        partner = row[(i + 4) % 8]
        truth.append(oracle.log_sum_exp(row[:i] + row[i + 1 :]) - partner)
    rows = fc.nt_xent_loss(a, b, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    mean = fc.nt_xent_loss(a, b, **options).item()
    assert mean == pytest.approx(sum(truth) / 8, **ORACLE)
    for reduction in ("mean", "none"):  # gradients in the forward pass, and recomputed
        check_gradients(
            lambda a, b, r=reduction: fc.nt_xent_loss(a, b, reduction=r, **options), a, b
        )


@every_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_clip_is_the_equation(normalize: bool, backend: str) -> None:
    u, v = random(5, 3), random(5, 3)
    scale = torch.tensor(3.0, dtype=torch.float64)
    s = scores_of(u, v, "cosine" if normalize else "dot", 1 / 3.0)
    truth = [
        (oracle.cross_entropy(s[i], i) + oracle.cross_entropy([row[i] for row in s], i)) / 2
        for i in range(5)
    ]
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    rows = fc.clip_loss(u, v, scale, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    for reduction in ("mean", "none"):
        check_gradients(
            lambda u, v, scale, r=reduction: fc.clip_loss(u, v, scale, reduction=r, **options),
            u, v, scale,
        )  # fmt: skip


def test_the_scale_of_clip_is_learnt_and_clipped() -> None:
    u, v = torch.randn(4, 3), torch.randn(4, 3)
    module = fc.ClipLoss(temperature=0.1)
    module(u, v).backward()
    assert module.logit_scale.grad.item() != 0
    held = fc.ClipLoss(temperature=0.001, max_scale=100.0)
    loss = held(u, v)
    loss.backward()
    torch.testing.assert_close(loss, fc.clip_loss(u, v, 100.0, normalize=True))
    assert held.logit_scale.grad.item() == 0


@every_backend
@pytest.mark.parametrize("shared", [True, False])
def test_multiple_negatives_ranking_is_the_equation(shared: bool, backend: str) -> None:
    a, p, n = random(4, 3), random(4, 3), random(4, 2, 3)
    truth = []
    for i in range(4):
        keys = torch.cat([p, n.flatten(0, 1) if shared else n[i]])
        (row,) = scores_of(a[i : i + 1], keys, "cosine", 0.05)
        truth.append(oracle.cross_entropy(row, i))
    options: dict[str, Any] = {"share_negatives": shared, "backend": backend}
    rows = fc.multiple_negatives_ranking_loss(a, p, n, reduction="none", **options)
    assert rows.tolist() == pytest.approx(truth, **ORACLE)
    check_gradients(lambda a, p, n: fc.multiple_negatives_ranking_loss(a, p, n, **options), a, p, n)


# All of them: modules, half inputs, frozen sides, temperatures


LOSSES: dict[str, Any] = {
    "info_nce": fc.info_nce_loss,
    "smoothed": lambda x, y, **o: fc.info_nce_loss(x, y, label_smoothing=0.1, **o),
    "debiased": lambda x, y, **o: fc.info_nce_loss(x, y, tau_plus=0.1, **o),
    "hard": lambda x, y, **o: fc.info_nce_loss(x, y, hardness=0.5, **o),
    "nt_xent": fc.nt_xent_loss,
    "mnrl": fc.multiple_negatives_ranking_loss,
    "spatial": fc.spatial_contrasting_loss,
    "clip": lambda x, y, temperature=1.0, **o: fc.clip_loss(x, y, 1 / temperature, **o),
    "supcon": lambda x, y, **o: fc.supcon_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, **o
    ),
    "supcon in": lambda x, y, **o: fc.supcon_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, form="in", **o
    ),
    "nca": lambda x, y, **o: fc.nca_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, **o
    ),
    "proxy_nca": lambda x, y, **o: fc.proxy_nca_loss(x, torch.arange(len(x)), y, **o),
    "proxy_nca 2017": lambda x, y, **o: fc.proxy_nca_loss(
        x, torch.arange(len(x)), y, positive_in_sum=False, **o
    ),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_rows_that_a_gpu_widens_are_multiplied_as_two_terms(device: str) -> None:
    with FakeTensorMode():
        half, full = (
            torch.empty(2, 3, dtype=dtype, device=device)
            for dtype in (torch.bfloat16, torch.float32)
        )
    assert of_widened("auto", half, half) == ("bf16x3" if device == "cuda" else "auto")
    assert of_widened("auto", half, full) == "auto"  # promoted to float32: torch's setting
    assert of_widened("ieee", half) == "ieee"


@every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_half_inputs_lose_only_their_own_rounding(name: str, backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(12, 8).to(dtype).requires_grad_()
        y = torch.randn(12, 8).to(dtype).requires_grad_()
        loss = LOSSES[name](x, y, temperature=0.5, backend=backend)
        truth = LOSSES[name](x.double(), y.double(), temperature=0.5, backend="reference")
        assert loss.dtype == torch.float32
        # Sums in float32 from inputs that both sides have in full.
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        for a, b in zip(
            torch.autograd.grad(loss, [x, y]), torch.autograd.grad(truth, [x, y]), strict=True
        ):
            assert a.dtype == dtype
            # One rounding of the gradient to its dtype, and of the weights where products of half
            # operands are taken by matrix units: an error of the row, not of each entry.
            assert relative_error(a, b) <= GRADIENT_FLOOR[dtype]


@every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_frozen_sides_and_the_temperature(name: str, backend: str) -> None:
    """Each input alone receives the gradient that it receives beside the others."""
    values = {"x": random(6, 4), "y": random(6, 4), "temperature": torch.tensor(0.7).double()}

    def gradients(*names: str) -> dict[str, Tensor]:
        inputs = {k: v.clone().requires_grad_(k in names) for k, v in values.items()}
        loss = LOSSES[name](
            inputs["x"], inputs["y"], temperature=inputs["temperature"], backend=backend
        )
        found = torch.autograd.grad(loss, [inputs[k] for k in names])
        return dict(zip(names, found, strict=True))

    together = gradients("x", "y", "temperature")
    for k in values:
        torch.testing.assert_close(gradients(k)[k], together[k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows(name: str) -> None:
    x = torch.empty(0, 3, requires_grad=True)
    y = torch.empty(0, 3) if "nca" not in name else torch.randn(2, 3)
    for reduction in ("mean", "sum"):
        loss = LOSSES[name](x, y, reduction=reduction)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, x)[0].shape == (0, 3)
    assert LOSSES[name](x, y, reduction="none").shape == (0,)


MODULES = [
    (fc.InfoNCELoss(label_smoothing=0.1, in_batch=True), fc.info_nce_loss,
     {"label_smoothing": 0.1}, lambda: (random(4, 3), random(6, 3))),
    (fc.NTXentLoss(temperature=0.2), fc.nt_xent_loss, {"temperature": 0.2},
     lambda: (random(4, 3), random(4, 3))),
    (fc.MultipleNegativesRankingLoss(symmetric=True), fc.multiple_negatives_ranking_loss,
     {"symmetric": True}, lambda: (random(4, 3), random(4, 3), random(5, 3))),
    (fc.SupConLoss(form="in"), fc.supcon_loss, {"form": "in"},
     lambda: (random(4, 3), torch.tensor([0, 1, 0, 1]))),
    (fc.NCALoss(objective="error"), fc.nca_loss, {"objective": "error"},
     lambda: (random(4, 3), torch.tensor([0, 1, 0, 1]))),
    (fc.SiameseContrastiveLoss(margin=2.0), fc.siamese_contrastive_loss, {"margin": 2.0},
     lambda: (random(4, 3), random(4, 3), torch.tensor([True, False, True, False]))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "function", "options", "inputs"), MODULES, ids=lambda v: getattr(v, "__name__", "")
)
def test_modules_call_their_function(
    module: nn.Module, function: Any, options: dict, inputs: Any
) -> None:
    arguments = inputs()
    assert torch.equal(module(*arguments), function(*arguments, **options))
    assert type(module).__name__ in repr(module)
    assert function.__name__ in type(module).__doc__
