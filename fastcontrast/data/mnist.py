"""MNIST in its own file format, IDX, plain or gzip-compressed; the training recipes read it here.

IDX: two zero bytes, a type byte, the number of dimensions, then each dimension as a big-endian
uint32, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch

from fastcontrast.data.dataset import ImageDataset

CLASS_NAMES = tuple("0123456789")

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
FOLDERS = (".", "MNIST/raw")  # the second is where torchvision puts them
_UINT8 = 0x08
_PIECE = 1 << 24
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | os.PathLike[str], ndim: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file; gzip is recognised by its content, not by its name.
        ndim: Number of dimensions that the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 array with ``ndim`` dimensions, writable.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not IDX, has other dimensions, or not the size its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted IDX with {ndim} dimensions")
    with open(path, "rb") as probe:
        compressed = probe.read(2) == _GZIP_MAGIC
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as stream:
            magic = stream.read(4)
            if magic != bytes((0, 0, _UINT8, ndim)):
                raise ValueError(
                    f"{path}: not the IDX file wanted: starts with bytes '{magic.hex(' ')}', "
                    f"wanted '00 00 {_UINT8:02x} {ndim:02x}' (unsigned bytes, {ndim} dimensions)"
                )
            header = stream.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise ValueError(f"{path}: truncated inside its header")
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
            size = int(np.prod(shape, dtype=object))
            values = _read_at_most(stream, size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip data ({error})") from error
    if len(values) != size:
        short = len(values) < size
        raise ValueError(
            f"{path}: {'truncated' if short else 'longer than it should be'}: the header says "
            f"{' x '.join(map(str, shape))} = {size:,} bytes, "
            f"found {f'{len(values):,}' if short else 'more'}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape).copy()


def load_mnist(directory: str | os.PathLike[str]) -> ImageDataset:
    """Read the four files of MNIST, or of a set in the same form (28 x 28 pixels, labels 0 to 9).

    Args:
        directory: Folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each plain or as ``.gz``; or
            with these in ``MNIST/raw``, which is torchvision's layout.

    Returns:
        Images uint8 [N, 1, 28, 28] and labels int64 [N] of both splits.

    Raises:
        FileNotFoundError: If the folder or one of the files is missing; the message names it.
        ValueError: If a file is truncated, is something else, or does not belong to its partner.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; wanted one with the MNIST IDX files")
    paths = {part: _find(root, name) for part, name in _FILES.items()}
    splits = [_read_split(paths[f"{s}_images"], paths[f"{s}_labels"]) for s in ("train", "test")]
    (train_images, train_labels), (test_images, test_labels) = splits
    return ImageDataset(
        "mnist", train_images, train_labels, test_images, test_labels, class_names=CLASS_NAMES
    )


def _read_at_most(stream: IO[bytes] | gzip.GzipFile, limit: int) -> bytes:
    """Read to the limit or the end, in pieces: a foreign header may promise any size."""
    values = bytearray()
    while piece := stream.read(min(_PIECE, limit - len(values))):
        values += piece
    return bytes(values)


def _find(root: Path, name: str) -> Path:
    candidates = [root / folder / (name + end) for folder in FOLDERS for end in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{root / name}: no such file, nor as .gz, nor in {root / FOLDERS[1]}; "
        "wanted the MNIST IDX files"
    )


def _read_split(images_path: Path, labels_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{images_path}: images of {images.shape[1]} x {images.shape[2]} pixels; wanted 28 x 28"
        )
    if len(images) == 0:
        raise ValueError(f"{images_path}: holds no images")
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_path}: {len(labels):,} labels, "
            f"but {len(images):,} images in {images_path.name}"
        )
    if labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{labels_path}: holds label {labels.max()}; wanted 0 to 9")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
