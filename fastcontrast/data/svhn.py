"""SVHN, format 2 (cropped digits), from its MAT files; read by the training recipes.

``X`` is indexed [row, column, channel, image], ``y`` says 10 for the digit 0. The extra images are
easier than the training images, and are joined to them as the triplet paper does.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.files import check_labels, find_file, require_folder
from fastcontrast.data.matlab import read_mat

CLASS_NAMES = tuple("0123456789")
FILES = ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat")
FOLDERS = (".", "svhn", "SVHN")

_WANTED = "SVHN's cropped digits, train_32x32.mat and test_32x32.mat"


def load_svhn(directory: str | os.PathLike[str], extra: bool | None = None) -> ImageDataset:
    """Read SVHN's cropped digits.

    Args:
        directory: Folder with ``train_32x32.mat``, ``test_32x32.mat`` and perhaps
            ``extra_32x32.mat``, as torchvision leaves them.
        extra: Whether the extra images follow the training images; None joins them if they are
            there.

    Returns:
        Images uint8 [N, 3, 32, 32], 604,388 with the extra images and 73,257 without; 26,032 test
        images; labels int64, where 0 is the digit 0.

    Raises:
        FileNotFoundError: If the folder or one of the files is missing; the message names it.
        ValueError: If a file is truncated or is something else.
    """
    root = Path(directory)
    require_folder(root, _WANTED)
    train, extras, test = FILES
    if extra is None:
        extra = any((root / folder / extras).is_file() for folder in FOLDERS)
    read = [train, extras] if extra else [train]
    parts = [_read(find_file(root, name, FOLDERS, _WANTED)) for name in read]
    test_images, test_labels = _read(find_file(root, test, FOLDERS, _WANTED))
    return ImageDataset(
        name="svhn-extra" if extra else "svhn",
        train_images=torch.cat([images for images, _ in parts]),
        train_labels=torch.cat([labels for _, labels in parts]),
        test_images=test_images,
        test_labels=test_labels,
        class_names=CLASS_NAMES,
    )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    arrays = read_mat(path, ("X", "y"))
    pixels, digits = arrays["X"], arrays["y"].reshape(-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(
            f"{path}: X is {pixels.dtype} {list(pixels.shape)}; wanted uint8 [32, 32, 3, N]"
        )
    count = pixels.shape[3]
    if count == 0 or len(digits) != count:
        raise ValueError(f"{path}: {len(digits):,} labels, but {count:,} images")
    check_labels(path, digits, 1, len(CLASS_NAMES))
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.int64) % 10)
