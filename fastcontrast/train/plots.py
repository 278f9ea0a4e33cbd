"""The two pictures of a run, as PNG files; drawn by the recipes when training ends.

matplotlib is imported when a picture is drawn, and drawn to files only: no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-6  # nats; below it a loss is drawn at it, so that a zero fits the log scale
_INK, _FAINT = "#222222", "#8a8a8a"
_LABELLED, _UNLABELLED, _ERROR = "#1f6fb4", "#e07b1f", "#b3282d"


def plot_curve(
    records: Sequence[dict[str, Any]],
    pixel_error: float,
    drop_steps: Sequence[int],
    title: str,
    path: Path,
) -> bool:
    """Draw both parts of the loss, and below them the 1-NN test error, over the training steps.

    Args:
        records: Lines of metrics.jsonl.
        pixel_error: 1-NN test error of raw pixels, 0 to 1, drawn for comparison.
        drop_steps: Steps after which the learning rate fell, marked where they were reached.
        title: Title of the picture.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    losses = [r for r in records if "loss" in r]
    errors = [r for r in records if "error_1nn" in r]
    if not losses:
        return False
    figure = _figure(8.0, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    mark = {"marker": "o", "markersize": 3} if len(losses) < 40 else {}
    for key, label, colour in (
        ("loss_labelled", "labelled: cross-entropy", _LABELLED),
        ("loss_unlabelled", "unlabelled: entropy", _UNLABELLED),
    ):
        points = [max(r[key], _FLOOR) for r in losses]
        top.plot([r["step"] for r in losses], points, color=colour, label=label, lw=1.6, **mark)
    values = [max(r[key], _FLOOR) for r in losses for key in ("loss_labelled", "loss_unlabelled")]
    if max(values) > 10 * min(values):
        top.set_yscale("log")
    top.set_ylabel("loss (nats, mean since last point)")
    reached = [step for step in drop_steps if step < losses[-1]["step"]]
    for axes in (top, bottom):
        for step in reached:
            axes.axvline(step, color=_FAINT, ls=":", lw=1.2)
    if reached:
        top.plot([], [], color=_FAINT, ls=":", lw=1.2, label="learning rate / 10")
    bottom.axhline(
        100 * pixel_error, color=_FAINT, ls="--", lw=1.4, label=f"raw pixels ({pixel_error:.1%})"
    )
    if errors:
        steps, percent = [r["step"] for r in errors], [100 * r["error_1nn"] for r in errors]
        bottom.plot(
            steps, percent, color=_ERROR, lw=1.6, marker="o", markersize=4, label="embedding"
        )
        bottom.annotate(
            f"{percent[-1]:.1f}%",
            (steps[-1], percent[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=_ERROR,
            fontweight="bold",
        )
    bottom.set_ylim(
        bottom=0, top=1.15 * max(100 * pixel_error, *(100 * r["error_1nn"] for r in errors), 1)
    )
    bottom.set_ylabel("1-NN test error (%)")
    bottom.set_xlabel("training step")
    bottom.set_xlim(left=0)
    for axes in (top, bottom):
        _plain_axes(axes)
        axes.grid(color="#e6e6e6", lw=0.8)
        place = "upper right" if axes is top else "center right"  # clear of raw pixels' line
        axes.legend(fontsize=9, loc=place, framealpha=0.9, edgecolor="none")
    figure.align_ylabels()
    figure.suptitle(title, fontsize=12, color=_INK)
    _save(figure, path)
    return True


def plot_embedding(
    points: Tensor,
    labels: Tensor,
    labelled_points: Tensor,
    labelled_labels: Tensor,
    class_names: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Draw the test embeddings in the plane of their two main directions, coloured by class.

    Args:
        points: Test embeddings [T, D].
        labels: int64 [T].
        labelled_points: Embeddings of the labelled training images [L, D], drawn as outlined marks.
        labelled_labels: int64 [L].
        class_names: Names for the legend.
        title: Title of the picture.
        path: PNG file to write.
    """
    mean, directions, shares = principal_directions(points, 2)
    plane = ((points.double() - mean) @ directions).cpu().numpy()
    marks = ((labelled_points.double() - mean) @ directions).cpu().numpy()
    labels_of_points, labels_of_marks = labels.cpu().numpy(), labelled_labels.cpu().numpy()
    figure = _figure(8.4, 7.2)
    axes = figure.subplots()
    colours = _class_colours(len(class_names))
    size = 9 if len(plane) <= 4000 else 3
    for number, name in enumerate(class_names):
        mine = plane[labels_of_points == number]
        axes.scatter(*mine.T, s=size, color=colours[number], alpha=0.55, lw=0)
        axes.scatter([], [], s=46, color=colours[number], lw=0, label=name)
    for number in range(len(class_names)):
        mine = marks[labels_of_marks == number]
        outline = {"edgecolors": "black", "linewidths": 0.9, "zorder": 3}
        axes.scatter(*mine.T, s=46, color=colours[number], **outline)
    axes.scatter([], [], s=46, color="white", edgecolors="black", lw=0.9, label="labelled")
    axes.set_xlabel(f"first principal direction ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second principal direction ({shares[1]:.0%})")
    axes.set_aspect("equal", adjustable="box")
    _plain_axes(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="class")
    axes.set_title(title, fontsize=12, color=_INK, pad=12)
    _save(figure, path)


def principal_directions(points: Tensor, count: int) -> tuple[Tensor, Tensor, list[float]]:
    """Find the directions in which points vary most (PCA).

    Args:
        points: [N, D], any float dtype.
        count: How many directions, at most D.

    Returns:
        Mean [D], directions [D, count] of unit length with their largest entry positive (so that a
        picture does not flip between runs), both float64, and each one's share of the variance.
    """
    points = points.double()
    mean = points.mean(dim=0)
    centred = points - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = vectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, count]
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    total = variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return mean, directions, (variances.flip(0)[:count] / total).tolist()


def _class_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    table = colormaps["tab10" if count <= 10 else "turbo"]
    return [table(i) if count <= 10 else table(i / (count - 1)) for i in range(count)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    return figure


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
