"""The frames by which the recipe ``temporal`` judges an embedding, and what needs no network.

Called by :mod:`fastcontrast.train.temporal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.data import ImageDataset, SequenceSet
from fastcontrast.ops.nearest import nearest
from fastcontrast.temporal import ClipSampler, slow_features

_SLOW, _CELLS = 32, 12
_BATCHES, _CLIPS = 20, 100  # of clips that slow features are fitted to


@dataclass(frozen=True, kw_only=True)
class FrameDataset(ImageDataset):
    """Frames of both splits, evenly spaced. Without labels all are of class 0.

    Attributes:
        is_labelled: Whether the labels mean anything.
        test_sequences: Number of each test frame's sequence, int64 [T].
        test_times: Place of each test frame in its sequence, int64 [T].
    """

    is_labelled: bool
    test_sequences: Tensor
    test_times: Tensor


def choose_frames(sequences: SequenceSet, count: int) -> FrameDataset:
    """Take evenly spaced frames of both splits; of those with a label, if there are labels.

    Args:
        sequences: Both splits.
        count: Most frames of a split.

    Returns:
        The frames, uint8 [N, C, H, W], or float32 [N, C, 1, T] of channels.

    Raises:
        ValueError: If there are labels and a split has none of them.
    """
    labelled = bool(sequences.class_names)
    parts = []
    for split, arrays, labels in (
        ("training", sequences.train, sequences.train_labels),
        ("test", sequences.test, sequences.test_labels),
    ):
        kept = [np.flatnonzero(one >= 0) if labelled else np.arange(len(one))
                for one in labels.values()]  # fmt: skip
        places = np.stack([
            np.repeat(np.arange(len(kept)), [len(times) for times in kept]), np.concatenate(kept)
        ], 1)  # fmt: skip
        if not len(places):
            raise ValueError(f"labels: no {split} frame of {sequences.name} has one")
        many = min(count, len(places))
        places = places[np.arange(many) * len(places) // many]
        parts.append((places, _taken(arrays, places), _classes(labels, places)))
    (_, train, train_labels), (places, test, test_labels) = parts
    return FrameDataset(
        sequences.name, train, train_labels, test, test_labels,
        sequences.class_names or ("frame",), is_labelled=labelled,
        test_sequences=torch.from_numpy(places[:, 0]), test_times=torch.from_numpy(places[:, 1]),
    )  # fmt: skip


def time_error(embeddings: Tensor, frames: FrameDataset, window: int) -> float:
    """Fraction of test frames whose nearest other test frame is not near in time.

    Args:
        embeddings: Of the test frames, [T, D].
        frames: Says where they are from.
        window: Frames of the same sequence at most so far apart are near.

    Returns:
        The error, from 0 to 1.
    """
    own = torch.arange(len(embeddings), device=embeddings.device)[:, None]
    found = nearest(embeddings, embeddings, exclude=own).indices[:, 0].cpu()
    apart = (frames.test_times[found] - frames.test_times).abs()
    other = frames.test_sequences[found] != frames.test_sequences
    return (other | (apart > window)).double().mean().item()


def slow_features_of(
    frames: FrameDataset, sampler: ClipSampler
) -> tuple[Tensor, Tensor, str] | None:
    """Slow features of both splits' frames, brought to at most 12 x 12 cells.

    Args:
        frames: Both splits.
        sampler: Of the training sequences; its clips are taken with every frame.

    Returns:
        Features of training and test frames [N, K], and how they came about; None if the frames do
        not vary enough for one.
    """
    close = ClipSampler(sampler.sequences, clips=_CLIPS, length=sampler.length, seed=sampler.seed)
    batches = [close.batch(step) for step in range(_BATCHES)]
    seen = torch.cat([_cells(batch.frames.flatten(0, 1)) for batch in batches])
    times = torch.cat([batch.times for batch in batches])
    ids = torch.arange(len(times))[:, None].expand_as(times)  # clips may overlap
    centred = seen - seen.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred)
    dim = min(_SLOW, int((variances > 1e-9 * variances[-1].clamp(min=1e-30)).sum()))
    if dim < 1:
        return None
    found = slow_features(seen, ids.flatten(), times.flatten(), dim)
    how = f"the {dim} slowest linear ones of {seen.shape[1]} cells, from {len(times):,} clips"
    points, test = (
        found.transform(_cells(x)).float() for x in (frames.train_images, frames.test_images)
    )
    return points, test, how


def _cells(frames: Tensor) -> Tensor:
    """Frames [N, C, H, W] averaged over at most 12 x 12 cells and flattened, float64."""
    height, width = (min(side, _CELLS) for side in frames.shape[2:])
    parts = [F.adaptive_avg_pool2d(part.double(), (height, width)) for part in frames.split(500)]
    return torch.cat(parts).flatten(1)


def _taken(arrays: Mapping[str, np.ndarray], places: np.ndarray) -> Tensor:
    """Frames at places [N, 2] of sequence and time, which ascend by sequence."""
    found = [
        np.array(array[places[places[:, 0] == k, 1]]) for k, array in enumerate(arrays.values())
    ]
    frames = torch.from_numpy(np.concatenate(found))
    return frames if frames.dtype == torch.uint8 else frames.float()


def _classes(labels: Mapping[str, np.ndarray], places: np.ndarray) -> Tensor:
    given = list(labels.values())
    chosen = np.array([max(given[k][t], 0) for k, t in places.tolist()], np.int64)
    return torch.from_numpy(chosen)
