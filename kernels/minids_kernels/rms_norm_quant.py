"""RMSNorm, with or without a residual, and quantisation of its output to fp8 in one pass over memory: what comes before
the fp8 products of a DeepSeek-V3 layer (arXiv 2412.19437, section 3.3).

    codes, scales = quantize_tiles(rms_norm(x, weight)) with the norm's output kept in fp32: it is not rounded to x's
    dtype in between

x [..., N] in fp32, bf16 or fp16, weight [N], N from 1 to 65,536; tiles, scales and codes as in fp8_quant.py. With a
residual, x + residual is rounded to the residual's dtype, normalised and returned as well. `transposed` adds the 128x1
tiles that the weight gradient multiplies; those need 128 rows side by side, so a second kernel reads x once more with
the first one's statistics. Not differentiable. Runs on every GPU Triton knows.
Test: tests/kernels/test_rms_norm_quant.py. Benchmark: benchmarks/ops/rms_norm_quant.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._launch import tl, triton
from ._operator import operator
from .fp8_quant import (
    E4M3,
    TILE,
    ScaleFormat,
    _check_input,
    empty_codes,
    encode_e4m3,
    native_e4m3,
    quantize_groups,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_reference,
    quantize_tiles_transposed_reference,
    scales_of,
)
from .rms_norm import _rows, check_inputs, load_normed, load_sum, rms_norm_reference, torch_fwd

__all__ = ["rms_norm_quant", "rms_norm_quant_reference"]

MAX_BLOCK = 16_384  # columns of a row held in registers


def rms_norm_quant_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale_format: ScaleFormat = "fp32",
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """Plain PyTorch, one step after the other; x [M, N], results as `rms_norm_quant`'s."""
    total = x if residual is None else (x.float() + residual.float()).to(residual.dtype)
    y = rms_norm_reference(total.float(), weight, eps)
    turned = quantize_tiles_transposed_reference(y, scale_format) if transposed else ()
    return *quantize_tiles_reference(y, scale_format), *(() if residual is None else (total,)), *turned


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _store_tiles(
    y, codes_ptr, scales_ptr, rows, start, M, N,
    UE8M0: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Quantises y [ROWS, BLOCK_N] fp32, columns start.. of rows [ROWS, 1]; codes [M, N], scales as
    `fp8_quant.empty_codes` has them."""
    GROUPS: tl.constexpr = BLOCK_N // 128
    codes, scale = quantize_groups(tl.reshape(y, (ROWS, GROUPS, 128)), UE8M0, NATIVE)
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    tl.store(codes_ptr + rows * N + cols, tl.reshape(codes, (ROWS, BLOCK_N)), mask=(rows < M) & (cols < N))
    groups = tl.cdiv(N, 128)
    group = start // 128 + tl.arange(0, GROUPS)[None, :]
    tl.store(scales_ptr + group.to(tl.int64) * M + rows, scale, mask=(rows < M) & (group < groups))


@triton.jit
def _rms_norm_quant_kernel(
    x_ptr, residual_ptr, weight_ptr, codes_ptr, scales_ptr, sum_ptr, rstd_ptr, M, N, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, UE8M0: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As _rms_norm_fwd_kernel, with codes and scales for y; BLOCK_N at least 128."""
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
            _store_tiles(part * rstd * weight, codes_ptr, scales_ptr, rows, start, M, N, UE8M0, NATIVE, ROWS, BLOCK_N)
    else:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        _store_tiles(x * rstd * weight, codes_ptr, scales_ptr, rows, 0, M, N, UE8M0, NATIVE, ROWS, BLOCK_N)


@triton.jit
def _rms_norm_quant_transposed_kernel(
    x_ptr, weight_ptr, rstd_ptr, codes_ptr, scales_ptr, M, N, x_stride,
    UE8M0: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows 128 i.., columns COLS j.. of y = x * rstd * weight; codes [N, M], scales as
    `fp8_quant.empty_codes` has them. Codes by integer arithmetic: see `encode_e4m3`."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    rows, cols = row[:, None], col[None, :]
    mask = (rows < M) & (cols < N)
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
    y = x * rstd[:, None] * tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    scale, inverse = scales_of(tl.max(tl.abs(y), axis=0), UE8M0)
    tl.store(codes_ptr + cols * M + rows, encode_e4m3(y * inverse[None, :], False), mask=mask)
    tl.store(scales_ptr + tl.program_id(0).to(tl.int64) * N + col, scale, mask=col < N)


# --- launchers --------------------------------------------------------------------------------------------------------


def _outputs(x: Tensor, residual: Tensor | None, transposed: bool) -> list[Tensor]:
    """Unwritten: codes and scales, the sum if there is a residual, transposed codes and scales if asked for."""
    rows, width = x.shape
    outputs = [*empty_codes(x, (rows, width), 1, TILE)]
    if residual is not None:
        outputs.append(residual.new_empty(rows, width))
    if transposed:
        outputs += empty_codes(x, (width, rows), 1, TILE)
    return outputs


def _triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, ue8m0: bool, transposed: bool
) -> list[Tensor]:
    rows, width = x.shape
    x, weight = _rows(x), weight.contiguous()
    outputs = _outputs(x, residual, transposed)
    rstd = x.new_empty(rows, dtype=torch.float32)
    other, total = (x, x) if residual is None else (_rows(residual), outputs[2])
    block = min(MAX_BLOCK, max(TILE, triton.next_power_of_2(width)))
    arch = _launch.arch(x)
    config = _launch.config("rms_norm_quant", "rms_norm_quant", arch, N=width)
    _launch.launch(
        _rms_norm_quant_kernel, (triton.cdiv(rows, config["ROWS"]),),
        x, other, weight, outputs[0], outputs[1], total, rstd, rows, width, x.stride(0), other.stride(0), eps,
        HAS_RESIDUAL=residual is not None, WIDE=block < width, UE8M0=ue8m0, NATIVE=native_e4m3(x), BLOCK_N=block,
        **config,
    )  # fmt: skip
    if transposed:
        config = _launch.config("rms_norm_quant", "rms_norm_quant_transposed", arch, N=width)
        _launch.launch(
            _rms_norm_quant_transposed_kernel, (triton.cdiv(rows, TILE), triton.cdiv(width, config["COLS"])),
            total, weight, rstd, outputs[-2], outputs[-1], rows, width, total.stride(0),
            UE8M0=ue8m0, TILE=TILE, **config,
        )  # fmt: skip
    return outputs


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _torch(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, ue8m0: bool, transposed: bool
) -> list[Tensor]:
    residual = None if residual is None else _rows(residual)
    y, total, _ = torch_fwd(_rows(x), weight, residual, eps, torch.float32)
    codes, scales, *turned = (quantize_tiles_both if transposed else quantize_tiles)(y, "ue8m0" if ue8m0 else "fp32")
    results = [codes, scales, *([] if residual is None else [total]), *turned]
    return [t.view(torch.uint8) if t.dtype == E4M3 else t for t in results]


# --- registration -----------------------------------------------------------------------------------------------------


@operator("rms_norm_quant")
def _rms_norm_quant(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, ue8m0: bool, transposed: bool
) -> list[Tensor]:
    """x, residual [M, N] -> codes [M, N] (uint8, e4m3's bits: `opcheck` knows no e4m3), scales [M, ceil(N / 128)]
    [, x + residual [M, N]][, codes [N, M], scales [N, ceil(M / 128)]]."""
    return (_triton if _launch.use_triton(x) else _torch)(x, weight, residual, eps, ue8m0, transposed)


@_rms_norm_quant.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, ue8m0: bool, transposed: bool) -> list[Tensor]:
    return _outputs(x, residual, transposed)


# --- public op --------------------------------------------------------------------------------------------------------


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale_format: ScaleFormat = "fp32",
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """x [..., N] fp32, bf16 or fp16, weight [N] -> codes [..., N] e4m3, scales [..., ceil(N / 128)] fp32; with
    `residual` [..., N] in x's dtype or fp32 those of x + residual, then x + residual itself; with `transposed`,
    of x as [M, N]: last codes [N, M] and scales [N, ceil(M / 128)] of 128x1 tiles. Not differentiable.

    Raises TypeError for another dtype or a residual of a dtype not allowed, ValueError for a weight that is not [N],
    a residual of another shape, N over 65,536 or a `scale_format` other than "fp32" and "ue8m0".
    """
    ue8m0 = _check_input("x", x, scale_format)
    check_inputs(x, weight, residual)
    rows = x.reshape(-1, x.shape[-1])
    results = _rms_norm_quant(
        rows, weight, None if residual is None else residual.reshape(rows.shape), eps, ue8m0, transposed
    )  # fmt: skip
    codes, scales, *others = (t.view(E4M3) if t.dtype == torch.uint8 else t for t in results)
    sums = [] if residual is None else [others[0].view(x.shape)]
    return codes.view(x.shape), scales.view(*x.shape[:-1], scales.shape[1]), *sums, *others[len(sums) :]
