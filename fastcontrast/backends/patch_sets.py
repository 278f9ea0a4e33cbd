"""How boxes are drawn and cut: what every backend of `extract_patches` is handed.

Filled by ``fastcontrast/ops/extract_patches.py``; csrc/common/crop.h and csrc/common/resize.h state
the arithmetic.
"""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

INTERPOLATIONS = ("none", "nearest", "bilinear")  # as csrc/common/patches.h numbers them
PADDING_MODES = ("error", "constant", "reflect", "edge")  # as csrc/common/resize.h does
FAR = 1 << 30  # padding without a limit of its own
RATIOS = 1024


class Draws(NamedTuple):
    """Which boxes are drawn, of which (seed, step) and how far apart.

    Attributes:
        seed: 64 bits; ignored where a tensor holds it.
        step: Below 2⁴⁸; ignored where a tensor holds it.
        first_patch: What k = 0 is in the counter.
        image_size: Height and width of the images.
        size: Height and width of the patches, which boxes of the image itself have.
        thresholds: Probabilities of a horizontal and a vertical flip in units of 2⁻³².
        padding: Pixels that a box may reach beyond the image, above and below, left and right.
        grid: Rows and columns of cells, one patch in each; (1, 1) is none.
        area: Least share of the area and number of shares, in units of 2⁻³⁰; (0, 0): boxes of the
            patch's size.
        factors: Square roots of 1/ratio and of ratio, int64 [2, 1024] in units of 2⁻²⁴, on the
            device of the boxes; None with boxes of the patch's size.
        limits: Least ratio, largest ratio and 1/least, in units of 2⁻²⁴.
        min_distance: ceil(4·d²) for centres d pixels apart; 0 is no limit.
        max_iou: In units of 2⁻²⁹; -1 is no limit.
    """

    seed: int
    step: int
    first_patch: int
    image_size: Sequence[int]
    size: Sequence[int]
    thresholds: Sequence[int]
    padding: Sequence[int]
    grid: Sequence[int]
    area: Sequence[int]
    factors: Tensor | None
    limits: Sequence[int]
    min_distance: int
    max_iou: int


class Pixels(NamedTuple):
    """How a box becomes a patch.

    Attributes:
        scale: Factor of each channel: C numbers, one for all, or none for 1.
        offset: Added to each channel: C numbers, one for all, or none.
        interpolation: One of :data:`INTERPOLATIONS`; with "none" boxes have the patches' size.
        antialias: Whether bilinear weights widen where the box is larger than the patch.
        padding_mode: One of :data:`PADDING_MODES`; with "error" boxes lie inside of the image.
        fill: Pixel beyond the image with "constant", in the images' values: as ``scale``.
    """

    scale: Sequence[float]
    offset: Sequence[float]
    interpolation: str
    antialias: bool
    padding_mode: str
    fill: Sequence[float]

    @property
    def plain(self) -> bool:
        """Whether every patch is a box of the image as it is."""
        return self.interpolation == "none" and self.padding_mode == "error"

    def linear(self) -> Pixels:
        """The same without what is added: the linear part of the map."""
        return self._replace(offset=[], fill=[])

    def reach(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Pixels that boxes may reach beyond each end of the image's rows and columns."""
        if self.padding_mode == "error":
            return 0, 0
        if self.padding_mode == "reflect":
            return image_size[0] - 1, image_size[1] - 1
        return FAR, FAR


def rows_of_images(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows of ``index`` in the order of their images, and where each image's begin [count + 1]."""
    ordered, order = index.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=index.device))


class RatioTable(NamedTuple):
    """Aspect ratios of crops as integers, see :class:`Draws`."""

    factors: Tensor
    limits: tuple[int, int, int]


@lru_cache(maxsize=32)
def ratio_table(low: float, high: float, device: torch.device) -> RatioTable:
    """1024 ratios at the midpoints of equal steps of log ratio, in decimal arithmetic.

    ``decimal`` rounds exp, ln and sqrt correctly, which the machine's library need not: the table
    is the same everywhere.
    """
    with decimal.localcontext(decimal.Context(prec=40)) as context:
        least, most = context.create_decimal(low), context.create_decimal(high)
        begin, step = least.ln(), (most.ln() - least.ln()) / (2 * RATIOS)
        roots = [(begin + (2 * i + 1) * step).exp().sqrt() for i in range(RATIOS)]
        unit = 1 << 24
        factors = [[round(unit / root) for root in roots], [round(unit * root) for root in roots]]
        limits = round(unit * least), round(unit * most), round(unit / least)
    table = torch.tensor(factors, dtype=torch.int64)
    if device.type == "cuda":  # from pinned memory nobody waits for the copy
        table = table.pin_memory()
    return RatioTable(table.to(device, non_blocking=True), limits)
