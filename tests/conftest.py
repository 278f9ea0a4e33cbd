"""Fixtures that every test shares: poisoned memory, seeds, and the backends under test."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

# Before torch starts its threads: on a busy machine, threads that spin while they wait make small
# calls a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes that share the tests (pytest -n) share the cores as well.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

import pytest
import torch
from bf16_units import active_unit, lacking
from variants import Variant, active, worth_emulating, worth_interpreting

from fastcontrast.backends import triton

# Searched for doctests, it would be imported, and its peers, some of which end the process that
# calls them, would be among the benchmark's.
collect_ignore = ["broken_peers.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under TRITON_INTERPRET=1, only what the interpreted kernels run: the rest had its own run.

    Slow tests come first, so that none is left to one process when the others have ended.
    """
    worth = worth_interpreting if triton.INTERPRETED else worth_emulating
    kept = [item for item in items if worth(item)]
    kept.sort(key=lambda item: item.get_closest_marker("slow") is None)
    left = [item for item in items if not worth(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A selection that has nothing to interpret is no failure."""
    if triton.INTERPRETED and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20140612)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the backend of a `Variant`, with the variant's instruction set in force.

    Emulated threads take their turns in an order that depends on the test's name.
    """
    variant: Variant = request.param
    if variant.skip_reason is not None:
        pytest.skip(f"{variant}: {variant.skip_reason}")
    with active(variant, zlib.crc32(request.node.nodeid.encode()) % 3):
        yield variant.backend


@pytest.fixture
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a bfloat16 matrix unit, in force for products of any size."""
    reason = lacking(request.param)
    if reason is not None:
        pytest.skip(reason)
    with active_unit(request.param):
        yield request.param
