"""Sequences of a training and a test split, with labels where there are any: a folder, or made.

Read by the recipe ``temporal``; the layout of a folder is in docs/temporal.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcontrast.data.moving_digits import moving_digits
from fastcontrast.data.sequences import load_sequences

_CHANNELS_LAST = ((3,), (4,))  # how a picture's shape ends then


@dataclass(frozen=True)
class SequenceSet:
    """Sequences by name. A frame is a picture, or a window of channels that starts at its time.

    Attributes:
        name: Short name for titles.
        train: uint8 [L, C, H, W], or floating point [L, C, 1, T] for channels.
        train_labels: Class of each frame, int64 [L], -1 where there is none.
        test: The same of the test split.
        test_labels: The same of the test split.
        class_names: What the labels mean; empty if there are no labels.
    """

    name: str
    train: Mapping[str, np.ndarray]
    train_labels: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    test_labels: Mapping[str, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def is_pictures(self) -> bool:
        """Whether frames are pictures, not windows of channels."""
        return next(iter(self.train.values())).dtype == np.uint8


def load_sequence_set(
    data: str | os.PathLike[str], *, labels: str = "labels", ticks: int = 64
) -> SequenceSet:
    """Read the sequences in a folder, or make moving digits.

    A folder has ``train/`` and ``test/`` with ``.npy`` files, or the files themselves, of which the
    last quarter of every sequence is then the test split. Files are uint8 [T, H, W] or [T, C, H, W]
    or floating point [T, C]. Beside them may lie a folder of labels with files of the same
    names: integers of the whole sequence or of each frame, -1 for none; ``<labels>.txt`` in the
    data's folder may name the classes, a line each.

    Args:
        data: The folder, or ``"sample"`` for moving digits of the embedded sample.
        labels: Name of the folder of labels.
        ticks: How many rows of channels make a frame; its label is that of the middle one.

    Returns:
        The set; arrays of a folder are read-only views of memory-mapped files.

    Raises:
        FileNotFoundError: If the folder, a split or the sequences are missing.
        ValueError: If a file is not as above; the message names it.
    """
    if data == "sample":
        made = moving_digits()
        sides = [
            {f"{k:04d}": frames.numpy() for k, frames in enumerate(split)}
            for split in (made.train_sequences, made.test_sequences)
        ]
        classes = [
            {name: np.full(len(side[name]), of_one[0], np.int64)
             for name, of_one in zip(side, of_all.tolist(), strict=True)}
            for side, of_all in zip(sides, (made.train_labels, made.test_labels), strict=True)
        ]  # fmt: skip
        return SequenceSet(made.name, sides[0], classes[0], sides[1], classes[1], made.class_names)
    root = Path(data)
    if (root / "train").is_dir():
        train, train_labels = _read(root / "train", labels, ticks)
        test, test_labels = _read(root / "test", labels, ticks)
    else:
        whole, of_whole = _read(root, labels, ticks)
        cut = {name: _cut(root / f"{name}.npy", array) for name, array in whole.items()}
        # Windows of channels overlap: none of the test split begins before training's have ended.
        gap = 0 if next(iter(whole.values())).dtype == np.uint8 else ticks - 1
        train = {name: array[: cut[name] - gap] for name, array in whole.items()}
        test = {name: array[cut[name] :] for name, array in whole.items()}
        train_labels = {name: of_whole[name][: cut[name] - gap] for name in whole}
        test_labels = {name: of_whole[name][cut[name] :] for name in whole}
        for name, array in train.items():
            if not len(array):
                raise ValueError(f"{root / name}.npy: too short to leave {ticks} ticks apart")
    shapes = [next(iter(split.values())) for split in (train, test)]
    if shapes[0].dtype != shapes[1].dtype or shapes[0].shape[1:] != shapes[1].shape[1:]:
        raise ValueError(
            f"{root}: train/ has frames {shapes[0].dtype} {list(shapes[0].shape[1:])}, test/ "
            f"{shapes[1].dtype} {list(shapes[1].shape[1:])}"
        )
    count = 1 + max(int(one.max()) for part in (train_labels, test_labels) for one in part.values())
    names = _class_names(root / f"{labels}.txt", count)
    return SequenceSet(root.resolve().name, train, train_labels, test, test_labels, names)


def _read(
    folder: Path, labels: str, ticks: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Frames of every sequence of a folder, and their labels."""
    frames, classes = {}, {}
    for name, array in load_sequences(folder).items():
        path = folder / f"{name}.npy"
        given = _labels(folder / labels / f"{name}.npy", len(array))
        if array.dtype == np.uint8:
            frames[name], classes[name] = _pictures(path, array), given
            continue
        if array.ndim != 2:
            raise ValueError(
                f"{path}: {array.dtype} {list(array.shape)}; wanted channels [T, C], or pictures "
                "as uint8"
            )
        if len(array) < ticks:
            raise ValueError(f"{path}: {len(array)} ticks, fewer than the {ticks} of a frame")
        windows = np.lib.stride_tricks.sliding_window_view(array, ticks, axis=0)  # [L, C, ticks]
        frames[name] = windows[:, :, None]
        classes[name] = given[ticks // 2 : ticks // 2 + len(windows)]
    return frames, classes


def _pictures(path: Path, array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        return array[:, None]
    is_channels_last = array.shape[3:] in _CHANNELS_LAST and array.shape[1] > 4
    if array.ndim == 4 and not is_channels_last:
        return array
    raise ValueError(
        f"{path}: uint8 {list(array.shape)}; wanted pictures [T, H, W] or [T, C, H, W], channels "
        "before rows"
    )


def _labels(path: Path, count: int) -> np.ndarray:
    """Labels of a sequence's frames, int64 [count]; -1 if there is no file."""
    if not path.is_file():
        return np.full(count, -1)
    try:
        given = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not an array in .npy form, or truncated ({error})") from error
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "iu":
        kind = given.dtype if isinstance(given, np.ndarray) else "archive"
        raise ValueError(f"{path}: {kind}; wanted integers")
    if given.shape not in ((), (1,), (count,)):
        raise ValueError(f"{path}: {list(given.shape)}; wanted one label, or {count}")
    if given.min(initial=0) < -1:
        raise ValueError(f"{path}: holds {given.min()}; wanted classes from 0 on, or -1")
    return np.broadcast_to(given.astype(np.int64).reshape(-1), count)


def _cut(path: Path, array: np.ndarray) -> int:
    """Where the last quarter of a sequence begins."""
    if len(array) < 4:
        raise ValueError(f"{path}: {len(array)} frames; wanted 4 or more to split")
    return len(array) - len(array) // 4


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(count)))
    lines = path.read_text("utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < count:
        raise ValueError(f"{path}: names {len(names)} classes; labels reach {count - 1}")
    return names
