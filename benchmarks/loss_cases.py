"""Jobs "losses" and "memory": pairwise losses, forward and backward, mean reduction.

The control is four GEMMs (X·Yᵀ twice, G·Y, Gᵀ·X: 8MND operations), what a loss that recomputes its
scores contains, of up to CONTROL_ROWS rows. The limit takes the 6MND that none can do without. The
kinds peers.FORWARD have no backward pass, and one GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Call, Case, Control, Work, generator, relative_errors

CONTROL_ROWS = 4096
# Rows and columns of the part that is set against float64: direct differences of all its pairs.
EXACT_ROWS = 512
# The precision of products is an option of ours; these alone stand beside it.
OF_PRECISIONS = (peers.OURS, "torch eager", "torch.compile")
SMALL_ROWS = 256
# Special functions per score: sqrt and exp2, or exp2.
SPECIALS = {"l2": 2, "sqeuclidean": 1, "dot": 1, "cosine": 1}


def points(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Two sets of points at distances of a few units, leaves of the graph."""
    source = generator(0, device)
    return [
        torch.randn(rows, dim, generator=source, device=device)
        .div_(dim**0.25)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    ]


def exact_loss(task: peers.Task, x: Tensor, y: Tensor) -> Tensor:
    """The job by its equation: float64 points, direct differences."""
    if task.metric not in ("l2", "sqeuclidean"):
        return peers.eager(task)(x, y)
    if task.kind == "two views":
        x = y = torch.cat([x, y])
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    s = -(d if task.metric == "l2" else d.square()) / task.temperature
    return peers.of_scores(task.kind, s)


class LossCase(Case):
    """Facts: kind, metric, rows (M = N), dim, dtype, precision."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.rows, self.dim = facts["rows"], facts["dim"]
        self.task = peers.Task(facts["kind"], facts["metric"], facts["precision"])

    @property
    def name(self) -> str:
        f = self.facts
        precision = "" if f["precision"] == "auto" else f" as {f['precision']}"
        text = f"{f['metric']}, M = N = {f['rows']}, D = {f['dim']}, {f['dtype']}{precision}"
        return text if f["kind"] == "one direction" else f"{f['kind']}: {text}"

    def providers(self) -> Sequence[str]:
        kind, metric = self.facts["kind"], self.facts["metric"]
        return [
            name
            for name, peer in peers.PROVIDERS.items()
            if metric in peer.jobs.get(kind, ())
            and (self.device.type == "cuda" or not peer.needs_cuda)
            and (self.facts["precision"] == "auto" or name in OF_PRECISIONS)
        ]

    def _backward_of(self, loss: peers.Loss, rows: int) -> Call:
        x, y = points(rows, self.dim, self.dtype, self.device)
        x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)

        def run() -> None:
            loss(x, y).backward()

        return run

    @property
    def _is_forward(self) -> bool:
        return self.facts["kind"] in peers.FORWARD

    def _forward_of(self, values: peers.Loss) -> Call:
        x, y = (p.detach() for p in points(self.rows, self.dim, self.dtype, self.device))
        return lambda: values(x, y)

    def build(self, provider: str) -> Call:
        loss = peers.PROVIDERS[provider].make(self.task)
        return self._forward_of(loss) if self._is_forward else self._backward_of(loss, self.rows)

    def work(self) -> Work:
        rows = self.rows * (2 if self.facts["kind"] == "two views" else 1)
        pairs = float(rows) * rows
        # Points read once, their gradients written once.
        moved = 4.0 * self.rows * self.dim * self.dtype.itemsize
        specials = pairs * SPECIALS[self.facts["metric"]]
        if self._is_forward:  # whoever is nearest is so before any root
            nearest = self.facts["kind"] == "nearest"
            return Work(2 * pairs * self.dim, moved / 2, 0.0 if nearest else specials)
        return Work(6 * pairs * self.dim, moved, specials)

    def control(self) -> Control:
        rows = min(self.rows, CONTROL_ROWS)
        x, y = (p.detach() for p in points(rows, self.dim, self.dtype, self.device))

        def gemms() -> None:
            x @ y.T
            g = x @ y.T
            g @ y
            g.T @ x

        times = (self.rows / rows) ** 2
        if self._is_forward:
            return Control("GEMM", lambda: x @ y.T, times)
        return Control("GEMMs", gemms, times)

    def control_work(self) -> Work:
        rows = float(min(self.rows, CONTROL_ROWS))
        return Work((2 if self._is_forward else 8) * rows * rows * self.dim, 0.0)

    def errors(self, provider: str) -> dict[str, float]:
        rows = min(self.rows, EXACT_ROWS)
        found = points(rows, self.dim, self.dtype, self.device)
        exact = [p.detach().double().requires_grad_() for p in found]
        if self._is_forward:
            return self._forward_errors(provider, found, exact)
        truth = exact_loss(self.task, *exact)
        mine = peers.PROVIDERS[provider].make(self.task)(found[0], found[1])
        return relative_errors(
            [mine.detach(), *torch.autograd.grad(mine, found)],
            [truth.detach(), *torch.autograd.grad(truth, exact)],
        )

    def _forward_errors(
        self, provider: str, found: list[Tensor], exact: list[Tensor]
    ) -> dict[str, float]:
        """Of log-sum-exp; of nearest columns how much farther they are than the nearest."""
        with torch.no_grad():
            mine = peers.PROVIDERS[provider].make(self.task)(*(p.detach() for p in found))
            if self.facts["kind"] == "nearest":
                d = torch.cdist(*exact, compute_mode="donot_use_mm_for_euclid_dist")
                return {"distance": float((d.gather(1, mine[:, None])[:, 0] / d.amin(1)).max() - 1)}
            truth = exact_loss(self.task, *exact)
            return {"value": float(((mine.double() - truth) / truth).abs().max())}

    def smaller(self) -> Case:
        return LossCase(self.facts | {"rows": min(self.rows, SMALL_ROWS)})

    def needs(self, provider: str) -> float:
        rows = self.rows * (2 if self.facts["kind"] == "two views" else 1)
        held = peers.PROVIDERS[provider].matrices * rows * rows * self.dtype.itemsize
        return 3 * self.work().bytes + held

    def compiles(self, provider: str) -> bool:
        return peers.PROVIDERS[provider].compiles

    def version(self, provider: str) -> str | None:
        return peers.version(peers.PROVIDERS[provider].distribution)


CASE = LossCase
Sizes = Sequence[int] | None
# Other kinds than one direction, each with the metric that its peers have.
KINDS_ALONE = (
    ("symmetric", "cosine"), ("two views", "cosine"), ("labels", "cosine"), ("entropy", "dot")
)  # fmt: skip


def all_cases(
    job: str, quick: bool, device: str, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Facts of a job's cases."""
    cuda = device == "cuda"
    found: list[dict[str, Any]] = []

    def add(
        rows: int, dim: int = 128, metric: str = "l2", kind: str = "one direction",
        dtype: str = "bfloat16" if cuda else "float32", precision: str = "auto",
    ) -> None:  # fmt: skip
        facts = {
            "job": job, "kind": kind, "metric": metric, "rows": rows, "dim": dim,
            "dtype": dtype, "precision": precision, "device": device,
        }  # fmt: skip
        if facts not in found:
            found.append(facts)

    if job == "memory":
        _memory_cases(add, quick, cuda, sizes)
    elif quick:
        middle = 16384 if cuda else 1024
        for rows in sizes or ((1024, 4096, 16384, 65536) if cuda else (256, 1024, 4096)):
            add(rows)
        middle = min(middle, max(sizes)) if sizes else middle
        add(middle, metric="dot")
        for kind, metric in KINDS_ALONE:
            add(middle, metric=metric, kind=kind)
    else:
        _full_cases(add, cuda, sizes)
    return found


def _memory_cases(add: Callable[..., None], quick: bool, cuda: bool, sizes: Sizes) -> None:
    """Up to the rows at which matrices no longer fit; those of the job "losses" are taken over."""
    ladder = (1024, 4096) if quick else (1024, 4096, 16384, 32768)
    for rows in sizes or (*ladder, *((65536, 131072) if cuda and not quick else ())):
        add(rows)
        if not quick and (cuda or rows <= 16384):
            add(rows, metric="dot")


def _full_cases(add: Callable[..., None], cuda: bool, sizes: Sizes) -> None:
    """A star around one size, a few corners, and each kind under two metrics.

    All products of what can be chosen would take days.
    """
    middle = 32768 if cuda else 4096
    small = middle // 4
    # A million rows fit into the memory of a large GPU; a CPU would take an hour for them.
    ladder = (256, 1024, 4096, 16384, 65536, 131072, *((1 << 20,) if cuda else ()))
    for rows in sizes or ladder:
        add(rows)
        if cuda or rows < 131072:  # on a CPU minutes for one call of ours alone
            add(rows, metric="dot")
    if sizes:
        middle, small = min(middle, max(sizes)), min(small, max(sizes))
    for metric, dims in (("l2", (64, 256, 512, 1024)), ("dot", (64, 512, 1024))):
        for dim in dims:
            add(middle, dim, metric)
    for dim in (64, 1024):
        add(small, dim)
    for metric in ("sqeuclidean", "cosine"):
        add(middle, metric=metric)
    for metric in ("l2", "dot"):
        add(middle, metric=metric, dtype="float32" if cuda else "bfloat16")
        # torch multiplies float16 one by one on many CPUs
        add(middle if cuda else small, metric=metric, dtype="float16")
    for precision in ("tf32", "bf16x3") if cuda else ("bf16", "bf16x3"):
        add(middle, dtype="float32", precision=precision)
    if cuda:
        add(middle, metric="sqeuclidean", kind="log-sum-exp")
        add(middle, kind="nearest")
    for kind, metric in KINDS_ALONE:
        add(middle, metric="l2", kind=kind)
        add(middle, metric=metric, kind=kind)
