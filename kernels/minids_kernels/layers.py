"""Layers by Hugging Face's rules for its kernel hub: an nn.Module with `forward` alone, which `kernelize` puts in place
of the forward of a model's own layer. No constructor and no state but `has_backward` and `can_torch_compile`; what is
annotated belongs to the layer that is served (huggingface.co/docs/kernels/kernel-requirements).
Test: tests/kernels/test_layers.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = ["RMSNorm", "SwiGLU"]


class RMSNorm(nn.Module):
    """For the RMSNorm of transformers' DeepSeek, Llama, Qwen and others: `weight` [N] and `variance_epsilon`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., N] -> [..., N] in its dtype (autocast's under autocast)."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SwiGLU(nn.Module):
    """For layers that get gate and up side by side, elsewhere called SiluAndMul."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2F] -> silu(x[..., :F]) * x[..., F:], [..., F]."""
        return swiglu(x)
