"""Multi-head latent attention (DeepSeek-V3 report, section 2.1.1): keys and values come from one latent a token.

Shapes: T tokens of packed documents, D hidden_size, H heads, C kv_lora_rank, N/R a query head's nope and rope widths.
"""

from __future__ import annotations

import torch
from minids_kernels import mla_attention
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.norm import RMSNorm
from minids.precision import LinearBeside, in_fp8, linear


def _columns_apart(projection: nn.Linear, x: Tensor, heads: int, first: int) -> tuple[Tensor, Tensor]:
    """x [T, K] -> the `first` columns of each head's projection [T, H, first], and the rest. Two products: those of one
    would have to be put together again in the backward. Nobody else may read x."""
    weight = projection.weight.unflatten(0, (heads, -1))
    part, rest = (w.flatten(0, 1) for w in weight.split([first, weight.shape[1] - first], dim=1))
    one, x = (linear(x, part), x) if in_fp8() else LinearBeside.apply(x, part)
    return one.unflatten(-1, (heads, -1)), linear(x, rest).unflatten(-1, (heads, -1))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, width = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)

    def project(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, Q + C + R]: what queries are made of, latents before their norm, and the key that heads share
        before its rotation."""
        first = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        weight = torch.cat((first.weight, self.kv_a_proj_with_mqa.weight))  # one product for both: they are narrow
        return linear(x, weight)

    def queries(self, q: Tensor) -> Tensor:
        """The first Q columns of `project` -> [T, H, N + R], whose last R columns are to be rotated."""
        if self.config.q_lora_rank is not None:
            q = linear(self.q_a_layernorm(q), self.q_b_proj.weight)
        return q.unflatten(-1, (self.config.num_attention_heads, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x [T, D], cos and sin [T, R/2], cu_seqlens int32 [documents + 1] -> [T, D]."""
        config = self.config
        projected, cached = self.project(x), [config.kv_lora_rank, config.qk_rope_head_dim]
        q, latent, k_pe = projected.split([projected.shape[-1] - sum(cached), *cached], dim=-1)
        k_nope, v = _columns_apart(
            self.kv_b_proj, self.kv_a_layernorm(latent), config.num_attention_heads, config.qk_nope_head_dim
        )
        out = mla_attention(
            self.queries(q), (k_nope, k_pe.unsqueeze(1)), v, cu_seqlens, scale=config.softmax_scale,
            rotary_cos=cos, rotary_sin=sin,
        )  # fmt: skip
        return linear(out.flatten(1), self.o_proj.weight)
