"""Which data set lies in a folder: found by its files, read by its reader, verified by its digests.

The training recipes call :func:`load_dataset`, ``fastcontrast data`` calls :func:`verify`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcontrast.data import cifar10, mnist, stl10, svhn
from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.files import size_and_md5
from fastcontrast.data.image_folder import class_folders, load_image_folder
from fastcontrast.data.sample import mnist_sample


@dataclass(frozen=True)
class Layout:
    """A data set's files and who reads them.

    Attributes:
        title: The set's name, for people.
        folders: Where below the given folder its files may lie.
        marks: A file of one of these names means that the set is there.
        files: What it consists of; size in bytes (0: any) and MD5 digest ("": none is published),
            both without gzip.
        optional: Those of the files that may be missing.
        load: The reader.
    """

    title: str
    folders: tuple[str, ...]
    marks: tuple[str, ...]
    files: dict[str, tuple[int, str]]
    optional: frozenset[str]
    load: Callable[[Path], ImageDataset]


@dataclass(frozen=True)
class FileReport:
    """What there is to say of one file.

    Attributes:
        path: The file.
        state: ``"as published"``, ``"size as published"`` (no digest is known) or ``"present"``
            (nor a size), ``"other content"``, ``"other size"``, ``"absent"`` (it is optional),
            ``"missing"``, or what is damaged.
        size: In bytes, without gzip; 0 if it is not there.
    """

    path: Path
    state: str
    size: int


@dataclass(frozen=True)
class SetReport:
    """What there is to say of one data set in a folder.

    Attributes:
        title: The set's name.
        files: One report per file; empty for folders of pictures.
        dataset: The set, or None if it could not be read.
        problem: Why it could not, one line; empty if it could.
    """

    title: str
    files: tuple[FileReport, ...]
    dataset: ImageDataset | None
    problem: str


_CIFAR_BATCH = 30_730_000
_PICKLE_DIGESTS = (
    *("c99cafc152244af753f735de768cd75f", "d4bba439e000b95fd0a9bffe97cbabec"),
    *("54ebc095f3ab1f0389bbae665268c751", "634d18415352ddfa80567beed471001a"),
    *("482c414d41f54cd18b22e5b47cb7c3cb", "40351d587109b95175f43aff81a1287e"),
)
_MNIST_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
_SVHN_FILES = {
    svhn.FILES[0]: (0, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    svhn.FILES[1]: (0, "a93ce644f1a588dc4d68dda5feec44a7"),
    svhn.FILES[2]: (0, "eb5a983be6a315427106f1b164d9cef3"),
}
_STL10_FILES = {
    stl10.TRAIN: (138_240_000, "918c2871b30a85fa023e0c44e0bee87f"),
    stl10.TRAIN_LABELS: (5_000, "5a34089d4802c674881badbb80307741"),
    stl10.TEST: (221_184_000, "7f263ba9f9e0b06b93213547f721ac82"),
    stl10.TEST_LABELS: (8_000, "36f9794fa4beb8a2c72628de14fa638e"),
    stl10.UNLABELLED: (2_764_800_000, "5242ba1fed5e4be9e1e742405eb56ca4"),
    stl10.FOLDS: (0, ""),
    stl10.NAMES: (0, ""),
}

LAYOUTS = {
    "mnist": Layout(
        "MNIST (IDX)",
        mnist.FOLDERS,
        ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"),
        _MNIST_FILES,
        frozenset(),
        mnist.load_mnist,
    ),
    "cifar10": Layout(
        "CIFAR-10 (binary)",
        cifar10.BINARY_FOLDERS,
        cifar10.BINARY_FILES[:1],
        dict.fromkeys(cifar10.BINARY_FILES, (_CIFAR_BATCH, "")),
        frozenset(),
        cifar10.load_cifar10,
    ),
    "cifar10-pickles": Layout(
        "CIFAR-10 (pickles)",
        cifar10.PICKLE_FOLDERS,
        cifar10.PICKLE_FILES[:1],
        {n: (0, d) for n, d in zip(cifar10.PICKLE_FILES, _PICKLE_DIGESTS, strict=True)},
        frozenset(),
        cifar10.load_cifar10,
    ),
    "svhn": Layout(
        "SVHN (cropped digits)",
        svhn.FOLDERS,
        svhn.FILES[:1],
        _SVHN_FILES,
        frozenset(svhn.FILES[1:2]),
        svhn.load_svhn,
    ),
    "stl10": Layout(
        "STL-10 (binary)",
        stl10.FOLDERS,
        (stl10.TRAIN,),
        _STL10_FILES,
        frozenset((stl10.UNLABELLED, stl10.FOLDS, stl10.NAMES)),
        stl10.load_stl10,
    ),
}
NAMES = ("mnist", "cifar10", "svhn", "stl10", "folder")


def load_dataset(
    data: str | os.PathLike[str],
    name: str = "auto",
    image_size: int | None = None,
    unlabelled: bool = True,
) -> ImageDataset:
    """Read the data set in a folder.

    Args:
        data: The folder, or ``"sample"`` for the embedded MNIST sample.
        name: Which of ``NAMES`` is wanted; ``"auto"`` takes what is there.
        image_size: For folders of pictures: see :func:`load_image_folder`.
        unlabelled: Whether to read STL-10's unlabelled images, 2.8 GB, if they are there.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If the folder or a file is missing; the message names it.
        ValueError: If nothing known, or more than one set, is in the folder, or a file is damaged.
    """
    if data == "sample":
        if name not in ("auto", "mnist"):
            raise ValueError(f"data is 'sample', which is MNIST; dataset is {name!r}")
        return mnist_sample()
    root = Path(data)
    name = _name_of_set(root, name)
    if name == "folder":
        return load_image_folder(root, image_size)
    if name == "stl10":
        return stl10.load_stl10(root, unlabelled)
    return LAYOUTS[name].load(root)


def other_sizes(data: str | os.PathLike[str], name: str = "auto") -> str:
    """Name the files that are read and do not have the size of the published ones, in one line.

    A file that ends where a record does is read as a shorter set, whoever cut it there.

    Args:
        data: As in :func:`load_dataset`, which raises what there is to raise.
        name: As there.

    Returns:
        The line; empty if there is no such file.
    """
    if data == "sample" or (name := _name_of_set(Path(data), name)) == "folder":
        return ""
    root, layout, found = Path(data), LAYOUTS[name], []
    for file, (wanted, _) in layout.files.items():
        path = _find(root, layout, file)
        # Compressed files are MNIST's, whose header says how long they are.
        if wanted and path and path.suffix != ".gz" and path.stat().st_size != wanted:
            found.append(f"{path} ({path.stat().st_size:,} bytes, not {wanted:,})")
    if not found:
        return ""
    return f"not the published {layout.title}, but cut off or another set: {', '.join(found)}"


def _name_of_set(root: Path, name: str) -> str:
    """Which of ``NAMES`` is wanted; raises what :func:`load_dataset` says."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; wanted one with a data set")
    if name == "auto":
        found = list(dict.fromkeys(key.removesuffix("-pickles") for key in find_layouts(root)))
        if not found and (class_folders(root) or (root / "train").is_dir()):
            found = ["folder"]
        if len(found) > 1:
            raise ValueError(f"{root}: holds {' and '.join(found)}; say which by --dataset")
        if not found:
            raise ValueError(
                f"{root}: holds no data set that is known here: MNIST, CIFAR-10, SVHN, STL-10, or "
                "one folder of pictures for each class"
            )
        name = found[0]
    return name


def find_layouts(root: Path) -> list[str]:
    """Return the keys of ``LAYOUTS`` that are in the folder or where torchvision has them."""
    return [
        key
        for key, layout in LAYOUTS.items()
        if any((root / f / mark).is_file() for f in layout.folders for mark in layout.marks)
    ]


def verify(directory: str | os.PathLike[str]) -> list[SetReport]:
    """Say of every data set in a folder whether its files are whole, and those that were published.

    Every file is read: minutes for the largest sets.

    Args:
        directory: The folder.

    Returns:
        One report per set.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds nothing that is known.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    reports = []
    for key in find_layouts(root):
        layout = LAYOUTS[key]
        files = tuple(_verify_file(root, layout, name) for name in layout.files)
        reports.append(_report(layout.title, files, lambda layout=layout: layout.load(root)))
    if not reports and (class_folders(root) or class_folders(root / "train")):
        reports.append(_report("folders of pictures", (), lambda: load_image_folder(root)))
    if not reports:
        load_dataset(root)  # raises, and says what is known
    return reports


def _report(
    title: str, files: tuple[FileReport, ...], load: Callable[[], ImageDataset]
) -> SetReport:
    try:
        return SetReport(title, files, load(), "")
    except (ValueError, OSError) as error:
        return SetReport(title, files, None, " ".join(str(error).split()))


def _find(root: Path, layout: Layout, name: str) -> Path | None:
    candidates = [root / f / (name + end) for f in layout.folders for end in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _verify_file(root: Path, layout: Layout, name: str) -> FileReport:
    wanted_size, wanted_digest = layout.files[name]
    path = _find(root, layout, name)
    if path is None:
        state = "absent" if name in layout.optional else "missing"
        return FileReport(root / name, state, 0)
    try:
        size, digest = size_and_md5(path)
    except OSError as error:
        return FileReport(path, f"damaged ({' '.join(str(error).split())})", 0)
    if wanted_size and size != wanted_size:
        return FileReport(path, "other size", size)
    if not wanted_digest:
        return FileReport(path, "size as published" if wanted_size else "present", size)
    return FileReport(path, "as published" if digest == wanted_digest else "other content", size)


def describe(dataset: ImageDataset) -> str:
    """One line: how many images of what size, and how they spread over the classes."""
    counts = np.bincount(dataset.train_labels.numpy(), minlength=dataset.num_classes)
    channels, height, width = dataset.train_images.shape[1:]
    spread = (
        f"{counts.min():,}"
        if counts.min() == counts.max()
        else f"{counts.min():,} to {counts.max():,}"
    )
    rest = ""
    if dataset.unlabelled_images is not None:
        rest = f", {len(dataset.unlabelled_images):,} unlabelled"
    return (
        f"{len(dataset.train_images):,} training images ({spread} of each of {dataset.num_classes} "
        f"classes), {len(dataset.test_images):,} test images{rest}; "
        f"{width} x {height} pixels, {channels} channel{'s' if channels > 1 else ''}"
        + (f"; {len(dataset.folds)} folds" if dataset.folds else "")
    )
