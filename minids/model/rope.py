"""Angles of the decoupled rotary embedding, with YaRN's frequency interpolation (arXiv 2309.00071, section 3.2-3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minids.config import ModelConfig, YarnConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """[qk_rope_head_dim / 2] fp32, radians per position."""
    width = config.qk_rope_head_dim
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequency = 1.0 / config.rope_theta**exponent
    yarn = config.rope_scaling
    if yarn is None:
        return frequency
    keep = 1.0 - _interpolation_ramp(yarn, width, config.rope_theta, device)
    return frequency / yarn.factor * (1.0 - keep) + frequency * keep


def _interpolation_ramp(yarn: YarnConfig, width: int, theta: float, device: torch.device | None) -> Tensor:
    """0 for dimensions that turn over beta_fast times in the original context, 1 below beta_slow, linear between."""

    def dimension(turns: float) -> float:
        return width * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=device)
    return ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def attention_factor(yarn: YarnConfig | None) -> float:
    """What cos and sin are multiplied with: mscale over mscale_all_dim's share, which the softmax scale holds."""
    if yarn is None or yarn.factor <= 1:
        return 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)
    return mscale(1.0)


def rope_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [T] -> cos, sin [T, qk_rope_head_dim / 2] fp32."""
    angle = positions.float().unsqueeze(1) * inverse_frequencies(config, positions.device)
    factor = attention_factor(config.rope_scaling)
    return angle.cos() * factor, angle.sin() * factor
