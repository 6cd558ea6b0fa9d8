"""SwiGLU: silu(gate) * up, with gate and up as the two halves of the last dimension (arXiv 2002.05202).

gate_up [..., 2F] -> [..., F], any float dtype. Test: tests/kernels/test_swiglu.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_float

__all__ = ["swiglu", "swiglu_reference"]


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Plain formula in fp32; gate_up [..., 2F] -> [..., F] in its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    """Saves only gate_up; silu(gate) is computed again in the backward."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(dy, gate_up)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of swiglu: dy [..., F], gate_up [..., 2F] -> [..., 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=-1)
    torch.mul(dy, F.silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] -> silu(gate_up[..., :F]) * gate_up[..., F:], [..., F]. Differentiable.

    Raises TypeError for a dtype that is no float, ValueError for an odd last dimension.
    """
    check_float("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: got last dimension {gate_up.shape[-1]}, allowed is an even one (gate and up halves)"
        )
    return _SwiGLU.apply(gate_up)
