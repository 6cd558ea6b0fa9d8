"""The latent KV cache: kv_lora_rank + qk_rope_head_dim numbers a token and layer, and nothing per head.

Memory: 2 bytes * (512 + 64) * 61 layers = 70 KB a token for DeepSeek-V3 in bf16.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from minids.config import ModelConfig

CHUNK = 256  # tokens; room is made in multiples of this


class Stepper(Protocol):
    """A quick way to take one more token of each sequence, with a model's weights as they were when it was made."""

    def step(self, tokens: list[int], cache: LatentCache) -> Tensor:
        """Appends a token to each of the B sequences in `cache` -> logits [B, V], which hold until the next step."""


class LatentCache:
    """`rows` [layers, B, capacity, C + R]: normalised latent, then rotated shared key. The first `length` tokens
    of each of the B sequences are valid. `stepper`: that of the model whose tokens these are, once it was needed."""

    def __init__(self, config: ModelConfig, batch: int = 1, like: Tensor | None = None) -> None:
        """`like` gives dtype and device (a weight of the model)."""
        width = config.kv_lora_rank + config.qk_rope_head_dim
        like = torch.empty(0) if like is None else like
        self.rows = like.new_empty(config.num_hidden_layers, batch, 0, width)
        self.length = 0
        self.stepper: Stepper | None = None

    @property
    def batch(self) -> int:
        return self.rows.shape[1]

    @property
    def capacity(self) -> int:
        return self.rows.shape[2]

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more tokens a sequence, half as many again as there are when it must grow."""
        wanted = self.length + tokens
        if wanted <= self.capacity:
            return
        wanted = max(wanted, self.length * 3 // 2)
        layers, batch, _, width = self.rows.shape
        grown = self.rows.new_empty(layers, batch, -(-wanted // CHUNK) * CHUNK, width)
        grown[:, :, : self.length] = self.rows[:, :, : self.length]
        self.rows = grown

    def convert(self, dtype: torch.dtype) -> None:
        """Rows are in `dtype` from here on."""
        self.rows = self.rows.to(dtype)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: got {length}, allowed is 0 to the cache's {self.length}")
        self.length = length
