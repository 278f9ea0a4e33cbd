"""What the tests of the recipes share: stopping a run after a step, and comparing two runs."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch

from fastcontrast.train import stage
from fastcontrast.train.checkpoints import latest_checkpoint
from fastcontrast.train.runs import RunFolder, read_metrics


def stop_after(patch, count):
    """Stand for a Ctrl-C that arrives during the step with this number, counted over all stages."""
    asked = iter(range(1, 10**6))

    @contextmanager
    def stop():
        yield lambda: next(asked) >= count

    patch.setattr(stage, "stop_on_signal", stop)


def assert_same_run(one: RunFolder, other: RunFolder):
    """Weights, optimiser, metrics and embeddings are equal to the bit, in every stage."""
    assert [p.name for p in one.stages] == [p.name for p in other.stages]
    pairs = zip([one.path, *one.stages], [other.path, *other.stages], strict=True)
    for a, b in ((RunFolder(x), RunFolder(y)) for x, y in pairs):
        assert _metrics(a) == _metrics(b)
        for kind in ("step", "best"):
            left, right = (latest_checkpoint(r.checkpoints, kind) for r in (a, b))
            assert (left is None) == (right is None)
            if left is not None and right is not None:
                _assert_same_checkpoint(left, right)
    a, b = np.load(one.embeddings), np.load(other.embeddings)
    assert all(np.array_equal(a[name], b[name]) for name in a.files)


def _metrics(run):
    timed = ("seconds", "speed")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(run)]


def _assert_same_checkpoint(left, right):
    assert left.name == right.name
    for weights in left.glob("*.safetensors"):
        assert weights.read_bytes() == (right / weights.name).read_bytes()
    saved = [torch.load(p / "training.pt", weights_only=True) for p in (left, right)]
    for content in saved:
        del content["seconds"]
    torch.testing.assert_close(*saved, rtol=0, atol=0)
