"""Linear layer y = x @ weight.T whose three products are all in fp8 (DeepSeek-V3 report, arXiv 2412.19437, 3.3).

    y  [M, N] = x  [M, K] in 1x128 tiles    @ weight   in 128x128 blocks
    dx [M, K] = dy [M, N] in 1x128 tiles    @ weight.T in the same blocks, codes transposed
    dw [N, K] = dy.T      in 128x1 tiles    @ x.T      in 128x1 tiles, summed in fp32

Codes are e4m3 with fp32 scales. For the backward pass x is kept as fp8 codes only. A weight is quantised when it is
first used after a change: its codes are kept beside it, found by the tensor itself and its version, which counts the
changes in place that autograd sees. Writing through `weight.data` escapes that count: use `torch.no_grad()` instead.
While a CUDA graph of a training step is captured, weights are always quantised, so that replays see the new ones.
Runs wherever `fp8_gemm` and `fp8_quant` do.
Test: tests/kernels/test_fp8_linear.py. Benchmark: benchmarks/ops/fp8_gemm.py has its products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._checks import as_rows, as_shape, check_shape, compute_dtype
from ._operator import operator
from .fp8_gemm import fp8_gemm, fp8_gemm_wgrad
from .fp8_quant import quantize_blocks, quantize_tiles, quantize_tiles_both, quantize_tiles_transposed

__all__ = ["fp8_linear", "fp8_linear_reference"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fp8_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The product without quantisation, in fp32: x [..., K], weight [N, K] -> [..., N] in x's dtype."""
    return (x.float() @ weight.float().T).to(x.dtype)


# --- weights' codes ---------------------------------------------------------------------------------------------------


class _Codes:
    """A weight's codes [N, K] and scales as of one state of it; the transposed ones once they are asked for."""

    def __init__(self, weight: Tensor, state: tuple[object, ...] = ()) -> None:
        self.state = state
        self.plain = quantize_blocks(weight)
        self._transposed: tuple[Tensor, Tensor] | None = None

    @property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """Blocks are square: only their codes turn."""
        if self._transposed is None:
            codes, scales = self.plain
            self._transposed = codes.view(torch.uint8).T.contiguous().view(codes.dtype), scales.T
        return self._transposed


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when the weight is written to in place, or given other memory."""
    return weight._version, weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> _Codes; an entry dies with its weight


def _weight_codes(weight: Tensor, training: bool) -> _Codes:
    capturing = training and weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or weight.is_inference():  # the latter count no versions
        return _Codes(weight)
    state = _state(weight)
    kept: _Codes | None = _kept.get(weight)
    if kept is None or kept.state != state:
        kept = _kept[weight] = _Codes(weight, state)
    return kept


# --- registration -----------------------------------------------------------------------------------------------------


@operator("fp8_linear")
def _fp8_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] -> y [M, N] in out_dtype; if training, also x's 128x1 codes [K, M] and their scales
    [K, ceil(M / 128)], else two empty tensors."""
    weight_codes = _weight_codes(weight, training)
    if training:
        codes, scales, codes_t, scales_t = quantize_tiles_both(x)
    else:
        codes, scales = quantize_tiles(x)
        codes_t, scales_t = codes.new_empty(0, 0), scales.new_empty(0, 0)
    return fp8_gemm(codes, scales, *weight_codes.plain, out_dtype), codes_t, scales_t


@operator("fp8_linear_dgrad")
def _fp8_linear_dgrad(codes: Tensor, scales: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dy's 1x128 codes [M, N] and scales, weight [N, K] -> dx [M, K] in out_dtype."""
    return fp8_gemm(codes, scales, *_weight_codes(weight, True).transposed, out_dtype)


@_fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, out_dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape if training else (0, 0)
    codes_t = x.new_empty(width, rows, dtype=torch.float8_e4m3fn)
    scales_t = x.new_empty(width, -(-rows // 128), dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype), codes_t, scales_t


@_fp8_linear_dgrad.register_fake
def _(codes: Tensor, scales: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    return weight.new_empty(codes.shape[0], weight.shape[1], dtype=out_dtype)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    _, codes_t, scales_t = output
    ctx.mark_non_differentiable(codes_t, scales_t)
    ctx.save_for_backward(weight, codes_t, scales_t)
    ctx.x_dtype = x.dtype


def _backward(ctx, dy, *_):
    weight, codes_t, scales_t = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad[:2]
    if dy.shape[0] == 0:
        return weight.new_empty(0, weight.shape[1], dtype=ctx.x_dtype), torch.zeros_like(weight), None, None
    dx = dweight = None
    if for_x and for_weight:
        codes, scales, dy_codes_t, dy_scales_t = quantize_tiles_both(dy)
    elif for_x:
        codes, scales = quantize_tiles(dy)
    else:
        dy_codes_t, dy_scales_t = quantize_tiles_transposed(dy)
    if for_x:
        dx = _fp8_linear_dgrad(codes, scales, weight, ctx.x_dtype)
    if for_weight:
        dweight = fp8_gemm_wgrad(dy_codes_t, dy_scales_t, codes_t, scales_t).to(weight.dtype)
    return dx, dweight, None, None


_fp8_linear.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in x's dtype (autocast's under autocast), by fp8 products forward and
    backward. x and weight in bf16, fp16 or fp32, each gradient in its tensor's dtype. Differentiable in both, once.

    Raises TypeError for another dtype, ValueError for a weight that is not [N, K] or for K = 0.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, allowed are {', '.join(map(str, DTYPES))}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is a last dimension of 1 or more")
    check_shape("weight", weight, (None, x.shape[-1]))
    training = torch.is_grad_enabled() and weight.requires_grad
    y, _, _ = _fp8_linear(as_rows(x), weight, compute_dtype(x), training)
    return as_shape(y, (*x.shape[:-1], weight.shape[0]))
