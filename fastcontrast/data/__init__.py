"""Readers of data sets, the embedded MNIST sample, and sequences made of it.

Called by :mod:`fastcontrast.train`.

Readers check what they read: a missing, truncated or foreign file is a one-line error that names
it. Nothing here downloads.
"""

from fastcontrast.data.cifar10 import load_cifar10
from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.image_folder import load_image_folder
from fastcontrast.data.mnist import load_mnist, read_idx
from fastcontrast.data.moving_digits import SequenceDataset, moving_digits
from fastcontrast.data.sample import mnist_sample
from fastcontrast.data.sequence_sets import SequenceSet, load_sequence_set
from fastcontrast.data.sequences import load_sequences
from fastcontrast.data.sets import SetReport, describe, load_dataset, other_sizes, verify
from fastcontrast.data.stl10 import load_stl10
from fastcontrast.data.svhn import load_svhn

__all__ = [
    "ImageDataset",
    "SequenceDataset",
    "SequenceSet",
    "SetReport",
    "describe",
    "load_cifar10",
    "load_dataset",
    "load_image_folder",
    "load_mnist",
    "load_sequence_set",
    "load_sequences",
    "load_stl10",
    "load_svhn",
    "mnist_sample",
    "moving_digits",
    "other_sizes",
    "read_idx",
    "verify",
]
