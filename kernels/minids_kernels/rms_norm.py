"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

x [..., N] in fp32, bf16 or fp16 (fp64 on the PyTorch path), weight [N] in any of them, N from 1 to 65,536. Statistics
are fp32 (fp64 for fp64). With a residual of x's shape, x + residual, rounded to the residual's dtype (x's or fp32), is
normalised and returned too. Under autocast the output comes in autocast's dtype, since what follows a norm is a matrix
product.

Gradient, with g = dy * weight and xhat = x * rstd: dx = rstd * (g - xhat * mean(g * xhat)), dweight = sum over rows of
dy * xhat. Each program of the backward sums its own rows' dweight, the programs' sums are added up afterwards in one
order: no atomics, the same bits every time. Runs on every GPU Triton knows.
Test: tests/kernels/test_rms_norm.py. Benchmark: benchmarks/ops/rms_norm.py.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from . import _launch
from ._checks import as_rows, as_shape, check_float, check_shape, compute_dtype
from ._launch import tl, triton
from ._operator import operator

__all__ = ["rms_norm", "rms_norm_reference"]

MAX_WIDTH = 65_536
MAX_BLOCK_FWD = 16_384  # columns of a row held in registers
MAX_BLOCK_BWD = 8_192
SUM_ROWS, SUM_BLOCK_N = 128, 32  # of a program that sums partial results


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain fp32 formula; x [..., N], weight [N] -> [..., N] in x's dtype."""
    xf = x.float() if x.dtype != torch.float64 else x
    return (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps) * weight.to(xf.dtype)).to(x.dtype)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_sum(
    x_ptr, residual_ptr, rows, cols, mask, x_stride, residual_stride, dtype: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """x, or x + residual, rounded to `dtype` as it will be stored, in fp32: [ROWS, BLOCK_N]."""
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    return x.to(tl.float32)


@triton.jit
def load_normed(
    x_ptr, residual_ptr, sum_ptr, rstd_ptr, row, M, N, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A first pass over rows `row` [ROWS] of x (+ residual, written to sum): -> x [ROWS, BLOCK_N] in fp32 (if
    WIDE, nothing of use), and rstd [ROWS, 1], also written."""
    rows = row[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    if WIDE:
        squares = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in tl.range(0, N, BLOCK_N):
            mask = (rows < M) & (start + cols < N)
            part = load_sum(
                x_ptr, residual_ptr, rows, start + cols, mask, x_stride, residual_stride, dtype, HAS_RESIDUAL
            )  # fmt: skip
            squares += part * part
            if HAS_RESIDUAL:
                tl.store(sum_ptr + rows * N + start + cols, part.to(dtype), mask=mask)
        x = squares
    else:
        mask = (rows < M) & (cols < N)
        x = load_sum(x_ptr, residual_ptr, rows, cols, mask, x_stride, residual_stride, dtype, HAS_RESIDUAL)
        squares = x * x
        if HAS_RESIDUAL:
            tl.store(sum_ptr + rows * N + cols, x.to(dtype), mask=mask)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    return x, rstd[:, None]


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, M, N, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; y, sum [M, N] contiguous, rstd [M]. WIDE: rows of more than BLOCK_N columns, read twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    x, rstd = load_normed(
        x_ptr, residual_ptr, sum_ptr, rstd_ptr, row, M, N, x_stride, residual_stride, eps, HAS_RESIDUAL, WIDE, ROWS,
        BLOCK_N,
    )  # fmt: skip
    if WIDE:
        for start in tl.range(0, N, BLOCK_N):
            mask = (rows < M) & (start + cols < N)
            part = load_sum(
                x_ptr, residual_ptr, rows, start + cols, mask, x_stride, residual_stride, dtype, HAS_RESIDUAL
            )  # fmt: skip
            weight = tl.load(weight_ptr + start + cols, mask=start + cols < N, other=0.0).to(tl.float32)
            tl.store(y_ptr + rows * N + start + cols, (part * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)
    else:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        mask = (rows < M) & (cols < N)
        tl.store(y_ptr + rows * N + cols, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, dsum_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, M, N, dy_stride, x_stride, dsum_stride, steps,
    HAS_DSUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes `steps` blocks of ROWS rows one after the other and sums their dweight in registers; dx [M, N]
    contiguous, partial [programs, N] fp32."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        rows = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        xhat = x * rstd[:, None]
        dweight += tl.sum(dy * xhat, axis=0)
        g = dy * weight[None, :]
        dx = rstd[:, None] * (g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None])
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + rows[:, None] * dsum_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program * N + cols, dweight, mask=cols < N)


@triton.jit
def _rms_norm_wide_dx_kernel(
    dy_ptr, x_ptr, dsum_ptr, weight_ptr, rstd_ptr, dx_ptr, N, dy_stride, x_stride, dsum_stride,
    HAS_DSUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row too wide for registers: one pass for mean(g * xhat), one for dx."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < N, other=0.0).to(tl.float32)
        products += dy * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * x
    mean = tl.sum(products, axis=0) * rstd / N
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < N, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        dx = rstd * (dy * weight - x * rstd * mean)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * dsum_stride + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _rms_norm_wide_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, partial_ptr, M, N, dy_stride, x_stride, steps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (p, j): dweight of columns j * BLOCK_N.. over `steps` blocks of ROWS rows; partial [programs, N] fp32."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(steps):
        rows = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(dy * x * tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None], axis=0)
    tl.store(partial_ptr + program * N + cols, dweight, mask=cols < N)


@triton.jit
def _sum_partials_kernel(partial_ptr, out_ptr, M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [N]: the sum of partial [M, N] over its rows; BLOCK_N columns a program."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in tl.range(0, M, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial_ptr + rows * N + cols, mask=(rows < M) & (cols < N), other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < N)


# --- launchers --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [M, N] with neighbouring columns side by side; rows may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _triton_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    x, weight = _rows(x), weight.contiguous()
    y = x.new_empty(rows, width, dtype=out_dtype)
    rstd = x.new_empty(rows, dtype=torch.float32)
    total = x if residual is None else residual.new_empty(rows, width)
    other = x if residual is None else _rows(residual)
    block = min(MAX_BLOCK_FWD, triton.next_power_of_2(width))
    config = _launch.config("rms_norm", "rms_norm_fwd", _launch.arch(x), N=width)
    _launch.launch(
        _rms_norm_fwd_kernel, (triton.cdiv(rows, config["ROWS"]),),
        x, other, weight, y, total, rstd, rows, width, x.stride(0), other.stride(0), eps,
        HAS_RESIDUAL=residual is not None, WIDE=block < width, BLOCK_N=block, **config,
    )  # fmt: skip
    return y, total, rstd


def _shares(blocks: int, programs: int) -> tuple[int, int]:
    """How many programs share `blocks` blocks of rows, and how many each takes."""
    steps = max(1, triton.cdiv(blocks, programs))
    return triton.cdiv(blocks, steps), steps


def _triton_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    dy, x, weight = _rows(dy), _rows(x), weight.contiguous()
    other = dy if dsum is None else _rows(dsum)
    dx = x.new_empty(rows, width)
    wide = width > MAX_BLOCK_BWD
    arch = _launch.arch(x)
    config = dict(_launch.config("rms_norm", "rms_norm_wide_bwd" if wide else "rms_norm_bwd", arch, N=width))
    programs = config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(x)
    programs, steps = _shares(triton.cdiv(rows, config["ROWS"]), programs)
    partial = x.new_empty(programs, width, dtype=torch.float32)
    if wide:
        _launch.launch(
            _rms_norm_wide_dx_kernel, (rows,),
            dy, x, other, weight, rstd, dx, width, dy.stride(0), x.stride(0), other.stride(0),
            HAS_DSUM=dsum is not None, BLOCK_N=config.pop("DX_BLOCK_N"), num_warps=config["num_warps"],
        )  # fmt: skip
        _launch.launch(
            _rms_norm_wide_dweight_kernel, (programs, triton.cdiv(width, config["BLOCK_N"])),
            dy, x, rstd, partial, rows, width, dy.stride(0), x.stride(0), steps, **config,
        )  # fmt: skip
    else:
        _launch.launch(
            _rms_norm_bwd_kernel, (programs,),
            dy, x, other, weight, rstd, dx, partial, rows, width, dy.stride(0), x.stride(0), other.stride(0), steps,
            HAS_DSUM=dsum is not None, BLOCK_N=triton.next_power_of_2(width), **config,
        )  # fmt: skip
    dweight = torch.empty_like(weight)
    _launch.launch(
        _sum_partials_kernel, (triton.cdiv(width, SUM_BLOCK_N),), partial, dweight, programs, width,
        ROWS=SUM_ROWS, BLOCK_N=SUM_BLOCK_N,
    )  # fmt: skip
    return dx, dweight


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def torch_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Few passes over memory: a norm and two products."""
    if residual is not None:
        x = x + residual
    statistic = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=statistic)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * rstd.unsqueeze(-1)
    y = y.mul_(weight) if y.dtype == weight.dtype else y * weight
    return y.to(out_dtype), x, rstd


def _torch_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx = rstd * (dy * w - x * rstd^2 * mean(dy * w * x)) is what a layer norm of mean 0 gives back, plus rstd times
    the mean of dy * w, which that takes away."""
    statistic, width = rstd.dtype, x.shape[-1]
    xs, dys, ws, column = x.to(statistic), dy.to(statistic), weight.to(statistic), rstd.unsqueeze(-1)
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        dys, xs, [width], torch.zeros_like(column), column, ws, None, [True, True, False]
    )
    dx += (dys @ ws).mul_(rstd).div_(width).unsqueeze(-1)
    if dsum is not None:
        dx += dsum
    return dx.to(x.dtype), dweight.to(weight.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, N] -> y [M, N] in out_dtype, rstd [M]."""
    y, _, rstd = (_triton_fwd if _launch.use_triton(x) else torch_fwd)(x, weight, None, eps, out_dtype)
    return y, rstd


@operator("add_rms_norm")
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N] -> y [M, N] in out_dtype, x + residual [M, N] in residual's, rstd [M]."""
    return (_triton_fwd if _launch.use_triton(x) else torch_fwd)(x, weight, residual, eps, out_dtype)


@operator("rms_norm_backward")
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dy, x [M, N], rstd [M], dsum [M, N] or None (a gradient to add to dx) -> dx [M, N], dweight [N]."""
    return (_triton_bwd if _launch.use_triton(x) else _torch_bwd)(dy, x, weight, rstd, dsum)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), _statistic(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), residual.new_empty(x.shape), _statistic(x)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, *_ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx, dy, drstd):
    return *_rms_norm_backward(dy, *ctx.saved_tensors, None), None, None


def _add_setup(ctx, inputs, output) -> None:
    _, total, rstd = output
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # a last layer's sum goes nowhere
    ctx.save_for_backward(total, inputs[2], rstd)


def _add_backward(ctx, dy, dsum, drstd):
    dtotal, dweight = dsum, None
    if dy is not None:
        dtotal, dweight = _rms_norm_backward(dy, *ctx.saved_tensors, dsum)
    return None if dtotal is None else dtotal.to(ctx.dtype), dtotal, dweight, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_add_rms_norm.register_autograd(_add_backward, setup_context=_add_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def check_inputs(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check_float("x", x)
    check_float("weight", weight)
    if x.dim() == 0 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is a last dimension of 1 to {MAX_WIDTH}")
    check_shape("weight", weight, (x.shape[-1],))
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        allowed = (x.dtype, torch.promote_types(x.dtype, torch.float32))
        if residual.dtype not in allowed:
            raise TypeError(f"residual: got {residual.dtype}, allowed is x's {allowed[0]} or {allowed[1]}")


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., N], weight [N] -> y [..., N] in x's dtype (autocast's under autocast); with `residual` [..., N] in x's
    dtype or fp32: y of x + residual, and x + residual itself in the residual's dtype. Differentiable in x, weight and
    residual.

    Raises TypeError for a dtype that is no float or a residual of a dtype not allowed, ValueError for a weight that
    is not [N], a residual of another shape, or N over 65,536.
    """
    check_inputs(x, weight, residual)
    rows, dtype = as_rows(x), compute_dtype(x)
    if residual is None:
        y, _ = _rms_norm(rows, weight, eps, dtype)
        return as_shape(y, x.shape)
    y, total, _ = _add_rms_norm(rows, as_rows(residual), weight, eps, dtype)
    return as_shape(y, x.shape), as_shape(total, x.shape)
