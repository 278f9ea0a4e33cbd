"""What a training run is told: frozen dataclasses whose field docstrings are the flags' help.

The command line builds one from preset, file and flags (:mod:`fastcontrast.train.settings`); Python
callers build it directly; ``runs`` saves it as JSON. What the papers and their code do is in
:mod:`fastcontrast.train.presets`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from fastcontrast.train.schedules import Schedule


@dataclass(frozen=True)
class RunConfig:
    """What every recipe is told."""

    recipe: ClassVar[str] = ""

    preset: str = ""
    """Whose values these are, where nothing else is said; empty: the defaults."""
    data: str = "sample"
    """Folder with a data set; fastcontrast data --help lists what is read. "sample": the 12,000
    images of MNIST in the package."""
    dataset: Literal["auto", "mnist", "cifar10", "svhn", "stl10", "folder"] = "auto"
    """Which data set of the folder. "auto": the one that is there."""
    image_size: int = 0
    """Side in pixels to which pictures of a folder are brought. 0: all have one size already, as
    frames of sequences must."""
    network: Literal["auto", "mnist", "cifar10", "stl10"] = "auto"
    """The paper's network for which data set. "auto": by the size of the images."""
    normalise: Literal["global", "bytes"] = "global"
    """"global": one mean and one deviation of all training pixels. "bytes": (x - 128) / 128."""
    seed: int = 0
    """Chooses the held-out or labelled images, the initial weights and every batch."""

    steps: int = 1000
    """Training steps in all."""
    batch_size: int = 128
    """What a step takes; the recipe's help says of what."""
    learning_rate: float = 0.1
    """Initial learning rate."""
    schedule: Literal["step", "cosine", "plateau", "constant"] = "step"
    """How the rate falls: to a tenth at --lr-drops; to 0 along a cosine; to a tenth whenever the
    watched figure has not improved; not at all."""
    lr_drops: tuple[int, ...] = ()
    """With "step": steps after which the rate falls to a tenth. None: 1/2 and 3/4 of --steps."""
    lr_decay: float = 0.0
    """The rate is also divided by 1 + lr_decay * step, as Torch7's learningRateDecay."""
    patience: int = 3
    """With "plateau": evaluations without improvement that lower the rate."""
    plateau_drops: int = 3
    """With "plateau": training ends when the rate would fall once more than this."""
    momentum: float = 0.9
    """Momentum of SGD."""
    dampening: float = 0.0
    """Share of a gradient that is kept out of the momentum. Torch7's SGD had it equal to momentum
    where nobody set it, which makes its rate act like a tenth."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    ema: float = 0.0
    """Evaluate an exponential moving average of the weights with this decay. 0: the weights."""

    out_dir: Path = Path("runs")
    """Folder that holds run folders."""
    name: str = "auto"
    """Name of the run's folder in --out-dir. "auto": <recipe>-<data>-seed<seed>."""
    resume: bool = False
    """Continue the run in its folder, with its flags; --steps may grow. Without a checkpoint there
    it starts over, and says so."""
    overwrite: bool = False
    """Replace the run in its folder; other files stay. If its config.json is damaged, remove the
    folder by hand."""
    init_from: str = ""
    """Start from the weights of this run's folder, or of a .safetensors file; nothing else of it is
    taken."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. "auto": the GPU if torch sees one."""
    threads: int = 0
    """CPU threads; their number may change the last bits. 0: torch's choice."""
    rank_timeout: int = 1800
    """Under torchrun: seconds that a rank waits for the others, while rank 0 evaluates for example,
    before it takes them for lost."""
    amp: bool = False
    """Run the network in bfloat16 where autocast does; losses stay in float32."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """Run the network through torch.compile; "reduce-overhead" replays CUDA graphs. A step is the
    eager one up to rounding, which the steps after it carry on."""
    cuda_graphs: bool = False
    """Record network, loss and gradients as one CUDA graph and replay it; on one GPU, without
    --compile. The log counts the loss's time as the network's."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations, each with a checkpoint."""

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise ValueError that names the first field whose value is unusable."""
        at_least(self, 1, "steps", "batch_size", "log_every", "eval_every", "patience")
        at_least(self, 1, "rank_timeout")
        at_least(self, 0, "threads", "weight_decay", "lr_decay", "image_size", "plateau_drops")
        require(0 <= self.seed < 2**63, self, "seed", "0 to 2**63 - 1")
        require(self.learning_rate > 0, self, "learning_rate", "more than 0")
        require(math.isfinite(self.learning_rate), self, "learning_rate", "a finite number")
        for field in ("momentum", "dampening", "ema"):
            require(0 <= getattr(self, field) < 1, self, field, "0 or more, below 1")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov wants momentum above 0 and dampening 0")
        drops = zip((0, *self.lr_drops), self.lr_drops, strict=False)
        require(all(a < b for a, b in drops), self, "lr_drops", "ascending steps from 1 on")
        require(
            Path(self.name).name == self.name and self.name not in ("", ".", ".."),
            self,
            "name",
            "one folder name without a path (the path is --out-dir)",
        )
        if self.cuda_graphs:
            require(self.compile == "off", self, "compile", "'off' with cuda_graphs")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: continue the run or replace it"
            )

    @property
    def drop_steps(self) -> tuple[int, ...]:
        """Steps after which the rate falls to a tenth, with the default filled in."""
        if self.schedule != "step":
            return ()
        return self.lr_drops or drops_of(self.steps)

    @property
    def rates(self) -> Schedule:
        """The learning rate as a function of the step and of what was watched."""
        return Schedule(
            kind=self.schedule,
            rate=self.learning_rate,
            steps=self.steps,
            drops=self.drop_steps,
            decay=self.lr_decay,
            patience=self.patience,
            max_drops=self.plateau_drops,
        )


@dataclass(frozen=True)
class SemisupConfig(RunConfig):
    """Semi-supervised metric embedding (Hoffer & Ailon, arXiv 1611.01449).

    The defaults are for a first run of a minute or two on two cores; ``mnist-paper`` and the other
    presets are the paper's.
    """

    recipe: ClassVar[str] = "semisup"

    normalise: Literal["global", "bytes"] = "bytes"
    labels_per_class: int = 10
    """Labelled training images of each class; all others are used without their label."""
    label_seed: int = -1
    """Chooses the labelled images, where it is not to be --seed. -1: --seed."""
    batches: Literal["paper", "code"] = "paper"
    """"paper": --batch-size labelled and as many unlabelled images, and an anchor per class.
    "code": --batch-size of all images as unlabelled ones, a labelled image and an anchor per
    class."""
    second_width: int = 192
    """Channels of the second 5 x 5 convolution, where the network is CIFAR-10's or STL-10's. The
    paper may have 96."""
    separate_norms: bool = False
    """Batch normalisation takes its statistics of labelled images, unlabelled ones and anchors
    apart, as in three copies of the network."""
    anchors: Literal["random", "nearest", "class-mean"] = "random"
    """"random": one labelled image of each class, as the paper. Otherwise --anchor-images of each
    are embedded, and an image is compared with the nearest of each class, or with their mean;
    without itself, where it is one of them."""
    anchor_images: int = 10
    """Labelled images of each class embedded in a step for nearest or mean anchors, at most."""
    squared: bool = False
    """Squared distances, as in the paper; plain ones, as in its code, do better in short runs."""
    unlabelled_weight: float = 1.0
    """Weight of the unlabelled images' entropy; the labelled images' cross-entropy has 1."""

    steps: int = 1500
    batch_size: int = 32
    """Labelled images in a step, and as many unlabelled ones; on top of them one anchor per class,
    or with "nearest" and "class-mean" --anchor-images of each."""
    learning_rate: float = 0.03
    """Initial rate. The paper's 0.1 suits runs of many epochs."""
    nesterov: bool = True

    def check(self) -> None:
        """Raise ValueError that names the first field whose value is unusable."""
        super().check()
        at_least(self, 1, "labels_per_class", "second_width")
        at_least(self, 0, "unlabelled_weight")
        at_least(self, 2, "anchor_images")
        enough = self.anchors == "random" or self.labels_per_class > 1
        require(enough, self, "anchors", "'random' with one label per class")
        require(-1 <= self.label_seed < 2**63, self, "label_seed", "-1 to 2**63 - 1")


@dataclass(frozen=True)
class TripletConfig(RunConfig):
    """Triplet network (Hoffer & Ailon, arXiv 1412.6622), or siamese pairs in its place.

    The defaults are for a first run of a few minutes on two cores; ``mnist-paper`` and the other
    presets are the paper's.
    """

    recipe: ClassVar[str] = "triplet"

    loss: Literal["mse", "nll", "siamese"] = "mse"
    """Of the two-way softmax of distances: squared error (the paper's) or negative log-likelihood.
    "siamese": pairs with the contrastive loss, half of them of one class."""
    mining: Literal[
        "uniform", "semi-hard", "batch-hard", "distance-weighted", "inverse-distance"
    ] = "uniform"
    """"uniform": the paper's triplets. Otherwise a step embeds as many images, 3 for each triplet
    of --batch-size, in class-balanced batches, and chooses triplets among them by distance;
    "inverse-distance" draws the biased negatives of the authors' code."""
    margin: float = 1.0
    """Margin of the siamese loss, in embedding units."""
    dropout: float = 0.5
    """Dropout after each pooling. 0.5 in the paper, 0.25 in its code."""
    held_out: float = 0.1
    """Share of the training images kept apart: the plateau schedule and the best checkpoint go by
    their triplet error. The last evaluation trains its classifiers on all training images."""
    test_triplets: int = 64_000
    """Fixed triplets of test images, and as many of held-out ones, that the error is taken of."""
    classifier_images: int = 0
    """Training images, drawn by the seed, on whose frozen embeddings the classifiers at the end are
    trained. 0: all, as fastcontrast eval takes whatever is said here."""

    steps: int = 1000
    batch_size: int = 64
    """Triplets (or pairs) in a step."""
    learning_rate: float = 0.5
    """Initial rate; with dampening 0.9 it acts like 0.05."""
    dampening: float = 0.9

    def check(self) -> None:
        """Raise ValueError that names the first field whose value is unusable."""
        super().check()
        at_least(self, 1, "test_triplets")
        at_least(self, 0, "classifier_images")
        require(self.margin > 0 and math.isfinite(self.margin), self, "margin", "more than 0")
        for field in ("dropout", "held_out"):
            require(0 <= getattr(self, field) < 1, self, field, "0 or more, below 1")
        uniform = self.mining == "uniform"
        require(uniform or self.loss != "siamese", self, "mining", "'uniform' with siamese pairs")
        recorded = self.cuda_graphs and not uniform  # how many triplets are mined is not fixed
        require(not recorded, self, "cuda_graphs", "False, or mining 'uniform'")
        if self.schedule == "plateau" and self.held_out == 0:
            raise ValueError("schedule is 'plateau', which goes by held-out images; held_out is 0")


@dataclass(frozen=True)
class SpatialConfig(RunConfig):
    """Spatial contrasting (Hoffer, Hubara & Ailon, arXiv 1610.00243), then fine-tuning.

    The defaults are for a first run of a few minutes on two cores; ``stl10-paper`` and the other
    presets are the paper's.
    """

    recipe: ClassVar[str] = "spatial"

    patches: Literal["features", "images"] = "features"
    """Cut patches out of the feature map, as the paper does, or out of the images."""
    patch_size: int = 1
    """Side of a patch in cells of the feature map, or in pixels of the images."""
    reduce: Literal["flatten", "mean"] = "flatten"
    """What becomes of the cells of a patch."""
    min_offset: float = 0.0
    """Least distance between the two patches of an image, in cells or pixels."""
    symmetric: bool = False
    """Contrast in both directions; the paper's equation 4 has one."""
    contrast: Literal["uniform", "debiased", "hard-negative", "queue"] = "uniform"
    """What a patch is told from. "uniform": one patch of each other image of the batch, as in the
    paper. "debiased": less the share --tau-plus that may be no negatives. "hard-negative": the near
    ones weigh more, by --hardness. "queue": also the last --queue-size such patches of the batches
    before, of this epoch, as the network embedded them then."""
    tau_plus: float = 0.1
    """With "debiased": how probably another image is of the same class."""
    hardness: float = 1.0
    """With "hard-negative": weights are exp(-hardness * distance), scaled to a mean of 1."""
    queue_size: int = 1024
    """With "queue": patches remembered; a checkpoint holds them."""
    pretraining_steps: int = 800
    """Steps of spatial contrasting. 0: none, and then no baseline either."""
    pretraining_eval_every: int = 0
    """Steps between checkpoints of spatial contrasting, at which a plateau is looked for. 0: as
    --eval-every, which is then for fine-tuning alone."""
    pretraining_learning_rate: float = 0.1
    """Initial rate of spatial contrasting."""
    labels_per_class: int = 10
    """Labelled training images of each class for fine-tuning. 0: all."""
    protocol: Literal["all", "folds"] = "all"
    """Fine-tune on all labels at once, or on each fold of the data set by itself."""
    baseline: bool = True
    """Train the same network from random weights beside it."""
    shift: int = 0
    """Largest translation of a training image, in pixels."""
    mirror: bool = False
    """Mirror every other training image."""
    head_dropout: float = 0.0
    """Dropout before the last layers, while fine-tuning."""
    slope: float = 0.01
    """Slope of the leaky units of the CIFAR-10 network."""
    width: float = 1.0
    """Factor of the widths of the network."""
    blocks: int = 0
    """Blocks of the network before the contrasted map. 0: all but the last layers."""

    steps: int = 300
    """Steps of fine-tuning."""
    batch_size: int = 64
    """Images in a step; in spatial contrasting also the number of contrasted patches."""
    learning_rate: float = 0.1
    """Initial rate of fine-tuning. The paper's 0.01 is too low for a short run."""
    baseline_learning_rate: float = 0.1
    """Initial rate of the network that starts from random weights."""
    schedule: Literal["step", "cosine", "plateau", "constant"] = "cosine"
    eval_every: int = 100

    def check(self) -> None:
        """Raise ValueError that names the first field whose value is unusable."""
        super().check()
        at_least(self, 1, "patch_size", "queue_size")
        at_least(self, 0, "pretraining_steps", "pretraining_eval_every", "labels_per_class")
        at_least(self, 0, "shift", "min_offset", "hardness", "blocks")
        for field in ("pretraining_learning_rate", "baseline_learning_rate", "width"):
            require(0 < getattr(self, field) < math.inf, self, field, "above 0")
        for field in ("head_dropout", "slope", "tau_plus"):
            require(0 <= getattr(self, field) < 1, self, field, "0 or more, below 1")
        require(self.batch_size > 1, self, "batch_size", "2 or more: images to contrast")
        recorded = self.cuda_graphs and self.contrast == "queue"  # whose length is not fixed
        require(not recorded, self, "cuda_graphs", "False, or a contrast other than 'queue'")


@dataclass(frozen=True)
class TemporalConfig(RunConfig):
    """Time as the comparison: frames close in time are alike, others are not.

    The defaults are for a first run of two minutes on two cores.
    """

    recipe: ClassVar[str] = "temporal"

    data: str = "sample"
    """Folder with sequences as .npy files, uint8 pictures or floating-point channels; the layout is
    in docs/temporal.md. "sample": moving digits, made of the images in the package."""
    dataset: Literal["auto"] = "auto"
    """There is one kind: sequences."""
    network: Literal["auto", "mnist", "cifar10", "stl10"] = "auto"
    """"auto": three strided convolutions, for pictures and channels alike. Otherwise the network of
    semi-supervised metric embedding, for pictures."""
    labels: str = "labels"
    """Folder beside the sequences with the labels that classifiers are tested on; training does not
    read them."""
    ticks: int = 64
    """Rows of channels that make a frame."""
    objective: Literal["contrast", "triplet", "prediction", "neighborhood", "autoencoder"] = (
        "contrast"
    )
    """"contrast": near frames against all others of the batch. "triplet": a near and a far frame
    drawn for each. "prediction": the next frames of the clip, each by a linear map, as in CPC.
    "neighborhood": whether two frames are near, as in TNC. "autoencoder": the frame itself, for
    comparison; time is not used."""
    metric: Literal["l2", "sqeuclidean", "cosine"] = "cosine"
    """Distance of embeddings, with "contrast" and "prediction"."""
    temperature: float = 0.1
    """Distance or similarity that changes a score by one nat, with "contrast" and "prediction"."""
    predicted: int = 4
    """Frames of a clip that "prediction" predicts from each, at most --clip-length - 1."""
    window: int = 14
    """Frames at most so far apart are near."""
    margin: int = 0
    """Frames of one sequence farther apart than this are negatives. 0: only other sequences are,
    or with a single sequence those beyond --window."""
    clip_length: int = 8
    """Frames of a clip."""
    clip_stride: int = 2
    """From one frame of a clip to the next."""
    probe_frames: int = 4000
    """Most frames of each split, evenly spaced, on which embeddings are judged."""

    steps: int = 400
    batch_size: int = 32
    """Clips in a step, from different sequences while there are enough."""
    schedule: Literal["step", "cosine", "plateau", "constant"] = "cosine"
    eval_every: int = 200

    def check(self) -> None:
        """Raise ValueError that names the first field whose value is unusable."""
        super().check()
        at_least(self, 1, "ticks", "window", "clip_stride", "probe_frames")
        at_least(self, 2, "clip_length")
        require(0 < self.temperature < math.inf, self, "temperature", "above 0")
        require(self.image_size == 0, self, "image_size", "0: frames stay as they are")
        require(
            self.margin == 0 or self.margin >= self.window, self, "margin", "0, or window or more"
        )
        if self.objective == "prediction":
            wanted = f"from 1 to clip_length - 1, {self.clip_length - 1}"
            require(1 <= self.predicted < self.clip_length, self, "predicted", wanted)
        if self.objective != "autoencoder":  # neighbours in time are looked for on the host
            require(not self.cuda_graphs, self, "cuda_graphs", "False, or objective 'autoencoder'")


# How a run is carried out, as opposed to what it computes: free to differ when it is resumed.
RUN_FIELDS = frozenset(
    (
        *("preset", "out_dir", "name", "resume", "overwrite", "device", "threads"),
        *("compile", "cuda_graphs", "log_every", "eval_every", "rank_timeout"),
    )
)


def drops_of(steps: int) -> tuple[int, ...]:
    """Where the rate of a run of this many steps falls, if nothing else is said."""
    return tuple(sorted({math.ceil(steps * k / 4) for k in (2, 3)}))


def at_least(config: RunConfig, least: float, *fields: str) -> None:
    """Raise ValueError that names the first field that is not a finite number from ``least`` on."""
    wanted = f"{least} or more" if least == 0 else f"at least {least}"
    for field in fields:
        value = getattr(config, field)
        require(value >= least and math.isfinite(value), config, field, wanted)


def require(condition: bool, config: RunConfig, field: str, wanted: str) -> None:
    """Raise ValueError that names the field, what came and what was wanted."""
    if not condition:
        raise ValueError(f"{field} is {getattr(config, field)!r}; wanted {wanted}")
