"""In what precision a step's matrix products run: what `train.dtype` means, as a context around the step.

Weights, their gradients and optimizer state are fp32 whatever it says. "fp8" follows DeepSeek-V3 (arXiv 2412.19437,
section 3.3): the three products of every linear layer in the blocks (attention's projections, feed-forwards, shared and
routed experts) are of e4m3 codes; embedding, output head, gates, norms, attention and MTP's projection stay as in bf16.
A chip without fp8, and the CPU, widen the codes: the same numbers, slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import fp8_linear
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}

_fp8: ContextVar[bool] = ContextVar("fp8", default=False)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of matrix products. "auto": bf16 where the hardware multiplies in it, else fp32; never fp8."""
    if name in NAMED:
        return NAMED[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        fast = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Products of a model on `device` run in `dtype`, one of `pick_dtype`'s. In fp8 autocast is that of bf16, for all
    that stays in bf16. Backward passes follow their forward and need no context."""
    fp8 = dtype == torch.float8_e4m3fn
    before = _fp8.set(fp8)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fp8 or dtype == torch.bfloat16):
            yield
    finally:
        _fp8.reset(before)


def in_fp8() -> bool:
    """Whether the blocks' linear layers multiply in fp8 here."""
    return _fp8.get()


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [T, N].T @ x [T, K] in `dtype`. A GPU rounds its fp32 sums to that alone, and needs no pass to widen them."""
    if x.is_cuda and dtype == torch.float32 != x.dtype and not torch.version.hip:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return (dy.t() @ x).to(dtype)


class _Linear(torch.autograd.Function):
    """x [T, K] @ weight [N, K].T -> [T, N] in x's dtype. The weight's gradient is `weight_gradient`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype, weight = weight.dtype, weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight, weight_gradient(dy, x, ctx.dtype)


class LinearBeside(torch.autograd.Function):
    """x [T, K], weight [N, K] -> their product [T, N], and x for its next reader, to whose gradient [T, K] this one's
    is added in place, by the product that makes it where their dtypes allow: no pass over memory adds gradients up.
    Nobody else may read x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtype, dtype = weight.dtype, product_dtype(x)
        rows, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        dx = dx.addmm_(dy, weight) if dx.dtype == dy.dtype else dx.add_(dy @ weight)
        return dx, weight_gradient(dy, rows, ctx.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer of a block: x [T, K] @ weight [N, K].T -> [T, N]."""
    if in_fp8():
        return fp8_linear(x, weight)
    if x.is_cuda and x.dtype == product_dtype(x) != weight.dtype:
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of x in matrix products, or of what fp8 products take and give: autocast's under autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
