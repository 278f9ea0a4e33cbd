"""Pictures with classes on both sides: what was taken for what, and what lies beside what.

Drawn by :mod:`fastcontrast.train.plots`, which also takes its figures from here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastcontrast.retrieval import nearest_neighbors
from fastcontrast.train.checkpoints import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS, _NEIGHBOURS = 12, 9
_FRAMES = ((179, 40, 45), (47, 143, 78), (0, 0, 0))  # another class, the same, the image itself


def open_figure(width: float, height: float) -> Figure:
    """Make a figure that is drawn to a file: no pyplot, no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG in one move."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_atomically(path, file.getvalue())


def plot_confusion(
    labels: Tensor, predictions: Tensor, class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw how often each class was taken for each.

    Args:
        labels: True classes, int64 [T].
        predictions: Classes found, int64 [T].
        class_names: Names for both axes.
        title: Title of the picture.
        path: PNG file to write.
    """
    counts = confusion(labels, predictions, len(class_names))
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(4.0 + 0.42 * len(class_names), 16.0)
    figure = open_figure(side + 0.6, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(class_names))
    axes.set_xticks(places, class_names, rotation=45, ha="right")
    axes.set_yticks(places, class_names)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if len(class_names) <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    axes.set_title(title, fontsize=11)
    save_figure(figure, path)


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> np.ndarray:
    """Count [is, taken for], int64 [classes, classes]."""
    pairs = (labels * classes + predictions).cpu()
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).numpy()


def plot_neighbours(
    points: Tensor,
    labels: Tensor,
    images: Tensor,
    class_names: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Draw a sheet of test images, each followed by the test images nearest to it.

    Args:
        points: Test embeddings [T, D].
        labels: int64 [T].
        images: uint8 [T, C, H, W].
        class_names: Printed beside the images.
        title: Title of the picture.
        path: PNG file to write.
    """
    count = min(_NEIGHBOURS, len(points) - 1)
    if count < 1:
        return
    chosen = torch.linspace(0, len(points) - 1, min(_ROWS, len(points))).long()
    found = nearest_neighbors(points[chosen], points, count + 1).indices  # itself comes first
    height, width = images.shape[2:]
    step = max(height, width) // 8 + max(height, width) + 2  # room for a frame and a name
    canvas = np.full((len(chosen) * step, (count + 1) * step, 3), 255, np.uint8)
    figure = open_figure(0.75 * (count + 1), 0.75 * len(chosen) + 0.4)
    axes = figure.subplots()
    for row in range(len(chosen)):
        own = int(chosen[row])
        others = [int(i) for i in found[row] if int(i) != own][:count]
        for column, index in enumerate((own, *others)):
            colour = _FRAMES[int(labels[index] == labels[own]) if index != own else 2]
            top, left = row * step, column * step
            canvas[top : top + height + 2, left : left + width + 2] = colour
            picture = images[index].permute(1, 2, 0).numpy()
            canvas[top + 1 : top + 1 + height, left + 1 : left + 1 + width] = picture
            name, place = class_names[int(labels[index])], top + height + 1.5
            axes.text(left, place, name, fontsize=5, va="top", color=np.array(colour) / 255)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    figure.suptitle(f"Test images (left) and their nearest: {title}", fontsize=9)
    save_figure(figure, path)
