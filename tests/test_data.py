"""Readers of MNIST's files and the embedded sample, on small files written from the format."""

import gzip
import os
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mnist_files import NAMES, idx_bytes, write_mnist

from fastcontrast.data import load_mnist, mnist_sample, read_idx

FULL = os.environ.get("FASTCONTRAST_DATA")
needs_full_set = pytest.mark.skipif(
    not FULL, reason="FASTCONTRAST_DATA names no folder with the full MNIST files"
)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_read_idx_keeps_rows_and_columns(tmp_path, compress):
    images = np.zeros((3, 28, 28), np.uint8)
    images[2, 1, 2] = 200  # row 1, column 2: a transposed or shifted read puts it elsewhere
    content = idx_bytes(images)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if compress else content)
    read = read_idx(path, ndim=3)
    assert read.dtype == np.uint8
    assert read[2, 1, 2] == 200
    assert read.sum() == 200


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)),
    compress=st.booleans(),
)
def test_read_idx_returns_what_was_written(tmp_path_factory, array, compress):
    path = tmp_path_factory.mktemp("idx") / "values"
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if compress else content)
    np.testing.assert_array_equal(read_idx(path, array.ndim), array)


_IMAGES = idx_bytes(np.ones((3, 28, 28)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not the IDX file wanted"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not the IDX file wanted"),
        (idx_bytes(np.arange(10)), "not the IDX file wanted"),  # labels where images belong
        (_IMAGES[:10], "truncated inside its header"),
        (_IMAGES[:-1], "truncated"),
        (_IMAGES + b"\0", "longer than it should be"),
        (gzip.compress(_IMAGES)[:-20], "gzip"),
        (gzip.compress(_IMAGES[:-1]), "truncated"),
        (gzip.compress(_IMAGES)[:4] + b"\xff" * 30, "gzip"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated"),  # promises 2**96 bytes
    ],
    ids=range(10),  # gzip writes the time: names made of the content would differ by process
)
def test_read_idx_refuses_other_content_by_name(tmp_path, content, said):
    path = tmp_path / "images-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_idx_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        read_idx(tmp_path / "nowhere", ndim=1)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_load_mnist(tmp_path, layout, compress):
    write_mnist(tmp_path / layout, train=30, test=20, compress=compress)
    data = load_mnist(tmp_path)
    assert data.name == "mnist"
    assert data.num_classes == 10
    assert data.train_images.shape == (30, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.test_labels.tolist() == [i % 10 for i in range(20)]
    # The bar of class c lies along row 2c + 4.
    assert (data.test_images[3, 0, 10, 4:24] == 255).all()
    assert (data.test_images[3, 0, 4:24, 10] == 255).sum() == 1


def _rewrite(folder, part, array):
    (folder / NAMES[part]).write_bytes(idx_bytes(array))


@pytest.mark.parametrize(
    ("part", "array", "said"),
    [
        ("train_images", np.zeros((60, 32, 32)), "wanted 28 x 28"),
        ("test_images", np.zeros((0, 28, 28)), "holds no images"),
        ("train_labels", np.zeros(59), "59 labels, but 60 images"),
        ("test_labels", np.full(20, 10), "label 10; wanted 0 to 9"),
    ],
)
def test_load_mnist_refuses_files_that_do_not_fit(tmp_path, part, array, said):
    _rewrite(write_mnist(tmp_path), part, array)
    with pytest.raises(ValueError, match=said) as caught:
        load_mnist(tmp_path)
    assert NAMES[part] in str(caught.value)


@pytest.mark.parametrize("part", NAMES)
def test_load_mnist_names_the_missing_file(tmp_path, part):
    (write_mnist(tmp_path) / NAMES[part]).unlink()
    with pytest.raises(FileNotFoundError, match=NAMES[part]):
        load_mnist(tmp_path)


def test_load_mnist_names_the_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_mnist(tmp_path / "absent")


def test_sample_is_balanced_and_has_its_licence_beside_it():
    data = mnist_sample()
    assert data.train_images.shape == (10_000, 1, 28, 28)
    assert data.test_images.shape == (2_000, 1, 28, 28)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [1000] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10
    assert "CC BY-SA 3.0" in files("fastcontrast.data").joinpath("MNIST_SAMPLE.md").read_text()


@pytest.mark.slow
@needs_full_set
def test_full_set_and_the_sample_taken_from_it():
    data = load_mnist(FULL)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train_labels.bincount().tolist() == counts
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_images.shape == (10_000, 1, 28, 28)
    sample = mnist_sample()
    with np.load(files("fastcontrast.data").joinpath("mnist_10k_2k.npz")) as arrays:
        train, test = arrays["i_train"].astype(np.int64), arrays["i_test"].astype(np.int64)
    assert torch.equal(data.train_images[train], sample.train_images)
    assert torch.equal(data.train_labels[train], sample.train_labels)
    assert torch.equal(data.test_images[test], sample.test_images)
    assert torch.equal(data.test_labels[test], sample.test_labels)
