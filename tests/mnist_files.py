"""Small data sets in MNIST's file format, for the tests of readers, recipes and the command."""

import gzip
import struct
from pathlib import Path

import numpy as np

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx_bytes(array: np.ndarray) -> bytes:
    """IDX content written from the format's definition, independently of the reader."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, train: int = 60, test: int = 20, compress: bool = False) -> Path:
    """Write a learnable set: class c = index mod 10 is a bright bar on row 2c + 4, over noise."""
    random = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        images = random.integers(0, 160, (count, 28, 28))
        images[np.arange(count), 2 * labels + 4, 4:24] = 255
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    for part, array in arrays.items():
        content = idx_bytes(array)
        if compress:
            (folder / f"{NAMES[part]}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / NAMES[part]).write_bytes(content)
    return folder
