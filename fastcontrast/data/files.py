"""Finding files, reading records of equal size, digests: what the readers beside it share."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_PIECE = 1 << 24


def require_folder(root: Path, wanted: str) -> None:
    """Raise FileNotFoundError that names the folder and what was wanted, unless it is there."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; wanted one with {wanted}")


def find_file(root: Path, name: str, folders: Sequence[str], wanted: str) -> Path:
    """Return ``name`` from the first of the folders below ``root`` that has it.

    Raises:
        FileNotFoundError: If none has it; the message names the file and the set.
    """
    for folder in folders:
        if (root / folder / name).is_file():
            return root / folder / name
    others = ", ".join(str(root / folder) for folder in folders if folder != ".")
    raise FileNotFoundError(
        f"{root / name}: no such file{f', nor in {others}' if others else ''}; wanted {wanted}"
    )


def read_records(path: Path, size: int, record: str) -> np.ndarray:
    """Map a file of equal records of bytes.

    Args:
        path: The file.
        size: Bytes of a record.
        record: What a record is, for the message.

    Returns:
        uint8 [N, size], N at least 1, read from the disk as it is used.

    Raises:
        ValueError: If the file is empty, or is not a whole number of records.
    """
    length = path.stat().st_size
    if length == 0 or length % size:
        raise ValueError(
            f"{path}: {length:,} bytes, not a whole number of {record} of {size:,} bytes: "
            "truncated, or another format"
        )
    return np.memmap(path, np.uint8, mode="r").reshape(-1, size)


def check_labels(path: Path, labels: np.ndarray, first: int, classes: int) -> None:
    """Raise ValueError that names the file if a label is not in first..first + classes - 1."""
    for worst in (labels.min(), labels.max()):
        if not first <= worst < first + classes:
            raise ValueError(
                f"{path}: holds label {worst}; wanted {first} to {first + classes - 1}"
            )


def size_and_md5(path: Path) -> tuple[int, str]:
    """Size in bytes and MD5 digest, the form in which data sets publish it, both without gzip.

    Raises:
        OSError: If the file cannot be read, or its gzip data is damaged.
    """
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged gzip data: {error}") from error
    return size, digest.hexdigest()
