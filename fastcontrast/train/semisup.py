"""Semi-supervised learning by metric embedding: the recipe, from data to figures.

Hoffer & Ailon, "Semi-supervised deep learning by metric embedding", arXiv 1611.01449. A step takes
labelled images, unlabelled images and one labelled anchor of each class (of several, the nearest or
their mean, on request), embeds all of them, and scores every image by its distances to the anchors.
Labelled images pay cross-entropy, unlabelled ones entropy. The command line calls :func:`prepare`
and :func:`train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcontrast.data import ImageDataset
from fastcontrast.losses.metric_embedding import metric_embedding_loss
from fastcontrast.mining import class_means, nearest_anchors
from fastcontrast.retrieval import knn_classify
from fastcontrast.train import models, plots, stage
from fastcontrast.train.batches import STEPS, LabelSplit, generator, split_labels
from fastcontrast.train.config import SemisupConfig
from fastcontrast.train.evaluation import (
    Figure,
    embed,
    neighbour_errors,
    pixel_errors,
)
from fastcontrast.train.loop import Batch, Task
from fastcontrast.train.progress import print_errors
from fastcontrast.train.ranks import Shares, is_first
from fastcontrast.train.runs import RunFolder, save_embeddings, write_results

HELP = """\
Learn an embedding from a few labels and many images without one
(Hoffer & Ailon, "Semi-supervised deep learning by metric embedding", arXiv 1611.01449).

- A step embeds labelled images, unlabelled images and one labelled anchor per class, or up to
  --anchor-images of each class with --anchors nearest or class-mean.
- Labelled images pay cross-entropy over their distances to the anchors, the others entropy.
- It ends with the nearest-neighbour test error against the labelled images, and raw pixels'.
- runs/<name>/ gets configuration, metrics, results, checkpoint, embeddings and pictures.
- Ctrl-C stops after the current step with everything written; --resume goes on from there."""

PART_NAMES = ("loss", "loss_labelled", "loss_unlabelled")


@dataclass(frozen=True)
class StepSample:
    """Indices of the training images of one step, each drawn uniformly with replacement.

    Attributes:
        labelled: int64 [B], from the labelled images; one of each class in the code's batches.
        unlabelled: int64 [U], from all others; from all images in the code's batches.
        anchors: int64 [C·A], A labelled images of each class, class after class.
    """

    labelled: np.ndarray
    unlabelled: np.ndarray
    anchors: np.ndarray


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        run: Its folder.
        step: Finished steps.
        interrupted: Whether it was asked to stop before its last step.
        errors: Test error of the embedding for each k of k-nearest-neighbour voting, 0 to 1.
        pixel_errors: The same for raw pixels.
    """

    run: RunFolder
    step: int
    interrupted: bool
    errors: dict[int, float]
    pixel_errors: dict[int, float]

    @property
    def figures(self) -> list[Figure]:
        """Both kinds of error, with their protocol."""
        protocol = "neighbours among the labelled images, after the last step"
        return [
            Figure(f"{k}-NN test error, {name}", error, protocol)
            for name, errors in (("embedding", self.errors), ("raw pixels", self.pixel_errors))
            for k, error in errors.items()
        ]


def sample_step(
    split: LabelSplit,
    batch_size: int,
    seed: int,
    step: int,
    batches: str = "paper",
    anchors_per_class: int = 1,
) -> StepSample:
    """Draw the images of one step: a pure function of its arguments, without hidden state.

    Args:
        split: Which images are labelled.
        batch_size: Labelled images, and unlabelled images; in the code's batches the latter alone.
        seed: The run's seed.
        step: Number of steps before this one.
        batches: ``"paper"`` or ``"code"``.
        anchors_per_class: Different labelled images of each class, A.

    Returns:
        The indices.
    """
    random = generator(seed, STEPS, step)
    classes, per_class = split.labelled.shape
    if batches == "code":
        everything = classes * per_class + len(split.unlabelled)
        labelled = split.labelled[np.arange(classes), random.integers(0, per_class, classes)]
        unlabelled = random.integers(0, everything, batch_size)
    else:
        flat = split.labelled.reshape(-1)
        labelled = flat[random.integers(0, classes * per_class, batch_size)]
        unlabelled = split.unlabelled[random.integers(0, len(split.unlabelled), batch_size)]
    if anchors_per_class > 1:
        anchors = random.permuted(split.labelled, axis=1)[:, :anchors_per_class].reshape(-1)
        return StepSample(labelled, unlabelled, anchors)
    anchors = split.labelled[np.arange(classes), random.integers(0, per_class, classes)]
    return StepSample(labelled, unlabelled, anchors)


def semisup_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    classes: int,
    squared: bool,
    unlabelled_weight: float,
    how: str = "random",
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one step.

    Args:
        embeddings: [B + U + C·A, D]: labelled, unlabelled, anchors in this order.
        labels: Of the first B, int64 [B].
        classes: Number of anchors, C.
        squared: Whether scores are squared distances.
        unlabelled_weight: Weight of the entropy.
        how: ``--anchors``; A is 1 with ``"random"``.
        own: Place of the first B + U among the anchors' images, -1 for none; not with "random".

    Returns:
        The loss in nats, and it with its labelled and unlabelled parts, [3].
    """
    first = len(embeddings) - classes if own is None else len(own)
    points, anchors = embeddings[:first], embeddings[first:]
    if own is not None:
        anchors = chosen_anchors(points, anchors, own, classes, how)
    count = len(labels)
    targets = torch.cat([labels, labels.new_full((len(points) - count,), -1)])
    rows = metric_embedding_loss(points, anchors, targets, squared=squared, reduction="none")
    labelled, unlabelled = rows[:count].mean(), rows[count:].mean()
    loss = labelled + unlabelled_weight * unlabelled
    return loss, torch.stack([loss, labelled, unlabelled])


def chosen_anchors(points: Tensor, images: Tensor, own: Tensor, classes: int, how: str) -> Tensor:
    """The anchors of each image: the nearest of each class, or class means, without itself.

    Args:
        points: [M, D].
        images: Embedded labelled images [C·A, D], class after class, A at least 2.
        own: Place of each point among them, int64 [M]; -1 for none.
        classes: C.
        how: ``"nearest"`` or ``"class-mean"``.

    Returns:
        [M, C, D], differentiable.
    """
    each = len(images) // classes
    labels = torch.arange(classes, device=images.device).repeat_interleave(each)
    if how == "nearest":
        index = nearest_anchors(points.detach(), images.detach(), labels, classes, own=own)
        return functional.embedding(index, images)  # not images[index]: deterministic gradients
    means = class_means(images, labels, classes)
    itself = functional.embedding(own.clamp(min=0), images)
    mine = (own >= 0)[:, None] & (own[:, None] // each == torch.arange(classes, device=own.device))
    return torch.where(mine[..., None], means + (means - itself[:, None]) / (each - 1), means)


def prepare(config: SemisupConfig, *, open_folder: bool = True) -> stage.Job[SemisupConfig]:
    """See :func:`fastcontrast.train.stage.prepare`; also checks that labels can be chosen."""

    def check(dataset: ImageDataset) -> None:
        if not len(split_of(config, dataset).unlabelled):
            per_class = config.labels_per_class
            raise ValueError(
                f"labels_per_class is {per_class}; that leaves no image without a label"
            )

    def make(name: str, channels: int) -> nn.Module:
        return models.semisup_network(name, channels, config.second_width)

    return stage.prepare(config, make, check, open_folder=open_folder)


def split_of(config: SemisupConfig, dataset: ImageDataset) -> LabelSplit:
    """Choose the images that keep their label; the data set's unlabelled images follow the rest."""
    seed = config.seed if config.label_seed < 0 else config.label_seed
    split = split_labels(dataset.train_labels, dataset.num_classes, config.labels_per_class, seed)
    if dataset.unlabelled_images is None:
        return split
    first = len(dataset.train_images)
    further = np.arange(first, first + len(dataset.unlabelled_images))
    return LabelSplit(split.labelled, np.concatenate([split.unlabelled, further]))


def build_model(config: SemisupConfig, network: str, channels: int) -> nn.Module:
    """Build the network with weights that are a function of the seed."""
    return models.build(
        lambda: models.semisup_network(network, channels, config.second_width), config.seed
    )


def train(job: stage.Job[SemisupConfig]) -> Result:
    """Train, evaluate, and leave embeddings and pictures in the run folder.

    Ctrl-C and SIGTERM end it after the current step with everything written.

    Args:
        job: From :func:`prepare`.

    Returns:
        What the run came to.

    Raises:
        NonFiniteLossError: If the loss became NaN or infinite.
        OSError: If something could not be written; the previous checkpoint is kept.
        ValueError: If the checkpoint or the metrics to resume from are damaged.
    """
    config, run, dataset, device, pixels = job.config, job.run, job.dataset, job.device, job.pixels
    split = split_of(config, dataset)
    model = build_model(config, job.network, job.channels)
    if config.init_from and not config.resume:
        stage.load_initial_weights(config.init_from, model)

    further = [] if dataset.unlabelled_images is None else [dataset.unlabelled_images]
    train_images = torch.cat([dataset.train_images, *further]).to(device)
    train_labels = dataset.train_labels.to(device)
    test_images, test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    chosen = torch.from_numpy(split.labelled.reshape(-1)).to(device)
    labelled_images, labelled_labels = train_images[chosen], train_labels[chosen]

    classes = dataset.num_classes
    queries = classes if config.batches == "code" else config.batch_size
    each = 1
    if config.anchors != "random":
        each = min(config.anchor_images, config.labels_per_class)
    shares = Shares(queries, config.batch_size, classes * each)

    def batch_at(step: int) -> Batch[tuple[Tensor, Tensor | None]]:
        drawn = sample_step(split, config.batch_size, config.seed, step, config.batches, each)
        order = np.concatenate([drawn.labelled, drawn.unlabelled, drawn.anchors])
        index = torch.from_numpy(order).to(device, non_blocking=True)
        own = None
        if each > 1:
            same = index[: -classes * each, None] == index[-classes * each :]
            own = torch.where(same.any(1), same.long().argmax(1), -1)
        targets = (train_labels[index[:queries]], own)
        return Batch(pixels.cut(train_images, shares.own(index)), targets)

    def forward(network: Callable[..., Tensor], images: Tensor) -> Tensor:
        if not config.separate_norms:
            return network(images)
        return torch.cat([network(stream) for stream in images.split(shares.own_groups)])

    def loss(embeddings: Tensor, targets: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        labels, own = targets
        return semisup_loss(
            embeddings, labels, classes=classes, squared=config.squared,
            unlabelled_weight=config.unlabelled_weight, how=config.anchors, own=own,
        )  # fmt: skip

    def errors(network: nn.Module) -> dict[int, float]:
        references = embed(network, labelled_images, pixels)
        queries = embed(network, test_images, pixels)
        return neighbour_errors(references, labelled_labels, queries, test_labels)

    task = Task(
        batch_at=batch_at,
        forward=forward,
        loss=loss,
        part_names=PART_NAMES,
        shares=shares,
        evaluate=lambda network: {f"error_{k}nn": e for k, e in errors(network).items()},
        schedule=config.rates,
        steps=config.steps,
    )
    announcement = (
        f"{dataset.name}: {chosen.numel():,} labelled and {len(split.unlabelled):,} unlabelled "
        f"training images, {len(test_images):,} test images\n"
        f"{config.steps:,} steps of {queries} labelled + {config.batch_size} unlabelled images + "
        f"{classes * each} anchors on {device} "
        f"({config.threads or torch.get_num_threads()} threads), in {run.path}"
    )
    with stage.session(job) as should_stop:
        trained = stage.run_stage(job, run, model, task, should_stop, announcement)
        if not is_first():
            return Result(run, trained.step, trained.interrupted, {}, {})
        pixel = pixel_errors(labelled_images, labelled_labels, test_images, test_labels)
        result = Result(run, trained.step, trained.interrupted, errors(trained.model), pixel)
        test = embed(trained.model, test_images, pixels).cpu()
        labelled = embed(trained.model, labelled_images, pixels).cpu()
        _write(job, result, split, test, labelled)
    return result


def train_semisup(config: SemisupConfig) -> Result:
    """Run the recipe from configuration to pictures: :func:`prepare`, then :func:`train`."""
    return train(prepare(config))


def show(job: stage.Job[SemisupConfig], result: Result) -> None:
    """Print the figures: a column for each number of neighbours."""
    labels = job.dataset.num_classes * job.config.labels_per_class
    print_errors(
        {"raw pixels": result.pixel_errors, "embedding": result.errors},
        f"Test error by nearest neighbours among the {labels:,} labelled images:",
    )


def _write(
    job: stage.Job[SemisupConfig],
    result: Result,
    split: LabelSplit,
    test: Tensor,
    labelled: Tensor,
) -> None:
    dataset, run, indices = job.dataset, job.run, split.labelled.reshape(-1)
    labelled_labels = dataset.train_labels[torch.from_numpy(indices)]
    save_embeddings(
        run.embeddings,
        test_embeddings=test,
        test_labels=dataset.test_labels,
        test_predictions=knn_classify(test, labelled, labelled_labels),
        labelled_embeddings=labelled,
        labelled_labels=labelled_labels,
        labelled_indices=torch.from_numpy(indices),
    )
    write_results(run, result.step, result.figures)
    plots.plot_run(run, job.config, dataset)
