"""STL-10's binary layout, with its folds and unlabelled images; read by the training recipes.

An image is 96 x 96 bytes of red, of green and of blue, each *column by column*. Labels are 1 to
10. A line of ``fold_indices.txt`` has the training images of one fold, counted from 0. Sets of
other images in this layout are read too, and are not called STL-10.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.files import check_labels, find_file, read_records, require_folder

CLASS_NAMES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
FOLDERS = (".", "stl10_binary")  # the second is where torchvision puts them
TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"
UNLABELLED, FOLDS, NAMES = "unlabeled_X.bin", "fold_indices.txt", "class_names.txt"

_SIDE = 96
_PIXELS = 3 * _SIDE * _SIDE
_PUBLISHED_COUNTS = (5000, 8000)
_WANTED = "STL-10's binary files"
_BLOCK = 1000  # images turned at a time


def load_stl10(directory: str | os.PathLike[str], unlabelled: bool = True) -> ImageDataset:
    """Read STL-10, or another set in its layout.

    Args:
        directory: Folder with ``train_X.bin``, ``train_y.bin``, ``test_X.bin``, ``test_y.bin`` and
            perhaps ``unlabeled_X.bin``, ``fold_indices.txt`` and ``class_names.txt``; or with these
            in ``stl10_binary``.
        unlabelled: Whether to read the unlabelled images, 2.8 GB, if they are there.

    Returns:
        Images uint8 [N, 3, 96, 96], labels int64 from 0, unlabelled images and folds if they are
        there. ``name`` is ``"stl10"`` if there are 5,000 training and 8,000 test images of
        STL-10's classes, and ``"stl10-layout"`` otherwise.

    Raises:
        FileNotFoundError: If the folder or a file that is not optional is missing.
        ValueError: If a file is truncated, is something else, or does not belong to its partner.
    """
    root = Path(directory)
    require_folder(root, _WANTED)

    def find(name: str) -> Path:
        return find_file(root, name, FOLDERS, _WANTED)

    def find_optional(name: str) -> Path | None:
        paths = (root / folder / name for folder in FOLDERS)
        return next((path for path in paths if path.is_file()), None)

    names = _read_names(find_optional(NAMES))
    train_images, train_labels = _read_split(find(TRAIN), find(TRAIN_LABELS), len(names))
    test_images, test_labels = _read_split(find(TEST), find(TEST_LABELS), len(names))
    rest = find_optional(UNLABELLED) if unlabelled else None
    folds = find_optional(FOLDS)
    counts = (len(train_images), len(test_images))
    return ImageDataset(
        name="stl10" if (counts, names) == (_PUBLISHED_COUNTS, CLASS_NAMES) else "stl10-layout",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=names,
        unlabelled_images=_read_images(rest) if rest else None,
        folds=_read_folds(folds, len(train_images)) if folds else (),
    )


def _read_split(images: Path, labels: Path, classes: int) -> tuple[Tensor, Tensor]:
    pixels = _read_images(images)
    numbers = np.fromfile(labels, np.uint8)
    if len(numbers) != len(pixels):
        raise ValueError(
            f"{labels}: {len(numbers):,} labels, but {len(pixels):,} images in {images.name}"
        )
    check_labels(labels, numbers, 1, classes)
    return pixels, torch.from_numpy(numbers.astype(np.int64) - 1)


def _read_images(path: Path) -> Tensor:
    columns_first = read_records(path, _PIXELS, "STL-10 images").reshape(-1, 3, _SIDE, _SIDE)
    images = np.empty(columns_first.shape, np.uint8)
    for start in range(0, len(images), _BLOCK):
        block = slice(start, start + _BLOCK)
        images[block] = columns_first[block].transpose(0, 1, 3, 2)
    return torch.from_numpy(images)


def _read_folds(path: Path, count: int) -> tuple[Tensor, ...]:
    folds = []
    try:
        for line in path.read_text("ascii").splitlines():
            folds.append(torch.tensor([int(number) for number in line.split()]))
    except ValueError as error:
        raise ValueError(f"{path}: not lines of indices ({error})") from error
    if not folds or any(len(f) == 0 or f.min() < 0 or f.max() >= count for f in folds):
        raise ValueError(f"{path}: a fold is empty, or has an index that is not in 0..{count - 1}")
    return tuple(folds)


def _read_names(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return CLASS_NAMES
    try:
        names = tuple(path.read_text("utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text ({error})") from error
    names = tuple(name.strip() for name in names if name.strip())
    if not 2 <= len(names) <= 255:
        raise ValueError(f"{path}: {len(names)} class names; wanted 2 to 255, one a line")
    return names
