"""A folder of .npy files as sequences, memory-mapped: a clip reads its own frames alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_KINDS = ("uint8", "float16", "float32", "float64")


def load_sequences(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Open every ``.npy`` file of a folder as one sequence of frames.

    Args:
        directory: Folder with arrays [L, ...], uint8 frames or channels of float16, float32 or
            float64, of one dtype and frame shape and any lengths.

    Returns:
        Name of the file without its ending to its array, in the order of the names; read-only and
        memory-mapped.

    Raises:
        FileNotFoundError: If the folder is missing or holds no such file.
        ValueError: If a file is not such an array, or differs from the first; the message names it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; wanted one with sequences as .npy files")
    paths = sorted(root.glob("*.npy"))
    if not paths:
        raise FileNotFoundError(f"{root}: holds no .npy file; wanted one for each sequence")
    found: dict[str, np.ndarray] = {}
    first: np.ndarray | None = None
    for path in paths:
        array = _opened(path)
        first = array if first is None else first
        if array.dtype != first.dtype or array.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{path}: frames {array.dtype} {list(array.shape[1:])}, but those of "
                f"{paths[0].name} are {first.dtype} {list(first.shape[1:])}"
            )
        found[path.stem] = array
    return found


def _opened(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not an array in .npy form, or truncated ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim < 1 or array.dtype.name not in _KINDS:
        shape = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "archive"
        raise ValueError(f"{path}: {shape}; wanted [L, ...] of {', '.join(_KINDS)}")
    return array
