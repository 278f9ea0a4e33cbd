"""What a training run is told: a frozen dataclass whose field docstrings are the flags' help.

The command line builds it from flags; Python callers build it directly; ``runs`` saves it as JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SemisupConfig:
    """Semi-supervised metric embedding (Hoffer & Ailon, arXiv 1611.01449) on MNIST.

    The defaults are for a first run of a minute or two on two cores, and differ from the paper's in
    four fields: ``steps`` 168,480 (90 epochs of the full set), ``learning_rate`` 0.1, ``lr_drops``
    (56160, 112320) (epochs 30 and 60), ``squared`` True (its equation; its code does not square).
    """

    data: str = "sample"
    """Folder with the MNIST IDX files, plain or .gz. "sample": the 12,000 images in the package."""
    labels_per_class: int = 10
    """Labelled training images of each class; all others are used without their label."""
    seed: int = 0
    """Chooses the labelled images, the initial weights and every batch."""

    steps: int = 1500
    """Training steps in all. The paper's 90 epochs of the full set are 168,480 steps."""
    batch_size: int = 32
    """Labelled images in a step, and as many unlabelled ones; one anchor per class on top."""
    learning_rate: float = 0.03
    """Initial rate of SGD with Nesterov momentum. The paper's 0.1 suits runs of many epochs."""
    lr_drops: tuple[int, ...] = ()
    """Steps after which the rate falls to a tenth. None given: 1/2 and 3/4 of --steps."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    squared: bool = False
    """Squared distances, as in the paper; plain ones, as in its code, do better in short runs."""
    unlabelled_weight: float = 1.0
    """Weight of the unlabelled images' entropy; the labelled images' cross-entropy has 1."""

    out_dir: Path = Path("runs")
    """Folder that holds run folders."""
    name: str = "auto"
    """Name of the run's folder in --out-dir. "auto": semisup-<data>-seed<seed>."""
    resume: bool = False
    """Continue the run in its folder, with its flags; --steps may grow. Without a checkpoint there
    it starts over, and says so."""
    overwrite: bool = False
    """Replace the run in its folder; other files stay. If its config.json is damaged, remove the
    folder by hand."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. "auto": the GPU if torch sees one."""
    threads: int = 0
    """CPU threads; their number may change the last bits. 0: torch's choice."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between measurements of the test error, each with a checkpoint."""

    def __post_init__(self):
        for field in ("steps", "batch_size", "labels_per_class", "log_every", "eval_every"):
            _require(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("threads", "weight_decay", "unlabelled_weight"):
            value = getattr(self, field)
            _require(value >= 0 and math.isfinite(value), self, field, "0 or more")
        _require(0 <= self.seed < 2**63, self, "seed", "0 to 2**63 - 1")
        _require(self.learning_rate > 0, self, "learning_rate", "more than 0")
        _require(math.isfinite(self.learning_rate), self, "learning_rate", "a finite number")
        _require(0 < self.momentum < 1, self, "momentum", "between 0 and 1")
        ascending = all(a < b for a, b in zip((0, *self.lr_drops), self.lr_drops, strict=False))
        _require(ascending, self, "lr_drops", "ascending steps from 1 on")
        _require(
            Path(self.name).name == self.name and self.name not in ("", ".", ".."),
            self,
            "name",
            "one folder name without a path (the path is --out-dir)",
        )
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite exclude each other: continue the run or replace it"
            )

    @property
    def drop_steps(self) -> tuple[int, ...]:
        """Steps after which the rate falls to a tenth, with the default filled in."""
        return self.lr_drops or tuple(sorted({math.ceil(self.steps * k / 4) for k in (2, 3)}))

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update that follows ``step`` finished ones."""
        return self.learning_rate * 0.1 ** sum(step >= drop for drop in self.drop_steps)


# How a run is carried out, as opposed to what it computes: free to differ when it is resumed.
RUN_FIELDS = frozenset(
    ("out_dir", "name", "resume", "overwrite", "device", "threads", "log_every", "eval_every")
)


def _require(condition: bool, config: object, field: str, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {getattr(config, field)!r}; wanted {wanted}")
