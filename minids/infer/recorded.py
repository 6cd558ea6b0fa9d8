"""One token of some sequences on a GPU, launched as one CUDA graph. Figures: benchmarks/decode.py."""

from __future__ import annotations

import torch
from torch import Tensor

from minids.device import queue_copy
from minids.graph import Recorded, unless_it_waits
from minids.infer.cache import LatentCache
from minids.infer.forward import hidden_states
from minids.model.model import DeepseekV3

Memory = tuple[int, int]  # a cache's address and capacity: what a graph may be replayed on


class _Step:
    """A step on `rows`, those of a cache [layers, B, capacity, C + R]."""

    rows: Tensor

    def __init__(self, model: DeepseekV3) -> None:
        self.model = model

    def __call__(self, inputs: list[Tensor], memory: Memory) -> Tensor:
        """Logits [B, V] from [B + 1]: a token of each sequence, and how many there are before it."""
        tokens, start = inputs[0].split([inputs[0].shape[0] - 1, 1])
        logits: Tensor = self.model.lm_head(hidden_states(self.model, tokens.unsqueeze(1), self.rows, start)[:, -1])
        return logits


class RecordedDecoder:
    """Steps a model on a GPU through sequences, with its weights where they are now. The cache's length lies on the
    GPU, so one graph serves all steps until the cache moves to larger memory. Work that waits for the GPU, as PyTorch's
    own path does where no kernel fits, cannot be recorded and runs as it is."""

    def __init__(self, model: DeepseekV3) -> None:
        self.device = model.lm_head.weight.device
        self.work = _Step(model)
        self.recorded: Recorded[Memory, Tensor] = Recorded(self.work, self.device)
        self.waits: bool | None = None  # not known yet

    @torch.inference_mode()
    def step(self, tokens: list[int], cache: LatentCache) -> Tensor:
        """See `Stepper`."""
        cache.reserve(1)
        self.work.rows, memory = cache.rows, (cache.rows.data_ptr(), cache.capacity)
        inputs = [queue_copy(torch.tensor([*tokens, cache.length]), self.device)]
        logits = None
        if self.waits is None:  # the first call runs as it is
            logits = unless_it_waits(lambda: self.recorded(inputs, memory))
            self.waits = logits is None
        if logits is None:
            logits = (self.work if self.waits else self.recorded)(inputs, memory)
        cache.length += 1
        return logits
