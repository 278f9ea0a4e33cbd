"""Every tolerance of the suite, each with its reason.

The error budget: a backend may be twice as wrong as eager PyTorch in the same dtype, plus a floor
for cases where eager happens to be exact. Errors are relative, ‖a-r‖/‖r‖, against float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUDGET_FACTOR = 2.0

# Values: scores of size |s| are rounded to |s|·eps before the exponential, and rows of up to 300
# columns are summed; |s| reaches about 30 in the cases, so 16 eps covers what eager's luck hides.
# In float64 the truth is no more exact than the backend: 100 times as many eps.
VALUE_FLOOR = {torch.float32: 2e-6, torch.float64: 4e-13}
# Gradients: the rounding of a score is an absolute error of its probability, and the sum
# Σ w (x-y) is taken as a difference of two products: another factor of ten.
GRADIENT_FLOOR = {torch.float32: 2e-5, torch.float64: 4e-12}
# Half inputs: values as float32; gradients are rounded once to the input dtype (eps/2 each).
for _half in (torch.bfloat16, torch.float16):
    VALUE_FLOOR[_half] = VALUE_FLOOR[torch.float32]
    GRADIENT_FLOOR[_half] = torch.finfo(_half).eps
# Pairs nearer than the limit of rule 2 are recomputed; those just above it carry a relative error
# of up to 2^-10 (float32) or 2^-26 (float64) in d², half of it in d and in what the pair adds.
NEAR_MULTIPLE = {torch.float32: 2.0**10, torch.float64: 2.0**26}
NEAR_PAIR = {dtype: 0.5 / multiple for dtype, multiple in NEAR_MULTIPLE.items()}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value-truth‖/‖truth‖ over finite entries; infinite entries must agree exactly."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    finite = torch.isfinite(truth)
    if not torch.equal(value[~finite], truth[~finite]):
        return float("inf")
    if not bool(torch.isfinite(value[finite]).all()):
        return float("inf")
    difference = (value[finite] - truth[finite]).norm()
    size = truth[finite].norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_within_budget(
    name: str, value: Tensor, truth: Tensor, eager: Tensor, floor: float
) -> None:
    """Hold ``value`` to the error budget of this module."""
    error, allowed = relative_error(value, truth), relative_error(eager, truth)
    limit = BUDGET_FACTOR * min(allowed, 1.0) + floor
    assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e} (eager {allowed:.2e})"
