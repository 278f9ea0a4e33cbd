"""`sentence-transformers`: multiple negatives ranking, in one direction or both.

``from fastcontrast.compat.sentence_transformers import MultipleNegativesRankingLoss``. The classes
are subclasses of the library's own: trainers, model cards and its other options know them.
"""

# Where the library is not installed, pyright takes this file for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses
from torch import Tensor

from fastcontrast.ops.checks import check_operands
from fastcontrast.ops.distance_softmax import distance_softmax
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.pairs import paired_scores
from fastcontrast.ops.softmax_loss import log_add, softplus

# Similarity functions by name: the library exports each under more than one.
METRICS = {"cos_sim": "cosine", "dot_score": "dot", "euclidean_sim": "l2"}
GAINS = ("in_batch_negatives", "all_negatives"), ("hard_negatives", "all_negatives")


def metric_of(similarity_fct: Any) -> str:
    """Metric of a similarity function of the library; raises for one without a kernel."""
    metric = METRICS.get(getattr(similarity_fct, "__name__", ""))
    if metric is None:
        raise ValueError(
            f"similarity_fct must be one of {', '.join(METRICS)}, got {similarity_fct!r}"
        )
    return metric


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """The library's loss without matrices of scores; every option of it."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        """Loss of anchors [M, D], positives [M, D] and any number of hard negatives [M, D] each."""
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        for other in embeddings[1:]:
            check_operands("embeddings[0]", embeddings[0], "another embedding", other)
        metric = metric_of(self.similarity_fct)
        dtype = torch.promote_types(embeddings[0].dtype, embeddings[1].dtype)
        if dtype in (torch.float16, torch.bfloat16):  # several passes, one rounding of gradients
            embeddings = [e.float() for e in embeddings]
        if metric == "cosine":
            embeddings, metric = [normalized(e) for e in embeddings], "dot"
        return _Directions(self, embeddings, metric).loss()


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """Both directions, averaged; the library deprecates its class of this name, which is alike."""

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Any = util.cos_sim,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )


class _Directions:
    """Log-sum-exp of every direction that a loss asks for, on one process's rows."""

    def __init__(self, options: Any, embeddings: list[Tensor], metric: str) -> None:
        self.options, self.metric = options, metric
        queries, docs = embeddings[0], embeddings[1:]
        m, offset = queries.shape[0], 0
        if options.gather_across_devices:
            queries = util.all_gather_with_grad(queries)
            docs = [util.all_gather_with_grad(doc) for doc in docs]
            offset = util.get_rank() * m
        self.queries, self.docs = queries, torch.cat(docs)
        self.own_queries, self.own_docs = queries[offset : offset + m], docs[0][offset : offset + m]
        self.own = torch.arange(m, device=queries.device) + offset
        # Of every document, the query that it was given with.
        self.owner = torch.arange(queries.shape[0], device=queries.device).repeat(len(docs))
        self.positive = paired_scores(
            self.own_queries, self.own_docs, metric=metric, scale=options.scale
        )

    def loss(self) -> Tensor:
        """Mean over the rows, in nats."""
        directions = self.options.directions
        to_docs = self.query_to_doc()
        found = {
            "query_to_query": lambda: self.lse(self.own_queries, self.queries, exclude=self.own),
            "doc_to_query": lambda: self.lse(self.own_docs, self.queries, exclude=self.own),
            "doc_to_doc": lambda: self.lse(self.own_docs, self.docs, keep="different"),
        }
        others = {name: f() for name, f in found.items() if name in directions}
        if self.options.partition_mode == "joint":
            total = to_docs
            for lse in others.values():
                total = log_add(total, lse)
            rows = softplus(total - self.positive)
            if "doc_to_query" in others:  # the pair is in this direction too
                rows = softplus(log_add(total, self.positive) - self.positive)
        else:
            rows = softplus(to_docs - self.positive)
            for lse in others.values():
                rows = rows + softplus(lse - self.positive)
            rows = rows / (1 + len(others))
        return rows.mean()

    def query_to_doc(self) -> Tensor:
        """Documents but each query's own positive; hard ones weighted up where asked for."""
        mode, strength = self.options.hardness_mode, self.options.hardness_strength
        if mode is None or strength == 0:
            return self.lse(self.own_queries, self.docs, exclude=self.own)
        in_batch, hard = (strength if mode in modes else 0.0 for modes in GAINS)
        others = self.lse(self.own_queries, self.docs, keep="different", gain=in_batch)
        if self.docs.shape[0] == self.queries.shape[0]:
            return others
        own = self.lse(self.own_queries, self.docs, exclude=self.own, keep="same", gain=hard)
        return log_add(others, own)

    def lse(
        self,
        rows: Tensor,
        columns: Tensor,
        *,
        exclude: Tensor | None = None,
        keep: str = "all",
        gain: float = 0.0,
    ) -> Tensor:
        """Log-sum-exp of scores; ``gain`` is added to the scale, but not to the gradient."""
        scale = self.options.scale
        masked = keep != "all"
        lse = distance_softmax(
            rows, columns, metric=self.metric, scale=scale + gain, exclude=exclude, keep=keep,
            row_ids=self.own if masked else None, column_ids=self.owner if masked else None,
        ).lse  # fmt: skip
        if gain == 0:
            return lse
        fixed = lse.detach()
        # The library adds gain · similarity as a constant: its gradient is that of the scale alone.
        varying = torch.where(torch.isneginf(fixed), 0.0, lse - fixed)
        return fixed + scale / (scale + gain) * varying
