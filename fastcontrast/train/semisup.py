"""Semi-supervised learning by metric embedding: the recipe, from data to figures.

Hoffer & Ailon, "Semi-supervised deep learning by metric embedding", arXiv 1611.01449. A step takes
a batch of labelled images, a batch of unlabelled images and one labelled anchor of each class,
embeds all of them in one pass, and scores every image by its distances to the anchors. Labelled
images pay cross-entropy, unlabelled ones entropy. The command line calls :func:`prepare` and
:func:`train`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastcontrast.data import ImageDataset, load_mnist, mnist_sample
from fastcontrast.losses.metric_embedding import metric_embedding_loss
from fastcontrast.train import plots
from fastcontrast.train.checkpoints import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    write_atomically,
)
from fastcontrast.train.config import SemisupConfig
from fastcontrast.train.evaluation import embed, neighbour_errors, pixel_errors
from fastcontrast.train.loop import fit, stop_on_signal
from fastcontrast.train.models import mnist_embedding_network, normalise_pixels
from fastcontrast.train.progress import show_progress
from fastcontrast.train.runs import (
    RunFolder,
    note_resumption,
    open_run,
    read_metrics,
    rewind_metrics,
)

PART_NAMES = ("loss", "loss_labelled", "loss_unlabelled")
_LABEL_STREAM, _BATCH_STREAM = 0, 1  # independent Philox keys of one seed


@dataclass(frozen=True)
class LabelSplit:
    """Which training images have a label.

    Attributes:
        labelled: Indices of the labelled images by class, int64 [C, L].
        unlabelled: Indices of all others, ascending, int64 [U].
    """

    labelled: np.ndarray
    unlabelled: np.ndarray


@dataclass(frozen=True)
class StepSample:
    """Indices of the training images of one step, each drawn uniformly with replacement.

    Attributes:
        labelled: int64 [B], from the labelled images.
        unlabelled: int64 [B], from all others.
        anchors: int64 [C], one labelled image of each class, in the order of the classes.
    """

    labelled: np.ndarray
    unlabelled: np.ndarray
    anchors: np.ndarray


@dataclass(frozen=True)
class Job:
    """A checked configuration with its data and its run folder: all that :func:`train` needs."""

    config: SemisupConfig
    run: RunFolder
    dataset: ImageDataset
    split: LabelSplit
    device: torch.device


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


def split_labels(labels: Tensor, num_classes: int, per_class: int, seed: int) -> LabelSplit:
    """Choose at random the images that keep their label: the same number of every class.

    Args:
        labels: int64 [N].
        num_classes: Number of classes C.
        per_class: Labelled images of each class.
        seed: The choice is a function of it and of the labels.

    Returns:
        The split.

    Raises:
        ValueError: If a class has too few images, or if none would be left without a label.
    """
    numbers = labels.numpy()
    random = np.random.Generator(np.random.Philox(key=[seed, _LABEL_STREAM]))
    chosen = []
    for c in range(num_classes):
        members = np.flatnonzero(numbers == c)
        if len(members) < per_class:
            raise ValueError(
                f"labels_per_class is {per_class}; class {c} has only {len(members)} images"
            )
        chosen.append(random.permutation(members)[:per_class])
    labelled = np.stack(chosen).astype(np.int64)
    unlabelled = np.setdiff1d(np.arange(len(numbers)), labelled)
    if len(unlabelled) == 0:
        raise ValueError(f"labels_per_class is {per_class}; that leaves no image without a label")
    return LabelSplit(labelled, unlabelled)


def sample_step(split: LabelSplit, batch_size: int, seed: int, step: int) -> StepSample:
    """Draw the images of one step: a pure function of its arguments, without hidden state.

    Args:
        split: Which images are labelled.
        batch_size: Labelled images, and unlabelled images.
        seed: The run's seed.
        step: Number of steps before this one.

    Returns:
        The indices.
    """
    random = np.random.Generator(
        np.random.Philox(key=[seed, _BATCH_STREAM], counter=[0, step, 0, 0])
    )
    classes, per_class = split.labelled.shape
    return StepSample(
        labelled=split.labelled.reshape(-1)[random.integers(0, classes * per_class, batch_size)],
        unlabelled=split.unlabelled[random.integers(0, len(split.unlabelled), batch_size)],
        anchors=split.labelled[np.arange(classes), random.integers(0, per_class, classes)],
    )


def semisup_loss(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    squared: bool,
    unlabelled_weight: float,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one step, from one pass over all its images.

    Args:
        model: The embedding network.
        batch: Images, uint8 [B + B + C, 1, H, W]: labelled, unlabelled, anchors in this order; and
            the labels of the first B, int64 [B].
        squared: Whether scores are squared distances.
        unlabelled_weight: Weight of the entropy.

    Returns:
        The loss in nats, and it with its labelled and unlabelled parts, [3].
    """
    images, labels = batch
    count = len(labels)
    embeddings = model(normalise_pixels(images))
    targets = torch.cat([labels, labels.new_full((count,), -1)])
    rows = metric_embedding_loss(
        embeddings[: 2 * count], embeddings[2 * count :], targets, squared=squared, reduction="none"
    )
    labelled, unlabelled = rows[:count].mean(), rows[count:].mean()
    loss = labelled + unlabelled_weight * unlabelled
    return loss, torch.stack([loss, labelled, unlabelled])


def build_model(seed: int) -> nn.Module:
    """Build the network with weights that are a function of the seed; global state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return mnist_embedding_network()


def prepare(config: SemisupConfig) -> Job:
    """Read the data, choose the labels and open the run folder, so that only training is left.

    Args:
        config: What is asked for.

    Returns:
        The job.

    Raises:
        ValueError: If the data, the device, or the run folder is not usable as asked.
        FileNotFoundError: If a file of the data, or the run to be resumed, is missing.
        OSError: If the run folder cannot be written.
    """
    device = _device(config.device)
    dataset = mnist_sample() if config.data == "sample" else load_mnist(config.data)
    split = split_labels(
        dataset.train_labels, dataset.num_classes, config.labels_per_class, config.seed
    )
    run, config = open_run(config)
    return Job(config, run, dataset, split, device)


def train(job: Job) -> Result:
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
    threads = torch.get_num_threads()
    torch.set_num_threads(job.config.threads or threads)
    try:
        with stop_on_signal() as should_stop:
            return _train(job, should_stop)
    finally:
        torch.set_num_threads(threads)


def train_semisup(config: SemisupConfig) -> Result:
    """Run the recipe from configuration to pictures: :func:`prepare`, then :func:`train`."""
    return train(prepare(config))


def _train(job: Job, should_stop: Callable[[], bool]) -> Result:
    config, run, dataset, device = job.config, job.run, job.dataset, job.device
    model = build_model(config.seed).to(device)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)  # faster, same values
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    state = TrainingState(0, torch.zeros(len(PART_NAMES), device=device), 0, 0.0)
    if config.resume:
        checkpoint = latest_checkpoint(run.checkpoints)
        if checkpoint:
            state = load_checkpoint(checkpoint, model, optimizer, device)
        rewind_metrics(run, state.step)
        note_resumption(run, config, state.step)

    train_images, train_labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    test_images, test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    labelled = torch.from_numpy(job.split.labelled.reshape(-1)).to(device)
    labelled_images, labelled_labels = train_images[labelled], train_labels[labelled]

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        drawn = sample_step(job.split, config.batch_size, config.seed, step)
        order = np.concatenate([drawn.labelled, drawn.unlabelled, drawn.anchors])
        index = torch.from_numpy(order).to(device, non_blocking=True)
        return train_images[index], train_labels[index[: config.batch_size]]

    def errors() -> dict[int, float]:
        return neighbour_errors(
            embed(model, labelled_images), labelled_labels, embed(model, test_images), test_labels
        )

    _announce(job, state)
    with show_progress(config.steps, state.step) as progress:
        state = fit(
            model,
            optimizer,
            state,
            steps=config.steps,
            batch_at=batch_at,
            loss_fn=partial(
                semisup_loss, squared=config.squared, unlabelled_weight=config.unlabelled_weight
            ),
            part_names=PART_NAMES,
            learning_rate_at=config.learning_rate_at,
            evaluate=lambda: {f"error_{k}nn": error for k, error in errors().items()},
            run=run,
            log_every=config.log_every,
            eval_every=config.eval_every,
            progress=progress,
            should_stop=should_stop,
        )
    pixels = pixel_errors(labelled_images, labelled_labels, test_images, test_labels)
    result = Result(run, state.step, state.step < config.steps, errors(), pixels)
    _write_results(
        job, result, embed(model, test_images).cpu(), embed(model, labelled_images).cpu()
    )
    return result


def _write_results(job: Job, result: Result, test: Tensor, labelled: Tensor) -> None:
    dataset, run, indices = job.dataset, job.run, job.split.labelled.reshape(-1)
    labelled_labels = dataset.train_labels[torch.from_numpy(indices)]
    file = io.BytesIO()
    np.savez(
        file,
        test_embeddings=test.numpy(),
        test_labels=dataset.test_labels.numpy(),
        labelled_embeddings=labelled.numpy(),
        labelled_labels=labelled_labels.numpy(),
        labelled_indices=indices,
    )
    write_atomically(run.embeddings, file.getvalue())
    setting = f"{dataset.name}, {indices.size} labels, seed {job.config.seed}"
    plots.plot_curve(
        read_metrics(run),
        result.pixel_errors[1],
        job.config.drop_steps,
        f"Training on {setting}",
        run.curve,
    )
    plots.plot_embedding(
        test,
        dataset.test_labels,
        labelled,
        labelled_labels,
        dataset.class_names,
        f"Test images of {setting}, after {result.step:,} steps: 1-NN error {result.errors[1]:.1%}",
        run.embedding,
    )


def _announce(job: Job, state: TrainingState) -> None:
    config, dataset, start = job.config, job.dataset, ""
    if state.step:
        start = f"\ncontinuing after step {state.step:,}"
    elif config.resume:
        start = f"\nno checkpoint in {job.run.checkpoints}: starting over from step 0"
    labels, unlabelled = job.split.labelled.size, len(job.split.unlabelled)
    print(
        f"{dataset.name}: {labels:,} labelled and {unlabelled:,} unlabelled training images, "
        f"{len(dataset.test_images):,} test images\n"
        f"{config.steps:,} steps of {config.batch_size} labelled + {config.batch_size} unlabelled "
        f"images + {dataset.num_classes} anchors on {job.device} "
        f"({torch.get_num_threads()} threads), in {job.run.path}{start}",
        flush=True,
    )


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(f"device is cuda, but torch {torch.__version__} sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
