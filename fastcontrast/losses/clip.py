"""The loss of CLIP: images and texts pick each other, with a logit scale that is learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.losses.memory_queue import MemoryQueue, with_entries
from fastcontrast.ops.checks import check_choice, check_pairs, check_scale
from fastcontrast.ops.contrast_loss import Candidates, Reweighting, contrast_loss
from fastcontrast.ops.distance_softmax import accumulator_dtype
from fastcontrast.ops.ranks import Ranks
from fastcontrast.ops.reduction import REDUCTIONS


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    queue: MemoryQueue | None = None,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: Sequence[str] = (),
    ranks: Ranks | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Any:
    r"""Pick each image's text among all texts and each text's image among all images.

    .. math::
        \ell_i = -\frac{1}{2} \Bigl[\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}
            + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}\Bigr], \qquad
        s_{ij} = \mathrm{scale}\; u_i \cdot v_j

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    arXiv 2103.00020, Figure 3. No deviation. Both directions come from one matrix of scores.

    Args:
        image_features: u [M, D], of length 1 unless ``normalize``; float16, bfloat16, float32 or
            float64.
        text_features: v of the same pairs [M, D], same device.
        logit_scale: The factor of the scores, 1 / temperature, not its logarithm. Positive; a
            number or a 0-dim tensor, which receives its exact gradient.
        queue: A :class:`fastcontrast.MemoryQueue` of text features, whose entries are further texts
            for the images; nobody's, they pick none.
        normalize: Divide the features by their lengths first.
        label_smoothing: See :func:`fastcontrast.info_nce_loss`.
        reduction: ``"mean"`` and ``"sum"`` give a scalar, ``"none"`` gives [M]. The mean of no rows
            is 0.
        return_stats: See :func:`fastcontrast.info_nce_loss`; of images against texts.
        ranks: See :func:`fastcontrast.info_nce_loss`.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs); ``(loss, stats)`` with ``return_stats``.

    Raises:
        ValueError: If the shapes differ, or an option is not as above.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> clip_loss(torch.eye(2), torch.eye(2), 2.0)  # log(1 + e^-2)
        tensor(0.1269)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_pairs("image_features", image_features, "text_features", text_features)
    check_scale("logit_scale", logit_scale, image_features)
    reweighting = Reweighting(label_smoothing)
    reweighting.check()
    if isinstance(logit_scale, Tensor):
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        logit_scale = logit_scale.to(accumulator_dtype(dtype))
    texts = with_entries(text_features, queue)
    metric = "cosine" if normalize else "dot"
    target = torch.arange(image_features.shape[0], device=image_features.device)
    return contrast_loss(
        Candidates(image_features, texts, target, None, None, None, metric, logit_scale),
        symmetric=True,
        all_pay=True,
        reweighting=reweighting,
        reduction=reduction,
        return_stats=return_stats,
        ranks=ranks,
        precision=precision,
        backend=backend,
    )


class ClipLoss(nn.Module):
    """Module of :func:`clip_loss`, which holds and learns the logarithm of the logit scale.

    Args:
        temperature: 1 / logit scale at the start, 0.07 in the paper.
        max_scale: The scale is clipped there, at 100 in the paper; None for no limit. Beyond it
            the parameter receives no gradient.
        queue: See :func:`clip_loss`.
        normalize: See :func:`clip_loss`.
        label_smoothing: See :func:`clip_loss`.
        reduction: See :func:`clip_loss`.
        return_stats: See :func:`clip_loss`.
        ranks: See :func:`clip_loss`.
        precision: See :func:`clip_loss`.
        backend: See :func:`clip_loss`.

    Attributes:
        logit_scale: Parameter, 0-dim float32: the logarithm.
    """

    def __init__(
        self,
        *,
        queue: MemoryQueue | None = None,
        temperature: float = 0.07,
        max_scale: float | None = 100.0,
        normalize: bool = True,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_stats: Sequence[str] = (),
        ranks: Ranks | None = None,
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_scale("temperature", temperature)
        if max_scale is not None:
            check_scale("max_scale", max_scale)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.queue = queue
        self.max_scale = max_scale
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.return_stats = tuple(return_stats)
        self.ranks = ranks
        self.precision = precision
        self.backend = backend

    def forward(self, image_features: Tensor, text_features: Tensor) -> Any:
        """See :func:`clip_loss`."""
        scale = self.logit_scale.exp()
        if self.max_scale is not None:
            scale = scale.clamp(max=self.max_scale)
        return clip_loss(
            image_features,
            text_features,
            scale,
            queue=self.queue,
            normalize=self.normalize,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            return_stats=self.return_stats,
            ranks=self.ranks,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"max_scale={self.max_scale}, normalize={self.normalize}"
