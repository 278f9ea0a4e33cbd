"""Spatial contrasting: the recipe, from data to figures.

Hoffer, Hubara & Ailon, "Deep unsupervised learning through spatial contrasting", arXiv 1610.00243.
First, patches of the feature maps of one batch are contrasted: two patches of the same image
against those of the others, without labels. Then the whole network is trained on the labelled
images, and beside it the same network from random weights. The command line calls :func:`prepare`
and :func:`train`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.data import ImageDataset
from fastcontrast.losses.memory_queue import MemoryQueue
from fastcontrast.patches import random_patches
from fastcontrast.train import models, plots, stage
from fastcontrast.train.batches import seed_dropout, shuffled_batch, split_labels
from fastcontrast.train.config import SpatialConfig, drops_of
from fastcontrast.train.contrasts import contrast, queue_of
from fastcontrast.train.evaluation import Figure, embed
from fastcontrast.train.loop import Batch, Task
from fastcontrast.train.probes import linear_probe
from fastcontrast.train.progress import print_figures
from fastcontrast.train.ranks import Shares, is_first
from fastcontrast.train.runs import save_embeddings, write_results

HELP = """\
Contrast patches of images without labels, then train on labels
(Hoffer, Hubara & Ailon, "Deep unsupervised learning through spatial contrasting", 1610.00243).

- Stage 1: two patches of each image's feature map, against those of the other images; --contrast
  corrects for false negatives, weighs hard ones up or remembers those of earlier batches.
- Stage 2: the whole network on the labelled images; and the same from random weights, beside it.
- It ends with both test errors, and those of a linear layer on the frozen features.
- Every stage has a folder in runs/<name>/, with metrics and checkpoint of its own.
- Ctrl-C stops after the current step with everything written; --resume goes on from there."""

_PATCHES = 1  # added to the seed of augmentations: patches are other draws of the same counter


class PatchTargets(NamedTuple):
    """What the positions of a step's patches follow from."""

    sample_ids: Tensor
    step: int | Tensor


def contrast_patches(
    features: Tensor,
    targets: PatchTargets,
    config: SpatialConfig,
    queue: MemoryQueue | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut two patches out of each feature map and contrast them: the loss of one step.

    Args:
        features: [N, C, H, W].
        targets: Of the images, for the positions.
        config: Says the size of the patches, what becomes of their cells, and the loss.
        queue: Of earlier batches' second patches; receives these.

    Returns:
        The loss in nats, and it as a vector, [1].
    """
    patches = random_patches(
        features, 2, config.patch_size, seed=config.seed + _PATCHES, step=targets.step,
        sample_ids=targets.sample_ids, min_distance=config.min_offset or None,
    ).data  # fmt: skip
    points = patches.mean((3, 4)) if config.reduce == "mean" else patches.flatten(2)
    return contrast(points[:, 0], points[:, 1], config, queue)


def contrast_crops(
    outputs: Tensor, config: SpatialConfig, queue: MemoryQueue | None = None
) -> tuple[Tensor, Tensor]:
    """Contrast the features of patches that were cut out of the images.

    Args:
        outputs: Feature maps [2N, C, h, w]: the first patch of every image, then the second.
        config: Says the loss.
        queue: Of earlier batches' second patches; receives these.

    Returns:
        The loss in nats, and it as a vector, [1].
    """
    first, second = outputs.mean((2, 3)).chunk(2)
    return contrast(first, second, config, queue)


def prepare(config: SpatialConfig, *, open_folder: bool = True) -> stage.Job[SpatialConfig]:
    """See :func:`fastcontrast.train.stage.prepare`; also checks patches, labels and folds."""

    def check(dataset: ImageDataset) -> None:
        if config.labels_per_class:
            split_labels(
                dataset.train_labels, dataset.num_classes, config.labels_per_class, config.seed
            )
        if config.protocol == "folds" and not dataset.folds:
            raise ValueError(f"protocol is 'folds', but {dataset.name} has none")
        if config.batch_size > len(dataset.train_images):
            raise ValueError(
                f"batch_size is {config.batch_size}; there are {len(dataset.train_images)} images"
            )

    def make(name: str, channels: int) -> nn.Module:
        return models.spatial_trunk(name, channels, config.slope, config.width, config.blocks)

    unlabelled = open_folder and config.pretraining_steps > 0  # only contrasting has a use for them
    job = stage.prepare(config, make, check, open_folder=False, unlabelled=unlabelled)
    if config.blocks > (depth := models.spatial_depth(job.network)):
        raise ValueError(f"blocks is {config.blocks}; the network has {depth}")
    with torch.device("meta"), torch.no_grad():
        trunk = make(job.network, job.channels).eval()
        shape = job.dataset.train_images.shape[2:]
        cells = trunk(torch.empty(1, job.channels, *shape)).shape[2:]
    limit = min(cells) if config.patches == "features" else min(shape)
    if config.patch_size > limit:
        of = "cells" if config.patches == "features" else "pixels"
        raise ValueError(f"patch_size is {config.patch_size}; there are {limit} {of} a side")
    return stage.open_job(job) if open_folder else job


def build_trunk(config: SpatialConfig, network: str, channels: int) -> nn.Module:
    """Build the part that is pretrained, with weights that are a function of the seed."""
    sizes = (config.slope, config.width, config.blocks)
    return models.build(lambda: models.spatial_trunk(network, channels, *sizes), config.seed)


def build_classifier(trunk: nn.Module, job: stage.Job[SpatialConfig]) -> nn.Sequential:
    """Put the head, with weights that are a function of the seed, on a trunk."""
    config, classes = job.config, job.dataset.num_classes
    sizes = (config.slope, config.head_dropout, config.width, config.blocks)
    head = models.build(lambda: models.spatial_head(job.network, classes, *sizes), config.seed + 1)
    return nn.Sequential(trunk, head)


def train(job: stage.Job[SpatialConfig]) -> stage.Result:
    """Pretrain, fine-tune, train the baseline, evaluate; leave everything in the run folder.

    Args:
        job: From :func:`prepare`.

    Returns:
        What the run came to; without the figures of stages that were not reached.

    Raises:
        NonFiniteLossError: If the loss became NaN or infinite.
        OSError: If something could not be written; the previous checkpoint is kept.
        ValueError: If a checkpoint or the metrics to resume from are damaged.
    """
    config, dataset = job.config, job.dataset
    figures: list[Figure] = []
    with stage.session(job) as should_stop:
        trunk = build_trunk(config, job.network, job.channels)
        initial = copy.deepcopy(trunk)
        if config.init_from and not config.resume:
            stage.load_initial_weights(config.init_from, trunk, "pretraining")
        ended = stage.Trained(trunk, 0, False)
        if config.pretraining_steps:
            ended = pretrain(job, trunk, should_stop)
        subsets = labelled_subsets(config, dataset)
        if is_first() and not ended.interrupted:
            given = (
                "spatial contrasting" if config.pretraining_steps else "the weights it began with"
            )
            figures += _probe(job, ended.model, given, subsets)
            if config.pretraining_steps:
                figures += _probe(job, initial, "no initialisation", subsets)
        starts = [("finetuned", ended.model, config.learning_rate)]
        if config.baseline and config.pretraining_steps:
            starts.append(("baseline", initial, config.baseline_learning_rate))
        for name, start, rate in starts:
            errors = []
            for fold, index in subsets.items():
                if ended.interrupted:
                    break
                model = build_classifier(copy.deepcopy(start), job)
                ended = fine_tune(job, model, index, f"{name}{fold}", rate, should_stop)
                if is_first():
                    errors.append(_test(job, ended.model, save=name == "finetuned"))
            if len(errors) == len(subsets) and not ended.interrupted:
                figures.append(_figure(job, name, errors, len(next(iter(subsets.values())))))
        result = stage.Result(job.run, ended.step, ended.interrupted, figures)
        if is_first():
            write_results(job.run, result.step, result.figures)
            plots.plot_run(job.run, config, dataset)
    return result


def pretrain(
    job: stage.Job[SpatialConfig], trunk: nn.Module, should_stop: Callable[[], bool]
) -> stage.Trained:
    """Train the trunk by spatial contrasting, on the training images and those without labels."""
    config, dataset, device, pixels = job.config, job.dataset, job.device, job.pixels
    further = [] if dataset.unlabelled_images is None else [dataset.unlabelled_images]
    images = torch.cat([dataset.train_images, *further]).to(device)
    count, crops = len(images), config.patches == "images"
    per_image = Shares(config.batch_size)
    shares = Shares(config.batch_size, config.batch_size) if crops else per_image
    queue, epoch = queue_of(config), count // config.batch_size

    def batch_at(step: int) -> Batch[PatchTargets]:
        drawn = shuffled_batch(count, config.batch_size, config.seed, step)
        index = torch.from_numpy(drawn).to(device, non_blocking=True)
        targets, own = PatchTargets(index, step), per_image.own(index)
        if not crops:
            return Batch(_augmented(job, images, own, step), targets)
        patches = random_patches(
            images, 2, config.patch_size, index=own, seed=config.seed + _PATCHES, step=step,
            min_distance=config.min_offset or None, hflip=0.5 if config.mirror else 0.0,
            mean=pixels.mean / 255, std=pixels.std / 255,
        ).data  # fmt: skip
        return Batch(patches.transpose(0, 1).flatten(0, 1), targets)

    def loss(features: Tensor, targets: PatchTargets) -> tuple[Tensor, Tensor]:
        if queue is not None and targets.step % epoch == 0:
            queue.clear()  # keys of the epoch before may be of the same images
        if crops:
            return contrast_crops(features, config, queue)
        return contrast_patches(features, targets, config, queue)

    steps = config.pretraining_steps
    drops = drops_of(steps) if config.schedule == "step" else ()
    task = Task(
        batch_at=batch_at,
        loss=loss,
        part_names=("loss",),
        shares=shares,
        evaluate=lambda network: {},
        schedule=replace(
            config.rates, rate=config.pretraining_learning_rate, steps=steps, drops=drops
        ),
        steps=steps,
        memory=queue,
        restart="--pretraining-learning-rate RATE --init-from WEIGHTS",
    )
    kind = "pixels" if crops else "cells of the feature map"
    announcement = (
        f"{dataset.name}: spatial contrasting of {count:,} images, {steps:,} steps of "
        f"{config.batch_size}, patches of {config.patch_size} x {config.patch_size} {kind}, "
        f"on {device} ({config.threads or torch.get_num_threads()} threads), in {job.run.path}"
    )
    return stage.run_stage(
        job, job.run.stage("pretraining"), trunk, task, should_stop, announcement,
        eval_every=config.pretraining_eval_every,
    )  # fmt: skip


def fine_tune(
    job: stage.Job[SpatialConfig],
    model: nn.Module,
    labelled: np.ndarray,
    name: str,
    rate: float,
    should_stop: Callable[[], bool],
) -> stage.Trained:
    """Train a classifier on labelled images by cross-entropy.

    Args:
        job: Everything that both stages share.
        model: Trunk and head.
        labelled: Indices of the training images whose labels are used, int64 [L].
        name: Of the stage's folder.
        rate: Initial learning rate.
        should_stop: Asked after every step.

    Returns:
        What it came to.
    """
    config, dataset, device = job.config, job.dataset, job.device
    chosen = torch.from_numpy(labelled)
    images = dataset.train_images[chosen].to(device)
    labels = dataset.train_labels[chosen].to(device)
    batch = min(config.batch_size, len(images))
    shares = Shares(batch)

    def batch_at(step: int) -> Batch[Tensor]:
        seed_dropout(config.seed, step, device)
        drawn = shuffled_batch(len(images), batch, config.seed, step)
        index = torch.from_numpy(drawn).to(device, non_blocking=True)
        return Batch(_augmented(job, images, shares.own(index), step), labels[index])

    def loss(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        value = F.cross_entropy(scores, targets)
        return value, value.detach()[None]

    again = "--learning-rate RATE"
    if config.pretraining_steps:
        again += f" --pretraining-steps 0 --init-from {job.run.path}"

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"error_test": _error(_predict(job, network), dataset.test_labels)}

    task = Task(
        batch_at=batch_at,
        loss=loss,
        part_names=("loss",),
        shares=shares,
        evaluate=evaluate,
        schedule=replace(config.rates, rate=rate),
        steps=config.steps,
        restart="--baseline-learning-rate RATE" if name.startswith("baseline") else again,
    )
    announcement = f"{name}: {len(images):,} labelled images, {config.steps:,} steps of {batch}"
    return stage.run_stage(job, job.run.stage(name), model, task, should_stop, announcement)


def labelled_subsets(config: SpatialConfig, dataset: ImageDataset) -> dict[str, np.ndarray]:
    """Indices of the labelled images of each fine-tuning, by what its folder's name ends in."""
    if config.protocol == "folds":
        return {f"-fold{i}": fold.numpy() for i, fold in enumerate(dataset.folds)}
    if not config.labels_per_class:
        return {"": np.arange(len(dataset.train_images))}
    split = split_labels(
        dataset.train_labels, dataset.num_classes, config.labels_per_class, config.seed
    )
    return {"": np.sort(split.labelled.reshape(-1))}


def train_spatial(config: SpatialConfig) -> stage.Result:
    """Run the recipe from configuration to pictures: :func:`prepare`, then :func:`train`."""
    return train(prepare(config))


def show(job: stage.Job[SpatialConfig], result: stage.Result) -> None:
    """Print the figures with their protocols."""
    if result.figures:
        print_figures(result.figures, f"Test error on {job.dataset.name}:")


def _augmented(job: stage.Job[SpatialConfig], images: Tensor, index: Tensor, step: int) -> Tensor:
    config = job.config
    return job.pixels.cut(
        images, index, shift=config.shift, mirror=config.mirror, seed=config.seed, step=step
    )


def _pooled(job: stage.Job[SpatialConfig], trunk: nn.Module, images: Tensor) -> Tensor:
    """Features of images: the mean over the cells of the map, [N, C]."""
    network = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(job.device)
    return embed(network, images, job.pixels)


def _predict(job: stage.Job[SpatialConfig], model: nn.Module) -> Tensor:
    return embed(model, job.dataset.test_images, job.pixels).argmax(1).cpu()


def _error(predictions: Tensor, labels: Tensor) -> float:
    return (predictions != labels).double().mean().item()


def _test(job: stage.Job[SpatialConfig], model: nn.Module, *, save: bool) -> float:
    """Test error of a classifier; its features and predictions go to the run's folder."""
    predictions, labels = _predict(job, model), job.dataset.test_labels
    if save:
        trunk = next(model.children())
        save_embeddings(
            job.run.embeddings,
            test_embeddings=_pooled(job, trunk, job.dataset.test_images),
            test_labels=labels,
            test_predictions=predictions,
        )
    return _error(predictions, labels)


def _probe(
    job: stage.Job[SpatialConfig], trunk: nn.Module, name: str, subsets: dict[str, np.ndarray]
) -> list[Figure]:
    """Test error of a linear layer on the frozen features, trained on each subset of labels."""
    dataset, errors = job.dataset, []
    test = _pooled(job, trunk, dataset.test_images)
    for index in map(torch.from_numpy, subsets.values()):
        points = _pooled(job, trunk, dataset.train_images[index])
        labels = dataset.train_labels[index].to(test.device)
        probe = linear_probe(
            points, labels, test, dataset.test_labels.to(test.device), seed=job.config.seed
        )
        errors.append(probe.error)
    count = len(next(iter(subsets.values())))
    protocol = f"linear layer on frozen, averaged features, {count:,} labels{_spread(errors)}"
    return [Figure(f"linear probe, {name}", float(np.mean(errors)), protocol)]


def _figure(job: stage.Job[SpatialConfig], name: str, errors: list[float], labels: int) -> Figure:
    title = "same network, no initialisation"
    if name == "finetuned" and job.config.pretraining_steps:
        title = "fine-tuned after spatial contrasting"
    elif job.config.init_from:
        title = "fine-tuned from the weights given"
    protocol = f"whole network, {labels:,} labels, after the last step{_spread(errors)}"
    return Figure(title, float(np.mean(errors)), protocol)


def _spread(errors: list[float]) -> str:
    if len(errors) == 1:
        return ""
    return f", mean of {len(errors)} folds, deviation {np.std(errors, ddof=1):.2%}"
