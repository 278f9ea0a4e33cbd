"""The loss files of lightly and open_clip alone, for peers.py and the tests of the drop-ins.

Both packages import torchvision, which has to match torch's build; their losses do without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def open_clip_loss() -> Any:
    """open_clip/loss.py; ImportError says why not."""
    path = _folder("open_clip") / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _concat_all_gather(x: Tensor) -> Tensor:
    """As lightly.models.utils's, which its memory bank calls."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def lightly_loss() -> Any:
    """lightly/loss/ntx_ent_loss.py, in packages whose `__init__` does not run."""
    if "lightly.loss.ntx_ent_loss" not in sys.modules:
        folder = _folder("lightly")
        for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules"):
            package = types.ModuleType(name)
            package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
        stub: Any = types.ModuleType("lightly.models.utils")  # needs torchvision
        stub.concat_all_gather = _concat_all_gather
        sys.modules["lightly.models.utils"] = stub
        sys.modules["lightly.models"].utils = stub
    return importlib.import_module("lightly.loss.ntx_ent_loss")
