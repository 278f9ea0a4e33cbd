"""Draws docs/patch_gallery.png: pictures with the boxes of their patches, and the patches.

``python docs/patch_gallery.py`` needs matplotlib, whose sample picture (a portrait of Grace Hopper
by the United States Navy, in the public domain) it cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import cbook
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from fastcontrast import random_patches

COUNT = 6
ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("size=96", 96, {}),
    ("max_iou=0", 96, {"max_iou": 0.0}),
    ("scale=(0.02, 0.4), hflip=0.5", 96, {"scale": (0.02, 0.4), "hflip": 0.5}),
    ("grid=(3, 2)", 96, {"grid": (3, 2)}),
    ("padding=60, padding_mode='reflect'", 160, {"padding": 60, "padding_mode": "reflect"}),
]


def picture() -> torch.Tensor:
    """The portrait [1, 3, 360, 360], uint8."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = np.asarray(plt.imread(file, format="jpg"))
    return torch.from_numpy(pixels[40:400, 80:440].copy()).permute(2, 0, 1)[None].contiguous()


def main() -> None:
    """Write the picture beside this file."""
    image = picture()
    height, width = image.shape[2:]
    colours = plt.get_cmap("tab10").colors
    figure, axes = plt.subplots(
        len(ROWS), COUNT + 1, figsize=(1.6 * (COUNT + 1), 1.75 * len(ROWS)), layout="constrained"
    )
    for row, (title, size, options) in zip(axes, ROWS, strict=True):
        patches = random_patches(
            image, COUNT, size, layout="NHWC", dtype=torch.uint8, seed=4, **options
        )
        row[0].imshow(image[0].permute(1, 2, 0))
        row[0].set_title(title, fontsize=8)
        pad = options.get("padding", 0)
        row[0].set_xlim(-pad, width + pad)
        row[0].set_ylim(height + pad, -pad)
        for k, (x, y, w, h) in enumerate(patches.boxes("xywh")[0].tolist()):
            row[0].add_patch(Rectangle((x, y), w, h, fill=False, color=colours[k], linewidth=1.5))
            row[k + 1].imshow(patches.data[0, k])
            flipped = ", flipped" if int(patches.flips[0, k]) & 1 else ""
            row[k + 1].set_title(f"{h:.0f}x{w:.0f}{flipped}", fontsize=7)
            for spine in row[k + 1].spines.values():
                spine.set(color=colours[k], linewidth=2.5)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)  # a third of the size
    print(path)


if __name__ == "__main__":
    main()
