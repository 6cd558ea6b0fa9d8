"""A step, of training or of decoding, as a CUDA graph.

On its own the host launches some two thousand kernels a step of training, some hundreds one of decoding, one after the
other; of a small model's step they take a GPU less time than the host needs for that. Recorded once, they are one
launch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
    the same memory in turn, those of several `Recorded` too if they are given the same `pool`
    (`torch.cuda.graph_pool_handle`). But each keeps its result and gradients: combinations should be few.
    """

    def __init__(
        self,
        work: Callable[[list[Tensor], Kind], Result],
        device: torch.device,
        parameters: Iterable[nn.Parameter] = (),
        pool: Any = None,
    ) -> None:
        self.work, self.device, self.parameters = work, device, list(parameters)
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
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

    def forget(self) -> None:
        """Lets go of all graphs and their memory. What is recorded then gets another pool: PyTorch refuses to record
        into that of graphs that are gone while a tensor there lives, a result or what awaits Python's collector."""
        self._recordings.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def _record(self, inputs: Sequence[Tensor], kind: Kind) -> _Recording[Result]:
        own = [torch.empty_like(x, device=self.device) for x in inputs]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with contextlib.ExitStack() as recording:
                # what graphs share of random numbers must not be inference tensors (pytorch issue 166792)
                with torch.inference_mode(False):
                    recording.enter_context(torch.cuda.graph(graph, self.pool))
                result = self.work(own, kind)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # PyTorch leaves its own current
            raise CannotRecord(str(error.__context__ or error).splitlines()[0]) from error
        return _Recording(graph, own, result, [parameter.grad for parameter in self.parameters])


def unless_it_waits(call: Callable[[], Result]) -> Result | None:
    """What `call` returns; None where it waits for a GPU somewhere, as far as PyTorch knows, or breaks."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # it says once that it is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def pad_cu_seqlens(cu_seqlens: Tensor, documents: int) -> Tensor:
    """int32 [n + 1] -> [documents + 1], with empty documents at the end."""
    return F.pad(cu_seqlens, (0, documents + 1 - cu_seqlens.shape[0]), value=int(cu_seqlens[-1]))
