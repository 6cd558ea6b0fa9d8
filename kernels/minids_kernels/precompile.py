"""Compiles the kernels that a call would launch, side by side, before it is run.

On its own each kernel is compiled where it is first launched, one after the other: half a minute for a training step
with empty caches. Here the call is run without its kernels, whose outputs are zeros instead, while Triton's
AsyncCompileMode compiles what would have been launched on as many threads as there are cores.
Test: tests/kernels/test_precompile.py. Benchmark: benchmarks/first_step.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import _launch
from ._launch import triton

__all__ = ["precompile"]


INSTEAD = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


class Zeros(TorchFunctionMode):
    """New tensors are zeros: what a kernel did not write is valid wherever it is used as an index."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _load(kernel: Any, device: int | None) -> None:
    """Its machine code onto the GPU, and what Triton launches it by (older versions have that compiled, too)."""
    if isinstance(kernel, triton.FutureKernel):
        kernel = kernel.result()
    with contextlib.nullcontext() if device is None else torch.cuda.device(device):
        kernel.run  # noqa: B018


def precompile(call: Callable[[], Any]) -> int:
    """Runs `call` without launching any kernel of this package, and compiles those that it would have launched; returns
    how many different ones. They lie in Triton's caches then, in memory too: running the call launches at once.

    The call is eager code: what torch.compile made goes past these zeros. Its results mean nothing, and what it writes
    to outside (parameters' gradients) is the caller's to throw away. Operators of PyTorch's run as ever. A kernel that
    cannot be compiled is left to raise when it is launched. Nothing is launched, and so nothing compiled, where PyTorch
    serves the call's tensors; where kernels are interpreted the call is not made.
    """
    if not _launch.HAS_TRITON or _launch.INTERPRETED:
        return 0
    compiled: dict[int, tuple[Any, int | None]] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        if 0 in grid:
            return
        found = kernel.warmup(*args, grid=grid, **kwargs)
        compiled[id(found)] = found, torch.cuda.current_device() if torch.cuda.is_available() else None

    with ThreadPoolExecutor() as pool:
        with (
            triton.AsyncCompileMode(pool, ignore_errors=True),
            _launch.launched_by(compile_only),
            Zeros(),
            torch.autograd.set_multithreading_enabled(False),  # the modes hold for this thread alone
        ):
            call()
        wait([pool.submit(_load, *found) for found in compiled.values()])
    return len(compiled)
