"""What a case of the benchmark is: the facts that name it, and what the runner asks of it.

A case is made from its facts alone, a dictionary that goes into the record, so that a process
started for one measurement builds the same case, with the same inputs, as any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import OURS, version

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest relative errors of a loss and its gradients: peers round their scores to the dtype, ...
ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
# ... and products of rounded points carry their rounding into scores of a few units.
PRECISIONS = {"auto": 0.0, "ieee": 0.0, "tf32": 5e-3, "bf16": 2e-2, "bf16x3": 0.0}
Call = Callable[[], Any]


class Work(NamedTuple):
    """What a job takes at least: operations of products, bytes moved, special functions."""

    flops: float
    bytes: float
    specials: float = 0.0


class Control(NamedTuple):
    """A job of the machine alone, timed beside the others, and how often the case contains it."""

    name: str
    call: Call
    times: float = 1.0


class Case(ABC):
    """One size of one job; see `all_cases` of the modules in MODULES."""

    distributions: ClassVar[dict[str, str]] = {}

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts, self.job_name = facts, facts["job"]
        self.device = torch.device(facts["device"])
        self.dtype = DTYPES[facts["dtype"]]

    @property
    @abstractmethod
    def name(self) -> str:
        """The facts in words."""

    @abstractmethod
    def providers(self) -> Sequence[str]:
        """Who has this job, ours first, installed or not."""

    @abstractmethod
    def build(self, provider: str) -> Call:
        """Inputs and the call that is timed.

        Raises:
            ImportError: If the library is missing.
            NotImplementedError: If it does not do this size or device.
        """

    @abstractmethod
    def work(self) -> Work:
        """The least that any implementation has to do."""

    @abstractmethod
    def control(self) -> Control:
        """What is timed beside them."""

    @abstractmethod
    def control_work(self) -> Work:
        """What one call of the control does: products, or bytes alone."""

    @abstractmethod
    def errors(self, provider: str) -> dict[str, float]:
        """Errors against float64 by name; beyond `allowed`, it is another job."""

    def allowed(self, provider: str) -> float:
        """Largest error of one and the same job; the precision of products is an option of ours."""
        precision = self.facts.get("precision", "auto") if provider == OURS else "auto"
        return max(ALLOWED[self.facts["dtype"]], PRECISIONS[precision])

    def remark(self, provider: str) -> str:
        """How a provider's job differs from ours where `errors` cannot tell; or empty."""
        return ""

    @abstractmethod
    def smaller(self) -> Case:
        """A case that loads the same libraries and costs little."""

    def needs(self, provider: str) -> float:
        """Bytes that a provider is expected to hold at its peak."""
        return self.work().bytes

    def compiles(self, provider: str) -> bool:
        """Whether the first call at a shape compiles."""
        return provider == "torch.compile"

    def version(self, provider: str) -> str | None:
        """Version of a provider's library, or None where it is not installed."""
        return version(self.distributions.get(provider, "torch"))


def relative_errors(mine: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Of a loss and of all its gradients together."""
    loss, truth = mine[0].double(), exact[0]
    off = sum(
        float((a.double() - b).square().sum()) for a, b in zip(mine[1:], exact[1:], strict=True)
    )
    size = sum(float(b.square().sum()) for b in exact[1:])
    return {
        "loss": float((loss - truth).abs() / truth.abs()),
        "gradient": math.sqrt(off / size) if size else float(off > 0),
    }


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Random numbers that do not depend on what ran before."""
    return torch.Generator(device).manual_seed(seed)


MODULES = {
    "losses": "benchmarks.loss_cases",
    "patches": "benchmarks.patch_cases",
    "triplet": "benchmarks.triplet_cases",
    "train": "benchmarks.train_cases",
    "memory": "benchmarks.loss_cases",
}
# Of the memory job one call is made, in a process of its own, and nothing is timed in turn.
UNTIMED = ("memory",)


def case_of(facts: dict[str, Any]) -> Case:
    """The case with these facts."""
    return import_module(MODULES[facts["job"]]).CASE(facts)


def all_cases(
    job: str, quick: bool, device: str, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Facts of a job's cases; ``sizes`` replaces the numbers of rows or images."""
    return import_module(MODULES[job]).all_cases(job, quick, device, sizes)
