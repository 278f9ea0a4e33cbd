"""What :func:`fastcontrast.random_patches` returns: patches with their coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Patches(NamedTuple):
    """Patches and where they come from.

    Attributes:
        data: Pixels [B, K, C, h, w]; ``data.flatten(0, 1)`` is a batch for an encoder.
        coords: Boxes [B, K, 4] int32, (y0, x0, height, width) in source pixels, half-open, as they
            are before flipping.
        flips: Flips [B, K] uint8: bit 0 horizontal, bit 1 vertical.

    Example:
        >>> coords = torch.tensor([[[1, 2, 4, 6], [1, 5, 4, 6]]], dtype=torch.int32)
        >>> patches = Patches(torch.zeros(1, 2, 3, 4, 6), coords, torch.zeros(1, 2).byte())
        >>> patches.boxes("xyxy")[0].tolist()
        [[2.0, 1.0, 8.0, 5.0], [5.0, 1.0, 11.0, 5.0]]
        >>> round(float(patches.overlap()[0, 0, 1]), 4)
        0.3333
    """

    data: Tensor
    coords: Tensor
    flips: Tensor

    def boxes(self, format: str = "xyxy") -> Tensor:
        """Boxes as other libraries write them, float32, x before y.

        Args:
            format: ``"xyxy"`` [B, K, 4], half-open corners as in torchvision; ``"xywh"`` [B, K, 4],
                corner and size; ``"kornia"`` [B, K, 4, 2], corners clockwise from the top left,
                whose last pixel is *inside*.
        """
        y0, x0, height, width = self.coords.float().unbind(-1)
        if format == "xyxy":
            return torch.stack([x0, y0, x0 + width, y0 + height], -1)
        if format == "xywh":
            return torch.stack([x0, y0, width, height], -1)
        if format == "kornia":
            x1, y1 = x0 + width - 1, y0 + height - 1
            corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
            return torch.stack([torch.stack(corner, -1) for corner in corners], -2)
        raise ValueError(f"format must be 'xyxy', 'xywh' or 'kornia', got {format!r}")

    def affine(self, layout: str = "NCHW") -> Tensor:
        """Map of patch pixels to source pixels [B, K, 2, 3] float32, flips included.

        ``(x, y) = A[..., :2] @ (i, j) + A[..., 2]`` is the place in the image of the centre of
        column i and row j of the patch, where the centre of pixel 0 is at 0. Cell centres follow:
        they are the same map at any finer grid of columns and rows. ``layout`` is that of ``data``.
        """
        sizes = self.data.shape[-2:] if layout == "NCHW" else self.data.shape[-3:-1]
        start, extent = self.coords.float().split(2, -1)
        step = extent / torch.tensor(list(sizes), dtype=torch.float32, device=start.device)
        first = start + step / 2 - 0.5
        last = start + extent - step / 2 - 0.5
        flipped = torch.stack([(self.flips & 2) != 0, (self.flips & 1) != 0], -1)
        step, first = torch.where(flipped, -step, step), torch.where(flipped, last, first)
        zero = torch.zeros_like(step[..., 0])
        x = torch.stack([step[..., 1], zero, first[..., 1]], -1)
        y = torch.stack([zero, step[..., 0], first[..., 0]], -1)
        return torch.stack([x, y], -2)

    def overlap(self) -> Tensor:
        """Intersection over union of the boxes of each image [B, K, K], float32."""
        start, extent = self.coords.long().split(2, -1)
        end = start + extent
        low = torch.maximum(start[:, :, None], start[:, None])
        high = torch.minimum(end[:, :, None], end[:, None])
        both = (high - low).clamp_min(0).prod(-1)
        area = extent.prod(-1)
        return both / (area[:, :, None] + area[:, None] - both)
