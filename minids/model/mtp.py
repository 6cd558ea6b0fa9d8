"""Multi-token prediction (DeepSeek-V3 report, section 2.2): a further block that sees the next token's embedding.

Embedding and output head are the main model's; `shared_head.norm` is the norm before that head. Names and the order
[embedding, hidden] are the official checkpoint's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.block import Block
from minids.model.moe import Routing
from minids.model.norm import AddRMSNorm, RMSNorm


class SharedHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPBlock(Block):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Routing | None]:
        """embedded [T, D] of the token one further than at the depth before, hidden [T, D] that depth's normed output
        -> normed hidden [T, D] for the head and the next depth."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        x, residual, routing = self(x, None, cos, sin, cu_seqlens)
        return self.shared_head.norm(x, residual)[0], routing
