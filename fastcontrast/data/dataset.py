"""The form in which every reader of this package returns a data set, for the training package."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageDataset:
    """Images and class labels of a training and a test split, in host memory.

    Attributes:
        name: Short name for run folders and titles, for example ``"mnist"``.
        train_images: uint8, shape [N, C, H, W], 0 to 255, rows from top to bottom.
        train_labels: int64, shape [N], each from 0 to ``len(class_names) - 1``.
        test_images: uint8, shape [T, C, H, W].
        test_labels: int64, shape [T].
        class_names: What the labels mean, in the order of their numbers.
        unlabelled_images: Further images without a label, uint8 [U, C, H, W], or None.
        folds: Indices of training images, int64 [n] each: the subsets on which a protocol trains
            one by one. Empty if there is none.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    unlabelled_images: Tensor | None = None
    folds: tuple[Tensor, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
