"""What a step trains on: indices that are functions of (seed, step), and pixels cut by them.

Nothing here keeps state, so that a run can be continued at any step, and a batch be shared out
among ranks, which all can draw the whole of it. Called by the recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastcontrast.patches import extract_patches, random_patches

# Independent Philox keys of one seed: one for each kind of draw.
LABELS, STEPS, HELD_OUT, TEST, SHUFFLES, DROPOUT, PROBES, CLASSIFIERS = range(8)


def generator(seed: int, stream: int, step: int = 0) -> np.random.Generator:
    """Random numbers that are a function of seed, kind of draw and step."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]))


@dataclass(frozen=True)
class Pixels:
    """How bytes, or channels as they are, become the network's input: ``(x - mean) / std``.

    Attributes:
        mean: In bytes, 0 to 255, or in the units of the channels.
        std: In bytes, or in the units of the channels, positive.
    """

    mean: float
    std: float

    def cut(
        self,
        images: Tensor,
        index: Tensor | None = None,
        *,
        shift: int = 0,
        mirror: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> Tensor:
        """Take whole images, normalised; translated and mirrored at random on request.

        Args:
            images: uint8 [N, C, H, W]; of channels floating point, taken whole.
            index: Which of them, int64 [B]; None for all.
            shift: Largest translation in pixels; what comes into view is the mean,
                rounded to a byte.
            mirror: Whether to mirror every other image.
            seed: Of the translations.
            step: Of the translations.

        Returns:
            float32 [B, C, H, W].
        """
        if images.is_floating_point():
            return ((images if index is None else images[index]).float() - self.mean) / self.std
        height, width = images.shape[2:]
        mean, std = self.mean / 255, self.std / 255
        if shift or mirror:
            return random_patches(
                images, 1, (height, width), padding=shift,
                padding_mode="constant" if shift else "error",
                fill=round(self.mean) if shift else 0.0,
                hflip=0.5 if mirror else 0.0, mean=mean, std=std, index=index, seed=seed, step=step,
            ).data[:, 0]  # fmt: skip
        count = len(images) if index is None else len(index)
        boxes = _whole_image(images.device, height, width).expand(count, 1, 4)
        return extract_patches(
            images, boxes, (height, width), mean=mean, std=std, index=index
        )[:, 0]  # fmt: skip


@lru_cache(maxsize=8)
def _whole_image(device: torch.device, height: int, width: int) -> Tensor:
    """The box of a whole image, made once: its copy to a GPU waits for all that runs there."""
    return torch.tensor([0, 0, height, width], dtype=torch.int32, device=device)


BYTES = Pixels(128.0, 128.0)


def pixels_of(images: Tensor, normalise: str) -> Pixels:
    """Choose the normalisation: ``"bytes"``, or ``"global"`` statistics of these images.

    Channels, which are floating point, have those statistics in any case.
    """
    if images.is_floating_point():
        values = images.double()
        return Pixels(values.mean().item(), values.std(unbiased=False).item() or 1.0)
    if normalise == "bytes":
        return BYTES
    counts = torch.bincount(images.flatten(), minlength=256).double()  # [256]: exact, no copy
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean).square()).sum() / counts.sum()
    return Pixels(mean.item(), max(variance.sqrt().item(), 1.0))


@dataclass(frozen=True)
class LabelSplit:
    """Which training images have a label.

    Attributes:
        labelled: Indices of the labelled images by class, int64 [C, L].
        unlabelled: Indices of all others, ascending, int64 [U].
    """

    labelled: np.ndarray
    unlabelled: np.ndarray


def split_labels(labels: Tensor, num_classes: int, per_class: int, seed: int) -> LabelSplit:
    """Choose at random the images that keep their label: the same number of every class.

    Args:
        labels: int64 [N].
        num_classes: Number of classes C.
        per_class: Labelled images of each class.
        seed: The choice is a function of it and of the labels.

    Returns:
        The split.

    Raises:
        ValueError: If a class has too few images.
    """
    numbers = labels.numpy()
    random = generator(seed, LABELS)
    chosen = []
    for c in range(num_classes):
        members = np.flatnonzero(numbers == c)
        if len(members) < per_class:
            raise ValueError(
                f"labels_per_class is {per_class}; class {c} has only {len(members)} images"
            )
        chosen.append(random.permutation(members)[:per_class])
    labelled = np.stack(chosen).astype(np.int64)
    return LabelSplit(labelled, np.setdiff1d(np.arange(len(numbers)), labelled))


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split training images into those to train on and those to watch, class by class.

    Args:
        labels: int64 [N].
        share: Share of each class to hold out, rounded down; at least 2 of a class that has 4 or
            more, if the share is not 0.
        seed: The choice is a function of it and of the labels.

    Returns:
        Both index arrays, ascending, int64.
    """
    numbers = labels.numpy()
    random, held = generator(seed, HELD_OUT), []
    for c in np.unique(numbers):
        members = random.permutation(np.flatnonzero(numbers == c))
        count = int(share * len(members))
        if share > 0 and len(members) >= 4:
            count = max(count, 2)
        held.append(members[:count])
    kept_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(numbers)), kept_out), kept_out


def shuffled_batch(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of one batch of an epoch: every image at most once between reshuffles.

    Args:
        count: Number of images.
        batch: Images in a batch; more than ``count`` counts as ``count``. An epoch's last images
            that would not fill one are left out of it.
        seed: The run's seed.
        step: Number of batches before this one.

    Returns:
        int64 [B].
    """
    batch = min(batch, count)
    epoch, position = divmod(step, count // batch)
    return _shuffle(count, seed, epoch)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, SHUFFLES, epoch).permutation(count)


def seed_dropout(seed: int, step: int, device: torch.device) -> None:
    """Make the masks of one step a function of (seed, step): sets torch's default generator."""
    number = int(generator(seed, DROPOUT, step).integers(0, 2**63))
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
