"""Embedding networks of the reproduced systems; built by the recipes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mnist_embedding_network() -> nn.Sequential:
    """Network of semi-supervised metric embedding for MNIST: 28 x 28 pixels to 128 features.

    From the authors' released code: five convolutions with batch normalisation *after* the ReLU and
    a global average, no dropout, features not normalised; 134,336 convolution and 608 normalisation
    parameters. One deviation: normalisation gains start at 1, PyTorch's default, where Torch7 drew
    them from U(0, 1).

    Returns:
        Module from float [M, 1, 28, 28] to float [M, 128], on the CPU, initialised from torch's
        default generator.
    """
    return nn.Sequential(
        *_convolution(1, 16, 5, pool=True),  # [M, 16, 13, 13]
        *_convolution(16, 32, 3),
        *_convolution(32, 64, 3),
        *_convolution(64, 64, 3, pool=True),  # [M, 64, 6, 6]
        *_convolution(64, 128, 3),
        nn.AvgPool2d(6),
        nn.Flatten(),  # [M, 128]
    )


def normalise_pixels(images: Tensor) -> Tensor:
    """Map bytes to about -1..1 as the authors' code does: ``(x - 128) / 128``.

    Args:
        images: uint8 [M, C, H, W].

    Returns:
        float32 of the same shape.
    """
    return (images.to(torch.float32) - 128) / 128


def _convolution(channels: int, out: int, kernel: int, pool: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, padding=1)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return [*layers, nn.ReLU(), nn.BatchNorm2d(out)]
