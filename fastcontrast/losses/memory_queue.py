"""Embeddings of past batches as further columns: MoCo's queue, cross-batch memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcontrast.ops.checks import FLOATING, check_count, check_integers, check_operands


class MemoryQueue(nn.Module):
    r"""The last ``size`` embeddings that were enqueued, first in, first out.

    A loss takes it as ``queue=`` and contrasts with its entries as with further keys that carry no
    gradient; losses by class ids use the ids that were enqueued with them. Enqueue after the loss:

    .. code-block:: python

        loss = info_nce_loss(query, key, queue=queue)
        queue.enqueue(key)

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv
    1911.05722 (keys from a momentum encoder); Wang et al., "Cross-Batch Memory for Embedding
    Learning", 2020, arXiv 1912.06798 (with labels). Deviation: an entry counts from when it is
    there, where MoCo's code begins with a queue full of random vectors.

    It is a module, so that it moves with its parent to a device and into a checkpoint. The entries
    keep the dtype of the first ones enqueued. While it fills, its length changes, and
    ``torch.compile`` compiles anew.

    Args:
        size: How many embeddings it holds, at least 1.

    Raises:
        ValueError: If size is below 1.
        TypeError: If size is not an integer.

    Example:
        >>> import torch
        >>> queue = MemoryQueue(3)
        >>> queue.enqueue(torch.tensor([[1.0], [2.0]]))
        >>> queue.enqueue(torch.tensor([[3.0], [4.0]]))
        >>> len(queue), sorted(queue.embeddings.flatten().tolist())
        (3, [2.0, 3.0, 4.0])
    """

    entries: Tensor
    ids: Tensor
    state: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        check_count("size", size)
        self.size = size
        self.register_buffer("entries", torch.empty(0, 0))
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64))
        # Where the next entry goes, how many there are, and whether they have ids. On the CPU in
        # ``_place`` as well, because reading a GPU tensor would wait for the device.
        self.register_buffer("state", torch.zeros(3, dtype=torch.int64))
        self._place = (0, 0, False)

    def __len__(self) -> int:
        """How many entries there are, at most ``size``."""
        return self._place[1]

    @property
    def embeddings(self) -> Tensor:
        """The entries [Q, D], in no particular order; before the first one, [0, 0]."""
        return self.entries[: self._place[1]]

    @property
    def labels(self) -> Tensor | None:
        """Class ids of the entries, int64 [Q]; None if the entries have none."""
        _, filled, has_labels = self._place
        return self.ids[:filled] if has_labels or not filled else None

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor | None = None) -> None:
        """Add embeddings in place of the oldest.

        Args:
            embeddings: [B, D], float16, bfloat16, float32 or float64; of more than ``size`` the
                last ones are kept.
            labels: Their class ids, integer [B]; always or never.

        Raises:
            ValueError: If a shape or the use of labels is not as above.
            TypeError: If a dtype is not as above.
        """
        if not isinstance(embeddings, Tensor) or embeddings.dtype not in FLOATING:
            kind = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise TypeError(f"embeddings must be a floating-point tensor, got {kind}")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must have shape [B, D], got {list(embeddings.shape)}")
        if labels is not None:
            check_integers("labels", labels, (embeddings.shape[0],), embeddings.device)
        first, filled, has_labels = self._place
        if filled and has_labels != (labels is not None):
            raise ValueError("labels must be enqueued always or never")
        dim = embeddings.shape[1]
        if not filled:
            # Zeros, so that what is saved is a function of what was enqueued.
            self.entries = embeddings.new_zeros(self.size, dim)
            self.ids = torch.zeros(self.size, dtype=torch.int64, device=embeddings.device)
        elif self.entries.shape[1] != dim:
            raise ValueError(
                f"embeddings must have D={self.entries.shape[1]} as before, got "
                f"{list(embeddings.shape)}"
            )
        embeddings = embeddings[-self.size :].detach()
        count = embeddings.shape[0]
        # A graph may still hold the entries for its backward pass: they are not written to.
        places = (torch.arange(count, device=embeddings.device) + first) % self.size
        self.entries = self.entries.index_copy(0, places, embeddings.to(self.entries.dtype))
        if labels is not None:
            self.ids = self.ids.index_copy(0, places, labels[-self.size :].to(torch.int64))
        self._place = (
            (first + count) % self.size,
            min(self.size, filled + count),
            labels is not None if count else has_labels,
        )
        self.state = torch.tensor(self._place, dtype=torch.int64)

    def clear(self) -> None:
        """Forget every entry."""
        self._place = (0, 0, False)
        self.state = torch.zeros(3, dtype=torch.int64)

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ) -> None:
        for name in ("entries", "ids"):  # their shapes depend on what was enqueued
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, saved.to(getattr(self, name).device, copy=True))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        first, filled, has_labels = self.state.tolist()
        self._place = (first, filled, bool(has_labels))

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"size={self.size}"


def with_entries(keys: Tensor, queue: MemoryQueue | None, more: Tensor | None = None) -> Tensor:
    """Keys [N, D], further ones of all rows [H, D], and the entries of a queue."""
    parts = [keys]
    if more is not None:
        parts.append(more)
    if queue is not None:
        if not isinstance(queue, MemoryQueue):
            raise TypeError(f"queue must be a MemoryQueue or None, got {type(queue).__name__}")
        if len(queue):
            entries = queue.embeddings
            if entries.shape[1] != keys.shape[1] or entries.device != keys.device:
                raise ValueError(
                    f"queue must hold embeddings [Q, {keys.shape[1]}] on {keys.device}, got "
                    f"{list(entries.shape)} on {entries.device}"
                )
            parts.append(entries.to(keys.dtype))
    return torch.cat(parts) if len(parts) > 1 else keys


class LabelledColumns(NamedTuple):
    """Columns of a loss by class ids: keys [N, D], their ids [N], and each row's own column."""

    keys: Tensor
    labels: Tensor
    own: Tensor | None


def labelled_columns(
    embeddings: Tensor,
    labels: Tensor,
    key: Tensor | None,
    key_labels: Tensor | None,
    queue: MemoryQueue | None,
) -> LabelledColumns:
    """Keys, or else the embeddings themselves, and the entries of a queue; raises if malformed."""
    if (key is None) != (key_labels is None):
        raise ValueError("key and key_labels must be given together")
    check_operands("embeddings", embeddings, "key", embeddings if key is None else key)
    check_integers("labels", labels, (embeddings.shape[0],), embeddings.device)
    own = None
    if key is None or key_labels is None:
        key, key_labels = embeddings, labels
        own = torch.arange(embeddings.shape[0], device=embeddings.device)
    else:
        check_integers("key_labels", key_labels, (key.shape[0],), embeddings.device)
    ids = key_labels.to(torch.int64)
    columns = with_entries(key, queue)
    if queue is not None and len(queue):
        if queue.labels is None:
            raise ValueError("queue must hold labels: enqueue(embeddings, labels)")
        ids = torch.cat([ids, queue.labels])
    return LabelledColumns(columns, ids, own)
