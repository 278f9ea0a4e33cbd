r"""Distances between the points of each triplet, in one read: what triplet losses are built on.

Called by ``fastcontrast/losses`` through ``fastcontrast/ops/triplet_loss.py``; the work is in
``fastcontrast/backends/<backend>/triplet_distances.py``.

Two ways lead there. Under ``torch.compile`` the call is the custom operator
``fastcontrast::triplet_distances``, which the compiler keeps whole. Eager calls go through an
``autograd.Function``, because the operator alone costs more than a small loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast import backends
from fastcontrast.backends.reference.triplet_distances import differentiable_distances
from fastcontrast.backends.scores import accumulator_dtype
from fastcontrast.ops.checks import check_choice, check_pairs
from fastcontrast.ops.double_backward import differentiable_gradients
from fastcontrast.ops.eager_function import EagerFunction

DISTANCES = ("l2", "sqeuclidean")


class TripletDistances(NamedTuple):
    """What :func:`triplet_distances` returns, one entry per triplet.

    Attributes:
        positive: Distance from anchor to positive, [M], embedding units (squared, if asked for).
        negative: Distance from anchor to negative, [M].
        between: Distance from positive to negative, [M]; None unless asked for.
    """

    positive: Tensor
    negative: Tensor
    between: Tensor | None


def triplet_distances(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    metric: str = "l2",
    between: bool = False,
    backend: str | None = None,
) -> TripletDistances:
    r"""Distances from each anchor to its positive and its negative, in one pass.

    .. math::
        d^+_i = \lVert a_i - p_i \rVert_2, \qquad d^-_i = \lVert a_i - n_i \rVert_2, \qquad
        d^{\pm}_i = \lVert p_i - n_i \rVert_2

    or their squares. Differences are taken directly, no epsilon is added, and at coincident points
    the subgradient 0 is taken. Gradients flow to all three; what is frozen costs nothing.

    Args:
        anchor: Anchors a [M, D], float16, bfloat16, float32 or float64.
        positive: Positives p [M, D], on the same device. Mixed dtypes are promoted.
        negative: Negatives n [M, D], on the same device.
        metric: ``"l2"``, or ``"sqeuclidean"`` for the squares.
        between: Also return the distance from positive to negative.
        backend: A name from ``fastcontrast.available_backends("triplet_distances")``, or None for
            the fastest.

    Returns:
        :class:`TripletDistances` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: If the shapes or devices differ, or an option is not as above.
        TypeError: If an argument is not a floating-point tensor.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> anchor, positive = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> triplet_distances(anchor, positive, torch.ones(1, 2), metric="sqeuclidean")
        TripletDistances(positive=tensor([25.]), negative=tensor([2.]), between=None)
    """
    points, backend = checked_triplets(anchor, positive, negative, metric, backend)
    compiling = torch.compiler.is_compiling()
    function = _triplet_distances_op if compiling else _EagerTripletDistances.apply
    to_positive, to_negative, of_others = function(*points, metric, between, backend)
    return TripletDistances(to_positive, to_negative, of_others if between else None)


def checked_triplets(
    anchor: Tensor, positive: Tensor, negative: Tensor, metric: str, backend: str | None
) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    """The points in their common dtype and the backend that runs, or raise; arguments as above."""
    for name, other in (("positive", positive), ("negative", negative)):
        check_pairs("anchor", anchor, name, other)
    check_choice("metric", metric, DISTANCES)
    if not anchor.dtype == positive.dtype == negative.dtype:
        dtype = torch.promote_types(anchor.dtype, positive.dtype)
        dtype = torch.promote_types(dtype, negative.dtype)
        anchor, positive, negative = anchor.to(dtype), positive.to(dtype), negative.to(dtype)
    backend = backends.resolve("triplet_distances", anchor, backend)
    return (anchor, positive, negative), backend


class _EagerTripletDistances(EagerFunction):
    """The eager path: straight to the backend, gradients of unused outputs skipped."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        metric: str,
        between: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        out = _triplet_distances(anchor, positive, negative, metric, between, backend)
        ctx.save_for_backward(anchor, positive, negative, *out)
        ctx.options = (metric, between, backend)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        anchor, positive, negative, *distances = ctx.saved_tensors
        metric, between, backend = ctx.options
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate again

            def distances_of(a: Tensor, p: Tensor, n: Tensor) -> list[Tensor]:
                return differentiable_distances(a, p, n, metric, between)

            points = (anchor, positive, negative)
            grads = grads if between else grads[:2]
            return (*differentiable_gradients(distances_of, points, grads, needs), *[None] * 3)
        found = backends.run(
            backend, "triplet_distances_backward", anchor, positive, negative, tuple(distances),
            grads, metric, needs,
        )  # fmt: skip
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 3)


def _triplet_distances(anchor, positive, negative, metric, between, backend):
    return backends.run(
        backend, "triplet_distances_forward", anchor, positive, negative, metric, between
    )


def _triplet_distances_backward(
    anchor, positive, negative, to_positive, to_negative, of_others, grad_positive, grad_negative,
    grad_between, metric, backend, needs,
):  # fmt: skip
    return backends.run(
        backend, "triplet_distances_backward", anchor, positive, negative,
        (to_positive, to_negative, of_others), (grad_positive, grad_negative, grad_between),
        metric, needs,
    )  # fmt: skip


# The custom operators: what torch.compile sees.

_triplet_distances_op = torch.library.custom_op(
    "fastcontrast::triplet_distances",
    _triplet_distances,
    mutates_args=(),
    schema="(Tensor anchor, Tensor positive, Tensor negative, str metric, bool between, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)
_triplet_distances_backward_op = torch.library.custom_op(
    "fastcontrast::triplet_distances_backward",
    _triplet_distances_backward,
    mutates_args=(),
    schema="(Tensor anchor, Tensor positive, Tensor negative, Tensor to_positive, "
    "Tensor to_negative, Tensor of_others, Tensor? grad_positive, Tensor? grad_negative, "
    "Tensor? grad_between, str metric, str backend, bool[3] needs) -> (Tensor, Tensor, Tensor)",
)


@_triplet_distances_op.register_fake
def _(anchor, positive, negative, metric, between, backend):
    rows, dtype = anchor.shape[0], accumulator_dtype(anchor.dtype)
    return tuple(anchor.new_empty(m, dtype=dtype) for m in (rows, rows, rows if between else 0))


@_triplet_distances_backward_op.register_fake
def _(
    anchor, positive, negative, to_positive, to_negative, of_others, grad_positive, grad_negative,
    grad_between, metric, backend, needs,
):  # fmt: skip
    return tuple(anchor.new_empty(anchor.shape if need else (0,)) for need in needs)


def _setup_context(ctx, inputs, output):
    *points, metric, between, backend = inputs
    ctx.save_for_backward(*points, *output)
    ctx.options = (metric, between, backend)


def _backward(ctx, grad_positive, grad_negative, grad_between):
    metric, between, backend = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    found = _triplet_distances_backward_op(
        *ctx.saved_tensors, grad_positive, grad_negative, grad_between if between else None,
        metric, backend, needs,
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 3)


_triplet_distances_op.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "fastcontrast::triplet_distances cannot be differentiated twice under torch.compile; "
        "double backward works in eager mode"
    )


_triplet_distances_backward_op.register_autograd(_no_double_backward)
