"""A folder of pictures, one folder for each class: how one's own images are trained on.

Pillow reads them, and is imported when the first is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.files import require_folder

_SPLITS = ("train", "test")
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_TEST_SHARE = 10  # without a test folder, one in so many images of a class
_WANTED = "one folder of pictures for each class"


def class_folders(root: Path) -> list[Path]:
    """Return the folders right below ``root`` that hold pictures, in the order of their names."""
    if not root.is_dir():
        return []
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [folder for folder in folders if _pictures(folder)]


def load_image_folder(
    directory: str | os.PathLike[str], size: int | None = None, seed: int = 0
) -> ImageDataset:
    """Read pictures sorted into one folder for each class.

    Args:
        directory: Folder with ``train/<class>/`` and ``test/<class>/``; or with ``<class>/`` alone,
            of which a tenth of each class, at least one picture, is then kept for the test.
        size: Side in pixels to which every picture is brought: its shorter side is resized, the
            middle of the longer one is kept. None wants all pictures to have one size.
        seed: Chooses the tenth.

    Returns:
        Images uint8 [N, C, H, W], C = 1 if every picture is grey and 3 otherwise; labels int64 in
        the order of the class folders' names.

    Raises:
        FileNotFoundError: If the folder is missing.
        ValueError: If it has fewer than two classes, if a file is not a readable picture or has
            another size; the message names it.
        ModuleNotFoundError: If Pillow is not installed.
    """
    root = Path(directory)
    require_folder(root, _WANTED)
    split = (root / _SPLITS[0]).is_dir()
    top = root / _SPLITS[0] if split else root
    names = tuple(folder.name for folder in class_folders(top))
    if len(names) < 2:
        raise ValueError(f"{top}: {len(names)} folders with pictures; wanted {_WANTED}, 2 or more")
    train = [_pictures(top / name) for name in names]
    if split:
        require_folder(root / _SPLITS[1], _WANTED)
        test = [_pictures(root / _SPLITS[1] / name) for name in names]
        if not any(test):
            raise ValueError(f"{root / _SPLITS[1]}: holds no picture of {', '.join(names)}")
    else:
        train, test = _take_test(train, top, seed)
    paths = [path for group in (*train, *test) for path in group]
    images = _stack([_read(path, size) for path in paths], paths)
    train_labels, test_labels = _labels(train), _labels(test)
    return ImageDataset(
        name=root.resolve().name,
        train_images=images[: len(train_labels)],
        train_labels=train_labels,
        test_images=images[len(train_labels) :],
        test_labels=test_labels,
        class_names=names,
    )


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _ENDINGS and p.is_file())


def _take_test(
    groups: list[list[Path]], top: Path, seed: int
) -> tuple[list[list[Path]], list[list[Path]]]:
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    train, test = [], []
    for group in groups:
        if len(group) < 2:
            raise ValueError(f"{top / group[0].parent.name}: one picture; wanted 2 or more")
        order = random.permutation(len(group))
        held = set(order[: max(1, len(group) // _TEST_SHARE)].tolist())
        train.append([path for i, path in enumerate(group) if i not in held])
        test.append([path for i, path in enumerate(group) if i in held])
    return train, test


def _read(path: Path, size: int | None) -> np.ndarray:
    image_module = _pillow()
    try:
        with image_module.open(path) as picture:
            picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
            if size is not None:
                picture = _resize(picture, size, image_module)
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable picture ({reason})") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _resize(picture: Any, size: int, image_module: Any) -> Any:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), image_module.Resampling.BILINEAR, box=box)


def _stack(arrays: list[np.ndarray], paths: list[Path]) -> Tensor:
    shape, grey = arrays[0].shape[:2], all(array.shape[2] == 1 for array in arrays)
    images = np.empty((len(arrays), 1 if grey else 3, *shape), np.uint8)
    for image, array, path in zip(images, arrays, paths, strict=True):
        if array.shape[:2] != shape:
            raise ValueError(
                f"{path}: {array.shape[1]} x {array.shape[0]} pixels, the first picture "
                f"{shape[1]} x {shape[0]}; an image size brings all to one"
            )
        image[:] = array.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _labels(groups: list[list[Path]]) -> Tensor:
    return torch.tensor([number for number, group in enumerate(groups) for _ in group])


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError(
            'folders of pictures need Pillow: pip install "fastcontrast[train]"'
        ) from error
    return Image
