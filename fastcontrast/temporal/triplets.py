"""Triplets by time: indices of anchors, neighbours and far frames, for every triplet loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.checks import check_choice, check_count
from fastcontrast.temporal.adjacency import Ranges, beyond, check_window, near, timeline
from fastcontrast.temporal.draws import TRIPLETS, below, check_seed, words

NEGATIVES = ("all", "same", "other")
_FRAMES = 1 << 31  # a position is 31 bits of a draw


class TemporalTriplets(NamedTuple):
    """Indices of frames, int64 [T] each.

    Attributes:
        anchor: Ascending, each as often as asked for.
        positive: Of the anchor's sequence, within the window.
        negative: Beyond the margin, or of another sequence.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor


def temporal_triplets(
    sequence_ids: Tensor,
    times: Tensor,
    *,
    window: int,
    margin: int | None,
    negatives: str = "all",
    per_anchor: int = 1,
    seed: int,
    step: int = 0,
) -> TemporalTriplets:
    r"""Draw triplets whose positive is near in time and whose negative is far.

    The single-view form of Sermanet et al., "Time-Contrastive Networks", 2017, arXiv 1704.06888,
    with ``negatives="same"``, margin twice the window and ``triplet_margin_loss(...,
    metric="sqeuclidean")``; after Mobahi, Collobert and Weston, "Deep learning from temporal
    coherence in video", 2009. The positive is uniform over the other frames of the sequence with
    :math:`|t_j - t_i| \le` window, the negative over the frames asked for. A frame that lacks
    either is no anchor. The draws are a pure function of seed, step and the frame's index.

    Args:
        sequence_ids: Which sequence each frame is of, integer [M].
        times: When, integer [M], in frames or other ticks.
        window: At least 1, in units of ``times``.
        margin: At least ``window``; None leaves out the whole sequence, for ``"all"`` and
            ``"other"``.
        negatives: ``"same"`` for frames of the sequence beyond the margin, ``"other"`` for those of
            other sequences, ``"all"`` for both, each frame as likely as another.
        per_anchor: Triplets of each anchor, at least 1.
        seed: 64-bit seed.
        step: Number of the batch in training, 0 <= step < 2**48.

    Returns:
        :class:`TemporalTriplets`, on the device of the ids; reading how many there are waits for a
        GPU.

    Raises:
        ValueError: If a shape, the window, the margin or an option is not as above.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> ids, times = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 5])
        >>> temporal_triplets(ids, times, window=1, margin=2, seed=0)
        TemporalTriplets(anchor=tensor([0, 1]), positive=tensor([1, 0]), negative=tensor([2, 2]))
    """
    check_choice("negatives", negatives, NEGATIVES)
    check_window(window, margin)
    check_count("per_anchor", per_anchor)
    check_seed(seed, step)
    if margin is None and negatives == "same":
        raise ValueError('margin must be a number for negatives="same", got None')
    if not isinstance(sequence_ids, Tensor) or sequence_ids.dim() != 1:
        kind = list(sequence_ids.shape) if isinstance(sequence_ids, Tensor) else sequence_ids
        raise ValueError(f"sequence_ids must be an integer tensor [M], got {kind}")
    line = timeline(sequence_ids, sequence_ids, times)
    m = line.order.shape[0]
    if m >= _FRAMES or per_anchor >= _FRAMES:
        raise ValueError(f"frames and per_anchor must be below 2^31, got {m} and {per_anchor}")
    positives = near(line, window)
    if negatives == "same":
        far = beyond(line, min(margin or 0, line.span))
    else:
        whole = margin is None or negatives == "other"
        reach = line.span + 1 if whole else min(margin or 0, line.span)
        # All positions but those of the row's own sequence within reach.
        first, last = line.first_at(line.times - reach), line.first_at(line.times + reach + 1)
        far = Ranges(torch.zeros_like(first), first, last, torch.full_like(last, m))
    anchor = ((positives.counts > 0) & (far.counts > 0)).nonzero().flatten()
    anchor = anchor.repeat_interleave(per_anchor)
    repeats = torch.arange(anchor.shape[0], device=anchor.device) % per_anchor
    drawn = words(seed, step, TRIPLETS, anchor | repeats << 32)
    found = []
    for ranges, word in ((positives.of(anchor), drawn[0]), (far.of(anchor), drawn[1])):
        found.append(line.order[ranges.at(below(word, ranges.counts))])
    return TemporalTriplets(anchor, *found)
