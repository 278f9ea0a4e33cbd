"""Other libraries, as far as they can be imported here; a test that needs one skips without it.

Not those that FASTCONTRAST_REQUIRED_PEERS names, with spaces between: without one its tests fail.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from benchmarks import loss_libraries


def peer(name: str) -> Any:
    """The module, or a skip that says why there is none; an ImportError if it is required."""
    if name.split(".")[0] in os.environ.get("FASTCONTRAST_REQUIRED_PEERS", "").split():
        return importlib.import_module(name)
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
