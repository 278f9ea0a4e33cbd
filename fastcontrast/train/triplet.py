"""The triplet network: the recipe, from data to figures.

Hoffer & Ailon, "Deep metric learning using triplet network", arXiv 1412.6622. A step draws
triplets of images (two of one class, one of another), embeds all of them in one pass, and drives
the softmax share of the positive's distance to zero. Afterwards the network is frozen, and a
linear layer, a support-vector machine and nearest neighbours are trained on its embeddings. The
command line calls :func:`prepare` and :func:`train`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastcontrast.data import ImageDataset
from fastcontrast.losses.siamese_contrastive import siamese_contrastive_loss
from fastcontrast.losses.triplet_ratio import triplet_ratio_loss
from fastcontrast.train import models, plots, stage
from fastcontrast.train.batches import CLASSIFIERS, STEPS, TEST, generator, hold_out, seed_dropout
from fastcontrast.train.config import TripletConfig
from fastcontrast.train.evaluation import (
    NEIGHBOURS,
    Figure,
    embed,
    neighbour_errors,
    triplet_error,
)
from fastcontrast.train.loop import Batch, Task
from fastcontrast.train.mined import Mined, MinedBatches, mined_loss
from fastcontrast.train.probes import Probe, linear_probe
from fastcontrast.train.progress import print_figures
from fastcontrast.train.ranks import Shares, is_first
from fastcontrast.train.runs import save_embeddings, write_results

HELP = """\
Learn an embedding from triplets of images: two of one class and one of another
(Hoffer & Ailon, "Deep metric learning using triplet network", arXiv 1412.6622).

- Classes are drawn uniformly, then images of them; no class counts more for being larger.
- A tenth of the training images is held out: schedule and best checkpoint go by its triplets.
- It ends with a linear layer, a linear SVM and nearest neighbours on the frozen embeddings.
- --mining chooses triplets by distance in class-balanced batches of as many images, 3 per triplet.
- --loss siamese trains pairs instead, the paper's baseline.
- Ctrl-C stops after the current step with everything written; --resume goes on from there."""


@dataclass(frozen=True)
class ClassMembers:
    """The images of each class, to draw from.

    Attributes:
        order: Indices of all images, class after class, int64 [N].
        starts: Where each class begins in ``order``, int64 [C].
        counts: Images of each class, int64 [C], each at least 2.
    """

    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def members_of(labels: Tensor, num_classes: int, index: np.ndarray | None = None) -> ClassMembers:
    """Sort images by class.

    Args:
        labels: int64 [N].
        num_classes: Number of classes.
        index: Images to take, int64 [M]; None for all.

    Returns:
        Their indices by class.

    Raises:
        ValueError: If there are fewer than two classes, or a class has fewer than two images.
    """
    index = np.arange(len(labels)) if index is None else index
    numbers = labels.numpy()[index]
    counts = np.bincount(numbers, minlength=num_classes)
    if num_classes < 2 or counts.min() < 2:
        raise ValueError(
            f"labels: class {counts.argmin()} of {num_classes} has {counts.min()} images to draw "
            "from; triplets want two of each of two classes"
        )
    order = index[np.argsort(numbers, kind="stable")]
    return ClassMembers(order, np.cumsum(counts) - counts, counts)


def draw_triplets(members: ClassMembers, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw triplets uniformly over classes, then uniformly over their images.

    Args:
        members: The images of each class.
        count: Number of triplets T.
        random: What to draw from.

    Returns:
        Indices of anchor, positive and negative, int64 [T, 3]: the first two are different images
        of one class, the third is of another class.
    """
    classes = len(members.counts)
    own = random.integers(0, classes, count)
    other = (own + random.integers(1, classes, count)) % classes
    first = random.integers(0, members.counts[own])
    second = random.integers(0, members.counts[own] - 1)
    second += second >= first  # all but the first
    places = np.stack([first, second, random.integers(0, members.counts[other])], axis=1)
    starts = members.starts[np.stack([own, own, other], axis=1)]
    return members.order[starts + places]


def draw_pairs(
    members: ClassMembers, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs for the siamese network: the first half of one class, the others of two.

    Args:
        members: The images of each class.
        count: Number of pairs P.
        random: What to draw from.

    Returns:
        Indices int64 [P, 2], and whether the two are of one class, bool [P].
    """
    triplets = draw_triplets(members, count, random)
    same = np.arange(count) < (count + 1) // 2
    return np.where(same[:, None], triplets[:, :2], triplets[:, ::2]), same


def triplet_loss(embeddings: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Compute the loss of one step.

    Args:
        embeddings: [3B, D]: anchors, positives, negatives in this order.
        objective: ``"mse"`` or ``"nll"``.

    Returns:
        The loss, and it with the fraction of triplets in error, [2].
    """
    anchors, positives, negatives = embeddings.chunk(3)
    loss = triplet_ratio_loss(anchors, positives, negatives, objective=objective)
    with torch.no_grad():
        near = (anchors - positives).square().sum(1)
        wrong = (near >= (anchors - negatives).square().sum(1)).float().mean()
    return loss, torch.stack([loss.detach(), wrong.to(loss.dtype)])


def prepare(config: TripletConfig, *, open_folder: bool = True) -> stage.Job[TripletConfig]:
    """See :func:`fastcontrast.train.stage.prepare`; also checks that triplets can be drawn."""

    def check(dataset: ImageDataset) -> None:
        kept, held = hold_out(dataset.train_labels, config.held_out, config.seed)
        members_of(dataset.train_labels, dataset.num_classes, kept)
        members_of(dataset.test_labels, dataset.num_classes)
        if config.mining != "uniform":
            MinedBatches(dataset.train_labels, kept, config.batch_size, config.seed)
        if config.held_out:
            members_of(dataset.train_labels, dataset.num_classes, held)

    def make(name: str, channels: int) -> nn.Module:
        return models.triplet_network(name, channels, config.dropout)

    return stage.prepare(config, make, check, open_folder=open_folder, unlabelled=False)


def build_model(config: TripletConfig, network: str, channels: int) -> nn.Module:
    """Build the network with weights that are a function of the seed."""
    return models.build(
        lambda: models.triplet_network(network, channels, config.dropout), config.seed
    )


def train(job: stage.Job[TripletConfig]) -> stage.Result:
    """Train, evaluate on frozen embeddings, and leave them and pictures in the run folder.

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
    model = build_model(config, job.network, job.channels)
    if config.init_from and not config.resume:
        stage.load_initial_weights(config.init_from, model)
    kept, held = hold_out(dataset.train_labels, config.held_out, config.seed)
    members = members_of(dataset.train_labels, dataset.num_classes, kept)
    train_images, test_images = dataset.train_images.to(device), dataset.test_images.to(device)
    held_images = train_images[torch.from_numpy(held).to(device)]
    fixed = generator(config.seed, TEST)  # triplets that are drawn once

    def fixed_triplets(labels: Tensor) -> Tensor:
        drawn = draw_triplets(members_of(labels, dataset.num_classes), config.test_triplets, fixed)
        return torch.from_numpy(drawn).to(device)

    test_triplets = fixed_triplets(dataset.test_labels)
    held_triplets = fixed_triplets(dataset.train_labels[held]) if len(held) else None
    siamese = config.loss == "siamese"
    mined = None
    if config.mining != "uniform":
        mined = MinedBatches(dataset.train_labels, kept, config.batch_size, config.seed)
    groups = [3 * config.batch_size] if mined else [config.batch_size] * (2 if siamese else 3)
    shares = Shares(*groups)

    def batch_at(step: int) -> Batch[Tensor | Mined | None]:
        seed_dropout(config.seed, step, device)
        if mined is not None:
            index = mined.at(step)
            targets = Mined(dataset.train_labels[index].to(device, non_blocking=True), step)
            own = shares.own(index).to(device, non_blocking=True)
            return Batch(pixels.cut(train_images, own), targets)
        random, targets = generator(config.seed, STEPS, step), None
        if siamese:
            drawn, same = draw_pairs(members, config.batch_size, random)
            targets = torch.from_numpy(same).to(device, non_blocking=True)
        else:
            drawn = draw_triplets(members, config.batch_size, random)
        index = shares.own(torch.from_numpy(np.ascontiguousarray(drawn.T).reshape(-1)))
        return Batch(pixels.cut(train_images, index.to(device, non_blocking=True)), targets)

    def loss(embeddings: Tensor, same: Tensor | Mined | None) -> tuple[Tensor, Tensor]:
        if same is None:
            return triplet_loss(embeddings, config.loss)
        if isinstance(same, Mined):
            return mined_loss(embeddings, same, config.mining, config.loss, config.seed)
        first, second = embeddings.chunk(2)
        value = siamese_contrastive_loss(first, second, same, margin=config.margin)
        return value, value.detach()[None]

    def evaluate(network: nn.Module) -> dict[str, float]:
        test = triplet_error(embed(network, test_images, pixels), test_triplets)
        figures = {"error_triplets": test}
        if held_triplets is not None:
            points = embed(network, held_images, pixels)
            figures["error_held_out"] = triplet_error(points, held_triplets)
        return figures

    task = Task(
        batch_at=batch_at,
        loss=loss,
        part_names=("loss",) if siamese else ("loss", "error_train"),
        shares=shares,
        evaluate=evaluate,
        schedule=config.rates,
        steps=config.steps,
        watch="error_held_out" if len(held) else "interval_loss",
        keep_best=len(held) > 0,
    )
    announcement = (
        f"{dataset.name}: {len(kept):,} training images, {len(held):,} held out, "
        f"{len(test_images):,} test images\n{config.steps:,} steps of {config.batch_size} "
        f"{'pairs' if siamese else 'triplets'} on {device} "
        f"({config.threads or torch.get_num_threads()} threads), in {run.path}"
    )
    with stage.session(job) as should_stop:
        trained = stage.run_stage(job, run, model, task, should_stop, announcement)
        if not is_first():
            return stage.Result(run, trained.step, trained.interrupted, [])
        chosen = torch.from_numpy(classifier_images(config, len(train_images))).to(device)
        every = len(chosen) == len(train_images)  # then nothing is copied
        points = embed(trained.model, train_images if every else train_images[chosen], pixels)
        test = embed(trained.model, test_images, pixels)
        figures = [
            Figure(
                "triplets in error",
                triplet_error(test, test_triplets),
                f"{config.test_triplets:,} fixed triplets of test images; a tie is an error",
            )
        ]
        probe, judged = judge_frozen(
            points, dataset.train_labels.to(device)[chosen], test, dataset.test_labels.to(device),
            config.seed,
        )  # fmt: skip
        result = stage.Result(run, trained.step, trained.interrupted, [*figures, *judged])
        save_embeddings(
            run.embeddings,
            test_embeddings=test,
            test_labels=dataset.test_labels,
            test_predictions=probe.predictions,
        )
        write_results(run, result.step, result.figures)
        plots.plot_run(run, config, dataset)
    return result


def classifier_images(config: TripletConfig, count: int) -> np.ndarray:
    """Indices of the training images that the classifiers at the end see, int64 [N]."""
    if not 0 < config.classifier_images < count:
        return np.arange(count)
    drawn = generator(config.seed, CLASSIFIERS).permutation(count)
    return np.sort(drawn[: config.classifier_images])


def judge_frozen(
    points: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, seed: int
) -> tuple[Probe, list[Figure]]:
    """Train classifiers on frozen embeddings of all training images, and test them.

    Args:
        points: Training embeddings [N, D].
        labels: int64 [N].
        test: Test embeddings [T, D].
        test_labels: int64 [T].
        seed: Chooses the tenth on which penalties are chosen.

    Returns:
        The linear layer, and the test errors of all classifiers with their protocols.
    """
    figures, probes = [], {}
    for kind, name in (("softmax", "linear layer"), ("svm", "linear SVM")):
        probes[kind] = linear_probe(points, labels, test, test_labels, kind, seed)
        penalty = f"penalty {probes[kind].penalty:g} chosen on a tenth of them"
        protocol = f"frozen embeddings of {len(points):,} training images, {penalty}"
        figures.append(Figure(name, probes[kind].error, protocol))
    errors = neighbour_errors(points, labels, test, test_labels, NEIGHBOURS)
    protocol = f"frozen embeddings, neighbours among {len(points):,} training images"
    figures += [Figure(f"{k}-NN", error, protocol) for k, error in errors.items()]
    return probes["softmax"], figures


def train_triplet(config: TripletConfig) -> stage.Result:
    """Run the recipe from configuration to pictures: :func:`prepare`, then :func:`train`."""
    return train(prepare(config))


def show(job: stage.Job[TripletConfig], result: stage.Result) -> None:
    """Print the figures with their protocols."""
    print_figures(result.figures, f"Test error on {job.dataset.name}:")
