"""Embedding networks of the three papers, by data set, and one for frames; built by the recipes.

Widths, kernels and their sources are in docs/reproduction.md. Every network takes float [M, C, H,
W] of its data set's size, and of any other that leaves at least one cell; the size of the
embedding does not depend on it. Convolutions and biases start as in Torch7, which is PyTorch's
default; gains of batch normalisation start at 1, where Torch7 drew them from U(0, 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NETWORKS = ("mnist", "cifar10", "stl10")


def network_for(images: Tensor) -> str:
    """Name of the network made for images of this size: by their shorter side."""
    side = min(images.shape[2:])
    return "mnist" if side <= 28 else "cifar10" if side <= 48 else "stl10"


def build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network with weights that are a function of the seed; global state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def semisup_network(name: str, channels: int, second_width: int = 192) -> nn.Sequential:
    """Network of semi-supervised metric embedding: 128 features for MNIST, 192 otherwise.

    MNIST's is that of the authors' code: five convolutions with batch normalisation *after* the
    ReLU and a global average, no dropout, features not normalised; 134,336 convolution and 608
    normalisation parameters. CIFAR-10's is a network in network, whose second 5 x 5 convolution
    has ``second_width`` channels; STL-10's is the same one.
    """
    if name == "mnist":
        return nn.Sequential(
            *_pooled(channels, 16, 5),  # [M, 16, 13, 13]
            *_relu_norm(16, 32),
            *_relu_norm(32, 64),
            *_pooled(64, 64, 3),  # [M, 64, 6, 6]
            *_relu_norm(64, 128),
            *_average(),  # [M, 128]
        )
    return nn.Sequential(
        *_relu_norm(channels, 192, 5),
        *_relu_norm(192, 160, 1),
        *_relu_norm(160, 96, 1),
        nn.MaxPool2d(3, 2),  # [M, 96, 15, 15]
        *_relu_norm(96, second_width, 5),
        *_relu_norm(second_width, 192, 1),
        *_relu_norm(192, 192, 1),
        nn.MaxPool2d(3, 2),  # [M, 192, 7, 7]
        *_relu_norm(192, 192),
        *_relu_norm(192, 192, 1),
        *_average(),  # [M, 192]
    )


def triplet_network(name: str, channels: int, dropout: float) -> nn.Sequential:
    """Network of the triplet paper: 128 features, none negative, no batch normalisation.

    CIFAR-10 and SVHN 505,088 parameters, STL-10 the same with stride 3 in the first convolution,
    MNIST 93,184 with kernels 5, 3, 3 (the paper does not give them). The last layer is a
    convolution and a ReLU, whose single cell at the papers' sizes is the embedding.
    """
    widths, kernels = ((32, 64, 128), (5, 3, 3)) if name == "mnist" else ((64, 128, 256), (5, 3, 3))
    layers: list[nn.Module] = []
    for number, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        stride = 3 if name == "stl10" and number == 0 else 1
        layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU(), nn.MaxPool2d(2)]
        if name != "mnist" or number < 2:
            layers.append(nn.Dropout(dropout))
        channels = width
    if name != "mnist":
        layers += [nn.Conv2d(channels, 128, 2), nn.ReLU()]
    return nn.Sequential(*layers, *_average())


def spatial_trunk(
    name: str, channels: int, slope: float, width: float = 1.0, blocks: int = 0
) -> nn.Sequential:
    """The part of spatial contrasting's network that is pretrained: images to a feature map.

    Of ``blocks`` blocks, 0 for all: MNIST [M, 64, 6, 6] and CIFAR-10 [M, 192, 8, 8] after two,
    STL-10 [M, 192, 23, 23] after three; ``width`` times as many channels.
    """
    made = _spatial_blocks(name, channels, slope, width)
    return nn.Sequential(*(layer for block in made[: blocks or None] for layer in block()))


def spatial_head(
    name: str, classes: int, slope: float, dropout: float, width: float = 1.0, blocks: int = 0
) -> nn.Sequential:
    """What follows the trunk for classification: a feature map to scores [M, classes]."""
    rest = _spatial_blocks(name, 0, slope, width)[blocks:] if blocks else []
    layers = [layer for block in rest for layer in block()]
    drop = [nn.Dropout(dropout)] if dropout else []
    w = _widths(width)
    if name == "mnist":
        layers += [*_norm_relu(w(64), w(128)), *drop, nn.Conv2d(w(128), classes, 1)]
    elif name == "cifar10":
        layers += [
            *_norm_relu(w(192), w(192), slope=slope),
            *_norm_relu(w(192), w(192), 1, slope=slope),
            *drop,
            nn.Conv2d(w(192), classes, 1),
        ]
    else:
        layers += [
            nn.Conv2d(w(192), w(256), 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(w(256), w(128), 1),
            nn.ReLU(),
            *drop,
            nn.Conv2d(w(128), classes, 1),
        ]
    return nn.Sequential(*layers, *_average())


def spatial_depth(name: str) -> int:
    """Blocks of the trunk, each of which ends where a map may be contrasted."""
    return len(_spatial_blocks(name, 0, 0.0, 1.0))


def _spatial_blocks(
    name: str, channels: int, slope: float, width: float
) -> list[Callable[[], list[nn.Module]]]:
    """Not built yet: what is not built draws no weights."""
    w = _widths(width)
    if name == "mnist":
        return [
            lambda: [
                nn.Conv2d(channels, w(32), 5, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),  # [M, 32, 13, 13]
                nn.BatchNorm2d(w(32)),
            ],
            lambda: [
                *_norm_relu(w(32), w(64)),
                *_norm_relu(w(64), w(64)),
                nn.MaxPool2d(2),  # [M, 64, 6, 6]
                nn.BatchNorm2d(w(64)),
            ],
        ]
    if name == "cifar10":
        return [
            lambda: [
                *_norm_relu(channels, w(96), slope=slope),
                *_norm_relu(w(96), w(96), slope=slope),
                *_norm_relu(w(96), w(96), slope=slope),
                nn.MaxPool2d(2),  # [M, 96, 16, 16]
                nn.BatchNorm2d(w(96)),
            ],
            lambda: [
                *_norm_relu(w(96), w(192), slope=slope),
                *_norm_relu(w(192), w(192), slope=slope),
                *_norm_relu(w(192), w(192), slope=slope),
                nn.MaxPool2d(2),  # [M, 192, 8, 8]
                nn.BatchNorm2d(w(192)),
            ],
        ]
    return [
        lambda: [
            *_norm_relu(channels, w(64), 5),
            *_norm_relu(w(64), w(160), 1),
            *_norm_relu(w(160), w(96), 1),
            nn.MaxPool2d(3, 2),  # [M, 96, 47, 47]
        ],
        lambda: [
            *_norm_relu(w(96), w(192), 5),
            *_norm_relu(w(192), w(192), 1),
            *_norm_relu(w(192), w(192), 1),
            nn.MaxPool2d(3, 2),  # [M, 192, 23, 23]
        ],
        lambda: [
            *_norm_relu(w(192), w(192)),
            *_norm_relu(w(192), w(192), 1),
            *_norm_relu(w(192), w(192), 1),
        ],
    ]


def _widths(factor: float) -> Callable[[int], int]:
    return lambda channels: max(1, round(factor * channels))


def temporal_network(name: str, channels: int, *, tall: bool) -> nn.Sequential:
    """Network of the frames of sequences: 128 features, 192 of the larger networks by name.

    ``"auto"`` is three strided convolutions with batch normalisation and the average of their
    cells, about 6 million multiplications a frame of 48 x 48. Not ``tall``, for windows of channels
    [M, C, 1, T], its kernels are one cell high, and every channel is normalised first.
    """
    if name != "auto":
        return semisup_network(name, channels)
    layers: list[nn.Module] = [] if tall else [nn.BatchNorm2d(channels, affine=False)]
    for width, kernel in ((32, 5), (64, 3), (128, 3)):
        sizes = (kernel if tall else 1, kernel)
        convolution = nn.Conv2d(
            channels, width, sizes, (2 if tall else 1, 2), (sizes[0] // 2, kernel // 2)
        )
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, *_average())


def temporal_decoder(features: int, shape: tuple[int, int, int]) -> nn.Sequential:
    """What an autoencoder has behind the network: features back to frames of shape (C, H, W)."""
    channels, height, width = shape
    rows, columns = -(-height // 4), -(-width // 4)
    return nn.Sequential(
        nn.Linear(features, 64 * rows * columns),
        nn.Unflatten(1, (64, rows, columns)),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, channels, 4, 2, 1),
        nn.AdaptiveAvgPool2d((height, width)),
    )


def _pooled(channels: int, out: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, padding=1)
    return [convolution, nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(out)]


def _relu_norm(channels: int, out: int, kernel: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
    return [convolution, nn.ReLU(), nn.BatchNorm2d(out)]


def _norm_relu(
    channels: int, out: int, kernel: int = 3, slope: float | None = None
) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
    unit = nn.ReLU() if slope is None else nn.LeakyReLU(slope)
    return [convolution, nn.BatchNorm2d(out), unit]


def _average() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
