"""Time as the comparison: the recipe, from sequences to figures.

A step draws clips from different sequences and asks that frames close in time have embeddings
closer than those of other times and sequences; no label is read. Afterwards the network is frozen
and judged by classifiers on its embeddings, beside the same network as it was before training and
the linear features that change least. The command line calls :func:`prepare` and :func:`train`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.data import SequenceSet, load_sequence_set
from fastcontrast.losses.triplet_margin import triplet_margin_loss
from fastcontrast.temporal import (
    ClipSampler,
    NeighborhoodDiscriminator,
    TemporalPredictionLoss,
    temporal_contrasting_loss,
    temporal_neighborhood_loss,
    temporal_triplets,
)
from fastcontrast.train import models, plots, stage
from fastcontrast.train.batches import pixels_of, seed_dropout
from fastcontrast.train.config import TemporalConfig
from fastcontrast.train.evaluation import Figure, embed, neighbour_errors
from fastcontrast.train.loop import Batch, Task
from fastcontrast.train.progress import print_figures
from fastcontrast.train.ranks import Shares, is_first
from fastcontrast.train.runs import folder_of, save_embeddings, write_results
from fastcontrast.train.temporal_frames import (
    FrameDataset,
    choose_frames,
    slow_features_of,
    time_error,
)
from fastcontrast.train.triplet import judge_frozen

HELP = """\
Learn an embedding from sequences without labels: frames close in time are alike, others are not.

- A step takes clips of different sequences; with --margin, far frames of the same one count too.
- It ends with a linear layer, a linear SVM and nearest neighbours on frozen frames, where there are
  labels; beside them the network before training, and the slowest linear features.
- Without --data it makes 1,000 sequences in which a digit moves.
- --objective triplet, prediction (CPC), neighborhood (TNC) or autoencoder trains the same network
  otherwise, for comparison.
- Ctrl-C stops after the current step with everything written; --resume goes on from there."""

_CALIBRATION = 20  # batches from which the network before training takes its normalisation


@dataclass(frozen=True)
class TemporalJob(stage.Job[TemporalConfig]):
    """A job whose data set are the frames to judge by, with the sequences to train on.

    Attributes:
        sequences: Both splits, memory-mapped where they are files.
        frames: The data set again, with the place of each test frame.
    """

    sequences: SequenceSet
    frames: FrameDataset


class PlacedFrames(NamedTuple):
    """What the loss takes beside the outputs: sequence ids [M], times [M], step and frames."""

    ids: Tensor
    times: Tensor
    step: int
    images: Tensor


def prepare(config: TemporalConfig, *, open_folder: bool = True) -> TemporalJob:
    """Read the sequences and open the run folder, so that only training is left.

    Args:
        config: What is asked for.
        open_folder: Whether to make the run folder; otherwise ``config`` is that of a finished run.

    Returns:
        The job.

    Raises:
        ValueError: If the data, the device, or the run folder is not usable as asked.
        FileNotFoundError: If the data, or the run to be resumed, is missing.
        OSError: If the run folder cannot be written.
    """
    device = stage.find_device(config.device)
    stage.check_switches(config, device)
    sequences = load_sequence_set(config.data, labels=config.labels, ticks=config.ticks)
    _sampler(config, sequences)  # names a sequence that is too short
    if config.network != "auto" and not sequences.is_pictures:
        raise ValueError(f"network is {config.network!r}; of channels only 'auto' can be trained")
    frames = choose_frames(sequences, config.probe_frames)
    pixels = pixels_of(frames.train_images, config.normalise)
    job = TemporalJob(
        config, folder_of(config), frames, device, pixels, config.network, sequences, frames
    )
    stage.check_size(lambda name, _: _encoder(job, name), config.network, frames.train_images)
    return stage.open_job(job) if open_folder else job


def read_frames(config: TemporalConfig) -> FrameDataset:
    """Read the frames again that a finished run was judged by."""
    sequences = load_sequence_set(config.data, labels=config.labels, ticks=config.ticks)
    return choose_frames(sequences, config.probe_frames)


class EncoderBesideLoss(nn.Module):
    """An encoder, and beside it what its loss learns: its passes are those of the encoder.

    Args:
        encoder: Embeds frames.
        learnt: The linear maps of :class:`fastcontrast.temporal.TemporalPredictionLoss`, or a
            :class:`fastcontrast.temporal.NeighborhoodDiscriminator`.
    """

    def __init__(self, encoder: nn.Module, learnt: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.learnt = learnt

    def forward(self, images: Tensor) -> Tensor:
        """Embed frames."""
        return self.encoder(images)


def build_model(job: TemporalJob) -> nn.Module:
    """Build the network and what the objective has beside it, with weights of the seed."""
    config = job.config

    def make() -> nn.Module:
        encoder = _encoder(job, job.network)
        features = 192 if job.network in ("cifar10", "stl10") else 128
        if config.objective == "autoencoder":
            channels, height, width = job.frames.train_images.shape[1:]
            decoder = models.temporal_decoder(features, (channels, height, width))
            return nn.Sequential(encoder, decoder)
        if config.objective == "prediction":
            maps = TemporalPredictionLoss(
                features, features, config.predicted, metric=config.metric,
                temperature=config.temperature,
            )  # fmt: skip
            return EncoderBesideLoss(encoder, maps)
        if config.objective == "neighborhood":
            return EncoderBesideLoss(encoder, NeighborhoodDiscriminator(features))
        return nn.Sequential(encoder)

    return models.build(make, config.seed)


def train(job: TemporalJob) -> stage.Result:
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
    config, run, frames, device, pixels = job.config, job.run, job.frames, job.device, job.pixels
    model = build_model(job)
    if config.init_from and not config.resume:
        stage.load_initial_weights(config.init_from, model)
    sampler = _sampler(config, job.sequences)
    shares = Shares(config.batch_size * config.clip_length)
    learnt = model.learnt if isinstance(model, EncoderBesideLoss) else None

    def batch_at(step: int) -> Batch[PlacedFrames]:
        seed_dropout(config.seed, step, device)
        clips = sampler.batch(step).flat()
        images = pixels.cut(clips.frames.to(device, non_blocking=True))
        ids, times = (x.to(device, non_blocking=True) for x in (clips.sequence_ids, clips.times))
        return Batch(shares.own(images), PlacedFrames(ids, times, step, images))

    def loss(outputs: Tensor, targets: PlacedFrames) -> tuple[Tensor, Tensor]:
        value = temporal_loss(outputs, targets, config, len(job.sequences.train), learnt)
        return value, value.detach()[None]

    def evaluate(network: nn.Module) -> dict[str, float]:
        return _errors_of(job, encoder_of(network))

    task = Task(
        batch_at=batch_at,
        loss=loss,
        part_names=("loss",),
        shares=shares,
        evaluate=evaluate,
        schedule=config.rates,
        steps=config.steps,
        learnt=learnt,
    )
    kind = "pictures" if job.sequences.is_pictures else f"windows of {config.ticks} ticks"
    announcement = (
        f"{frames.name}: {len(job.sequences.train):,} training and {len(job.sequences.test):,} "
        f"test sequences of {kind}\n{config.steps:,} steps of {config.batch_size} clips of "
        f"{config.clip_length} frames on {device} "
        f"({config.threads or torch.get_num_threads()} threads), in {run.path}"
    )
    with stage.session(job) as should_stop:
        before = copy.deepcopy(encoder_of(model))
        trained = stage.run_stage(job, run, model, task, should_stop, announcement)
        if not is_first():
            return stage.Result(run, trained.step, trained.interrupted, [])
        encoder = encoder_of(trained.model)
        test = embed(encoder, frames.test_images, pixels)
        arrays = {"test_embeddings": test, "test_labels": frames.test_labels}
        figures = [_time_figure(job, test)]
        if frames.is_labelled:
            points = embed(encoder, frames.train_images, pixels)
            judged, predictions = _judge(job, points, test, config.objective)
            arrays["test_predictions"] = predictions
            figures += judged + baselines(job, calibrated(before, sampler, job), sampler)
        result = stage.Result(run, trained.step, trained.interrupted, figures)
        save_embeddings(run.embeddings, **arrays)
        write_results(run, result.step, result.figures)
        plots.plot_run(run, config, frames)
    return result


def temporal_loss(
    outputs: Tensor,
    targets: PlacedFrames,
    config: TemporalConfig,
    sequences: int,
    learnt: nn.Module | None = None,
) -> Tensor:
    """Compute the loss of one step.

    Args:
        outputs: Embeddings [M, D], or of an autoencoder frames [M, C, H, W].
        targets: Where and when the frames are from, and the frames.
        config: Says which loss.
        sequences: How many there are to train on.
        learnt: What the loss itself learns, of "prediction" and "neighborhood".

    Returns:
        The loss; of an autoencoder the mean squared error in units of the pixels' variance.
    """
    ids, times, step, images = targets
    if config.objective == "autoencoder":
        return F.mse_loss(outputs, images)
    if config.objective == "prediction":
        assert learnt is not None
        # The next frame of a clip, whatever its stride, is one step ahead.
        return learnt(outputs, outputs, ids, times // config.clip_stride)
    margin = config.margin or (None if sequences > 1 else config.window)
    if config.objective in ("triplet", "neighborhood"):
        drawn = temporal_triplets(
            ids, times, window=config.window, margin=margin, seed=config.seed, step=step
        )
        anchor, near, far = (F.embedding(index, outputs) for index in drawn)
        if config.objective == "triplet":
            return triplet_margin_loss(anchor, near, far)
        assert learnt is not None
        return temporal_neighborhood_loss(learnt(anchor, near), learnt(anchor, far))
    return temporal_contrasting_loss(
        outputs, ids, times, window=config.window, margin=margin, metric=config.metric,
        temperature=config.temperature,
    )  # fmt: skip


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a trained model that embeds."""
    return next(model.children())


def calibrated(encoder: nn.Module, sampler: ClipSampler, job: TemporalJob) -> nn.Module:
    """Give a network that is not trained the statistics of its normalisation, in place."""
    stage.place(encoder, job.device)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    encoder.train()
    with torch.no_grad():
        for step in range(_CALIBRATION):
            clips = sampler.batch(step).flat()
            encoder(job.pixels.cut(clips.frames.to(job.device)))
    return encoder.eval()


def baselines(job: TemporalJob, before: nn.Module, sampler: ClipSampler) -> list[Figure]:
    """Test errors of the network before training, and of the slowest linear features."""
    frames = job.frames
    points, test = (embed(before, x, job.pixels) for x in (frames.train_images, frames.test_images))
    note = f", not trained, normalised over {_CALIBRATION} batches"
    figures = _judge(job, points, test, "random network", note)[0]
    slow = slow_features_of(frames, sampler)
    if slow is not None:
        points, test, how = slow
        figures += _judge(job, points, test, "slow features", f", {how}")[0]
    return figures


def train_temporal(config: TemporalConfig) -> stage.Result:
    """Run the recipe from configuration to pictures: :func:`prepare`, then :func:`train`."""
    return train(prepare(config))


def show(job: TemporalJob, result: stage.Result) -> None:
    """Print the figures with their protocols."""
    print_figures(result.figures, f"Test error on {job.frames.name}:")


def _sampler(config: TemporalConfig, sequences: SequenceSet) -> ClipSampler:
    return ClipSampler(
        sequences.train, clips=config.batch_size, length=config.clip_length,
        stride=config.clip_stride, seed=config.seed,
    )  # fmt: skip


def _encoder(job: TemporalJob, name: str) -> nn.Sequential:
    return models.temporal_network(name, job.channels, tall=job.sequences.is_pictures)


def _errors_of(job: TemporalJob, encoder: nn.Module) -> dict[str, float]:
    """Figures while training: the nearest neighbour's class, or its time without labels."""
    frames, device = job.frames, job.device
    test = embed(encoder, frames.test_images, job.pixels)
    if not frames.is_labelled:
        return {"error_time": time_error(test, frames, job.config.window)}
    points = embed(encoder, frames.train_images, job.pixels)
    labels, test_labels = frames.train_labels.to(device), frames.test_labels.to(device)
    return {"error_1nn": neighbour_errors(points, labels, test, test_labels, (1,))[1]}


def _time_figure(job: TemporalJob, test: Tensor) -> Figure:
    window = job.config.window
    protocol = (
        f"nearest of {len(test):,} test frames that is of another sequence or more than {window} "
        "away; frames next to it in the set included"
    )
    return Figure("nearest frame in time", time_error(test, job.frames, window), protocol)


def _judge(
    job: TemporalJob, points: Tensor, test: Tensor, name: str, note: str = ""
) -> tuple[list[Figure], Tensor]:
    """Errors of classifiers on frozen features, named after these, and the linear one's classes."""
    points, test, labels, test_labels = (
        x.to(job.device) for x in (points, test, job.frames.train_labels, job.frames.test_labels)
    )
    probe, judged = judge_frozen(points, labels, test, test_labels, job.config.seed)
    figures = [Figure(f"{f.name}, {name}", f.value, f.protocol + note) for f in judged]
    return figures, probe.predictions
