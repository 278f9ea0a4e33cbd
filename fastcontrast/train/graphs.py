"""A training step as a CUDA graph (``--cuda-graphs``): recorded once, then replayed.

Network, loss and both backward passes are recorded; the batch is drawn and the optimiser steps
outside, so that indices, the learning rate and the moving average stay what they are in an eager
run. Inputs are copied into the memory that the graph reads, numbers as tensors; dropout follows
torch's generator, which every replay reads. The loop calls :class:`RecordedStep` for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM_UP = 3  # steps that run eagerly first: kernels are compiled and libraries take their memory

Step = Callable[[Any, Any], Tensor]  # from images and targets, the parts of the loss


class Recorder(Protocol):
    """What records and replays: a GPU, or what stands for it in a test."""

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """Run once, as it will be recorded."""
        ...

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what replays the call: into the same memory each time, nothing is run yet."""
        ...


class CudaRecorder:
    """Records on a stream of its own, as CUDA wants it."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """Run on the stream, after what was asked of the device before and before what follows."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the call."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class RecordedStep:
    """Gradients of a batch, by replaying the step once it is warm.

    A batch that differs from the first in a shape, a dtype or a setting runs eagerly.

    Args:
        step: Sets the parameters' gradients from images and targets; returns the loss's parts.
        parameters: Of the model. They and its buffers are changed in place only.
        recorder: What records.
    """

    def __init__(self, step: Step, parameters: Iterable[Tensor], recorder: Recorder) -> None:
        self._step, self._parameters, self._recorder = step, list(parameters), recorder
        self._kinds: Any = None
        self._inputs: list[Any] = []  # what the recorded step reads
        self._gradients: list[Tensor | None] = []  # what it writes
        self._replay: Callable[[], Tensor] | None = None
        self._warm = 0

    def __call__(self, images: Tensor, targets: Any) -> Tensor:
        """Set the gradients; return the parts, which the next call may overwrite, [P]."""
        leaves, layout = tree_flatten((images, targets))
        kinds = [_kind(leaf) for leaf in leaves], layout
        if self._kinds is None:
            self._kinds = kinds
            self._inputs = [_own(leaf, images.device) for leaf in leaves]
        if kinds != self._kinds:
            return self._step(images, targets)
        for own, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                own.copy_(leaf, non_blocking=True)
            elif isinstance(own, Tensor):
                own.fill_(leaf)

        def call() -> Tensor:
            return self._step(*tree_unflatten(self._inputs, layout))

        if self._warm < WARM_UP:
            self._warm += 1
            return self._recorder.warm_up(call)
        if self._replay is None:
            self._replay = self._recorder.record(call)
            self._gradients = [p.grad for p in self._parameters]
        parts = self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # an eager step in between has put others there
        return parts


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int) and not isinstance(leaf, bool)


def _kind(leaf: Any) -> Any:
    """What a graph cannot change: the shape of a tensor, or the value of a setting."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return int if _is_number(leaf) else leaf


def _own(leaf: Any, device: torch.device) -> Any:
    """Memory of the graph's own for an input; a number, such as the step's, becomes a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return torch.full((), leaf, dtype=torch.int64, device=device) if _is_number(leaf) else leaf
