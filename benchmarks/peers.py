"""Losses of other libraries that do the same jobs as ours, one adapter each.

An adapter takes a `Task` and returns a loss of points x and y; it imports its library when it is
made. Row i's positive is column i; with "labels" the columns of its class are. Whether an adapter
computes the job is not taken on trust: loss_cases.py sets each against float64 before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastcontrast
from benchmarks import image_libraries, loss_libraries

Loss = Callable[[Tensor, Tensor], Tensor]
CHECKPOINT_ROWS = 1024
ROWS_PER_CLASS = 4


class Task(NamedTuple):
    """What is computed: see KINDS."""

    kind: str
    metric: str
    precision: str = "auto"

    @property
    def temperature(self) -> float:
        """Cosines are at most 1, and need one to tell rows apart."""
        return 0.1 if self.metric == "cosine" else 1.0


KINDS = {
    "one direction": "cross-entropy of each row over all columns",
    "symmetric": "the mean of rows over columns and columns over rows",
    "two views": "SimCLR: 2M rows against the 2M - 1 others",
    "labels": f"supervised contrastive, {ROWS_PER_CLASS} rows to a class",
    "entropy": "cross-entropy plus the entropy of each row",
    "log-sum-exp": "of each row over all columns, forward alone",
    "nearest": "the column nearest to each row, forward alone",
}
# Numbers of rows, without a gradient, as yardsticks of the forward pass.
FORWARD = ("log-sum-exp", "nearest")


def class_ids(rows: int, device: torch.device) -> Tensor:
    """Class of each row: as many rows to each class, one class where there are few rows."""
    return torch.arange(rows, device=device) % max(rows // ROWS_PER_CLASS, 1)


def scores(metric: str, x: Tensor, y: Tensor) -> Tensor:
    """The M×N matrix, as PyTorch's users write it."""
    if metric == "l2":
        return -torch.cdist(x, y)
    if metric == "sqeuclidean":
        return 2 * x @ y.T - x.square().sum(1, keepdim=True) - y.square().sum(1)
    if metric == "cosine":
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return x @ y.T


def of_scores(kind: str, s: Tensor) -> Tensor:
    """The loss of a matrix of scaled scores; of FORWARD what each row has."""
    rows = torch.arange(len(s), device=s.device)
    if kind in FORWARD:
        return s.logsumexp(1) if kind == "log-sum-exp" else s.argmax(1)
    if kind == "two views":
        s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
        return F.cross_entropy(s, rows.roll(len(s) // 2))
    if kind == "symmetric":
        return (F.cross_entropy(s, rows) + F.cross_entropy(s.T, rows)) / 2
    log_p = s.log_softmax(1)
    if kind == "labels":
        ids = class_ids(len(s), s.device)
        same = (ids[:, None] == ids).to(s.dtype)
        return -((log_p * same).sum(1) / same.sum(1)).mean()
    if kind == "entropy":
        return F.nll_loss(log_p, rows) - (log_p.exp() * log_p).sum(1).mean()
    return F.cross_entropy(s, rows)


def eager(task: Task) -> Loss:
    """PyTorch as one writes it."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if task.kind == "two views":
            x = y = torch.cat([x, y])
        return of_scores(task.kind, scores(task.metric, x, y) / task.temperature)

    return loss


def ours(task: Task) -> Loss:
    """The project's own."""
    options: Any = {"metric": task.metric, "precision": task.precision}
    if task.kind == "entropy":

        def with_entropy(x: Tensor, y: Tensor) -> Tensor:
            out = fastcontrast.distance_softmax(x, y, scale=1 / task.temperature, **options)
            a, b = x.float(), y.float()
            positive = (a * b).sum(1) if task.metric == "dot" else -(a - b).norm(dim=1)
            return (out.lse - positive / task.temperature + out.entropy).mean()

        return with_entropy
    if task.kind == "nearest":
        return lambda x, y: fastcontrast.nearest(x, y, 1, metric=task.metric).indices[:, 0]
    if task.kind == "log-sum-exp":
        scale = 1 / task.temperature
        return lambda x, y: fastcontrast.distance_softmax(x, y, scale=scale, **options).lse
    options["temperature"] = task.temperature
    if task.kind == "two views":
        return partial(fastcontrast.nt_xent_loss, **options)
    if task.kind == "labels":

        def supcon(x: Tensor, y: Tensor) -> Tensor:
            ids = class_ids(len(x), x.device)
            return fastcontrast.supcon_loss(x, ids, y, ids, **options)

        return supcon
    return partial(fastcontrast.info_nce_loss, symmetric=task.kind == "symmetric", **options)


def compiled(task: Task) -> Loss:
    """`torch.compile` of the eager loss, for the shape at hand."""
    return torch.compile(eager(task), dynamic=False)


def checkpointed(task: Task) -> Loss:
    """Eager by blocks of rows that the backward pass computes again."""

    def part(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores(task.metric, x, y) / task.temperature, target)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        for rows in torch.arange(len(x), device=x.device).split(CHECKPOINT_ROWS):
            block = x[int(rows[0]) : int(rows[-1]) + 1]
            value: Any = checkpoint(part, block, y, rows, use_reentrant=False)
            total = total + value * len(rows)
        return total / len(x)

    return loss


def chunked(task: Task) -> Loss:
    """Torch's own chunked op, which takes dot products, and squared distances through a bias."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        if task.metric == "sqeuclidean":
            bias = -y.square().sum(1) / task.temperature
            x = x * (2 / task.temperature)
            return F.linear_cross_entropy(x, y, rows, linear_bias=bias, options=options)
        if task.metric == "cosine":
            x, y = F.normalize(x, dim=1) / task.temperature, F.normalize(y, dim=1)
        return F.linear_cross_entropy(x, y, rows, options=options)

    return loss


def metric_learning(task: Task) -> Loss:
    """NCALoss, or SupConLoss with labels; the keys' labels are an object of their own."""
    from pytorch_metric_learning import distances, losses

    distance: Any = distances.CosineSimilarity()
    if task.metric == "l2":
        distance = distances.LpDistance(normalize_embeddings=False, power=1)
    if task.kind == "labels":
        supcon: Any = losses.SupConLoss(temperature=task.temperature, distance=distance)

        def labelled(x: Tensor, y: Tensor) -> Tensor:
            ids = class_ids(len(x), x.device)
            return supcon(x, ids, ref_emb=y, ref_labels=ids.clone())

        return labelled
    nca: Any = losses.NCALoss(softmax_scale=1 / task.temperature, distance=distance)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return nca(x, rows, ref_emb=y, ref_labels=rows.clone())

    return loss


def sentence_transformers(task: Task) -> Loss:
    """MultipleNegativesRankingLoss of embeddings."""
    with suppress(ImportError):
        image_libraries.torchvision()  # transformers imports it where it is installed
    losses: Any = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    util: Any = importlib.import_module("sentence_transformers.util")
    names = {"l2": "euclidean_sim", "cosine": "cos_sim", "dot": "dot_score"}
    module = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        scale=1 / task.temperature,
        similarity_fct=getattr(util, names[task.metric]),
    )
    return lambda x, y: module.compute_loss_from_embeddings([x, y], torch.empty(0))


def info_nce_pytorch(task: Task) -> Loss:
    """Its function, which normalises."""
    from info_nce import info_nce

    return lambda x, y: info_nce(x, y, temperature=task.temperature)


def open_clip(task: Task) -> Loss:
    """ClipLoss, which takes normalised features and a scale."""
    loss = loss_libraries.open_clip_loss().ClipLoss()
    return lambda x, y: loss(F.normalize(x, dim=1), F.normalize(y, dim=1), 1 / task.temperature)


def lightly(task: Task) -> Loss:
    """NTXentLoss."""
    return loss_libraries.lightly_loss().NTXentLoss(temperature=task.temperature)


def liger(task: Task) -> Loss:
    """The fused scaled cross-entropy with its entropy."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    function: Any = LigerFusedLinearScaledCrossEntropyFunction

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        nll, entropy = function.apply(x, y, rows, task.temperature, -100, 1, True)
        return nll.mean() + entropy.mean() if task.kind == "entropy" else nll.mean()

    return loss


def cut_cross_entropy(task: Task) -> Loss:
    """On CPU the library's compiled fall-back, on CUDA its exact kernels."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        impl = "cce_exact" if x.is_cuda else "torch_compile"
        return linear_cross_entropy(x / task.temperature, y, rows, impl=impl)

    return loss


def keops(task: Task) -> Loss:
    """Symbolic distances, reduced by generated code."""
    from pykeops.torch import LazyTensor

    def loss(x: Tensor, y: Tensor) -> Tensor:
        squared = ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)
        lse = (-squared.sqrt() / task.temperature).logsumexp(dim=1).view(-1)
        return (lse + (x - y).norm(dim=1) / task.temperature).mean()

    return loss


def memeff(task: Task) -> Loss:
    """The closest relative, on CUDA; `stable=True` would rescale gradients."""
    module: Any = importlib.import_module("memeff")
    return module.MemoryEfficientCLIPLoss(temperature=task.temperature, stable=False)


def inf_cl(task: Task) -> Loss:
    """Its flash loss of rows, on CUDA."""
    module: Any = importlib.import_module("inf_cl.flash")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        scale, head = 1 / task.temperature, min(x.shape[1], 256)
        return module.cal_flash_loss(x, y, rows, scale=scale, head_dim=head).mean()

    return loss


def flash_sinkhorn(task: Task) -> Loss:
    """A half step of Sinkhorn with potentials of 0, on CUDA: log-sum-exp of squared distances.

    Products of float32 points in TF32 and norms in float32, neither centred; and the nearest column
    by its c-transform, which rounds points before it takes norms.
    """
    if task.kind == "nearest":
        transform: Any = importlib.import_module("flash_sinkhorn").c_transform_fwd

        def nearest(x: Tensor, y: Tensor) -> Tensor:
            return transform(x, y, torch.zeros(len(y), device=y.device))[1]

        return nearest
    kernels: Any = importlib.import_module("flash_sinkhorn.kernels")
    t = task.temperature

    def log_sum_exp(x: Tensor, y: Tensor) -> Tensor:
        bias = -y.float().square().sum(1) / t
        return -kernels.flashsinkhorn_lse(x, y, bias, t) / t - x.float().square().sum(1) / t

    return log_sum_exp


def flash_kmeans(task: Task) -> Loss:
    """Its assignment of points to centroids, on CUDA; in the points' dtype, not centred."""
    module: Any = importlib.import_module("flash_kmeans.assign_euclid_triton")

    def nearest(x: Tensor, y: Tensor) -> Tensor:
        sqnorm = x.float().square().sum(1)
        return module.euclid_assign_triton(x[None], y[None], sqnorm[None])[0].long()

    return nearest


class Peer(NamedTuple):
    """Maker, distribution, kinds with their metrics, and M×N matrices of float32 held at a time."""

    make: Callable[[Task], Loss]
    distribution: str
    jobs: dict[str, tuple[str, ...]]
    matrices: float
    compiles: bool = False
    needs_cuda: bool = False


ALL = ("l2", "sqeuclidean", "dot", "cosine")
OF_KIND = {"entropy": ("l2", "dot"), "nearest": ("l2", "sqeuclidean")}
EVERY = {kind: OF_KIND.get(kind, ALL) for kind in KINDS}
ONE = "one direction"
OURS = "fastcontrast"
PROVIDERS = {
    OURS: Peer(ours, "fastcontrast", EVERY, 0),
    "torch eager": Peer(eager, "torch", EVERY, 5),
    "torch.compile": Peer(compiled, "torch", EVERY, 3, compiles=True),
    "torch checkpoint": Peer(checkpointed, "torch", {ONE: ALL}, 0),
    "torch linear_cross_entropy": Peer(chunked, "torch", {ONE: ALL[1:]}, 0),
    "pytorch-metric-learning": Peer(
        metric_learning,
        "pytorch-metric-learning",
        {ONE: ("l2", "cosine"), "labels": ("l2", "cosine")},
        8,
    ),
    "sentence-transformers": Peer(
        sentence_transformers, "sentence-transformers", {ONE: ("l2", "dot", "cosine")}, 6
    ),
    "info-nce-pytorch": Peer(info_nce_pytorch, "info-nce-pytorch", {ONE: ("cosine",)}, 5),
    "open_clip": Peer(open_clip, "open_clip_torch", {"symmetric": ("cosine",)}, 7),
    "lightly": Peer(lightly, "lightly", {"two views": ("cosine",)}, 7),
    "liger": Peer(liger, "liger_kernel", {ONE: ("dot",), "entropy": ("dot",)}, 1),
    "cut-cross-entropy": Peer(
        cut_cross_entropy, "cut-cross-entropy", {ONE: ("dot",)}, 3, compiles=True
    ),
    "KeOps": Peer(keops, "pykeops", {ONE: ("l2",)}, 0),
    "memeff": Peer(memeff, "memeff", {"symmetric": ("cosine",)}, 0, needs_cuda=True),
    "inf-cl": Peer(inf_cl, "inf-cl", {ONE: ("cosine",)}, 0, needs_cuda=True),
    "flash-sinkhorn": Peer(
        flash_sinkhorn,
        "flash-sinkhorn",
        {"log-sum-exp": ("sqeuclidean",), "nearest": ("l2", "sqeuclidean")},
        0,
        needs_cuda=True,
    ),
    "flash-kmeans": Peer(
        flash_kmeans, "flash-kmeans", {"nearest": ("l2", "sqeuclidean")}, 0, needs_cuda=True
    ),
}


def version(distribution: str) -> str | None:
    """Installed version of a library, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
