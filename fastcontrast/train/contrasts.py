"""What the points of a step are told from (``--contrast``); for the spatial recipe.

All of it contrasts with the other images of the batch, and costs the network the same: a queue adds
columns to the loss alone. It is a cross-batch memory (Wang et al., arXiv 1912.06798): its keys are
embeddings by the network of the step that cut them, with no momentum encoder, which would take one
more pass of the batch. They trail the network by ``queue_size / batch_size`` steps at most.
"""

from __future__ import annotations

from torch import Tensor

from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.losses.memory_queue import MemoryQueue
from fastcontrast.train.config import SpatialConfig


def queue_of(config: SpatialConfig) -> MemoryQueue | None:
    """Make the queue of a run, empty; None for a run without one."""
    return MemoryQueue(config.queue_size) if config.contrast == "queue" else None


def contrast(
    anchors: Tensor, positives: Tensor, config: SpatialConfig, queue: MemoryQueue | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one step, spatial contrasting's with the negatives of ``--contrast``.

    Args:
        anchors: Embeddings of the first patch of each image [N, D].
        positives: Of the second [N, D].
        config: Says the loss.
        queue: Further negatives of all anchors; receives the positives afterwards.

    Returns:
        The loss in nats, and it as a vector, [1].
    """
    loss = info_nce_loss(
        anchors.contiguous(),
        positives.contiguous(),
        queue=queue,
        metric="l2",
        symmetric=config.symmetric,
        tau_plus=config.tau_plus if config.contrast == "debiased" else 0.0,
        hardness=config.hardness if config.contrast == "hard-negative" else 0.0,
    )
    if queue is not None:
        queue.enqueue(positives)
    return loss, loss.detach()[None]
