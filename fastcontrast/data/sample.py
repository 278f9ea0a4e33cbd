"""The MNIST sample that ships inside the package: a first training run needs no download.

``MNIST_SAMPLE.md`` beside this file states where the images come from and their licence.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np
import torch

from fastcontrast.data.dataset import ImageDataset
from fastcontrast.data.mnist import CLASS_NAMES


def mnist_sample() -> ImageDataset:
    """Read the embedded sample: 10,000 training and 2,000 test images of MNIST, balanced by digit.

    Returns:
        Images uint8 [10000, 1, 28, 28] and [2000, 1, 28, 28], labels int64, in MNIST's order.

    Raises:
        FileNotFoundError: If the package was installed without its data file.

    Example:
        >>> mnist_sample().train_labels.bincount().tolist()
        [1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000]
    """
    resource = files("fastcontrast.data").joinpath("mnist_10k_2k.npz")
    with as_file(resource) as path, np.load(path, allow_pickle=False) as arrays:
        return ImageDataset(
            name="mnist-sample",
            train_images=torch.from_numpy(arrays["x_train"]).unsqueeze(1),
            train_labels=torch.from_numpy(arrays["y_train"].astype(np.int64)),
            test_images=torch.from_numpy(arrays["x_test"]).unsqueeze(1),
            test_labels=torch.from_numpy(arrays["y_test"].astype(np.int64)),
            class_names=CLASS_NAMES,
        )
