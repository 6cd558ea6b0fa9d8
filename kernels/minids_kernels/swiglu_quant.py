"""SwiGLU and its gradient, quantised to fp8 in the same pass: the input of an expert's second product, and the gradient
that flows into both products of the first one's backward (DeepSeek-V3 report, arXiv 2412.19437, section 3.3).

    swiglu_quant(gate_up, weight) = quantize_tiles(swiglu(gate_up) * weight)
    swiglu_backward_quant(dy, gate_up) = quantize_tiles_both(the gradient of swiglu)

with what is quantised kept in fp32: it is not rounded to the inputs' dtype in between. gate_up [..., 2F] in fp32, bf16
or fp16, any F; tiles, scales and codes as in fp8_quant.py; the gradient is one matrix [M, 2F], tiles may lie across its
halves. Not differentiable. Runs on every GPU Triton knows.
Test: tests/kernels/test_swiglu_quant.py. Benchmark: benchmarks/ops/swiglu_quant.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._checks import as_rows, check_shape
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
    quantize_tiles_both_reference,
    quantize_tiles_reference,
    scales_of,
)
from .swiglu import _rows, check_halves, swiglu_gradients, swiglu_reference, swiglu_values, torch_bwd, torch_fwd

__all__ = [
    "swiglu_backward_quant",
    "swiglu_backward_quant_reference",
    "swiglu_quant",
    "swiglu_quant_reference",
]


def swiglu_quant_reference(
    gate_up: Tensor, scale_format: ScaleFormat = "fp32", weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: gate_up [M, 2F], weight [M] -> codes [M, F], scales [M, ceil(F / 128)]."""
    y = swiglu_reference(gate_up.float())
    return quantize_tiles_reference(y if weight is None else y * weight.float().unsqueeze(-1), scale_format)


def swiglu_backward_quant_reference(
    dy: Tensor, gate_up: Tensor, scale_format: ScaleFormat = "fp32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch: dy [M, F], gate_up [M, 2F] -> results as `swiglu_backward_quant`'s."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    dgate = dy.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    return quantize_tiles_both_reference(torch.cat([dgate, dy.float() * gate * sigmoid], -1), scale_format)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_quant_kernel(
    gate_up_ptr, weight_ptr, codes_ptr, scales_ptr, M, N, stride, HAS_WEIGHT: tl.constexpr,
    UE8M0: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ROWS rows, GROUPS tiles of each; gate_up [M, 2N], weight [M], codes [M, N], scales as
    `fp8_quant.empty_codes` has them."""
    groups = tl.cdiv(N, TILE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    rows = row[:, :, None]
    cols = group[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    mask = (rows < M) & (cols < N)
    gate = tl.load(gate_up_ptr + rows * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + rows * stride + N + cols, mask=mask, other=0.0).to(tl.float32)
    y = swiglu_values(gate, up)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)
    codes, scale = quantize_groups(y, UE8M0, NATIVE)
    tl.store(codes_ptr + rows * N + cols, codes, mask=mask)
    tl.store(scales_ptr + group.to(tl.int64) * M + row, scale, mask=(row < M) & (group < groups))


@triton.jit
def _swiglu_backward_quant_kernel(
    dy_ptr, gate_up_ptr, codes_ptr, scales_ptr, codes_t_ptr, scales_t_ptr, M, N, dy_stride, stride,
    UE8M0: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (2i + h, j) takes a 128x128 tile of the gradient [M, 2N]: rows 128 j.., columns 128 i.. of half h of the
    tiles. Gate, up and dy are read for both halves, by neighbours, so that one of them finds them in L2.

    codes [M, 2N], codes_t [2N, M], both scales as `fp8_quant.empty_codes` has them.
    """
    groups = tl.cdiv(2 * N, TILE)
    pair = tl.program_id(0) // 2
    second = tl.program_id(0) % 2 == 1
    group = pair + tl.where(second, tl.cdiv(groups, 2), 0)
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    col = group.to(tl.int64) * TILE + tl.arange(0, TILE)
    rows, cols = row[:, None], col[None, :]
    mask = (rows < M) & (cols < 2 * N)
    source = tl.where(col < N, col, col - N)[None, :]
    dy = tl.load(dy_ptr + rows * dy_stride + source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + rows * stride + source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + rows * stride + N + source, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = swiglu_gradients(dy, gate, up)
    grad = tl.where(cols < N, dgate, dup)
    size = tl.abs(grad)
    scale, inverse = scales_of(tl.max(size, axis=1), UE8M0)
    tl.store(codes_ptr + rows * (2 * N) + cols, encode_e4m3(grad * inverse[:, None], NATIVE), mask=mask)
    tl.store(scales_ptr + group.to(tl.int64) * M + row, scale, mask=(row < M) & (group < groups))
    scale, inverse = scales_of(tl.max(size, axis=0), UE8M0)
    tl.store(codes_t_ptr + cols * M + rows, encode_e4m3(grad * inverse[None, :], False), mask=mask)
    tl.store(scales_t_ptr + tl.program_id(1).to(tl.int64) * (2 * N) + col, scale, mask=col < 2 * N)


# --- launchers --------------------------------------------------------------------------------------------------------


def _triton(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = _rows(gate_up)
    codes, scales = empty_codes(gate_up, (rows, width), 1, TILE)
    config = _launch.config("swiglu_quant", "swiglu_quant", _launch.arch(gate_up), N=width)
    _launch.launch(
        _swiglu_quant_kernel, (triton.cdiv(rows, config["ROWS"]), triton.cdiv(scales.shape[1], config["GROUPS"])),
        gate_up, gate_up if weight is None else weight.contiguous(), codes, scales, rows, width, gate_up.stride(0),
        HAS_WEIGHT=weight is not None, UE8M0=ue8m0, NATIVE=native_e4m3(gate_up), TILE=TILE, **config,
    )  # fmt: skip
    return codes, scales


def _triton_backward(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = dy.shape
    dy, gate_up = _rows(dy), _rows(gate_up)
    codes, scales = empty_codes(gate_up, (rows, 2 * width), 1, TILE)
    codes_t, scales_t = empty_codes(gate_up, (2 * width, rows), 1, TILE)
    config = _launch.config("swiglu_quant", "swiglu_backward_quant", _launch.arch(gate_up), N=width)
    _launch.launch(
        _swiglu_backward_quant_kernel, (2 * triton.cdiv(scales.shape[1], 2), triton.cdiv(rows, TILE)),
        dy, gate_up, codes, scales, codes_t, scales_t, rows, width, dy.stride(0), gate_up.stride(0),
        UE8M0=ue8m0, NATIVE=native_e4m3(gate_up), TILE=TILE, **config,
    )  # fmt: skip
    return codes, scales, codes_t, scales_t


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _torch(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    y = torch_fwd(gate_up.float())
    if weight is not None:
        y.mul_(weight.unsqueeze(1))
    codes, scales = quantize_tiles(y, "ue8m0" if ue8m0 else "fp32")
    return codes.view(torch.uint8), scales


def _torch_backward(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = torch_bwd(dy.float(), gate_up.float())
    codes, scales, codes_t, scales_t = quantize_tiles_both(grad, "ue8m0" if ue8m0 else "fp32")
    return codes.view(torch.uint8), scales, codes_t.view(torch.uint8), scales_t


# --- registration -----------------------------------------------------------------------------------------------------


@operator("swiglu_quant")
def _swiglu_quant(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """gate_up [M, 2F], weight [M] -> codes [M, F] (uint8, e4m3's bits: `opcheck` knows no e4m3), scales
    [M, ceil(F / 128)]."""
    return (_triton if _launch.use_triton(gate_up) else _torch)(gate_up, weight, ue8m0)


@operator("swiglu_backward_quant")
def _swiglu_backward_quant(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [M, F], gate_up [M, 2F] -> codes [M, 2F], scales [M, ceil(2F / 128)], codes [2F, M], scales
    [2F, ceil(M / 128)]."""
    return (_triton_backward if _launch.use_triton(gate_up) else _torch_backward)(dy, gate_up, ue8m0)


@_swiglu_quant.register_fake
def _(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return empty_codes(gate_up, (gate_up.shape[0], gate_up.shape[1] // 2), 1, TILE)


@_swiglu_backward_quant.register_fake
def _(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape
    return *empty_codes(gate_up, (rows, width), 1, TILE), *empty_codes(gate_up, (width, rows), 1, TILE)


# --- public ops -------------------------------------------------------------------------------------------------------


def swiglu_quant(
    gate_up: Tensor, scale_format: ScaleFormat = "fp32", weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """gate_up [..., 2F] fp32, bf16 or fp16 -> swiglu's codes [..., F] e4m3 and scales [..., ceil(F / 128)] fp32; with
    `weight` [...], a router's, those of swiglu times it. Not differentiable.

    Raises TypeError for another dtype, ValueError for an odd last dimension, a weight of another shape or a
    `scale_format` other than "fp32" and "ue8m0".
    """
    ue8m0 = _check_input("gate_up", gate_up, scale_format)
    check_halves(gate_up)
    *outer, width = gate_up.shape
    if weight is not None:
        _check_input("weight", weight, scale_format)
        check_shape("weight", weight, tuple(outer))
        weight = weight.reshape(-1)
    codes, scales = _swiglu_quant(as_rows(gate_up), weight, ue8m0)
    return codes.view(E4M3).view(*outer, width // 2), scales.view(*outer, scales.shape[1])


def swiglu_backward_quant(
    dy: Tensor, gate_up: Tensor, scale_format: ScaleFormat = "fp32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [M, F], gate_up [M, 2F] -> gradient of swiglu by gate_up [M, 2F] as codes [M, 2F] e4m3 and scales
    [M, ceil(2F / 128)] of 1x128 tiles, then codes [2F, M] and scales [2F, ceil(M / 128)] of 128x1 tiles.

    Raises TypeError for another dtype than fp32, bf16 and fp16, ValueError for shapes that do not fit or a
    `scale_format` other than "fp32" and "ue8m0".
    """
    ue8m0 = _check_input("gate_up", gate_up, scale_format)
    _check_input("dy", dy, scale_format)
    check_shape("gate_up", gate_up, (None, None))
    check_halves(gate_up)
    check_shape("dy", dy, (gate_up.shape[0], gate_up.shape[1] // 2))
    codes, scales, codes_t, scales_t = _swiglu_backward_quant(dy, gate_up, ue8m0)
    return codes.view(E4M3), scales, codes_t.view(E4M3), scales_t
