"""Numeric arrays in MATLAB's level 5 MAT files, in which SVHN is published; for the reader of it.

A file is a header of 128 bytes and a list of elements: type and size as uint32, then the data. A
variable is an element of type 14 that holds four: flags, dimensions, name, numbers. It may lie in
an element of type 15 as a zlib stream. Numbers are in column-major order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

_TYPES = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)  # double, single, and integers of 8 to 64 bits
_COMPLEX = 0x0800


class _Element(NamedTuple):
    kind: int
    data: memoryview


def read_mat(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Read numeric arrays from a level 5 MAT file.

    Args:
        path: The file.
        names: The variables wanted; others are skipped.

    Returns:
        Name to array, in the dtype in which its numbers are stored (which may be narrower than its
        MATLAB class), with MATLAB's axes; column-major, read-only.

    Raises:
        ValueError: If it is not such a file, is truncated, or lacks a variable.
    """
    found: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        order = _byte_order(path, file.read(128))
        while len(found) < len(names):
            head = file.read(8)
            if not head:
                break
            kind, size = struct.unpack(order + "2I", _whole(path, head, 8))
            data = _whole(path, file.read(size), size)
            if kind == _COMPRESSED:
                kind, data = _inflate(path, data, order)
            if kind == _MATRIX:
                name, array = _variable(path, memoryview(data), order, names)
                if array is not None:
                    found[name] = array
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(f"{path}: holds no numeric variable {missing[0]!r}")
    return found


def _byte_order(path: Path, header: bytes) -> str:
    if header.startswith(b"MATLAB 7.3"):
        raise ValueError(f"{path}: MAT version 7.3, which is HDF5; wanted version 5")
    mark = header[126:128]
    if len(header) < 128 or mark not in (b"IM", b"MI"):
        raise ValueError(f"{path}: not a level 5 MAT file")
    return "<" if mark == b"IM" else ">"


def _whole(path: Path, data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise ValueError(f"{path}: truncated: {size:,} bytes promised, {len(data):,} found")
    return data


def _inflate(path: Path, data: bytes, order: str) -> tuple[int, bytes]:
    """Undo the compression of one element, up to the size that it says it has."""
    stream = zlib.decompressobj()
    try:
        kind, size = struct.unpack(order + "2I", _whole(path, stream.decompress(data, 8), 8))
        # A limit of 0 would be none.
        inner = _whole(path, stream.decompress(stream.unconsumed_tail, size or 1), size)
        rest = stream.decompress(stream.unconsumed_tail, 1)  # reads on to the checksum
    except zlib.error as error:
        raise ValueError(f"{path}: damaged compressed data ({error})") from error
    if rest or not stream.eof:
        raise ValueError(f"{path}: compressed data of another size than it says")
    return kind, inner


def _variable(
    path: Path, data: memoryview, order: str, names: Collection[str]
) -> tuple[str, np.ndarray | None]:
    parts = []
    for _ in range(4):
        element, data = _element(path, data, order)
        parts.append(element)
        if len(parts) == 1 and (len(element.data) < 4 or not _is_real(element, order)):
            return "", None
    _, dimensions, name, numbers = parts
    text = bytes(name.data).decode("latin1")
    if text not in names:
        return text, None
    shape = np.frombuffer(dimensions.data, order + "i4")
    if numbers.kind not in _TYPES or len(shape) < 2 or (shape < 0).any():
        raise ValueError(f"{path}: variable {text!r} is damaged")
    dtype = np.dtype(order + _TYPES[numbers.kind])
    if len(numbers.data) != np.prod(shape, dtype=object) * dtype.itemsize:
        raise ValueError(
            f"{path}: variable {text!r} has {len(numbers.data):,} bytes, not those of "
            f"{' x '.join(map(str, shape))} numbers of {dtype.itemsize}"
        )
    return text, np.frombuffer(numbers.data, dtype).reshape(tuple(shape), order="F")


def _is_real(flags: _Element, order: str) -> bool:
    (word,) = struct.unpack(order + "I", flags.data[:4])
    return word & 0xFF in _NUMERIC_CLASSES and not word & _COMPLEX


def _element(path: Path, data: memoryview, order: str) -> tuple[_Element, memoryview]:
    """Split the first element off, small ones (size and data in one word each) included."""
    if len(data) < 8:
        raise ValueError(f"{path}: truncated inside a variable")
    kind, size = struct.unpack(order + "2I", data[:8])
    if kind >> 16:
        size, start, following = kind >> 16, 4, 8
        kind &= 0xFFFF
    else:
        start, following = 8, 8 + (size + 7) // 8 * 8
    if len(data) < start + size or (following == 8 and size > 4 and start == 4):
        raise ValueError(f"{path}: truncated inside a variable")
    return _Element(kind, data[start : start + size]), data[following:]
