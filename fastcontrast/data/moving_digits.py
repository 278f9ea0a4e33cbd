"""Moving digits: sequences made from the embedded sample, for learning from time without downloads.

After Srivastava, Mansimov and Salakhutdinov, "Unsupervised Learning of Video Representations using
LSTMs", 2015, arXiv 1502.04681, with one or more digits and in integer arithmetic throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data.sample import mnist_sample


@dataclass(frozen=True)
class SequenceDataset:
    """Sequences and what they show, of a training and a test split, in host memory.

    Attributes:
        name: Short name for run folders and titles.
        train_sequences: uint8 [S, T, C, H, W], 0 to 255.
        train_labels: int64 [S, K], classes of what each sequence shows, ascending.
        test_sequences: uint8 [U, T, C, H, W].
        test_labels: int64 [U, K].
        class_names: What the labels mean, in the order of their numbers.
    """

    name: str
    train_sequences: Tensor
    train_labels: Tensor
    test_sequences: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


def moving_digits(
    train: int = 1000,
    test: int = 200,
    *,
    length: int = 20,
    size: int = 48,
    digits: int = 1,
    speed: int = 3,
    seed: int = 0,
) -> SequenceDataset:
    """Let handwritten digits move in straight lines and bounce off the borders.

    Each sequence draws its digits, where they start, and whole velocities of at most ``speed``
    pixels per frame along each axis, not both 0; where digits overlap the brighter pixel counts.
    Training sequences show digits of the sample's training images, test sequences those of its test
    images. Equal arguments give equal bytes on every machine.

    Args:
        train: Training sequences S, at least 1.
        test: Test sequences U, at least 1.
        length: Frames of a sequence T, at least 1.
        size: Height and width of a frame in pixels, at least 28.
        digits: Digits of a sequence K, at least 1.
        speed: At least 1 and at most 100.
        seed: 0 <= seed < 2**64.

    Returns:
        Frames uint8 [S, T, 1, size, size], 0 for the ground, and labels int64 [S, K].

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument is not an integer.

    Example:
        >>> found = moving_digits(2, 1, length=5)
        >>> list(found.train_sequences.shape), list(found.test_labels.shape)
        ([2, 5, 1, 48, 48], [1, 1])
    """
    limits = {
        "train": (train, 1, 1 << 32), "test": (test, 1, 1 << 32), "length": (length, 1, 1 << 20),
        "size": (size, 28, 1 << 12), "digits": (digits, 1, 1 << 10), "speed": (speed, 1, 100),
        "seed": (seed, 0, (1 << 64) - 1),
    }  # fmt: skip
    for name, (value, least, most) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in {least}..{most}, got {value}")
    sample = mnist_sample()
    splits = []
    for split, images, labels, count in (
        (0, sample.train_images, sample.train_labels, train),
        (1, sample.test_images, sample.test_labels, test),
    ):
        # The raw words of a bit generator are the same in every version of numpy.
        raw = np.random.Philox(key=[seed, split]).random_raw(count * digits * 5)
        words = torch.from_numpy((raw >> np.uint64(33)).astype(np.int64)).view(count, digits, 5)
        chosen = words[..., 0] % len(labels)
        frames = torch.zeros(count, length, size, size, dtype=torch.uint8)
        for k in range(digits):
            rows, columns = _paths(words[:, k, 1:], length, size - 28, speed)
            _paste(frames, images[chosen[:, k], 0], rows, columns)
        splits += [frames[:, :, None], labels[chosen].sort(1).values]
    return SequenceDataset("moving-digits", *splits, class_names=sample.class_names)


def _paths(words: Tensor, length: int, room: int, speed: int) -> tuple[Tensor, Tensor]:
    """First row and column of a digit in each frame [S, T], from four words of each sequence."""
    velocity = words[:, 2:] % (2 * speed + 1) - speed
    still = (velocity == 0).all(1)
    velocity[:, 0] = torch.where(still, speed, velocity[:, 0])
    walked = words[:, :2] % (room + 1) + torch.arange(length)[:, None, None] * velocity
    # Bouncing between 0 and room is a walk on a circle twice as long, folded.
    place = walked % max(1, 2 * room)
    place = torch.minimum(place, 2 * room - place)
    return place[..., 0].T, place[..., 1].T


def _paste(frames: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Lay images [S, 28, 28] over frames [S, T, H, W], the brighter pixel on top."""
    sequence = torch.arange(frames.shape[0])[:, None, None]
    extent = torch.arange(28)
    for t in range(frames.shape[1]):
        y = (rows[:, t, None] + extent)[:, :, None]
        x = (columns[:, t, None] + extent)[:, None, :]
        frames[sequence, t, y, x] = torch.maximum(frames[sequence, t, y, x], images)
