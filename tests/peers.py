"""Other libraries, as far as they can be imported here; a test that needs one skips without it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import loss_libraries


def peer(name: str) -> Any:
    """The module, or a skip that says why there is none."""
    return pytest.importorskip(name, exc_type=ImportError)


def open_clip_loss() -> Any:
    """open_clip/loss.py."""
    return _loaded(loss_libraries.open_clip_loss)


def lightly_loss() -> Any:
    """lightly/loss/ntx_ent_loss.py."""
    return _loaded(loss_libraries.lightly_loss)


def _loaded(load: Any) -> Any:
    try:
        return load()
    except ImportError as error:
        pytest.skip(str(error))
