"""One transformer layer: pre-norm attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.attention import Attention
from minids.model.moe import MLP, MoE, Routing
from minids.model.norm import RMSNorm


class Block(nn.Module):
    """x [T, D] -> [T, D]; dense below `first_k_dense_replace`, mixture of experts from there on."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: MLP | MoE
        if layer_idx < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, sequences: int
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), None
        out, routing = self.mlp(normed, sequences)
        return x + out, routing
