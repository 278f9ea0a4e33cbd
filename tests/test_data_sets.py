"""Readers of CIFAR-10, SVHN, STL-10 and folders of pictures, on small files in their formats."""

import contextlib
import dataclasses
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from data_files import bars, mat_bytes, write_cifar10, write_pictures, write_stl10, write_svhn
from mnist_files import write_mnist

from fastcontrast import cli
from fastcontrast.data import (
    load_cifar10,
    load_dataset,
    load_image_folder,
    load_stl10,
    load_svhn,
    other_sizes,
    sets,
    verify,
)
from fastcontrast.data.matlab import read_mat
from fastcontrast.train import semisup, spatial, stage, triplet
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TripletConfig
from fastcontrast.train.models import semisup_network

FULL = os.environ.get("FASTCONTRAST_DATA")


def _pixel(side):
    """Two black images; the second has one bright pixel: channel 1, row 1, column 2."""
    images = np.zeros((2, 3, side, side), np.uint8)
    images[1, 1, 1, 2] = 200
    return images, np.array([3, 7])


def _assert_pixel(images):
    assert images.dtype == torch.uint8
    assert images[1, 1, 1, 2] == 200
    assert images.sum() == 200 * len(images) // 2


@pytest.mark.parametrize("pickled", [False, True], ids=["binary", "pickles"])
@pytest.mark.parametrize("nested", [False, True])
def test_cifar10(tmp_path, pickled, nested):
    place = f"cifar-10-batches-{'py' if pickled else 'bin'}" if nested else "."
    write_cifar10(tmp_path / place, *_pixel(32), pickled=pickled)
    data = load_cifar10(tmp_path)
    assert data.train_images.shape == (10, 3, 32, 32)
    _assert_pixel(data.train_images)
    _assert_pixel(data.test_images)
    assert data.train_labels.tolist() == [3, 7] * 5
    assert data.class_names[3] == "cat"
    assert load_dataset(tmp_path).name == "cifar10"


def test_a_pickle_may_not_name_anything_but_arrays(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    write_cifar10(tmp_path, pickled=True)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Attack()}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3: not a readable .*mkdir, which is not"):
        load_cifar10(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_pickle_of_python_2_is_read(tmp_path):
    """As the published files are: byte strings for text, and an array's bytes as such."""
    images, labels = _pixel(32)
    rows = images.reshape(2, -1)
    raw = rows.tobytes()

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K\x02M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    )
    content = b"\x80\x02}(" + text(b"labels") + b"](K\x03K\x07e" + text(b"data") + array + b"u."
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(content)
    data = load_cifar10(tmp_path)
    _assert_pixel(data.train_images)
    assert data.test_labels.tolist() == labels.tolist()


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_read_mat(tmp_path, compress, order):
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
    y = np.array([[1.0], [10.0]])
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes({"Z": y, "X": x, "y": y}, compress=compress, order=order))
    found = read_mat(path, ("X", "y"))
    assert set(found) == {"X", "y"}
    np.testing.assert_array_equal(found["X"], x)
    np.testing.assert_array_equal(found["y"], y)


@pytest.mark.parametrize("compress", [False, True])
def test_read_mat_agrees_with_scipy(tmp_path, compress):
    io = pytest.importorskip("scipy.io")
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 7)).astype(np.uint8)
    y = np.arange(1.0, 8.0)[:, None]  # which scipy stores as float64, MATLAB as bytes
    io.savemat(tmp_path / "a.mat", {"X": x, "y": y, "note": "text"}, do_compression=compress)
    found = read_mat(tmp_path / "a.mat", ("X", "y"))
    np.testing.assert_array_equal(found["X"], x)
    np.testing.assert_array_equal(found["y"], y)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_svhn(tmp_path, extra, dtype):
    write_svhn(tmp_path, extra=extra, dtype=dtype)
    images, _ = _pixel(32)
    arrays = {"X": images.transpose(2, 3, 1, 0), "y": np.array([[10], [7]]).astype(dtype)}
    (tmp_path / "train_32x32.mat").write_bytes(mat_bytes(arrays, compress=True))
    data = load_svhn(tmp_path)
    _assert_pixel(data.train_images[:2])
    assert data.train_labels[:2].tolist() == [0, 7]  # 10 is the digit 0
    assert len(data.train_images) == (22 if extra else 2)
    assert data.name == ("svhn-extra" if extra else "svhn")
    assert len(load_svhn(tmp_path, extra=False).train_images) == 2
    assert torch.equal(data.test_images, torch.from_numpy(bars(20, 32)[0]))


@pytest.mark.parametrize("place", [".", "stl10_binary"])
def test_stl10(tmp_path, place):
    write_stl10(tmp_path / place, *_pixel(96))
    data = load_stl10(tmp_path)
    for images in (data.train_images, data.test_images, data.unlabelled_images):
        _assert_pixel(images)
    assert data.train_labels.tolist() == [3, 7]
    assert [fold.tolist() for fold in data.folds] == [[0], [1]]
    assert data.name == "stl10-layout"  # two images are not STL-10
    assert data.class_names[7] == "monkey"
    assert load_stl10(tmp_path, unlabelled=False).unlabelled_images is None
    assert load_dataset(tmp_path, unlabelled=False).unlabelled_images is None
    (tmp_path / place / "unlabeled_X.bin").unlink()
    assert load_dataset(tmp_path).unlabelled_images is None


def test_only_who_needs_unlabelled_images_reads_them(tmp_path):
    place = {"data": str(write_stl10(tmp_path)), "device": "cpu"}
    few = SpatialConfig(**place, labels_per_class=1, batch_size=4, pretraining_steps=0)
    jobs = {
        "triplet": triplet.prepare(TripletConfig(**place, held_out=0.0), open_folder=False),
        "semisup": semisup.prepare(SemisupConfig(**place, labels_per_class=1), open_folder=False),
        "fine-tuning": spatial.prepare(dataclasses.replace(few, out_dir=tmp_path / "runs")),
        "contrasting": spatial.prepare(
            dataclasses.replace(few, out_dir=tmp_path / "more", pretraining_steps=1)
        ),
    }
    have = {name for name, job in jobs.items() if job.dataset.unlabelled_images is not None}
    assert have == {"semisup", "contrasting"}


@pytest.mark.parametrize("split", [False, True])
def test_folders_of_pictures(tmp_path, split):
    write_pictures(tmp_path, split=split)
    data = load_dataset(tmp_path)
    assert data.class_names == ("class0", "class1")
    assert data.train_images.shape[1:] == (3, 32, 32)
    assert len(data.train_images) == (20 if split else 18)
    assert data.test_labels.tolist() == ([0] * 10 + [1] * 10 if split else [0, 1])
    # The bar of class c lies along row 2c + 4.
    first = data.train_images[int(data.train_labels.tolist().index(1))]
    assert (first[:, 6, 4:28] == 255).all()
    if not split:  # what is tested is not trained on
        together = torch.cat([data.train_images, data.test_images]).flatten(1)
        assert len(together.unique(dim=0)) == 20


def test_pictures_are_brought_to_one_size_and_stay_grey(tmp_path):
    write_pictures(tmp_path, grey=True, side=32)
    write_pictures(tmp_path / "train" / "inner", grey=True, side=16)  # no pictures right below
    data = load_image_folder(tmp_path, size=8)
    assert data.train_images.shape == (20, 1, 8, 8)
    from PIL import Image

    Image.new("RGB", (10, 6), (255, 0, 0)).save(tmp_path / "train" / "class0" / "other.png")
    with pytest.raises(ValueError, match=r"other\.png: 10 x 6 pixels, the first picture 32 x 32"):
        load_image_folder(tmp_path)
    data = load_image_folder(tmp_path, size=8)
    assert data.train_images.shape == (21, 3, 8, 8)
    assert data.train_images[10].amin((1, 2)).tolist() == [255, 0, 0]


def _cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


_DAMAGES = [
    ("cifar10", "data_batch_2.bin", lambda p: _cut(p, 1), "whole number of CIFAR-10 records"),
    ("cifar10", "test_batch.bin", lambda p: p.write_bytes(b""), "0 bytes"),
    ("cifar10", "data_batch_1.bin", lambda p: p.write_bytes(b"\x0b" * 3073), "label 11; wanted 0"),
    ("cifar10", "data_batch_5.bin", lambda p: p.unlink(), "no such file"),
    ("pickles", "data_batch_2", lambda p: _cut(p, 9), "not a readable CIFAR-10 pickle"),
    ("pickles", "data_batch_2", lambda p: p.write_bytes(pickle.dumps([1])), "wanted CIFAR-10's"),
    ("pickles", "data_batch_2", lambda p: p.write_bytes(pickle.dumps({})), 'no "data"'),
    ("pickles", "test_batch", lambda p: p.write_bytes(b"?"), "not a readable"),
    ("svhn", "test_32x32.mat", lambda p: _cut(p, 30), "truncated"),
    ("svhn", "test_32x32.mat", lambda p: p.write_bytes(b"\x89PNG"), "not a level 5 MAT file"),
    ("svhn", "train_32x32.mat", lambda p: p.write_bytes(b"MATLAB 7.3 MAT" * 20), "HDF5"),
    ("svhn", "test_32x32.mat", lambda p: p.unlink(), "no such file"),
    (
        "svhn",
        "test_32x32.mat",
        lambda p: p.write_bytes(p.read_bytes()[:128]),
        "no numeric variable",
    ),
    ("stl10", "train_X.bin", lambda p: _cut(p, 1), "whole number of STL-10 images"),
    ("stl10", "test_X.bin", lambda p: _cut(p, 27648), "20 labels, but 19 images"),
    ("stl10", "test_y.bin", lambda p: p.write_bytes(bytes(20)), "label 0; wanted 1 to 10"),
    ("stl10", "fold_indices.txt", lambda p: p.write_text("1 2 x\n"), "not lines of indices"),
    ("stl10", "fold_indices.txt", lambda p: p.write_text("1 20\n"), "not in 0..19"),
    ("pictures", "test/class1/001.png", lambda p: _cut(p, 100), "not a readable picture"),
    ("pictures", "train/class0/000.png", lambda p: p.write_bytes(b"?"), "not a readable picture"),
]


@pytest.mark.parametrize(("kind", "name", "damage", "said"), _DAMAGES)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, capsys, kind, name, damage, said):
    write = {
        "cifar10": write_cifar10,
        "pickles": lambda folder: write_cifar10(folder, pickled=True),
        "svhn": write_svhn,
        "stl10": write_stl10,
        "pictures": write_pictures,
    }[kind]
    write(tmp_path)
    damage(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load_dataset(tmp_path)
    assert name.rpartition("/")[2] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cli.main(["data", "verify", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_to_a_mat_file_never_passes_unseen(tmp_path, seed):
    """Whatever byte is changed or cut: the numbers are the same, or the error is ours."""
    write_svhn(tmp_path, compress=True)
    path = tmp_path / "test_32x32.mat"
    content, random = bytearray(path.read_bytes()), np.random.default_rng(seed)
    position = int(random.integers(124, len(content)))
    content[position] ^= int(random.integers(1, 256))
    path.write_bytes(content[:position] if seed % 4 == 0 else content)
    with contextlib.suppress(ValueError):
        data = load_svhn(tmp_path)
        assert torch.equal(data.test_images, torch.from_numpy(bars(20, 32)[0]))


def test_two_sets_in_one_folder_are_told_apart_by_name(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    with pytest.raises(ValueError, match="holds mnist and cifar10; say which by --dataset"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, "cifar10").name == "cifar10"
    assert load_dataset(tmp_path, "mnist").train_images.shape[1] == 1
    with pytest.raises(FileNotFoundError, match="STL-10"):
        load_dataset(tmp_path, "stl10")
    with pytest.raises(ValueError, match="data is 'sample', which is MNIST; dataset is 'svhn'"):
        load_dataset("sample", "svhn")


def test_nothing_known_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no data set that is known here"):
        load_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_dataset(tmp_path / "absent")
    assert cli.main(["data", "verify", str(tmp_path)]) == 2


def test_pictures_without_pillow_say_what_to_install(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["data", "verify", str(tmp_path)]) == 2
    assert 'pip install "fastcontrast[train]"' in capsys.readouterr().err


def test_verify_says_what_is_there(tmp_path, capsys):
    write_mnist(tmp_path / "MNIST" / "raw", compress=True)
    write_cifar10(tmp_path, pickled=True)
    write_stl10(tmp_path / "stl10_binary", unlabelled=False)
    reports = {report.title: report for report in verify(tmp_path)}
    assert set(reports) == {"MNIST (IDX)", "CIFAR-10 (pickles)", "STL-10 (binary)"}
    states = {f.path.name: f.state for report in reports.values() for f in report.files}
    assert states["train-images-idx3-ubyte.gz"] == "other size"  # without gzip: 60 images
    assert states["data_batch_1"] == "other content"
    assert states["unlabeled_X.bin"] == "absent"
    assert states["fold_indices.txt"] == "present"
    assert cli.main(["data", "verify", str(tmp_path)]) == 1  # of the sizes
    out = capsys.readouterr().out
    assert "100 training images (10 of each of 10 classes), 20 test images; 32 x 32 pixels" in out
    assert "2 folds" in out


def test_a_file_cut_between_records_is_named_when_training_starts(tmp_path, capsys, monkeypatch):
    """It reads as a shorter set. Here a published batch has 20 records."""
    path = write_cifar10(tmp_path / "cifar-10-batches-bin") / "data_batch_3.bin"
    layout = sets.LAYOUTS["cifar10"]
    sizes = dict.fromkeys(layout.files, (20 * 3073, ""))
    monkeypatch.setitem(sets.LAYOUTS, "cifar10", dataclasses.replace(layout, files=sizes))
    assert other_sizes(tmp_path) == other_sizes("sample") == ""
    assert cli.main(["data", "verify", str(tmp_path)]) == 0
    _cut(path, 15 * 3073)
    assert load_dataset(tmp_path).train_images.shape[0] == 85
    assert cli.main(["data", "verify", str(tmp_path)]) == 1
    said = f"warning: not the published CIFAR-10 (binary), but cut off or another set: {path} ("
    assert said not in capsys.readouterr().out
    config = SemisupConfig(data=str(tmp_path), labels_per_class=1, device="cpu")
    stage.prepare(config, semisup_network, open_folder=False)
    assert capsys.readouterr().out == said + "15,365 bytes, not 61,460)\n"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["data"], 2, "usage: fastcontrast data verify DIR"),
        (["data", "--help"], 0, "usage: fastcontrast data verify DIR"),
        (["data", "verify"], 2, "the command is: fastcontrast data verify DIR"),
        (["data", "verify", "absent"], 2, "absent: no such folder"),
    ],
)
def test_the_data_command(arguments, code, said, capsys):
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="FASTCONTRAST_DATA names no folder with full data sets")
def test_full_sets():
    """Class counts and channel means are those that were published."""
    data = load_dataset(FULL, "cifar10")
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    means = data.train_images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(
        means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=5e-5, rtol=0
    )
    states = {f.path.name: f.state for r in verify(FULL) for f in r.files}
    assert states["train-images-idx3-ubyte.gz"] == "as published"


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="FASTCONTRAST_DATA names no folder with full data sets")
def test_a_full_set_in_stl10s_layout_is_not_called_stl10():
    """Ten classes of Imagenette, with folds of its own."""
    data = load_dataset(f"{FULL}/imagenette96_stl10_layout")
    assert data.name == "stl10-layout"
    assert data.class_names[0] == "tench"
    assert data.train_labels.bincount().tolist() == [500] * 10
    assert len(data.test_images) == len(data.test_labels) == 3925
    assert data.unlabelled_images.shape == (4469, 3, 96, 96)
    assert [len(fold) for fold in data.folds] == [1000] * 10
    for fold in data.folds:
        assert data.train_labels[fold].bincount().tolist() == [100] * 10
    means = data.train_images.double().mean((0, 2, 3)) / 255
    # Of this selection of images, as it was read here first; turned images have the same.
    torch.testing.assert_close(
        means, torch.tensor([0.4627, 0.4577, 0.4300]).double(), atol=5e-5, rtol=0
    )
    assert "test_X.bin" in other_sizes(f"{FULL}/imagenette96_stl10_layout")
