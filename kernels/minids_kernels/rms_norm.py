"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

x [..., N] in fp32, bf16, fp16 or fp64, weight [N]. Statistics are taken in fp32 (fp64 for fp64 input). Under autocast
the output comes in autocast's dtype, since what follows a norm is a matrix product.
Test: tests/kernels/test_rms_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_float, check_shape, compute_dtype

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain fp32 formula; x [..., N], weight [N] -> [..., N] in x's dtype."""
    xf = x.float() if x.dtype != torch.float64 else x
    return (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps) * weight.to(xf.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Few passes over memory: a norm and two products forward; backward rests on layer norm's fused kernel.

    Layer norm's gradient at mean 0 is rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight; RMSNorm's is
    the same without the mean(g) term, which is put back as one matrix-vector product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistic)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y = x * rstd
        if y.dtype == weight.dtype:
            y.mul_(weight)
        else:
            y = y * weight
        return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        xs, dys, ws = x.to(rstd.dtype), dy.to(rstd.dtype), weight.to(rstd.dtype)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dys, xs, [x.shape[-1]], torch.zeros_like(rstd), rstd, ws, None, [True, True, False]
        )
        dx.addcmul_((dys @ ws).unsqueeze(-1), rstd, value=1.0 / x.shape[-1])
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., N], weight [N] -> [..., N] in x's dtype (autocast's under autocast). Differentiable in x and weight.

    Raises TypeError for a dtype that is no float, ValueError for a weight that is not [N].
    """
    check_float("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))
