"""What the Triton kernels of triplets and patches ask of a GPU: bytes, and lanes for each element.

Counted in fastcontrast/backends/triton/triplet_distances.py, extract_patches.py and patch_cuts.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.gpu_model import Counts, Launch
from fastcontrast.backends.triton.launch import patch_launch

# Of an element of a row: two differences, squares added. Half points are widened, an integer each.
TRIPLETS_FORWARD = (4, 0)
# Six differences, a weight times each and their sums; chosen; rounded (half ones, special).
TRIPLETS_BACKWARD = (6 + 6 + 3, 6)
SECTOR = 32  # bytes that the L2 cache moves at least


def triplets(rows: int, dim: int, size: int) -> list[Launch]:
    """Launches of a triplet loss, ratio or margin, mean reduction, without swap."""
    elements, half = float(rows) * dim, size == 2
    floats, integers = TRIPLETS_FORWARD
    forward = Counts(
        memory=3 * size * elements + 12 * rows,  # points; difference and two distances
        floats=floats * elements,
        integers=(integers + 3 * half) * elements,
        # Sums of a chunk go on in float64: converted, added, rooted, for two pairs.
        doubles=2 * 2 * 32.0 * rows,  # each lane of the warp that holds the row
        conversions=2 * 2 * 32.0 * rows,
    )
    floats, integers = TRIPLETS_BACKWARD
    backward = Counts(
        memory=6 * size * elements + 12 * rows,  # points and gradients; distances and slope
        floats=floats * elements,
        integers=(integers + 3 * half) * elements,
        special=3.0 * half * elements,
        doubles=2 * 32.0 * rows,
        conversions=3 * 2 * 32.0 * rows,
    )
    # losses: value and slope of each row from the difference, their mean; float32.
    losses = Counts(memory=6 * 4.0 * rows)
    return [Launch("forward", forward), Launch("row losses", losses), Launch("backward", backward)]


class Patches(NamedTuple):
    """Patches of images [batch, channels, side, side]: k of each, p × p pixels."""

    batch: int
    channels: int
    side: int
    k: int
    p: int

    @property
    def pixels(self) -> float:
        """Of all patches, channels counted."""
        return float(self.batch) * self.k * self.channels * self.p**2

    @property
    def image_pixels(self) -> float:
        """Of all images."""
        return float(self.batch) * self.channels * self.side**2


# cut_tile of a pixel, METHOD "none": widened, masked, added to two addresses; scale and offset.
CUT = (2, 6)
# With channels_last a column is divided into column and channel.
DIVISION = 12
# A tap of a pixel: masked, chosen, moved to the box, loaded, widened; weight_of: a reciprocal and
# three products, numerator: two products and a difference.
TAP = (6, 9, 1)
# taps and numerators of an axis: three divisions of integers, and some twenty sums and products.
AXIS = 3 * DIVISION + 20
# gather_gradients_kernel of a pixel and a box that its tile meets: row and column in the patch,
# four comparisons, two addresses; a sum.
GATHERED = (1, 8)
# All instructions as compiled by Triton 3.9.0, of a pixel and of a pixel and a box, in tiles of
# 32 × 32 and 64 × 32 pixels of uint8 images: `python -m benchmarks.compiled_loops`. Every thread of
# a program that draws takes the box of its patch.
COMPILED = {"patches cut": 51.0, "patches drawn and cut": 158.0, "patches gathered": 38.0}


def cut_patches(
    job: Patches, image: int, out: int, *, last: bool = False, drawn: bool = True
) -> list[Launch]:
    """The launch that cuts, and with ``drawn`` draws; ``image`` and ``out``: bytes of a pixel.

    ``last``: Whether the channels of the output are last.
    """
    pixels = job.pixels
    # A row of a patch lies anywhere in the image, and whole sectors come from the cache.
    row = job.p * image
    sectors = math.ceil((row + SECTOR - 1) / SECTOR) * SECTOR
    counts = Counts(
        memory=pixels * out + touched_pixels(job) * image + 17.0 * job.batch * job.k,
        cache=pixels * out + pixels / job.p * sectors,
        floats=CUT[0] * pixels,
        integers=(CUT[1] + (DIVISION if last else 0)) * pixels,
    )
    name = "patches drawn and cut" if drawn else "patches cut"
    return [Launch(name, counts, Counts(slots=COMPILED[name] * pixels))]


def touched_pixels(job: Patches) -> float:
    """Of the images, at most all of them."""
    return min(job.image_pixels, job.pixels)


def mean_taps(side: int, p: int, scale: tuple[float, float]) -> float:
    """Pixels of a box on an axis that a pixel of a resized patch is made of, mean over boxes.

    Boxes are squares of an area uniform in ``scale`` of the image's: 2·max(1, box/patch).
    """
    steps = 1000
    areas = (scale[0] + (i + 0.5) / steps * (scale[1] - scale[0]) for i in range(steps))
    return sum(2 * max(1.0, side * math.sqrt(a) / p) for a in areas) / steps


def resized_patches(job: Patches, image: int, out: int, scale: tuple[float, float]) -> list[Launch]:
    """The same with boxes of any size, bilinear and antialiased."""
    pixels, taps = job.pixels, mean_taps(job.side, job.p, scale)
    taken = pixels * taps**2
    counts = Counts(
        memory=pixels * out + min(job.image_pixels, taken) * image,
        cache=pixels * out + taken * image,
        floats=(CUT[0] + 4) * pixels + TAP[0] * taken,
        integers=(CUT[1] + 2 * AXIS) * pixels + TAP[1] * taken,
        special=TAP[2] * taken,
    )
    return [Launch("draw and resize", counts)]


def meeting(side: int, p: int, tile: int) -> float:
    """Share of an axis' tiles that a box of p pixels meets, mean over its places."""
    places = side - p + 1
    met = sum((min(side, top + p) - 1) // tile - top // tile + 1 for top in range(places))
    return met / places / math.ceil(side / tile)


def patch_gradients(job: Patches, size: int) -> list[Launch]:
    """gather_gradients_kernel: every tile of an image asks every box of it."""
    sizes = patch_launch("gather", job.channels, job.side, job.side, interpreted=False)
    asked = job.image_pixels * job.k
    share = meeting(job.side, job.p, sizes.lines) * meeting(job.side, job.p, sizes.columns)
    met = asked * share
    counts = Counts(
        memory=size * (job.pixels + job.image_pixels) + 17.0 * job.batch * job.k,
        floats=GATHERED[0] * met,
        integers=GATHERED[1] * met,
    )
    return [Launch("gather", counts, Counts(slots=COMPILED["patches gathered"] * met))]
