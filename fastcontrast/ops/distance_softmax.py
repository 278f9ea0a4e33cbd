r"""Row statistics of the softmax over pairwise scores: the op every pairwise loss is built on.

For scores :math:`s_{ij}` of row :math:`x_i` against column :math:`y_j` ("higher is closer") it
returns :math:`\mathrm{lse}_i = \log\sum_j e^{s_{ij}}` and more, without the M×N matrix. Called by
``fastcontrast/losses``; the work is in ``fastcontrast/backends/<backend>/distance_softmax.py``.

Two ways lead there. Under ``torch.compile`` the call is the custom operator
``fastcontrast::distance_softmax``, which the compiler keeps whole. Eager calls go through an
``autograd.Function``, because the operator alone costs more than a small loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.reference.distance_softmax import differentiable_statistics
from fastcontrast.backends.scores import (
    RowGradients,
    Scores,
    accumulator_dtype,
    empty_statistics,
)
from fastcontrast.ops.checks import (
    METRICS,
    PRECISION_CHOICES,
    check_choice,
    check_mask,
    check_operands,
    check_scale,
    check_thresholds,
)
from fastcontrast.ops.double_backward import differentiable_gradients
from fastcontrast.ops.eager_function import EagerFunction
from fastcontrast.ops.normalized import of_unit_rows
from fastcontrast.ops.precision import effective_precision, of_widened


class RowStatistics(NamedTuple):
    """What :func:`distance_softmax` returns, one entry per row.

    Attributes:
        lse: Log-sum-exp of the scores, [M], nats; -inf where no column counts. Differentiable.
        entropy: Entropy of the softmax, [M], nats; 0 where no column counts. Differentiable.
        rank: Number of columns that score above the threshold, [M] int64; None without threshold.
        score_sum: Sum of the scores that count, [M]; None unless asked for. Differentiable.
        column_count: Number of columns that count, [M] int64; None unless asked for.
    """

    lse: Tensor
    entropy: Tensor
    rank: Tensor | None
    score_sum: Tensor | None
    column_count: Tensor | None

    @property
    def mean_score(self) -> Tensor:
        """Mean score under the softmax, [M], nats; -inf where no column counts. Differentiable."""
        return self.lse - self.entropy


def distance_softmax(
    x: Tensor,
    y: Tensor,
    *,
    metric: str = "l2",
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    keep: str = "all",
    threshold: Tensor | None = None,
    score_sum: bool = False,
    precision: str = "auto",
    backend: str | None = None,
) -> RowStatistics:
    r"""Log-sum-exp, entropy and rank of every row of a pairwise score matrix never formed.

    .. math::
        \mathrm{lse}_i = \log \sum_{j \in C_i} e^{s_{ij}}, \qquad
        p_{ij} = e^{s_{ij} - \mathrm{lse}_i}, \qquad
        H_i = -\sum_{j \in C_i} p_{ij} \log p_{ij} = \mathrm{lse}_i - \sum_{j \in C_i} p_{ij} s_{ij}

    with :math:`s_{ij} = -\mathrm{scale}\,\lVert x_i - y_j\rVert` (``"l2"``), its square
    (``"sqeuclidean"``), :math:`\mathrm{scale}\; x_i\cdot y_j` (``"dot"``) or the same of normalised
    vectors (``"cosine"``; a zero vector stays zero, with gradient 0). :math:`C_i` are the columns
    that count. Memory is O((M+N)·D). Gradients flow to ``x``, ``y`` and a tensor ``scale``; at
    coincident points the subgradient 0 of the distance is taken.

    Args:
        x: Rows [M, D], float16, bfloat16, float32 or float64.
        y: Columns [N, D], on the same device. Mixed dtypes are promoted.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"dot"`` or ``"cosine"``.
        scale: 1 / temperature, positive; a number or a 0-dim tensor, which receives its gradient.
        exclude: Column indices left out of each row, integer [M] or [M, E] with E <= 2; values
            outside 0..N-1, such as -1, name no column.
        row_ids: Integer ids of the rows [M]; needed unless ``keep="all"``.
        column_ids: Integer ids of the columns [N]; needed unless ``keep="all"``.
        keep: ``"all"`` columns count, or those whose id is the ``"same"`` as the row's, or
            ``"different"`` from it.
        threshold: Scores [M] that ``rank`` counts against (strictly above); carries no gradient.
        score_sum: Also return the plain sum and the number of the scores that count.
        precision: How operands of matrix products may be rounded at the worst: ``"ieee"``,
            ``"tf32"``, ``"bf16x3"``, ``"bf16"``, or ``"auto"`` to follow
            ``torch.get_float32_matmul_precision()``. float64 is never rounded; half points are
            used as they are; where a GPU has to normalize or widen them first, in ``"bf16x3"``.
        backend: A name from :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        :class:`RowStatistics` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape, an option or a device is not as above.
        TypeError: If an argument is not a tensor of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> y = torch.tensor([[0.0], [1.0], [2.0]])
        >>> distance_softmax(x, y).lse  # log(1 + e^-1 + e^-2), log(1 + 2 e^-1)
        tensor([0.4076, 0.5514])
    """
    check_operands("x", x, "y", y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISION_CHOICES)
    exclude = check_mask(x, y, exclude, row_ids, column_ids, keep)
    if threshold is not None:
        check_thresholds(threshold, x.shape[0], x.device)
        threshold = threshold.detach()
    check_scale("scale", scale, x)
    if torch.compiler.is_compiling():  # what "auto" means, the operator asks when it runs
        precision = of_widened(precision, x) if metric == "cosine" else precision
        x, y, metric = of_unit_rows(x, y, metric)
        backend = backends.resolve("distance_softmax", x, backend, others=y, precision=precision)
        scale_tensor = torch.as_tensor(scale, dtype=accumulator_dtype(x.dtype), device=x.device)
        lse, _, entropy, total, count, rank = torch.ops.fastcontrast.distance_softmax(
            x, y, scale_tensor, metric, exclude, row_ids, column_ids, keep, threshold, score_sum,
            precision, backend,
        )  # fmt: skip
    else:
        x, y, metric, precision, backend = prepared(x, y, metric, precision, backend)
        scores = Scores(metric, scale, exclude, row_ids, column_ids, keep, precision)
        scale_input = scale if isinstance(scale, Tensor) else None
        lse, _, entropy, total, count, rank = _EagerDistanceSoftmax.apply(
            x, y, scale_input, exclude, row_ids, column_ids, scores, threshold, score_sum, backend
        )
    return RowStatistics(
        lse,
        entropy,
        rank if threshold is not None else None,
        total if score_sum else None,
        count if score_sum else None,
    )


def prepared(
    x: Tensor, y: Tensor, metric: str, precision: str, backend: str | None
) -> tuple[Tensor, Tensor, str, str, str]:
    """Operands of one dtype, metric, precision and backend of an eager call.

    Rows are normalised for "cosine", unless the backend takes their norms into the scores.
    """
    effective = effective_precision(precision, x)
    name = backends.resolve("distance_softmax", x, backend, others=y, precision=effective)
    if metric != "cosine" or backends.takes_cosine(name, x.dtype):
        return x, y, metric, effective, name
    precision = of_widened(precision, x)
    x, y, metric = of_unit_rows(x, y, metric)
    precision = effective_precision(precision, x)
    name = backends.resolve("distance_softmax", x, backend, others=y, precision=precision)
    return x, y, metric, precision, name


class _EagerDistanceSoftmax(EagerFunction):
    """The eager path: straight to the backend, gradients of unused outputs skipped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor | None,
        exclude: Tensor | None,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        scores: Scores,
        threshold: Tensor | None,
        score_sum: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        out = backends.run(backend, "distance_softmax_forward", x, y, scores, threshold, score_sum)
        # Every tensor goes here, so that a change in place is noticed.
        ctx.save_for_backward(
            x, y, scale, exclude, row_ids, column_ids, out.lse, out.lse_residual, out.entropy
        )
        ctx.scores = without_tensors(scores)
        ctx.backend = backend
        ctx.mark_non_differentiable(out.lse_residual, out.column_count, out.rank)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, scale, exclude, row_ids, column_ids, *statistics = ctx.saved_tensors
        scores = with_tensors(ctx.scores, scale, exclude, row_ids, column_ids)
        needs = tuple(ctx.needs_input_grad[:3])
        row_gradients = RowGradients(grads[0], grads[2], grads[3])
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again
            dx, dy, dscale = score_gradients(
                differentiable_statistics, x, y, scores, row_gradients, needs
            )
        else:
            dx, dy, dscale = backends.run(
                ctx.backend, "distance_softmax_backward", x, y, scores, tuple(statistics),
                row_gradients, needs,
            )  # fmt: skip
        if scale is not None and dscale is not None:
            dscale = dscale.to(scale.dtype).to(scale.device)
        result = [d if need else None for d, need in zip((dx, dy, dscale), needs, strict=True)]
        return (*result, *[None] * 7)


def without_tensors(scores: Scores) -> Scores:
    """What an autograd context keeps of ``scores`` itself; its tensors are saved as tensors."""
    scale = 1.0 if isinstance(scores.scale, Tensor) else scores.scale
    return scores._replace(scale=scale, exclude=None, row_ids=None, column_ids=None)


def with_tensors(
    scores: Scores,
    scale: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> Scores:
    """Undo :func:`without_tensors`."""
    scores = scores._replace(exclude=exclude, row_ids=row_ids, column_ids=column_ids)
    return scores if scale is None else scores._replace(scale=scale)


def score_gradients(
    function: Callable[[Tensor, Tensor, Scores], Sequence[Tensor]],
    x: Tensor,
    y: Tensor,
    scores: Scores,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, y and a tensor scale as functions of inputs and grads, for double backward.

    ``function(x, y, scores)`` is the reference path, differentiable any number of times.
    """

    def of_scale(x: Tensor, y: Tensor, scale: float | Tensor) -> Sequence[Tensor]:
        x, y, metric = of_unit_rows(x, y, scores.metric)
        return function(x, y, scores._replace(metric=metric, scale=scale))

    return differentiable_gradients(of_scale, (x, y, scores.scale), grads, needs)


# The custom operator: what torch.compile sees. Schema, fake and gradient formula stand together.


@torch.library.custom_op(
    "fastcontrast::distance_softmax",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor scale, str metric, Tensor? exclude, Tensor? row_ids, "
    "Tensor? column_ids, str keep, Tensor? threshold, bool score_sum, str precision, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _distance_softmax_op(
    x,
    y,
    scale,
    metric,
    exclude,
    row_ids,
    column_ids,
    keep,
    threshold,
    score_sum,
    precision,
    backend,
):
    precision = effective_precision(precision, x)
    scores = Scores(metric, scale, exclude, row_ids, column_ids, keep, precision)
    out = backends.run(backend, "distance_softmax_forward", x, y, scores, threshold, score_sum)
    return tuple(out)


@_distance_softmax_op.register_fake
def _(
    x,
    y,
    scale,
    metric,
    exclude,
    row_ids,
    column_ids,
    keep,
    threshold,
    score_sum,
    precision,
    backend,
):
    return tuple(empty_statistics(x, score_sum=score_sum, rank=threshold is not None))


@torch.library.custom_op(
    "fastcontrast::distance_softmax_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor scale, str metric, Tensor? exclude, Tensor? row_ids, "
    "Tensor? column_ids, str keep, str precision, str backend, Tensor lse, Tensor lse_residual, "
    "Tensor entropy, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_sum, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def _distance_softmax_backward_op(
    x, y, scale, metric, exclude, row_ids, column_ids, keep, precision, backend, lse,
    lse_residual, entropy, grad_lse, grad_entropy, grad_sum, needs,
):  # fmt: skip
    precision = effective_precision(precision, x)
    scores = Scores(metric, scale, exclude, row_ids, column_ids, keep, precision)
    grads = RowGradients(grad_lse, grad_entropy, grad_sum)
    dx, dy, dscale = backends.run(
        backend, "distance_softmax_backward", x, y, scores, (lse, lse_residual, entropy), grads,
        tuple(needs),
    )  # fmt: skip
    return dx, dy, dscale.to(scale.dtype)


@_distance_softmax_backward_op.register_fake
def _(
    x, y, scale, metric, exclude, row_ids, column_ids, keep, precision, backend, lse,
    lse_residual, entropy, grad_lse, grad_entropy, grad_sum, needs,
):  # fmt: skip
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        y.new_empty(y.shape if needs[1] else (0,)),
        scale.new_empty(() if needs[2] else (0,)),
    )


def _setup_context(ctx, inputs, output):
    x, y, scale, metric, exclude, row_ids, column_ids, keep, _, score_sum, precision, backend = (
        inputs
    )
    lse, lse_residual, entropy, _, count, rank = output
    ctx.save_for_backward(x, y, scale, exclude, row_ids, column_ids, lse, lse_residual, entropy)
    ctx.options = (metric, keep, precision, backend, score_sum)
    ctx.mark_non_differentiable(lse_residual, count, rank)


def _backward(ctx, grad_lse, _, grad_entropy, grad_sum, *__):
    x, y, scale, exclude, row_ids, column_ids, *statistics = ctx.saved_tensors
    metric, keep, precision, backend, score_sum = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    dx, dy, dscale = torch.ops.fastcontrast.distance_softmax_backward(
        x, y, scale, metric, exclude, row_ids, column_ids, keep, precision, backend,
        *statistics, grad_lse, grad_entropy, grad_sum if score_sum else None, needs,
    )  # fmt: skip
    result = [d if need else None for d, need in zip((dx, dy, dscale), needs, strict=True)]
    return (*result, *[None] * 9)


_distance_softmax_op.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "fastcontrast::distance_softmax cannot be differentiated twice under torch.compile; "
        "double backward works in eager mode"
    )


_distance_softmax_backward_op.register_autograd(_no_double_backward)
