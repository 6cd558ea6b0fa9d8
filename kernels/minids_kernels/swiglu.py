"""SwiGLU: silu(gate) * up, with gate and up as the two halves of the last dimension (arXiv 2002.05202).

gate_up [..., 2F] in fp32, bf16 or fp16 (fp64 on the PyTorch path) -> [..., F] in its dtype, any F; arithmetic in fp32
inside the kernels. Gradient, with s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s;
the forward keeps gate_up only. Runs on every GPU Triton knows.
Test: tests/kernels/test_swiglu.py. Benchmark: benchmarks/ops/swiglu.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._checks import as_rows, as_shape, check_float
from ._launch import tl, triton
from ._operator import operator

__all__ = ["swiglu", "swiglu_reference"]


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Plain formula in fp32; gate_up [..., 2F] -> [..., F] in its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK_N] of this program's tile of an [M, N] matrix, and what of it exists."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(N, BLOCK_N)
    rows = (program // across) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, (rows < M) & (cols < N)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def swiglu_values(gate, up):
    return gate * _sigmoid(gate) * up


@triton.jit
def swiglu_gradients(dy, gate, up):
    sigmoid = _sigmoid(gate)
    return dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid))), dy * (gate * sigmoid)


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, y_ptr, M, N, stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of y [M, N] contiguous a program; gate_up [M, 2N]."""
    rows, cols, mask = _tile(M, N, ROWS, BLOCK_N)
    gate = tl.load(gate_up_ptr + rows * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + rows * stride + N + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * N + cols, swiglu_values(gate, up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_up_ptr, out_ptr, M, N, dy_stride, stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One tile of dy [M, N] a program; both halves of its gradient in out [M, 2N] contiguous."""
    rows, cols, mask = _tile(M, N, ROWS, BLOCK_N)
    gate = tl.load(gate_up_ptr + rows * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + rows * stride + N + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = swiglu_gradients(dy, gate, up)
    tl.store(out_ptr + rows * (2 * N) + cols, dgate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + rows * (2 * N) + N + cols, dup.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [M, N] with neighbouring columns side by side; rows may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _grid(rows: int, width: int, config: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(width, config["BLOCK_N"]),)


def _triton_fwd(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = _rows(gate_up)
    y = gate_up.new_empty(rows, width)
    config = _launch.config("swiglu", "swiglu_fwd", _launch.arch(gate_up), N=width)
    _launch.launch(
        _swiglu_fwd_kernel, _grid(rows, width, config), gate_up, y, rows, width, gate_up.stride(0), **config
    )  # fmt: skip
    return y


def _triton_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    rows, width = dy.shape
    dy, gate_up = _rows(dy), _rows(gate_up)
    out = gate_up.new_empty(rows, 2 * width)
    config = _launch.config("swiglu", "swiglu_bwd", _launch.arch(gate_up), N=width)
    _launch.launch(
        _swiglu_bwd_kernel, _grid(rows, width, config),
        dy, gate_up, out, rows, width, dy.stride(0), gate_up.stride(0), **config,
    )  # fmt: skip
    return out


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def torch_fwd(gate_up: Tensor) -> Tensor:
    gate, up = _rows(gate_up).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def torch_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Everything is worked out where it will lie: fresh memory costs more than the arithmetic."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = gate_up.new_empty(gate_up.shape)
    dgate, dup = out.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=dup)
    dup.mul_(dy)
    torch.mul(dy, up, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return out


# --- registration -----------------------------------------------------------------------------------------------------


@operator("swiglu")
def _swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [M, 2F] -> [M, F]."""
    return (_triton_fwd if _launch.use_triton(gate_up) else torch_fwd)(gate_up)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of swiglu: dy [M, F], gate_up [M, 2F] -> [M, 2F]. For the inside of other ops: no graph sees it."""
    return (_triton_bwd if _launch.use_triton(gate_up) else torch_bwd)(dy, gate_up)


_swiglu_backward = operator("swiglu_backward")(swiglu_backward)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def check_halves(gate_up: Tensor) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: got shape {tuple(gate_up.shape)}, allowed is an even last dimension (gate and up halves)"
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> silu(gate_up[..., :F]) * gate_up[..., F:], [..., F]. Differentiable.

    Raises TypeError for a dtype that is no float, ValueError for an odd last dimension.
    """
    check_float("gate_up", gate_up)
    check_halves(gate_up)
    return as_shape(_swiglu(as_rows(gate_up)), (*gate_up.shape[:-1], gate_up.shape[-1] // 2))
