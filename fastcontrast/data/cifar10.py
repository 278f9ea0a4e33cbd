"""CIFAR-10 in both of its forms, binary records and Python pickles; read by the training recipes.

A binary record is a label byte and 32 x 32 bytes of red, of green and of blue, row by row. A pickle
holds the same rows in a matrix. Pickles can run any code when they are loaded: these are read by
an unpickler that knows NumPy arrays and nothing else.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.files import check_labels, find_file, read_records, require_folder

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
BINARY_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
PICKLE_FILES = tuple(name.removesuffix(".bin") for name in BINARY_FILES)
BINARY_FOLDERS = (".", "cifar-10-batches-bin")
PICKLE_FOLDERS = (".", "cifar-10-batches-py")  # the form and the place in which torchvision has it

_PIXELS = 3 * 32 * 32
_WANTED = "CIFAR-10's batches, binary (data_batch_1.bin) or pickled (data_batch_1)"
# What a pickle of arrays refers to; `numpy.core` until NumPy 1, `numpy._core` from 2 on.
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def load_cifar10(directory: str | os.PathLike[str]) -> ImageDataset:
    """Read CIFAR-10: five training batches and the test batch.

    Args:
        directory: Folder with ``data_batch_1.bin`` to ``_5.bin`` and ``test_batch.bin``, or with
            the pickles ``data_batch_1`` to ``_5`` and ``test_batch``; or with these in
            ``cifar-10-batches-bin`` or ``cifar-10-batches-py``. Binary files are preferred.

    Returns:
        Images uint8 [50000, 3, 32, 32] and [10000, 3, 32, 32] (of a file of another number of
        records, that many), labels int64.

    Raises:
        FileNotFoundError: If the folder or one of the files is missing; the message names it.
        ValueError: If a file is truncated or is something else.
    """
    root = Path(directory)
    require_folder(root, _WANTED)
    binary = any((root / folder / BINARY_FILES[0]).is_file() for folder in BINARY_FOLDERS)
    names, folders = (BINARY_FILES, BINARY_FOLDERS) if binary else (PICKLE_FILES, PICKLE_FOLDERS)
    paths = [find_file(root, name, folders, _WANTED) for name in names]
    batches = [(_read_binary if binary else _read_pickle)(path) for path in paths]
    return ImageDataset(
        name="cifar10",
        train_images=torch.cat([images for images, _ in batches[:5]]),
        train_labels=torch.cat([labels for _, labels in batches[:5]]),
        test_images=batches[5][0],
        test_labels=batches[5][1],
        class_names=CLASS_NAMES,
    )


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    records = read_records(path, 1 + _PIXELS, "CIFAR-10 records")
    check_labels(path, records[:, 0], 0, len(CLASS_NAMES))
    return _images(records[:, 1:]), torch.from_numpy(records[:, 0].astype(np.int64))


def _read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except (*(pickle.UnpicklingError, EOFError, ValueError, TypeError), *_OTHER_FAILURES) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable CIFAR-10 pickle ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a pickle of {type(content).__name__}; wanted CIFAR-10's dict")
    pixels, labels = (content.get(name.encode(), content.get(name)) for name in ("data", "labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f'{path}: has no "data" of bytes [N, {_PIXELS}]')
    if pixels.shape[1] != _PIXELS or len(pixels) == 0:
        raise ValueError(f'{path}: "data" is {list(pixels.shape)}; wanted [N, {_PIXELS}]')
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ValueError(f'{path}: has no "labels", a list of integers')
    if len(labels) != len(pixels):
        raise ValueError(f"{path}: {len(labels):,} labels, but {len(pixels):,} images")
    numbers = np.array(labels, np.int64)
    check_labels(path, numbers, 0, len(CLASS_NAMES))
    return _images(pixels), torch.from_numpy(numbers)


def _images(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(-1, 3, 32, 32).copy())


class _ArraysOnly(pickle.Unpickler):
    """Loads dicts, lists, numbers, bytes and NumPy arrays; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array's pickle may call."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _RECONSTRUCT
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes in Python 3's old protocols
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not loaded")


# What damaged opcodes raise inside of pickle and NumPy.
_OTHER_FAILURES = (AttributeError, LookupError, MemoryError, OverflowError, AssertionError)
