"""Small data sets in the formats of CIFAR-10, SVHN, STL-10 and folders of pictures, for tests.

Each is written from the format's description, independently of the readers. Every image is noise
with a bright bar in row 2c + 4 of its class c, so that the sets can be learnt.
"""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np


def bars(count: int, side: int, channels: int = 3, classes: int = 10, seed: int = 7):
    """Images uint8 [count, channels, side, side] of class i mod classes, and their classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = random.integers(0, 160, (count, channels, side, side)).astype(np.uint8)
    images[np.arange(count), :, 2 * labels + 4, 4 : side - 4] = 255
    return images, labels


def write_cifar10(folder: Path, images=None, labels=None, *, pickled=False) -> Path:
    """Five training batches and a test batch, each of the same images."""
    if images is None:
        images, labels = bars(20, 32)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = images.reshape(len(images), -1)
        if pickled:
            content = {b"data": rows, b"labels": labels.tolist(), b"batch_label": name.encode()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            records = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def mat_bytes(arrays: dict, *, compress: bool, order: str = "<") -> bytes:
    """A level 5 MAT file of uint8 and float64 arrays, as its specification lays it out."""

    def element(kind, data):
        return struct.pack(order + "2I", kind, len(data)) + data + bytes(-len(data) % 8)

    kinds = {"uint8": (9, 2, "u1"), "float64": (6, 9, "f8")}
    file = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "2H", 0x0100, 0x4D49)
    for name, array in arrays.items():
        matlab_class, kind, dtype = kinds[str(array.dtype)]
        numbers = array.astype(order + dtype).tobytes(order="F")
        variable = element(6, struct.pack(order + "2I", matlab_class, 0))
        variable += element(5, struct.pack(f"{order}{array.ndim}i", *array.shape))
        # A name of up to four bytes is a small element: size and data in one word each.
        variable += struct.pack(order + "I", len(name) << 16 | 1) + name.encode().ljust(4, b"\0")
        variable += element(kind, numbers)
        whole = element(14, variable)
        if compress:
            packed = zlib.compress(whole)
            whole = struct.pack(order + "2I", 15, len(packed)) + packed
        file += whole
    return file


def write_svhn(folder: Path, *, compress=True, extra=False, dtype="uint8") -> Path:
    """Training and test digits, and extra ones on request."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", *(["extra"] if extra else [])):
        images, labels = bars(20, 32)
        digits = np.where(labels == 0, 10, labels).astype(dtype)[:, None]
        arrays = {"X": images.transpose(2, 3, 1, 0), "y": digits}
        (folder / f"{name}_32x32.mat").write_bytes(mat_bytes(arrays, compress=compress))
    return folder


def write_stl10(folder: Path, images=None, labels=None, *, unlabelled=True) -> Path:
    """Both splits of the same images, two folds, and unlabelled images on request."""
    if images is None:
        images, labels = bars(20, 96)
    folder.mkdir(parents=True, exist_ok=True)
    columns = b"".join(
        image[channel, :, column].tobytes()
        for image in images
        for channel in range(3)
        for column in range(96)
    )
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(columns)
        (folder / f"{split}_y.bin").write_bytes(bytes(int(label) + 1 for label in labels))
    half = len(images) // 2
    folds = (range(half), range(half, len(images)))
    lines = "".join(" ".join(map(str, fold)) + "\n" for fold in folds)
    (folder / "fold_indices.txt").write_text(lines)
    if unlabelled:
        (folder / "unlabeled_X.bin").write_bytes(columns)
    return folder


def write_pictures(folder: Path, *, split=True, side=32, count=20, classes=2, grey=False) -> Path:
    """PNG files in train/<class> and test/<class>, or in <class> alone."""
    from PIL import Image

    images, labels = bars(count, side, 1 if grey else 3, classes)
    for top in ("train", "test") if split else (".",):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / top / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image[0] if grey else image.transpose(1, 2, 0))
            picture.save(place / f"{number:03}.png")
    return folder
