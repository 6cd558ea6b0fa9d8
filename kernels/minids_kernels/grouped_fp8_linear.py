"""Experts' linear layer y[t] = x[t] @ w[e].T whose three products are all in fp8 (DeepSeek-V3 report, arXiv 2412.19437,
section 3.3): `fp8_linear` for segments of rows, as `grouped_gemm` has them.

    y  [T, N]    = x  [T, K] in 1x128 tiles  @ w   [E, N, K] in 128x128 blocks
    dx [T, K]    = dy [T, N] in 1x128 tiles  @ w.T in the same blocks, codes transposed
    dw [E, N, K] = dy.T @ x  in 128x1 tiles of the experts' segments, summed in fp32

For the backward pass x and w are kept as fp8 codes only. Runs wherever `grouped_fp8_gemm` does.
Test: tests/kernels/test_grouped_fp8_gemm.py. Benchmark: benchmarks/ops/grouped_fp8_gemm.py has its products.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_dtype, check_shape, compute_dtype
from ._operator import operator
from .fp8_quant import E4M3, TILE, quantize_blocks, quantize_tiles
from .grouped_fp8_gemm import (
    _check_depth,
    _check_offsets,
    _empty_segments,
    grouped_fp8_gemm,
    grouped_fp8_gemm_wgrad,
    quantize_segments_transposed,
)

__all__ = ["grouped_fp8_linear", "grouped_fp8_linear_reference"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_fp8_linear_reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """The products without quantisation, in fp32: x [T, K], w [E, N, K] -> [T, N] in x's dtype."""
    bounds = itertools.pairwise(offsets.tolist())
    pieces = [x[start:end].float() @ m.float().T for (start, end), m in zip(bounds, w, strict=True)]
    rest = x.new_zeros(x.shape[0] - int(offsets[-1]), w.shape[1], dtype=torch.float32)
    return torch.cat([*pieces, rest]).to(x.dtype)


# --- weights' codes ---------------------------------------------------------------------------------------------------


def quantize_experts(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [E, N, K] -> codes [E, N, K] as uint8, scales [E, ceil(N / 128), ceil(K / 128)]; a block is one expert's."""
    experts, rows, width = w.shape
    padded = F.pad(w, (0, 0, 0, -rows % TILE)) if rows % TILE else w
    codes, scales = quantize_blocks(padded.reshape(experts * padded.shape[1], width))
    codes = codes.view(torch.uint8).view(padded.shape)[:, :rows].contiguous()
    return codes, scales.view(experts, -(-rows // TILE), scales.shape[1])


def empty_experts(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as `quantize_experts` gives them, unwritten."""
    experts, rows, width = w.shape
    scales = w.new_empty(experts, -(-rows // TILE), -(-width // TILE), dtype=torch.float32)
    return w.new_empty(w.shape, dtype=torch.uint8), scales


# --- registration -----------------------------------------------------------------------------------------------------


@operator("grouped_fp8_linear")
def _grouped_fp8_linear(
    x: Tensor, w: Tensor, offsets: Tensor, out_dtype: torch.dtype, for_x: bool, for_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y [T, N]; for x's gradient w's codes and scales, for w's gradient x's codes and scales in tiles of its
    segments, else empty tensors. Codes are uint8."""
    w_codes, w_scales = quantize_experts(w)
    y = grouped_fp8_gemm(*quantize_tiles(x), w_codes.view(E4M3), w_scales, offsets, out_dtype)
    if not for_x:
        w_codes, w_scales = w_codes.new_empty(0, 0, 0), w_scales.new_empty(0, 0, 0)
    if not for_w:
        return y, w_codes, w_scales, w_codes.new_empty(0, 0), w_scales.new_empty(0, 0)
    x_codes, x_scales = quantize_segments_transposed(x, offsets)
    return y, w_codes, w_scales, x_codes.view(torch.uint8), x_scales


@_grouped_fp8_linear.register_fake
def _(
    x: Tensor, w: Tensor, offsets: Tensor, out_dtype: torch.dtype, for_x: bool, for_w: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, scales = empty_experts(w if for_x else w.new_empty(0, 0, 0))
    empty = x.new_empty(0, 0, dtype=torch.uint8), x.new_empty(0, 0, dtype=torch.float32)
    kept = _empty_segments(x, offsets) if for_w else empty
    return x.new_empty(x.shape[0], w.shape[1], dtype=out_dtype), codes, scales, *kept


def _setup(ctx, inputs, output) -> None:
    x, w, offsets, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(offsets, *output[1:])
    ctx.dtypes = x.dtype, w.dtype


def _backward(ctx, dy, *_):
    offsets, w_codes, w_scales, x_codes, x_scales = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        turned = w_codes.transpose(1, 2).contiguous().view(E4M3), w_scales.transpose(1, 2)
        dx = grouped_fp8_gemm(*quantize_tiles(dy), *turned, offsets, ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        tiles = quantize_segments_transposed(dy, offsets)
        dw = grouped_fp8_gemm_wgrad(*tiles, x_codes.view(E4M3), x_scales, offsets).to(ctx.dtypes[1])
    return dx, dw, None, None, None, None


_grouped_fp8_linear.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def grouped_fp8_linear(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x [T, K] sorted by expert, w [E, N, K], offsets int32 [E + 1] -> [T, N]: x[t] @ w[e].T as `grouped_gemm` has it,
    by fp8 products forward and backward, in x's dtype (autocast's under autocast). x and w in bf16, fp16 or fp32, each
    gradient in its tensor's dtype. Differentiable in both, once. w is quantised once a call; for the backward pass x
    and w are kept as fp8 codes only.

    Raises TypeError for another dtype, ValueError for shapes that do not fit and for K or N of 0.
    """
    check_dtype("x", x, *DTYPES)
    check_dtype("w", w, *DTYPES)
    check_shape("x", x, (None, None))
    _check_depth("x", x)
    check_shape("w", w, (None, None, x.shape[1]))
    if w.shape[1] == 0:
        raise ValueError(f"w: got shape {tuple(w.shape)}, allowed is 1 row an expert or more")
    _check_offsets(offsets, w.shape[0])
    grad = torch.is_grad_enabled()
    y, *_ = _grouped_fp8_linear(x, w, offsets, compute_dtype(x), grad and x.requires_grad, grad and w.requires_grad)
    return y
