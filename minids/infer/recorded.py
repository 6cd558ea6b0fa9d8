"""One token of some sequences on a GPU, launched as one CUDA graph. Figures: benchmarks/decode.py."""

from __future__ import annotations

import torch
from torch import Tensor

from minids.graph import Recorded, waits
from minids.infer.cache import LatentCache
from minids.infer.forward import hidden_states
from minids.model.model import DeepseekV3


class RecordedDecoder:
    """Steps a model on a GPU through the sequences of a cache, with its weights where they are now. The cache's length
    lies on the GPU, so one graph serves all steps until the cache moves to larger memory. Work that waits for the GPU,
    as PyTorch's own path does where no kernel fits, cannot be recorded and runs as it is."""

    def __init__(self, model: DeepseekV3, cache: LatentCache) -> None:
        self.model, self.cache, self.device = model, cache, cache.rows.device
        self.recorded: Recorded[int, Tensor] = Recorded(self._logits, self.device)
        self.waits: bool | None = None  # not known yet

    def _logits(self, inputs: list[Tensor], capacity: int) -> Tensor:
        """[B, V] from [B + 1]: a token of each sequence, and the cache's length."""
        tokens, start = inputs[0].split([self.cache.batch, 1])
        hidden = hidden_states(self.model, tokens.unsqueeze(1), self.cache, start)
        logits: Tensor = self.model.lm_head(hidden[:, -1])
        return logits

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """Appends a token to each of the B sequences -> logits [B, V], which hold until the next step."""
        cache = self.cache
        cache.reserve(1)
        inputs = [torch.tensor([*tokens, cache.length])]
        if self.waits is None:
            queued = [x.to(self.device) for x in inputs]
            self.waits = waits(lambda: self._logits(queued, cache.capacity))  # writes what this step writes, too
        if self.waits:
            logits = self._logits([x.to(self.device) for x in inputs], cache.capacity)
        else:
            logits = self.recorded(inputs, cache.capacity)
        cache.length += 1
        return logits
