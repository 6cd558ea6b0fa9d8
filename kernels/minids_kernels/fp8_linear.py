"""Linear layer y = x @ weight.T whose three products are all in fp8 (DeepSeek-V3 report, arXiv 2412.19437, 3.3).

    y  [M, N] = x  [M, K] in 1x128 tiles    @ weight   in 128x128 blocks
    dx [M, K] = dy [M, N] in 1x128 tiles    @ weight.T in the same blocks, codes transposed
    dw [N, K] = dy.T      in 128x1 tiles    @ x.T      in 128x1 tiles, summed in fp32

Codes are e4m3 with fp32 scales. The weight is quantised once a call, and for the backward pass x and weight are kept as
these codes only. Nothing outlives a call and its backward: a tensor does not tell that it was changed, since fused
optimizers and writes through `weight.data` leave its version as it was. Who multiplies with a weight that never changes
keeps `quantize_blocks` of it and calls `fp8_gemm`. Runs wherever `fp8_gemm` and `fp8_quant` do.
Test: tests/kernels/test_fp8_linear.py. Benchmark: benchmarks/ops/fp8_gemm.py has its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import as_rows, as_shape, check_dtype, check_shape, compute_dtype
from ._operator import operator
from .fp8_gemm import fp8_gemm, fp8_gemm_wgrad
from .fp8_quant import (
    E4M3,
    TILE,
    empty_codes,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
    transpose_blocks,
)

__all__ = ["fp8_linear", "fp8_linear_reference"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fp8_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The product without quantisation, in fp32: x [..., K], weight [N, K] -> [..., N] in x's dtype."""
    return (x.float() @ weight.float().T).to(x.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("fp8_linear")
def _fp8_linear(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] -> y [M, N] in out_dtype; for x's gradient the weight's codes [N, K] and scales, for the
    weight's gradient x's 128x1 codes [K, M] and scales [K, ceil(M / 128)], else empty tensors. Codes are uint8."""
    w_codes, w_scales = quantize_blocks(weight)
    if for_weight:
        codes, scales, x_codes, x_scales = quantize_tiles_both(x)
    else:
        codes, scales = quantize_tiles(x)
        x_codes, x_scales = codes.new_empty(0, 0), scales.new_empty(0, 0)
    y = fp8_gemm(codes, scales, w_codes, w_scales, out_dtype)
    if not for_x:
        w_codes, w_scales = w_codes.new_empty(0, 0), w_scales.new_empty(0, 0)
    return y, w_codes.view(torch.uint8), w_scales, x_codes.view(torch.uint8), x_scales


@_fp8_linear.register_fake
def _(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w_shape, x_shape = weight.shape if for_x else (0, 0), x.shape[::-1] if for_weight else (0, 0)
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    return y, *empty_codes(x, w_shape, TILE, TILE), *empty_codes(x, x_shape, 1, TILE)


def _setup(ctx, inputs, output) -> None:
    x, weight, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the codes' size would come back for them
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = x.dtype, weight.dtype


def _backward(ctx, dy, *_):
    if dy is None:  # nothing came back
        return (None,) * 5
    w_codes, w_scales, x_codes, x_scales = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad[:2]
    dx = dweight = None
    if for_x and for_weight:
        codes, scales, dy_codes, dy_scales = quantize_tiles_both(dy)
    elif for_x:
        codes, scales = quantize_tiles(dy)
    else:
        dy_codes, dy_scales = quantize_tiles_transposed(dy)
    if for_x:
        dx = fp8_gemm(codes, scales, *transpose_blocks(w_codes, w_scales), ctx.dtypes[0])
    if for_weight and dy.shape[0]:
        dweight = fp8_gemm_wgrad(dy_codes, dy_scales, x_codes.view(E4M3), x_scales).to(ctx.dtypes[1])
    elif for_weight:
        dweight = dy.new_zeros(dy.shape[1], x_codes.shape[0], dtype=ctx.dtypes[1])
    return dx, dweight, None, None, None


_fp8_linear.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in x's dtype (autocast's under autocast), by fp8 products forward and
    backward. x and weight in bf16, fp16 or fp32, each gradient in its tensor's dtype. Differentiable in both, once.

    Raises TypeError for another dtype, ValueError for a weight that is not [N, K] or for K = 0.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        check_dtype(name, tensor, *DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is a last dimension of 1 or more")
    check_shape("weight", weight, (None, x.shape[-1]))
    grad = torch.is_grad_enabled()
    y, *_ = _fp8_linear(as_rows(x), weight, compute_dtype(x), grad and x.requires_grad, grad and weight.requires_grad)
    return as_shape(y, (*x.shape[:-1], weight.shape[0]))
