r"""The temporal contrasting loss: frames close in time against all others, streamed.

Negatives are the columns of other sequences and those of the same one beyond a margin. Ids alone
cannot say "beyond a margin", but buckets of time can, up to a rest: with buckets of margin + 1,
frames two buckets away are beyond it for sure. Rows whose bucket leaves r modulo 3 share one
grouping of buckets by threes in which each stands in the middle, so three streams with a third of
the rows each cover every sure negative once, for the work of one stream. The rest, frames
of margin + 2 times at most, is taken by direct difference beside the positives, and joined to the
stream by the sum of their exponentials: nothing is subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastcontrast.ops.checks import METRICS, check_choice, check_operands, inverse_temperature
from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.precision import of_widened
from fastcontrast.ops.reduction import REDUCTIONS
from fastcontrast.ops.softmax_loss import log_add, softplus
from fastcontrast.temporal.adjacency import (
    Ranges,
    Timeline,
    beyond,
    check_window,
    near,
    timeline,
)

# Coordinates of near frames gathered at a time; their gradients recompute what is gathered.
_GATHERED = 1 << 22


def temporal_contrasting_loss(
    embeddings: Tensor,
    sequence_ids: Tensor,
    times: Tensor,
    *,
    window: int,
    margin: int | None,
    metric: str = "l2",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Ask that frames close in time are closer than frames of other times and sequences.

    .. math::
        \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i}
        \log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n \in N_i} e^{s_{in}}}

    .. math::
        P_i = \{j \ne i : q_j = q_i,\; |t_j - t_i| \le \tau\}, \qquad
        N_i = \{j : q_j \ne q_i\} \cup \{j : q_j = q_i,\; |t_j - t_i| > \Delta\}

    with sequence ids q, times t, the window :math:`\tau` and the margin :math:`\Delta \ge \tau`;
    same-sequence frames between the two count for nothing. It is Eq. 4 of Hoffer, Hubara and Ailon,
    "Deep unsupervised learning through spatial contrasting", 2016, arXiv 1610.00243, with time
    for space, as its section 6 proposes: a frame's positive is its neighbour instead of a patch of
    its image. Deviations: all neighbours in the batch are positives, averaged, and each is alone
    with the negatives in its sum. Other frames of the same time, such as another camera's or
    another view's, are positives (the multi-view form of Sermanet et al., 2017, arXiv 1704.06888).

    Memory is O(M·D); no M×M mask is written. The masks are ids inside the stream, and the at most
    :math:`2\tau + \Delta + 2` other frames of each time around a row are taken by direct
    difference. Looking for them waits for a GPU a few times, and breaks the graph under
    ``torch.compile``. Double backward works in eager mode.

    Args:
        embeddings: Frames f [M, D], float16, bfloat16, float32 or float64, in any order.
        sequence_ids: Which sequence each frame is of, integer [M], any values.
        times: When, integer [M], in frames or other ticks, any values.
        window: :math:`\tau`, at least 1, in units of ``times``.
        margin: :math:`\Delta`, at least ``window``, or None to leave out the whole sequence and
            contrast with other sequences alone.
        metric: ``"l2"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``, as in
            :func:`fastcontrast.info_nce_loss`.
        temperature: Distance (or similarity) that changes a score by one nat. Positive; a number or
            a 0-dim tensor, which receives its gradient.
        reduction: ``"mean"`` over the frames with a positive (of none, 0) and ``"sum"`` give a
            scalar, ``"none"`` gives [M], with 0 for frames without a positive.
        precision: See :func:`fastcontrast.distance_softmax`.
        backend: One of :func:`fastcontrast.available_backends`, or None for the fastest.

    Returns:
        Loss in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If a shape, the window, the margin, the temperature or an option is not as
            above, or ids and times do not fit into 61 bits together.
        TypeError: If an argument is not of the kind above.
        RuntimeError: If the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> frames = torch.tensor([[0.0], [1.0], [3.0]])
        >>> ids, times = torch.tensor([7, 7, 8]), torch.tensor([0, 1, 0])
        >>> options = {"window": 1, "margin": 2, "reduction": "none"}
        >>> temporal_contrasting_loss(frames, ids, times, **options)  # log(1 + e^-2), log(1 + e^-1)
        tensor([0.1269, 0.3133, 0.0000])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("metric", metric, METRICS)
    check_operands("embeddings", embeddings, "embeddings", embeddings)
    check_window(window, margin)
    scale = inverse_temperature(temperature, embeddings)
    line = timeline(embeddings, sequence_ids, times)
    x = embeddings
    if x.dtype in (torch.float16, torch.bfloat16):
        # Streams and near frames, several gradients: added before they are rounded.
        x, precision = x.float(), of_widened(precision, x)
    if metric == "cosine":
        x, metric = normalized(x), "dot"
    positives = near(line, window)
    scores = {"metric": metric, "scale": scale}
    options = {**scores, "precision": precision, "backend": backend}
    if margin is None:
        ids = line.sequences
        stream = distance_softmax(
            x, x, row_ids=ids, column_ids=ids, keep="different", **options
        ).lse
        no = torch.zeros_like(ids)
        rest = Ranges(no, no, no, no)
    else:
        width = min(margin, line.span) + 1
        stream = _sure_negatives(x, line, width, options)
        bucket = line.times // width
        rest = beyond(line, width - 1, (bucket - 1) * width, (bucket + 2) * width)
    loss = _near_rows(x, stream, line, positives, rest, scores)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / (positives.counts > 0).sum().clamp(min=1) if reduction == "mean" else total


def _sure_negatives(x: Tensor, line: Timeline, width: int, options: dict) -> Tensor:
    """Log-sum-exp [M] over all columns but the same sequence's in a row's bucket and the next."""
    bucket = line.times // width
    groups = line.span // width // 3 + 2
    parts, rows = [], []
    for remainder in range(3):
        mine = (bucket % 3 == remainder).nonzero().flatten()
        # Buckets by threes, such that those of the rows stand in the middle.
        ids = line.sequences * groups + (bucket - remainder + 1).div(3, rounding_mode="floor")
        parts.append(
            distance_softmax(
                x[mine], x, row_ids=ids[mine], column_ids=ids, keep="different", **options
            ).lse
        )
        rows.append(mine)
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _near_rows(
    x: Tensor, stream: Tensor, line: Timeline, positives: Ranges, rest: Ranges, scores: dict
) -> Tensor:
    """Loss of every row [M], from the stream and from near frames by direct difference."""
    m, dim = x.shape
    if m == 0:
        return stream
    widths = torch.stack([positives.counts.max(), rest.counts.max()]).tolist()
    if widths[0] == 0:  # nobody has a positive
        return torch.where(positives.counts > 0, stream, 0.0)
    rows = max(1, _GATHERED // max(1, sum(widths) * dim))
    several = rows < m and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    found = []
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        near_frames = _frames(line, positives.of(part), widths[0])
        rest_frames = _frames(line, rest.of(part), widths[1])
        arguments = (x, x[part], stream[part], near_frames, rest_frames, scores)
        if several:  # gathers once more in the backward pass
            found.append(
                checkpoint(_row_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            found.append(_row_losses(*arguments))
    return torch.cat(found)


def _frames(line: Timeline, ranges: Ranges, width: int) -> Tensor:
    """Frames in the ranges of each row, int64 [R, width]; -1 after the last."""
    k = torch.arange(width, device=line.order.device).expand(ranges.first.shape[0], -1)
    is_one = k < ranges.counts[:, None]
    return torch.where(is_one, line.order[torch.where(is_one, ranges.at(k), 0)], -1)


def _row_losses(
    x: Tensor, own: Tensor, stream: Tensor, positives: Tensor, rest: Tensor, scores: dict
) -> Tensor:
    """Loss of some rows [R], 0 without positives; frames [R, P] and [R, Q], -1 for none."""
    negatives = stream
    if rest.shape[1]:
        s = torch.where(rest >= 0, _scores(x, own, rest, scores), -torch.inf)
        nothing = (rest < 0).all(1)
        # A row of -inf alone has a NaN gradient in torch.
        lse = torch.where(nothing[:, None], 0.0, s).logsumexp(1)
        # Nor are sums of one term taken as sums of two: second derivatives would be NaN.
        alone = torch.isneginf(stream)
        both = log_add(torch.where(alone, 0.0, stream), lse)
        negatives = torch.where(nothing, stream, torch.where(alone, lse, both))
    is_one = positives >= 0
    count = is_one.sum(1)
    negatives = torch.where(count > 0, negatives, 0.0)
    loss = softplus(negatives[:, None] - _scores(x, own, positives, scores))
    return torch.where(is_one, loss, 0.0).sum(1) / count.clamp(min=1)


def _scores(x: Tensor, own: Tensor, frames: Tensor, scores: dict) -> Tensor:
    """Scores of rows [R, D] with frames [R, P] by direct difference; 0 where there is none."""
    # F.embedding, because the gradient of x[frames] is not deterministic on two threads.
    is_one = frames >= 0
    near = F.embedding(torch.where(is_one, frames, 0), x)
    # What is not there is the row itself, detached: a NaN elsewhere stays there.
    near = torch.where(is_one[:, :, None], near, own.detach()[:, None])
    return torch.where(is_one, paired_scores(own[:, None], near, **scores), 0.0)


class TemporalContrastingLoss(nn.Module):
    """Module of :func:`temporal_contrasting_loss`; stores its options.

    A ``temperature`` that is an ``nn.Parameter`` is registered, and so learnt.
    """

    def __init__(
        self,
        *,
        window: int,
        margin: int | None,
        metric: str = "l2",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        precision: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_window(window, margin)
        self.window = window
        self.margin = margin
        self.metric = metric
        self.temperature = temperature
        self.reduction = reduction
        self.precision = precision
        self.backend = backend

    def forward(self, embeddings: Tensor, sequence_ids: Tensor, times: Tensor) -> Tensor:
        """See :func:`temporal_contrasting_loss`."""
        return temporal_contrasting_loss(
            embeddings,
            sequence_ids,
            times,
            window=self.window,
            margin=self.margin,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"window={self.window}, margin={self.margin}, metric={self.metric!r}"
