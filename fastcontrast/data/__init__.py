"""Readers of image data sets and the embedded MNIST sample; called by :mod:`fastcontrast.train`.

Readers check what they read: a missing, truncated or foreign file is a one-line error that names
it. Nothing here downloads.
"""

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.mnist import load_mnist, read_idx
from fastcontrast.data.sample import mnist_sample

__all__ = ["ImageDataset", "load_mnist", "mnist_sample", "read_idx"]
