"""`lightly`: ``NTXentLoss`` with its arguments.

``from fastcontrast.compat.lightly import NTXentLoss``. The library itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcontrast.distributed import gather, rank, world_size
from fastcontrast.losses.info_nce import info_nce_loss
from fastcontrast.ops.checks import check_pairs, inverse_temperature
from fastcontrast.ops.contrast_loss import Candidates, contrast_loss
from fastcontrast.ops.normalized import normalized
from fastcontrast.ops.precision import of_widened


class MemoryBank(nn.Module):
    """Keys of past batches, random ones at first; the last batch that fits is cut at the end."""

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: Sequence[int], gather_distributed: bool) -> None:
        super().__init__()
        self.size = tuple(size)
        self.gather_distributed = gather_distributed
        first = normalized(torch.randn(self.size)) if len(self.size) == 2 else torch.empty(0)
        self.register_buffer("bank", first, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Write keys [M, D] over the oldest; those beyond the end are dropped."""
        if self.gather_distributed:
            batch = gather(batch, gradients="none", even=True)
        start, count = int(self.bank_ptr), batch.shape[0]
        end = min(start + count, self.size[0])
        self.bank[start:end] = batch[: end - start]
        self.bank_ptr[0] = 0 if start + count >= self.size[0] else end


class NTXentLoss(nn.Module):
    """SimCLR's loss of two views, or MoCo's with a memory bank.

    Args:
        temperature: Divides the cosines, positive.
        memory_bank_size: (entries, D), or 0 for none.
        gather_distributed: Contrast with the views of all processes, with gradients to them.

    Raises:
        ValueError: If the temperature or the size is not as above.
        TypeError: If the temperature is no number.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float, Tensor)):
            raise TypeError(
                f"temperature must be a number or a 0-dim tensor, got {type(temperature).__name__}"
            )
        if not temperature >= 1e-8:
            raise ValueError(f"temperature must be at least 1e-8, got {temperature}")
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else memory_bank_size
        size = tuple(size)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(f"memory_bank_size must be (entries, D) or 0, got {memory_bank_size}")
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed needs a torch with distributed support")
        self.memory_bank = MemoryBank(size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of views [M, D] and [M, D]; a bank is updated where ``out0`` needs a gradient."""
        check_pairs("out0", out0, "out1", out1)
        if self.memory_bank.size[0]:
            return self._against_bank(out0, out1)
        rows = normalized(torch.cat([out0, out1]))
        m, n, columns = out0.shape[0], out0.shape[0] * world_size(), rows
        first = 0
        if self.gather_distributed and world_size() > 1:
            views = [gather(view, even=True) for view in rows.split(m)]
            columns, first = torch.cat(views), rank() * m
        else:
            n = m
        own = torch.arange(m, device=rows.device) + first
        own, target = torch.cat([own, own + n]), torch.cat([own + n, own])
        scale = inverse_temperature(self.temperature, rows)
        return contrast_loss(
            Candidates(rows, columns, target, own, None, None, "dot", scale),
            all_pay=True,
            reduction="mean",
            precision=of_widened("auto", out0, out1),
            backend=None,
        )

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        query, key = normalized(out0), normalized(out1)
        bank = self.memory_bank.bank.detach().clone().to(query.dtype)
        if out0.requires_grad:
            self.memory_bank.update(key.detach().to(self.memory_bank.bank.dtype))
        return info_nce_loss(
            query,
            key,
            negatives=bank,
            in_batch=False,
            metric="dot",
            temperature=self.temperature,
            precision=of_widened("auto", out0, out1),
        )
