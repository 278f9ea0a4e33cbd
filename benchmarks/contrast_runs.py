"""The runs of each study of what is contrasted: recipe, budget and test errors of one variant.

Called by benchmarks/contrast_study.py. Budgets are reduced to minutes on one core; the papers train
for hundreds of times as many steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcontrast.retrieval import nearest_neighbors
from fastcontrast.temporal import ClipSampler
from fastcontrast.train import temporal
from fastcontrast.train.config import (
    RUN_FIELDS,
    RunConfig,
    SemisupConfig,
    SpatialConfig,
    TemporalConfig,
    TripletConfig,
)
from fastcontrast.train.presets import TEMPORAL
from fastcontrast.train.reports import load_run
from fastcontrast.train.runs import RunFolder, read_metrics
from fastcontrast.train.semisup import train_semisup
from fastcontrast.train.spatial import train_spatial
from fastcontrast.train.triplet import train_triplet

Record = dict[str, Any]

FINE_TUNING = 300  # steps on the labelled images, after spatial contrasting of any length
# Labels that its linear layer and the fine-tuning see, of each class.
LABELS_PER_CLASS = 400
CONTRASTED = 51_200  # images that each way of cutting patches sees
# Ways to cut patches: where, side, images in a step.
PATCHES = {
    **{f"{side} × {side} cells of {batch} images": ("features", side, batch)
       for side in (1, 3, 5) for batch in (64, 256)},
    **{f"{side} × {side} pixels of 64 images": ("images", side, 64) for side in (16, 24)},
}  # fmt: skip
# Of the temporal study: configuration and steps. The page says what the labels are.
TASKS = {
    "digits": (TemporalConfig(), 200),
    "objects": (dataclasses.replace(TEMPORAL["views"], labels="objects"), 400),
    "angles": (dataclasses.replace(TEMPORAL["views"], labels="angles"), 400),
    "motion": (dataclasses.replace(TEMPORAL["channels"], labels="motion"), 200),
    "video": (dataclasses.replace(TEMPORAL["video"], batch_size=8), 60),
}
OBJECTIVES = ("contrast", "triplet", "prediction", "neighborhood", "autoencoder")
QUERIES, FOUND = 6, 3  # of the sheet of the video


class Study(NamedTuple):
    """What is compared.

    Attributes:
        points: Every variant with its budgets in steps.
        run: Trains a variant; from its name, the steps, the data, and what all runs are told.
        figures: Test errors shown, and what the page calls the accuracy.
        title: Of its section.
        about: What a run is, for the page.
    """

    points: tuple[tuple[str, int], ...]
    run: Callable[[str, int, str, Record], Record]
    figures: dict[str, str]
    title: str
    about: str


def _triplet(variant: str, steps: int, data: str, common: Record) -> Record:
    """On the small network of MNIST, whatever the images."""
    config = TripletConfig(
        **common, data=data, mining=variant, steps=steps, eval_every=steps,  # pyright: ignore
        network="mnist", schedule="cosine", amp=True, classifier_images=10_000,
    )  # fmt: skip
    result = train_triplet(config)
    return _came_to(config, result, result.run, {f.name: f.value for f in result.figures})


def _anchors(variant: str, steps: int, data: str, common: Record) -> Record:
    config = SemisupConfig(
        **common, data=data, anchors=variant, steps=steps, eval_every=steps,  # pyright: ignore
        amp=True,
    )  # fmt: skip
    result = train_semisup(config)
    return _came_to(config, result, result.run, {f.name: f.value for f in result.figures})


def _spatial(variant: str, steps: int, data: str, common: Record) -> Record:
    """On the small network of MNIST, whatever the images; "none" is not pretrained."""
    given: Record = {"contrast": variant, "pretraining_steps": steps}
    if variant == "none":
        given = {"pretraining_steps": 0}
    config = SpatialConfig(
        **common, **given, data=data, network="mnist", labels_per_class=LABELS_PER_CLASS,
        mirror=True, patch_size=5, reduce="mean", amp=True,
        steps=FINE_TUNING, eval_every=FINE_TUNING, pretraining_eval_every=max(1, steps),
        baseline=False,
    )  # fmt: skip
    result = train_spatial(config)
    probe, *_, tuned = result.figures
    figures = {"linear probe": probe.value, "fine-tuned": tuned.value}
    stage = None if variant == "none" else result.run.stage("pretraining")
    return _came_to(config, result, stage, figures)


def _patches(variant: str, steps: int, data: str, common: Record) -> Record:
    """Contrast in steps of the variant's size, then fine-tune in steps of 64, whatever it was."""
    tuned = SpatialConfig(
        **common, data=data, network="mnist", labels_per_class=LABELS_PER_CLASS, mirror=True,
        amp=True, pretraining_steps=0, steps=FINE_TUNING, eval_every=FINE_TUNING, baseline=False,
    )  # fmt: skip
    stage, told = None, {}
    if variant != "none":
        where, side, batch = PATCHES[variant]
        contrasted = dataclasses.replace(
            tuned, name="contrasted", patches=where, patch_size=side, reduce="mean",
            batch_size=batch, pretraining_steps=steps, pretraining_eval_every=steps, steps=1,
        )  # fmt: skip
        result = train_spatial(contrasted)
        stage = result.run.stage("pretraining")
        told = _came_to(contrasted, result, stage, {})["config"]
        tuned = dataclasses.replace(tuned, init_from=str(stage.path))
    result = train_spatial(tuned)
    probe, *_, last = result.figures
    record = _came_to(tuned, result, stage, {"linear probe": probe.value, "fine-tuned": last.value})
    return record | {"config": told or record["config"]}


def _temporal(variant: str, steps: int, data: str, common: Record) -> Record:
    """One objective on one task, and with it what its recipe judges beside."""
    task, objective = variant.split(", ")
    place = "sample"
    if task != "digits":
        place = str(write_sequences(Path(data), task, common["out_dir"] / "sequences"))
    config = dataclasses.replace(
        TASKS[task][0], **common, data=place, objective=objective, steps=steps, eval_every=steps
    )
    result = temporal.train_temporal(config)
    record = _came_to(config, result, result.run, {f.name: f.value for f in result.figures})
    if task == "video" and not result.interrupted:
        record["nearest"] = _nearest_frames(result.run.path, objective)
    return record


def _came_to(
    config: RunConfig, result: Any, stage: RunFolder | None, figures: dict[str, float]
) -> Record:
    """Seconds of training, test errors, and what differs from the recipe's defaults."""
    if result.interrupted:
        raise KeyboardInterrupt
    default = type(config)()
    told = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in (*RUN_FIELDS, "data", "seed", "steps")
        and getattr(config, field.name) != getattr(default, field.name)
    }
    seconds = 0.0 if stage is None else read_metrics(stage)[-1]["seconds"]
    return {"seconds": seconds, "figures": figures, "recipe": config.recipe, "config": told}


def write_sequences(source: Path, task: str, folder: Path) -> Path:
    """Write the sequences of a task as ``fastcontrast train temporal`` reads them.

    Args:
        source: Holds coil20.npy, uint8 [20, 50, 32, 32], daphnet.csv and vtest.npy, uint8
            [795, 96, 128, 3].
        task: ``"objects"``, ``"angles"``, ``"motion"`` or ``"video"``.
        folder: Made.

    Returns:
        The folder.
    """
    if task in ("objects", "angles"):
        view = np.arange(50)
        for k, views in enumerate(np.load(source / "coil20.npy")):
            if task == "objects":  # two views of each are labelled
                given, wanted = np.where(view % 25 == 0, k, -1), np.full(50, k)
            else:
                given, wanted = np.where(view % 4 == 3, -1, view // 5), view // 5
            asked = view % 4 == 3
            for split, frames, labels in (
                ("train", views, given), ("test", views[asked], wanted[asked])
            ):  # fmt: skip
                place = folder / split / task
                place.mkdir(parents=True, exist_ok=True)
                np.save(folder / split / f"{k:02}.npy", frames)
                np.save(place / f"{k:02}.npy", labels)
        return folder
    (folder / task).mkdir(parents=True)
    if task == "motion":
        rows = np.loadtxt(
            source / "daphnet.csv", delimiter=",", skiprows=1, usecols=range(1, 10),
            dtype=np.float32,
        )  # fmt: skip
        np.save(folder / "walk.npy", rows)
        np.save(folder / task / "walk.npy", quarters_of_motion(rows[:, 1]))
    else:
        np.save(folder / "vtest.npy", np.load(source / "vtest.npy").transpose(0, 3, 1, 2))
    return folder


def quarters_of_motion(acceleration: np.ndarray, ticks: int = 64) -> np.ndarray:
    """Quarter, 0 to 3, of the deviation around each row among all rows, int64 [T]."""
    padded = np.pad(acceleration, (ticks // 2, ticks - ticks // 2 - 1), mode="edge")
    deviation = np.lib.stride_tricks.sliding_window_view(padded, ticks).std(1)
    return np.searchsorted(np.quantile(deviation, (0.25, 0.5, 0.75)), deviation)


def _nearest_frames(run: Path, objective: str) -> dict[str, list[list[int]]]:
    """For some test frames, their place first, the nearest training frames, by each embedding."""
    loaded = load_run(run, device="cpu")
    job: Any = loaded.job
    config, frames = job.config, job.frames
    sampler = ClipSampler(
        job.sequences.train, clips=config.batch_size, length=config.clip_length,
        stride=config.clip_stride, seed=config.seed,
    )  # fmt: skip
    untrained = temporal.calibrated(temporal.encoder_of(temporal.build_model(job)), sampler, job)
    asked = torch.linspace(0, len(frames.test_images) - 1, QUERIES).long()
    found = {}
    for name, embed in (
        (objective, loaded.embed),
        ("random network", dataclasses.replace(loaded, model=untrained).embed),
        ("pixels", lambda images: images.flatten(1).float()),
    ):
        nearest = nearest_neighbors(
            embed(frames.test_images[asked]), embed(frames.train_images), FOUND
        ).indices
        found[name] = torch.cat([asked[:, None], nearest.cpu()], 1).tolist()
    return found


def _grid(variants: tuple[str, ...], budgets: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((variant, steps) for variant in variants for steps in budgets)


STUDIES = {
    "triplet": Study(
        _grid(
            ("uniform", "semi-hard", "batch-hard", "distance-weighted", "inverse-distance"),
            (100, 400),
        ),
        _triplet,
        {"linear layer": "linear layer"},
        "Which triplets",
        "The small network of MNIST, in bfloat16. A step embeds 192 images, whatever is chosen "
        "among them. A linear layer is then trained on the frozen embeddings of 10,000 training "
        "images. Seconds include mining and one evaluation.",
    ),
    "spatial": Study(
        (
            ("none", 0),
            *_grid(("uniform", "debiased", "hard-negative", "queue"), (200, 800)),
        ),
        _spatial,
        {"linear probe": "linear layer on frozen features", "fine-tuned": "fine-tuned"},
        "What a patch is told from",
        "The small network of MNIST, of 128,000 weights, in bfloat16; 64 images a step, mean "
        "features of 5 × 5 of its 7 × 7 cells (of 1, 3 and 5 the side that did least harm in a "
        "run of 200 steps), mirrored images. 400 labels per class for the linear layer, and for "
        'the 300 steps that fine-tune all weights; "none" is fine-tuned from random weights. '
        "Seconds are those of contrasting.",
    ),
    "patches": Study(
        (("none", 0), *((variant, CONTRASTED // p[2]) for variant, p in PATCHES.items())),
        _patches,
        {"linear probe": "linear layer on frozen features", "fine-tuned": "fine-tuned"},
        "Which patches, and how many at once",
        "The small network of MNIST, as above; 51,200 images contrasted in steps of 64 or 256, "
        "patches of its 7 × 7 cells or of the 32 × 32 pixels of mirrored images. Then 300 steps "
        'of 64 on 400 labels per class; "none" is fine-tuned from random weights. Seconds are '
        "those of contrasting.",
    ),
    "anchors": Study(
        _grid(("random", "nearest", "class-mean"), (250, 1000)),
        _anchors,
        {"1-NN test error, embedding": "1-NN"},
        "Which anchors",
        "10 labels per class, 32 labelled and 32 unlabelled images a step, in bfloat16. Nearest "
        "and mean anchors embed 100 images for them where random ones embed 10. Neighbours are "
        "among the 100 labels.",
    ),
    "temporal": Study(
        tuple(
            (f"{task}, {objective}", steps)
            for task, (_, steps) in TASKS.items()
            for objective in OBJECTIVES
            if task != "video" or objective in ("contrast", "autoencoder")
        ),
        _temporal,
        {},
        "Time as the comparison",
        "The same three convolutions, frozen after equal steps on equal clips: trained by time, "
        "by the objectives of [temporal.md](temporal.md), as an autoencoder of single frames, or "
        "not at all; and the slowest linear features. "
        "digits: which digit moves. objects: COIL-20, every fourth view is asked for, two views "
        "of each object are labelled. angles: its views in ten classes of 25 degrees, the same "
        "views asked for, all others labelled. motion: Daphnet's S06R02E0, whose own label has "
        "no positive example; the class is the quarter, among all windows, of the deviation of "
        "the ankle's acceleration, and the last quarter of the recording is asked for. Labels "
        "train the classifiers alone; frames asked for of COIL-20 are among those trained on "
        "without.",
    ),
}
