"""A step, of training or of decoding, as a CUDA graph.

On its own the host launches some two thousand kernels a step of training, some hundreds one of decoding, one after the
other; of a small model's step they take a GPU less time than the host needs for that. Recorded once, they are one
launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.device import queue_copy

Kind = TypeVar("Kind", bound=Hashable)
Result = TypeVar("Result")


class CannotRecord(RuntimeError):
    """A step that is no CUDA graph; the message is PyTorch's reason."""


@dataclass
class _Recording(Generic[Result]):
    """A graph, the tensors that it reads and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Result
    gradients: list[Tensor | None]


class Recorded(Generic[Kind, Result]):
    """`work(inputs, kind)` on a GPU, which leaves gradients in `parameters`.

    What `work` queues must depend on `kind` and the shapes of `inputs` alone, and nothing in it may wait for the GPU.
    Each such combination runs as it is the first time, which compiles its kernels; from the second on its graph is
    replayed. Before a call no parameter has a gradient. A result, gradients too, holds until the next call: graphs use
    the same memory in turn.
    """

    def __init__(
        self,
        work: Callable[[list[Tensor], Kind], Result],
        device: torch.device,
        parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        self.work, self.device, self.parameters = work, device, list(parameters)
        self.pool = torch.cuda.graph_pool_handle()
        self._recordings: dict[Hashable, _Recording[Result] | None] = {}

    def __call__(self, inputs: Sequence[Tensor], kind: Kind) -> Result:
        """inputs: on the CPU or on the GPU. CannotRecord for work that waits, or otherwise breaks the recording off;
        PyTorch's default random numbers are unusable then."""
        key = kind, *(x.shape for x in inputs)
        if key not in self._recordings:
            self._recordings[key] = None
            return self.work([queue_copy(x, self.device) for x in inputs], kind)
        recording = self._recordings[key]
        if recording is None:
            recording = self._recordings[key] = self._record(inputs, kind)
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(queue_copy(given, self.device))
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.result

    def _record(self, inputs: Sequence[Tensor], kind: Kind) -> _Recording[Result]:
        own = [torch.empty_like(x, device=self.device) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self.pool):
                result = self.work(own, kind)
        except RuntimeError as error:
            raise CannotRecord(str(error.__context__ or error).splitlines()[0]) from error
        return _Recording(graph, own, result, [parameter.grad for parameter in self.parameters])


def waits(call: Callable[[], object]) -> bool:
    """Whether `call` waits for a GPU somewhere, as far as PyTorch knows, or breaks."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # it says once that it is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def pad_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """With empty documents at the end, to 2^n of them, so that batches have few shapes. int32 [documents + 1]."""
    documents = cu_seqlens.shape[0] - 1
    padding = (1 << (documents - 1).bit_length()) - documents
    return F.pad(cu_seqlens, (0, padding), value=int(cu_seqlens[-1]))
