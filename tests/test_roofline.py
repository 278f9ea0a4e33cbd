"""The model of the Triton kernels' bytes and operations: its limits are those of the units."""

from __future__ import annotations

import pytest

from benchmarks import roofline
from fastcontrast.backends import native


@pytest.mark.parametrize("device", roofline.DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("metric", roofline.SCORE)
def test_no_launch_beats_its_matrix_units(metric: str, device: roofline.Device) -> None:
    for dim in (16, 128, 1024):
        forward = roofline.launch_time(device, "statistics", metric, 4096, dim, 128)
        backward = roofline.launch_time(device, "gradients", metric, 4096, dim, 128)
        gemm = 4096.0**2 * dim / device.matrix
        assert gemm <= forward.limit <= forward.predicted
        assert 2 * gemm <= backward.limit <= backward.predicted


def test_special_functions_bound_small_dimensions() -> None:
    """L2 at D = 64: two special functions per score take longer than its products."""
    h200 = roofline.DEVICES[0]
    found = roofline.launch_time(h200, "statistics", "l2", 32768, 64, 128)
    assert found.limit == pytest.approx(2 * 32768**2 / h200.special)
    wide = roofline.launch_time(h200, "statistics", "l2", 32768, 1024, 128)
    assert wide.limit > found.limit


def test_the_table_has_every_device() -> None:
    text = roofline.table(1024, (64,), ("l2",))
    assert all(device.name in text for device in roofline.DEVICES)


@pytest.mark.parametrize("device", roofline.DEVICES, ids=lambda d: d.name)
def test_the_choice_of_cuda_kernels_is_what_the_model_says(device: roofline.Device) -> None:
    """Within a factor of five, for want of a measurement, on GPUs this unlike."""
    assert 1 / 5 < native.SMALL_ON_CUDA / roofline.small_problem(device) < 5
    assert 1 / 5 < native.FEW_COLUMNS / roofline.few_columns(device) < 5
