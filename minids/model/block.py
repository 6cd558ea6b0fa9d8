"""One transformer layer: pre-norm attention and feed-forward, each added to the residual stream.

Every addition is left to the norm that follows it, the last one to the next layer's: both are one pass over memory.
"""

from __future__ import annotations

from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.attention import Attention
from minids.model.moe import MLP, MoE, Routing
from minids.model.norm import AddRMSNorm


class Block(nn.Module):
    """Dense below `first_k_dense_replace`, mixture of experts from there on."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: MLP | MoE
        if layer_idx < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config)
        self.input_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """x [T, D] the last layer's output and residual [T, D] the stream it is yet to be added to (None: there is no
        layer before) -> the same of this layer, and how tokens were routed."""
        normed, residual = self.input_layernorm(x, residual)
        normed, residual = self.post_attention_layernorm(self.self_attn(normed, cos, sin, cu_seqlens), residual)
        if isinstance(self.mlp, MLP):
            return self.mlp(normed), residual, None
        out, routing = self.mlp(normed)
        return out, residual, routing
