"""Dense SwiGLU feed-forward y = swiglu(x @ w_gate_up.T) @ w_down.T with all products in fp8 (DeepSeek-V3 report, arXiv
2412.19437, section 3.3): two `fp8_linear` with fewer passes over memory in between.

The activation goes from gate_up straight to codes, and so does its gradient. For the backward x and the weights are
kept as codes and gate_up [M, 2F] as it is, from which the activation is computed again. Codes are e4m3 with fp32
scales, of x and gradients in 1x128 and 128x1 tiles, of weights in 128x128 blocks, made once a call. Runs wherever
`fp8_gemm` and `swiglu_quant` do.
Test: tests/kernels/test_fp8_mlp.py. Benchmark: benchmarks/ops/fp8_gemm.py and swiglu_quant.py have its parts.
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
from .swiglu import swiglu, swiglu_reference
from .swiglu_quant import swiglu_backward_quant, swiglu_quant

__all__ = ["fp8_mlp", "fp8_mlp_reference"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fp8_mlp_reference(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Without quantisation, in fp32: x [..., K], w_gate_up [2F, K], w_down [N, F] -> [..., N] in x's dtype."""
    return (swiglu_reference(x.float() @ w_gate_up.float().T) @ w_down.float().T).to(x.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("fp8_mlp")
def _fp8_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """x [M, K] -> y [M, N] in `dtype`; if `keep`, for the backward: gate_up [M, 2F] in `dtype`, then codes (uint8) and
    scales of x in 128x1 tiles, of w_gate_up and of w_down."""
    gate_up_codes, down_codes = quantize_blocks(w_gate_up), quantize_blocks(w_down)
    codes, scales, *transposed = quantize_tiles_both(x) if keep else quantize_tiles(x)
    gate_up = fp8_gemm(codes, scales, *gate_up_codes, dtype)
    y = fp8_gemm(*swiglu_quant(gate_up), *down_codes, dtype)
    if not keep:
        return y, []
    kept = (*transposed, *gate_up_codes, *down_codes)
    return y, [gate_up, *(t.view(torch.uint8) if t.dtype == E4M3 else t for t in kept)]


@_fp8_mlp.register_fake
def _(x: Tensor, w_gate_up: Tensor, w_down: Tensor, dtype: torch.dtype, keep: bool) -> tuple[Tensor, list[Tensor]]:
    y = x.new_empty(x.shape[0], w_down.shape[0], dtype=dtype)
    if not keep:
        return y, []
    gate_up = x.new_empty(x.shape[0], w_gate_up.shape[0], dtype=dtype)
    weights = (t for w in (w_gate_up, w_down) for t in empty_codes(x, w.shape, TILE, TILE))
    return y, [gate_up, *empty_codes(x, x.shape[::-1], 1, TILE), *weights]


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1])
    ctx.dtypes = [t.dtype for t in inputs[:3]]


def _backward(ctx, dy, *_):
    if dy is None:  # nothing came back
        return (None,) * 5
    gate_up, x_codes, x_scales, *gate_up_codes, down_codes, down_scales = ctx.saved_tensors
    if dy.shape[0] == 0:
        shapes = (0, x_codes.shape[0]), gate_up_codes[0].shape, down_codes.shape
        grads = [dy.new_zeros(shape) for shape in shapes]
    else:
        codes, scales, dy_codes, dy_scales = quantize_tiles_both(dy)
        dhidden = fp8_gemm(codes, scales, *transpose_blocks(down_codes, down_scales), gate_up.dtype)
        dw_down = fp8_gemm_wgrad(dy_codes, dy_scales, *quantize_tiles_transposed(swiglu(gate_up)))
        codes, scales, codes_t, scales_t = swiglu_backward_quant(dhidden, gate_up)
        dw_gate_up = fp8_gemm_wgrad(codes_t, scales_t, x_codes.view(E4M3), x_scales)
        dx = fp8_gemm(codes, scales, *transpose_blocks(*gate_up_codes), ctx.dtypes[0])
        grads = [dx, dw_gate_up, dw_down]
    return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


_fp8_mlp.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def fp8_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """swiglu(x [..., K] @ w_gate_up [2F, K].T) @ w_down [N, F].T -> [..., N] in x's dtype (autocast's under autocast),
    by fp8 products forward and backward. All in bf16, fp16 or fp32, each gradient in its tensor's dtype. Differentiable
    in all three, once.

    Raises TypeError for another dtype, ValueError for weights that are not [2F, K] and [N, F] or for K or F of 0.
    """
    for name, tensor in (("x", x), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        check_dtype(name, tensor, *DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is a last dimension of 1 or more")
    check_shape("w_down", w_down, (None, None))
    if w_down.shape[1] == 0:
        raise ValueError(f"w_down: got shape {tuple(w_down.shape)}, allowed is a last dimension of 1 or more")
    check_shape("w_gate_up", w_gate_up, (2 * w_down.shape[1], x.shape[-1]))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate_up, w_down))
    y, _ = _fp8_mlp(as_rows(x), w_gate_up, w_down, compute_dtype(x), keep)
    return as_shape(y, (*x.shape[:-1], w_down.shape[0]))
