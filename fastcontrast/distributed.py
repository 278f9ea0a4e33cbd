r"""Losses of a batch that is spread over processes, over ``torch.distributed``.

.. code-block:: python

    from fastcontrast.distributed import Ranks

    loss = info_nce_loss(query, key, symmetric=True, ranks=Ranks("ring"))
    loss.backward()  # the model is wrapped in DistributedDataParallel

Every rank passes its part of the batch, as many rows as it has, none included, and receives the
loss of the whole batch, the same on every rank. Three conventions:

* **The batch is spread, state is not.** Queries, keys, negatives, labels, targets and weights are
  parts of one batch, in the order of the ranks; a target is an index of this rank's keys. What a
  model holds is the same on every rank: parameters, a learnable temperature, the anchors of
  ``metric_embedding_loss``, the entries of a queue (enqueue ``gather(key)``).
* **Gradients are right after the mean over ranks**, which ``DistributedDataParallel`` takes. The
  backward pass gives a rank the number of ranks times its share of the gradient: for embeddings
  from the rows of every rank, for a parameter of the loss from the rows of this rank. The mean of
  the shares is the gradient that one process has with the whole batch. A parameter of the loss that
  is outside of the wrapped model needs the same mean.
* **Every rank makes the same calls** in the same order, the backward pass included. Calls that
  differ raise, and a rank that has stopped ends the others with an error within the timeout of the
  process group.

With ``reduction="none"`` a rank receives the losses of its own rows; what the ranks make of them
counts as a sum over ranks. ``docs/distributed.md`` says which strategy serves when.

Example:
    One process is a world of one, and needs no process group:

    >>> import torch
    >>> import fastcontrast as fc
    >>> x, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
    >>> fc.supcon_loss(x, labels, temperature=1.0, ranks=Ranks())  # log(1 + 2 / e)
    tensor(0.5514)
"""

from fastcontrast.ops.ranks import Ranks, gather, rank, world_size

__all__ = ["Ranks", "gather", "rank", "world_size"]
