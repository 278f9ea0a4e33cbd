"""Peers that go wrong in every way, added to those of the benchmark where this is imported.

And rates by small products: no test asks for them, and where torch has none for halves they take
minutes.
"""

from __future__ import annotations

import os
import signal

import torch

from benchmarks import limits, peers

limits.SIZE = {device: 64 for device in limits.SIZE}


def _raises(task):
    def loss(x, y):
        raise ValueError("it does not like these points")

    return loss


def _eats_memory(task):
    return lambda x, y: torch.empty(1 << 50).sum()


def _dies(task):
    return lambda x, y: os.kill(os.getpid(), signal.SIGKILL)


def _hangs(task):
    return lambda x, y: signal.pause()


def _another_job(task):
    eager = peers.eager(task)
    return lambda x, y: 1.1 * eager(x, y)


MAKERS = {
    "raises": _raises, "eats memory": _eats_memory, "dies": _dies, "hangs": _hangs,
    "another job": _another_job,
}  # fmt: skip
for _name, _make in MAKERS.items():
    peers.PROVIDERS[_name] = peers.Peer(_make, "torch", {"one direction": ("l2",)}, 0)
_JOBS = {"one direction": ("l2",)}
peers.PROVIDERS["is large"] = peers.Peer(peers.eager, "torch", _JOBS, 1e15)
peers.PROVIDERS["is absent"] = peers.Peer(peers.eager, "no-such-library", _JOBS, 0)
