r"""Contrastive predictive coding: one linear map per step ahead, each with a streamed InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcontrast.backends import autocast_off
from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.ops.checks import FLOATING, check_choice, check_count, check_operands
from fastcontrast.temporal.adjacency import frames_after, timeline

_REDUCTIONS = ("mean", "none")


def temporal_prediction_loss(
    context: Tensor,
    embeddings: Tensor,
    sequence_ids: Tensor,
    times: Tensor,
    weight: Tensor,
    *,
    metric: str = "dot",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Pick the frame that follows k later from a context, among all frames, for k = 1 to K.

    .. math::
        L = \frac{1}{K} \sum_{k=1}^{K} \frac{1}{|A_k|} \sum_{i \in A_k}
        -\log \frac{\exp(z_{i(k)} \cdot W_k c_i / \tau)}{\sum_j \exp(z_j \cdot W_k c_i / \tau)}

    with contexts c, embeddings z, i(k) the frame of i's sequence at time :math:`t_i + k` and
    :math:`A_k` the frames that have one. With ``metric="dot"`` and temperature 1 it is Eq. 4 of van
    den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, arXiv
    1807.03748, with the score of its Eq. 3, averaged over the steps; negatives are all other frames
    of the batch, those of the same sequence included, as there. Of several frames at one time the
    first is picked.

    Args:
        context: Contexts c [M, C], for example of a recurrent network over the frames up to i;
            float16, bfloat16, float32 or float64.
        embeddings: Embeddings z [M, D], frame for frame.
        sequence_ids: Which sequence each frame is of, integer [M].
        times: When, integer [M]; a step is 1 in their units.
        weight: Linear maps W [K, D, C], which receive their gradients.
        metric: ``"dot"``, ``"cosine"``, ``"l2"`` or ``"sqeuclidean"``, of :math:`W_k c_i` and z.
        temperature: As in :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"``, or ``"none"`` for the means of the steps [K]. The mean of no frames
            is 0, with gradient 0.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape, the temperature or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0], [2.0]])
        >>> ids, times = torch.zeros(2, dtype=torch.int64), torch.arange(2)
        >>> temporal_prediction_loss(torch.ones(2, 1), z, ids, times, torch.ones(1, 1, 1))
        tensor(0.1269)
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_operands("context", context, "context", context)
    check_operands("embeddings", embeddings, "embeddings", embeddings)
    if context.shape[0] != embeddings.shape[0] or context.device != embeddings.device:
        raise ValueError(
            f"context must have as many rows as embeddings, and their device, got "
            f"{list(context.shape)} on {context.device} and {list(embeddings.shape)} on "
            f"{embeddings.device}"
        )
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor [K, D, C], got {kind}")
    shape = (embeddings.shape[1], context.shape[1])
    if weight.dim() != 3 or weight.shape[0] < 1 or weight.shape[1:] != shape:
        raise ValueError(
            f"weight must have shape [K, {shape[0]}, {shape[1]}] with K >= 1, got "
            f"{list(weight.shape)}"
        )
    line = timeline(embeddings, sequence_ids, times)
    dtype = torch.promote_types(context.dtype, weight.dtype)
    context = context.to(dtype)
    with autocast_off(context.device.type):  # it lowers no score, and so no map before the scores
        predictions = [context @ step_weight.to(dtype).T for step_weight in weight.unbind()]
    steps = [
        info_nce_loss(
            prediction,
            embeddings,
            frames_after(line, step),
            metric=metric,
            temperature=temperature,
            ignore_index=-1,
            precision=precision,
            backend=backend,
        )
        for step, prediction in enumerate(predictions, 1)
    ]
    loss = torch.stack(steps)
    return loss.mean() if reduction == "mean" else loss


class TemporalPredictionLoss(nn.Module):
    """Module of :func:`temporal_prediction_loss`; holds the linear maps, which are learnt.

    Args:
        context_dim: C.
        dim: D.
        steps: K, at least 1.
        metric: See :func:`temporal_prediction_loss`, as the other options.
        temperature: An ``nn.Parameter`` is registered, and so learnt.
        reduction: As above.
        precision: As above.
        backend: As above.
    """

    def __init__(
        self,
        context_dim: int,
        dim: int,
        steps: int,
        *,
        metric: str = "dot",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("context_dim", context_dim), ("dim", dim), ("steps", steps)):
            check_count(name, count)
        self.weight = nn.Parameter(torch.empty(steps, dim, context_dim))
        bound = context_dim**-0.5  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        self.metric = metric
        self.temperature = temperature
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(
        self, context: Tensor, embeddings: Tensor, sequence_ids: Tensor, times: Tensor
    ) -> Tensor:
        """See :func:`temporal_prediction_loss`."""
        return temporal_prediction_loss(
            context,
            embeddings,
            sequence_ids,
            times,
            self.weight,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        steps, dim, context_dim = self.weight.shape
        return f"context_dim={context_dim}, dim={dim}, steps={steps}, metric={self.metric!r}"
