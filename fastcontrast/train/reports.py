"""What a finished run can be asked for: evaluation, embeddings, pictures; for the command line.

The network is rebuilt from the run's configuration and a checkpoint, and the data set read again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcontrast.data import load_dataset
from fastcontrast.train import plots, semisup, spatial, stage, temporal, triplet
from fastcontrast.train.checkpoints import latest_checkpoint, load_weights
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TemporalConfig, TripletConfig
from fastcontrast.train.evaluation import Figure, embed
from fastcontrast.train.runs import RunFolder, read_run, save_embeddings


@dataclass(frozen=True)
class Loaded:
    """A run's data set and its trained network.

    Attributes:
        job: Configuration, data and device.
        model: Maps normalised images to embeddings [M, D], in evaluation mode.
        labelled: Indices of the training images whose labels the run was given, int64 [L].
        source: The checkpoint that the weights come from.
    """

    job: stage.Job[Any]
    model: nn.Module
    labelled: np.ndarray
    source: Path

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of images, uint8 [N, C, H, W] to [N, D] on the run's device."""
        return embed(self.model, images, self.job.pixels)


def load_run(path: Path, checkpoint: str = "last", device: str = "auto") -> Loaded:
    """Rebuild a run's network with its weights, and read its data.

    Args:
        path: The run's folder.
        checkpoint: ``"last"``, or ``"best"`` where the run had something to choose by.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``: where to embed, whatever the run trained on.

    Returns:
        Both. Of spatial contrasting the network is the fine-tuned trunk with its features averaged,
        or the pretrained trunk if there is no other; of a run by folds that of fold 0.

    Raises:
        FileNotFoundError: If there is no run, or its data is missing.
        ValueError: If there is no such checkpoint, or a file is damaged.
    """
    config = replace(read_run(path)[1], device=device)
    if isinstance(config, TripletConfig):
        job = triplet.prepare(config, open_folder=False)
        model = triplet.build_model(config, job.network, job.channels)
        folder, labelled = job.run, np.arange(len(job.dataset.train_labels))
    elif isinstance(config, SemisupConfig):
        job = semisup.prepare(config, open_folder=False)
        model = semisup.build_model(config, job.network, job.channels)
        folder = job.run
        labelled = np.sort(semisup.split_of(config, job.dataset).labelled.reshape(-1))
    elif isinstance(config, SpatialConfig):
        job = spatial.prepare(config, open_folder=False)
        name, labelled = next(iter(spatial.labelled_subsets(config, job.dataset).items()))
        trunk = spatial.build_trunk(config, job.network, job.channels)
        folder, model = job.run.stage(f"finetuned{name}"), spatial.build_classifier(trunk, job)
        if latest_checkpoint(folder.checkpoints) is None:
            folder, model = job.run.stage("pretraining"), trunk
    elif isinstance(config, TemporalConfig):
        job = temporal.prepare(config, open_folder=False)
        folder, model = job.run, temporal.build_model(job)
        labelled = np.arange(len(job.frames.train_labels) if job.frames.is_labelled else 0)
    else:
        raise ValueError(f"{path}: a run of {config.recipe!r}, which is not known here")
    source = _load(folder, model, checkpoint, average=config.ema > 0)
    if isinstance(config, SpatialConfig):
        trunk = model if folder.path.name == "pretraining" else next(model.children())
        model = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if isinstance(config, TemporalConfig):
        model = temporal.encoder_of(model)
    stage.place(model, job.device)  # as in training: other layouts round otherwise
    return Loaded(job, model.eval(), labelled, source)


def evaluate_run(loaded: Loaded) -> list[Figure]:
    """Judge a run's embedding by classifiers on frozen embeddings of its labelled images.

    Args:
        loaded: From :func:`load_run`.

    Returns:
        Test errors of a linear layer, a linear SVM and nearest neighbours, each with its protocol.

    Raises:
        ValueError: If the run was given no labels.
    """
    if not len(loaded.labelled):
        raise ValueError(f"{loaded.job.run.path}: the run's data have no labels to judge by")
    dataset, device = loaded.job.dataset, loaded.job.device
    index = torch.from_numpy(loaded.labelled)
    points = loaded.embed(dataset.train_images[index])
    labels, test_labels = dataset.train_labels[index].to(device), dataset.test_labels.to(device)
    _, figures = triplet.judge_frozen(
        points, labels, loaded.embed(dataset.test_images), test_labels, loaded.job.config.seed
    )
    config = loaded.job.config
    if isinstance(config, SpatialConfig) and config.protocol == "folds":
        note = f", fold 0 of {len(dataset.folds)} alone"
        figures = [replace(figure, protocol=figure.protocol + note) for figure in figures]
    return figures


def embed_run(loaded: Loaded, out: Path) -> dict[str, tuple[int, ...]]:
    """Write the embeddings of all training and test images, with their labels, as an .npz file.

    Args:
        loaded: From :func:`load_run`.
        out: The file.

    Returns:
        Name of each array and its shape.

    Raises:
        OSError: If it could not be written.
    """
    dataset = loaded.job.dataset
    arrays = {
        "train_embeddings": loaded.embed(dataset.train_images),
        "train_labels": dataset.train_labels,
        "test_embeddings": loaded.embed(dataset.test_images),
        "test_labels": dataset.test_labels,
        "labelled_indices": torch.from_numpy(loaded.labelled),
    }
    save_embeddings(out, **arrays)
    return {name: tuple(array.shape) for name, array in arrays.items()}


def plot_finished(path: Path, method: str = "pca") -> list[Path]:
    """Draw a run's pictures again from its files: see :func:`fastcontrast.train.plots.plot_run`.

    Raises:
        FileNotFoundError: If there is no run, or its data is missing.
        ValueError: If a file is damaged.
        ModuleNotFoundError: If the method's package is not installed.
    """
    run, config = read_run(path)
    if isinstance(config, TemporalConfig):
        dataset = temporal.read_frames(config)
    else:
        size = config.image_size or None
        dataset = load_dataset(config.data, config.dataset, size, unlabelled=False)
    return plots.plot_run(run, config, dataset, method)


def _load(folder: RunFolder, model: nn.Module, kind: str, *, average: bool) -> Path:
    source = latest_checkpoint(folder.checkpoints, "best" if kind == "best" else "step")
    if source is None:
        raise ValueError(f"{folder.checkpoints}: holds no {kind} checkpoint")
    load_weights(source / ("average.safetensors" if average else "model.safetensors"), model)
    return source
