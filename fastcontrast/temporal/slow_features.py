"""Slow feature analysis in closed form: the linear baseline of learning from time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops.checks import check_count, check_operands
from fastcontrast.temporal.adjacency import frames_after, timeline

_ROWS = 1 << 14  # rows widened to float64 at a time


class SlowFeatures(NamedTuple):
    """Linear features, slowest first, float64.

    Attributes:
        mean: Of the frames [D].
        weight: Linear map [D, K].
        slowness: Mean square of each feature's change in one step [K], in units of its variance;
            ascending, 2 for white noise.
    """

    mean: Tensor
    weight: Tensor
    slowness: Tensor

    def transform(self, frames: Tensor) -> Tensor:
        """Features [M, K] of frames [M, D], in their dtype if it is float64, else in float32."""
        check_operands("frames", frames, "mean", self.mean[None].to(frames.device))
        dtype = torch.float64 if frames.dtype == torch.float64 else torch.float32
        mean, weight = self.mean.to(frames.device), self.weight.to(frames.device)
        parts = [((part.double() - mean) @ weight).to(dtype) for part in frames.split(_ROWS)]
        return torch.cat(parts)


@torch.no_grad()
def slow_features(
    frames: Tensor, sequence_ids: Tensor, times: Tensor, dim: int, *, tolerance: float = 1e-10
) -> SlowFeatures:
    r"""Fit the linear features that change least from frame to frame.

    .. math::
        \min_W \sum_k \langle (\dot y_k)^2 \rangle \quad\text{with}\quad y = W^T (x - \bar x),\;
        \langle y_k y_l \rangle = \delta_{kl}

    Wiskott and Sejnowski, "Slow Feature Analysis: Unsupervised Learning of Invariances", Neural
    Computation 14, 2002, without its quadratic expansion: the generalised eigenproblem
    :math:`\mathrm{Cov}(\dot x) W = \mathrm{Cov}(x) W \Lambda` of smallest eigenvalues, by
    whitening. Changes are those from each frame to the one of its sequence a time of 1 later.

    Args:
        frames: [M, D], float16, bfloat16, float32 or float64; images flattened.
        sequence_ids: Which sequence each frame is of, integer [M].
        times: When, integer [M].
        dim: K, at least 1.
        tolerance: Directions whose variance is at most this share of the largest are left out.

    Returns:
        :class:`SlowFeatures` on the device of the frames.

    Raises:
        ValueError: If a shape is not as above, no two frames follow each other, or the frames vary
            in fewer than ``dim`` directions.
        TypeError: If an argument is not of the kind above.

    Example:
        >>> import torch
        >>> t = torch.arange(100)
        >>> frames = torch.stack([(0.1 * t).sin() + (2.0 * t).sin(), (2.0 * t).sin()], 1)
        >>> found = slow_features(frames, torch.zeros_like(t), t, 1)
        >>> float(found.slowness) < 0.02  # the slow sine alone: about 0.1 squared
        True
    """
    check_operands("frames", frames, "frames", frames)
    check_count("dim", dim)
    if not isinstance(tolerance, (int, float)) or not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
    line = timeline(frames, sequence_ids, times, "frames")
    later = frames_after(line, 1)
    rows = (later >= 0).nonzero().flatten()
    if rows.shape[0] == 0:
        raise ValueError(
            "times must have two frames of a sequence that differ by 1, got none among "
            f"{frames.shape[0]} frames"
        )
    m, d = frames.shape
    total = frames.new_zeros(d, dtype=torch.float64)
    for part in frames.split(_ROWS):
        total += part.double().sum(0)
    mean = total / m
    spread = frames.new_zeros(d, d, dtype=torch.float64)
    for part in frames.split(_ROWS):
        centred = part.double() - mean
        spread.addmm_(centred.T, centred)
    change = torch.zeros_like(spread)
    for part in rows.split(_ROWS):
        step = frames[later[part]].double() - frames[part].double()
        change.addmm_(step.T, step)
    variances, directions = torch.linalg.eigh(spread / m)
    kept = variances > tolerance * variances[-1:].clamp(min=0)
    if int(kept.sum()) < dim:
        raise ValueError(
            f"dim must be at most the {int(kept.sum())} directions in which the frames vary, got "
            f"{dim}"
        )
    whitening = directions[:, kept] * variances[kept].rsqrt()
    slowness, rotation = torch.linalg.eigh(whitening.T @ (change / rows.shape[0]) @ whitening)
    weight = whitening @ rotation[:, :dim]
    # The sign of an eigenvector is free: the largest weight is positive.
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    return SlowFeatures(mean, weight * largest.sign(), slowness[:dim].clamp(min=0.0))
