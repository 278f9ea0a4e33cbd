"""The pictures of a run, as PNG files; drawn when training ends, and again by `fastcontrast plot`.

matplotlib is imported when a picture is drawn, and drawn to files only: no display is needed.
What has classes on both sides, confusion and neighbours, is in :mod:`fastcontrast.train.sheets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastcontrast.data import ImageDataset
from fastcontrast.train.config import RunConfig
from fastcontrast.train.progress import LABELS
from fastcontrast.train.runs import METHODS, RunFolder, read_metrics
from fastcontrast.train.sheets import (
    open_figure,
    plot_confusion,
    plot_neighbours,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOOR = 1e-6  # nats; below it a loss is drawn at it, so that a zero fits the log scale
_INK, _FAINT = "#222222", "#8a8a8a"
_COLOURS = ("#1f6fb4", "#e07b1f", "#b3282d", "#2f8f4e", "#7a4fa3")


def plot_run(
    run: RunFolder, config: RunConfig, dataset: ImageDataset, method: str = "pca"
) -> list[Path]:
    """Draw everything that the files in a run's folder, and in those of its stages, allow.

    Args:
        run: The folder: metrics.jsonl gives the curves, embeddings.npz the other pictures.
        config: What was run.
        dataset: The run's data, for class names and the sheet of neighbours.
        method: How the embedding is brought to two dimensions: one of ``METHODS``, each with a
            picture of its own.

    Returns:
        The pictures that were written.

    Raises:
        ValueError: If a file is damaged.
        ModuleNotFoundError: If the method's package is not installed.
    """
    setting = f"{config.recipe} on {dataset.name}, seed {config.seed}"
    written = []
    for folder in (run, *(RunFolder(path) for path in run.stages)):
        name = "" if folder == run else f"{folder.path.name}, "
        records = read_metrics(folder)
        drops = rate_drops(records) if config.schedule in ("step", "plateau") else []
        if plot_curve(records, drops, name + setting, folder.curve):
            written.append(folder.curve)
    if not run.embeddings.is_file():
        return written
    try:
        with np.load(run.embeddings, allow_pickle=False) as arrays:
            saved = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        points, labels = saved["test_embeddings"].float(), saved["test_labels"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{run.embeddings}: damaged ({error})") from error
    predictions, names = saved.get("test_predictions"), dataset.class_names
    error = "" if predictions is None else f": error {(predictions != labels).double().mean():.2%}"
    marks, mark_labels = saved.get("labelled_embeddings"), saved.get("labelled_labels")
    plot_embedding(
        points, labels, marks, mark_labels, names, f"Test images, {setting}{error}",
        run.embedding_by(method), method,
    )  # fmt: skip
    written.append(run.embedding_by(method))
    if predictions is not None:
        plot_confusion(labels, predictions, names, f"{setting}{error}", run.confusion)
        written.append(run.confusion)
    images = dataset.test_images
    is_pictures = images.dtype == torch.uint8 and images.shape[1] in (1, 3)
    if len(images) == len(points) and is_pictures:
        plot_neighbours(points, labels, images, names, setting, run.neighbours)
        written.append(run.neighbours)
    return written


def plot_curve(
    records: Sequence[dict[str, Any]], drop_steps: Sequence[int], title: str, path: Path
) -> bool:
    """Draw the losses, and below them the errors, over the training steps.

    Args:
        records: Lines of metrics.jsonl: keys that start with "loss" and with "error".
        drop_steps: Steps after which the learning rate fell, marked where they were reached.
        title: Title of the picture.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    losses = [r for r in records if "loss" in r]
    errors = [r for r in records if any(key.startswith("error") for key in r)]
    if not losses:
        return False
    figure = open_figure(8.0, 6.4 if errors else 3.6)
    panels = figure.subplots(2 if errors else 1, 1, sharex=True, squeeze=False)[:, 0]
    top = panels[0]
    mark = {"marker": "o", "markersize": 3} if len(losses) < 40 else {}
    parts = [key for key in losses[0] if key.startswith("loss_")] or ["loss"]
    for key, colour in zip(parts, _COLOURS, strict=False):
        points = [max(r[key], _FLOOR) for r in losses]
        label = key.removeprefix("loss_").replace("_", " ")
        top.plot([r["step"] for r in losses], points, color=colour, label=label, lw=1.6, **mark)
    values = [max(r[key], _FLOOR) for r in losses for key in parts]
    if max(values) > 10 * min(values):
        top.set_yscale("log")
    top.set_ylabel("loss (mean since last point)")
    reached = [step for step in drop_steps if step < losses[-1]["step"]]
    for axes in panels:
        for step in reached:
            axes.axvline(step, color=_FAINT, ls=":", lw=1.2)
    if reached:
        top.plot([], [], color=_FAINT, ls=":", lw=1.2, label="learning rate / 10")
    if errors:
        _draw_errors(panels[1], errors)
    for axes in panels:
        _plain_axes(axes)
        axes.grid(color="#e6e6e6", lw=0.8)
        axes.legend(fontsize=9, loc="upper right", framealpha=0.9, edgecolor="none")
    panels[-1].set_xlabel("training step")
    panels[-1].set_xlim(left=0)
    figure.align_ylabels()
    figure.suptitle(title, fontsize=12, color=_INK)
    save_figure(figure, path)
    return True


def rate_drops(records: Sequence[dict[str, Any]]) -> list[int]:
    """Steps of the log lines after which the learning rate fell to a tenth, or less.

    Args:
        records: Lines of metrics.jsonl, of a schedule by steps or plateaus.
    """
    rates = [(r["step"], r["learning_rate"]) for r in records if "learning_rate" in r]
    return [step for (step, rate), (_, lower) in pairwise(rates) if lower < rate / 5]


def _draw_errors(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(k for r in records for k in r if k.startswith("error")))
    highest = 1.0
    for key, colour in zip(keys, _COLOURS, strict=False):
        mine = [(r["step"], 100 * r[key]) for r in records if key in r]
        steps, percent = [step for step, _ in mine], [value for _, value in mine]
        highest = max(highest, *percent)
        label = f"{LABELS.get(key, key.replace('_', ' '))} ({percent[-1]:.2f} %)"
        axes.plot(steps, percent, color=colour, lw=1.6, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0, top=1.15 * highest)
    axes.set_ylabel("error (%)")


def plot_embedding(
    points: Tensor,
    labels: Tensor,
    labelled_points: Tensor | None,
    labelled_labels: Tensor | None,
    class_names: Sequence[str],
    title: str,
    path: Path,
    method: str = "pca",
) -> None:
    """Draw the test embeddings in two dimensions, coloured by class.

    Args:
        points: Test embeddings [T, D].
        labels: int64 [T].
        labelled_points: Embeddings of the labelled training images [L, D], drawn as outlined marks;
            or None.
        labelled_labels: int64 [L].
        class_names: Names for the legend.
        title: Title of the picture.
        path: PNG file to write.
        method: ``"pca"``: the plane of the two main directions. ``"tsne"``, ``"umap"``: by the
            packages openTSNE and umap-learn.

    Raises:
        ModuleNotFoundError: If the method's package is not installed.
    """
    if labelled_points is None or labelled_labels is None:
        labelled_points, labelled_labels = points[:0], labels[:0]
    has_marks = len(labelled_points) > 0
    both = torch.cat([points, labelled_points])
    flat, axis_names = _in_two_dimensions(both, len(points), method)
    plane, marks = flat[: len(points)], flat[len(points) :]
    labels_of_points = labels.cpu().numpy()
    labels_of_marks = labelled_labels.cpu().numpy()
    figure = open_figure(8.4, 7.2)
    axes = figure.subplots()
    colours = _class_colours(len(class_names))
    size = 9 if len(plane) <= 4000 else 3
    for number, name in enumerate(class_names):
        mine = plane[labels_of_points == number]
        axes.scatter(*mine.T, s=size, color=colours[number], alpha=0.55, lw=0)
        axes.scatter([], [], s=46, color=colours[number], lw=0, label=name)
    outline = {"edgecolors": "black", "linewidths": 0.9}
    for number in range(len(class_names) if has_marks else 0):
        mine = marks[labels_of_marks == number]
        axes.scatter(*mine.T, s=46, color=colours[number], zorder=3, **outline)
    if has_marks:
        axes.scatter([], [], s=46, color="white", label="labelled", **outline)
    axes.set_xlabel(axis_names[0])
    axes.set_ylabel(axis_names[1])
    axes.set_aspect("equal", adjustable="box")
    _plain_axes(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="class")
    axes.set_title(title, fontsize=12, color=_INK, pad=12)
    save_figure(figure, path)


def _in_two_dimensions(
    points: Tensor, fitted: int, method: str
) -> tuple[np.ndarray, tuple[str, str]]:
    """Bring points to [N, 2], and name the axes; PCA is fitted on the first ``fitted`` of them."""
    if method == "pca":
        mean, directions, shares = principal_directions(points[:fitted], 2)
        names = (
            f"first principal direction ({shares[0]:.0%} of the variance)",
            f"second principal direction ({shares[1]:.0%})",
        )
        return ((points.double() - mean) @ directions).cpu().numpy(), names
    rows = points.float().cpu().numpy()
    try:
        if method == "tsne":
            from openTSNE import TSNE  # pyright: ignore[reportMissingImports]

            return np.asarray(TSNE(random_state=0).fit(rows)), ("t-SNE 1", "t-SNE 2")
        if method == "umap":
            from umap import UMAP  # pyright: ignore[reportMissingImports]

            return np.asarray(UMAP(random_state=0).fit_transform(rows)), ("UMAP 1", "UMAP 2")
    except ImportError as error:
        package = {"tsne": "openTSNE", "umap": "umap-learn"}[method]
        raise ModuleNotFoundError(
            f'method {method} needs {package}: pip install "fastcontrast[plots]"'
        ) from error
    raise ValueError(f"method is {method!r}; wanted {', '.join(METHODS)}")


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


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.set_axisbelow(True)
