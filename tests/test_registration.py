"""The pairwise op as PyTorch sees it: custom operators, torch.compile, torch.func, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MASKS, case, mask_options
from torch import Tensor, nn
from variants import on_every_backend

import fastcontrast
from fastcontrast import distance_softmax, info_nce_loss, metric_embedding_loss
from fastcontrast.temporal import temporal_contrasting_loss, temporal_prediction_loss

every_backend = on_every_backend("distance_softmax")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def op_arguments(mask: str, backend: str, *, requires_grad: bool, contiguous: bool) -> tuple:
    c = case("vector plus one", mask, torch.float32)
    x, y = c.x.float(), c.y.float()
    if not contiguous:
        x, y = x.T.contiguous().T, y[:, :]
    x, y = x.requires_grad_(requires_grad), y.requires_grad_(requires_grad)
    scale = torch.tensor(0.7, requires_grad=requires_grad)
    exclude = c.options.get("exclude")
    if exclude is not None:
        exclude = exclude.reshape(x.shape[0], -1)
    return (
        x, y, scale, "l2", exclude, c.options.get("row_ids"), c.options.get("column_ids"),
        c.options.get("keep", "all"), torch.full((x.shape[0],), -2.0), True, "ieee", backend,
    )  # fmt: skip


@every_backend
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("requires_grad", "contiguous"), [(True, True), (False, True), (True, False)]
)
def test_opcheck_forward(mask: str, requires_grad: bool, contiguous: bool, backend: str) -> None:
    arguments = op_arguments(mask, backend, requires_grad=requires_grad, contiguous=contiguous)
    torch.library.opcheck(torch.ops.fastcontrast.distance_softmax, arguments)


@every_backend
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_backward(needs: tuple[bool, ...], backend: str) -> None:
    arguments = op_arguments("different", backend, requires_grad=False, contiguous=True)
    x, y, scale, metric, exclude, rows, columns, keep, _, _, precision, _ = arguments
    lse, residual, entropy, *_ = torch.ops.fastcontrast.distance_softmax(*arguments)
    torch.library.opcheck(
        torch.ops.fastcontrast.distance_softmax_backward,
        (x, y, scale, metric, exclude, rows, columns, keep, precision, backend, lse, residual,
         entropy, torch.randn_like(lse), torch.randn_like(lse), None, list(needs)),
        test_utils=("test_schema", "test_faketensor"),  # no gradient of its own, and it says so
    )  # fmt: skip


def compiled(function: Any) -> Any:
    # aot_eager traces the operator and its gradient as Inductor does, without generating code.
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@every_backend
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_equals_eager(mask: str, backend: str) -> None:
    c = case("ragged", mask, torch.float32)
    temperature = torch.tensor(0.6, requires_grad=True)

    def loss(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
        r = distance_softmax(
            x, y, scale=1 / temperature, score_sum=True, backend=backend, **c.options
        )
        lse = torch.where(torch.isinf(r.lse), 0.0, r.lse)
        return (lse + 0.5 * r.entropy + 0.01 * r.score_sum).sum()

    x, y = c.x.float().requires_grad_(), c.y.float().requires_grad_()
    results = []
    for f in (loss, compiled(loss)):
        value = f(x, y, temperature)
        results.append([value, *torch.autograd.grad(value, [x, y, temperature])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_inductor() -> None:
    """The default compiler, once: it needs a C++ compiler and takes seconds."""
    x = torch.randn(20, 8, requires_grad=True)
    y = torch.randn(30, 8)
    eager = info_nce_loss(x, y, temperature=0.3)
    fast = torch.compile(lambda x, y: info_nce_loss(x, y, temperature=0.3), fullgraph=True)(x, y)
    torch.testing.assert_close(eager, fast)
    torch.testing.assert_close(torch.autograd.grad(eager, x)[0], torch.autograd.grad(fast, x)[0])


def test_no_recompilation_over_batch_sizes() -> None:
    """Rows, columns and targets of sizes of their own, without gradients; see also test_traps."""
    loss = compiled(lambda x, y, t: info_nce_loss(x, y, t, metric="cosine"))
    for m in range(5, 25):
        with torch.compiler.set_stance("default" if m == 5 else "fail_on_recompile"):
            loss(torch.randn(m, 3), torch.randn(m + 30, 3), torch.arange(m)).item()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: fastcontrast.spatial_contrasting_loss(x, y, symmetric=True),
        lambda x, y: metric_embedding_loss(x, y[:4], torch.arange(12) % 5 - 1, squared=False),
        lambda x, y: fastcontrast.triplet_ratio_loss(x, y, x.flip(0)),
    ],
    ids=["spatial_contrasting", "metric_embedding", "triplet_ratio"],
)
def test_losses_compile_whole(loss: Any) -> None:
    x, y = torch.randn(12, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
    a, b = loss(x, y), compiled(loss)(x, y)
    torch.testing.assert_close(a, b)
    for left, right in zip(
        torch.autograd.grad(a, [x, y], allow_unused=True),
        torch.autograd.grad(b, [x, y], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


FRAMES = torch.arange(12)
TEMPORAL: dict[str, Any] = {
    "contrasting": lambda x, y: temporal_contrasting_loss(
        x * y, FRAMES // 6, FRAMES, window=1, margin=2
    ),
    "prediction": lambda x, y: temporal_prediction_loss(
        x, y, FRAMES // 6, FRAMES, torch.eye(6).expand(2, 6, 6)
    ),
}


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal_losses_compile_in_parts(name: str) -> None:
    """Times are looked at on the host: no whole graph, but values and gradients of eager mode."""
    torch._dynamo.reset()
    loss = TEMPORAL[name]
    x, y = torch.randn(12, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(loss)(x, y)
    torch._dynamo.reset()
    a, b = loss(x, y), torch.compile(loss, backend="aot_eager")(x, y)
    torch.testing.assert_close(a, b)
    for left, right in zip(*(torch.autograd.grad(v, [x, y]) for v in (a, b)), strict=True):
        torch.testing.assert_close(left, right)


def test_a_saved_operand_must_not_change_in_place() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(5, 3)
    lse = distance_softmax(x, y).lse
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_grad_scaler_and_accumulation() -> None:
    """A scaled loss gives scaled gradients: nothing is computed before the upstream is known."""
    layer = nn.Linear(6, 4)
    data, keys = torch.randn(8, 6), torch.randn(8, 4)
    info_nce_loss(layer(data), keys).backward()
    once = layer.weight.grad.clone()
    (1024 * info_nce_loss(layer(data), keys)).backward()
    torch.testing.assert_close(layer.weight.grad, 1025 * once)


GOOD: dict[str, Any] = {"x": torch.randn(4, 3), "y": torch.randn(5, 3)}
BAD_CALLS = {
    "x is a list": ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    "integer y": ({"y": torch.ones(5, 3, dtype=torch.int64)}, TypeError, "y must be float16"),
    "3-D x": ({"x": torch.randn(2, 2, 3)}, ValueError, r"x must have shape \[rows, D\]"),
    "different D": ({"y": torch.randn(5, 4)}, ValueError, "same number of columns D"),
    "other device": ({"y": torch.empty(5, 3, device="meta")}, ValueError, "on one device"),
    "metric": ({"metric": "l1"}, ValueError, "metric must be one of l2, sqeuclidean"),
    "keep": ({"keep": "some"}, ValueError, "keep must be one of"),
    "precision": ({"precision": "fp8"}, ValueError, "precision must be one of auto, ieee"),
    "scale zero": ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be positive and finite"),
    "scale tensor": ({"scale": torch.tensor(-1.0)}, ValueError, "scale must be positive"),
    "scale shape": ({"scale": torch.ones(2)}, ValueError, r"0-dim tensor, got \[2\]"),
    "scale device": (
        {"scale": torch.tensor(1.0, device="meta")}, ValueError,
        "scale must be on cpu or on cpu with the operands, got meta",
    ),
    "scale text": ({"scale": "1"}, TypeError, "scale must be a number"),
    "exclude dtype": ({"exclude": torch.ones(4)}, TypeError, "exclude must be an int64 or int32"),
    "exclude list": ({"exclude": [0, 1, 2, 3]}, TypeError, "got list"),
    "exclude rows": ({"exclude": torch.arange(3)}, ValueError, r"exclude must have shape \[4, 1\]"),
    "exclude three": (
        {"exclude": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"\[4, 2\], got \[4, 3\]",
    ),
    "ids without keep": ({"row_ids": torch.arange(4)}, ValueError, "need keep="),
    "keep without ids": ({"keep": "same"}, ValueError, r"needs row_ids, an integer tensor \[4\]"),
    "ids shape": (
        {"keep": "same", "row_ids": torch.arange(4), "column_ids": torch.arange(4)},
        ValueError, r"column_ids must have shape \[5\], got \[4\]",
    ),
    "threshold": ({"threshold": torch.zeros(5)}, ValueError, r"threshold must have shape \[4\]"),
    "threshold list": ({"threshold": [0.0]}, TypeError, "threshold must be a floating-point"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be None or one of native"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named(name: str) -> None:
    change, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        distance_softmax(**(GOOD | change))


def test_all_masks_have_options() -> None:
    assert all(mask == "all" or mask_options(mask, 4, 5) for mask in MASKS)
