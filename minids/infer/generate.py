"""Generation: `LanguageModel` is DeepseekV3 with `.generate` and `.stream`, absorbed decoding on a latent cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.errors import InputError
from minids.infer.cache import LatentCache, Stepper
from minids.infer.decoder import Decoder
from minids.infer.forward import check_length, forward_cached
from minids.infer.recorded import RecordedDecoder
from minids.infer.sampling import Sampling, next_token
from minids.model.model import DeepseekV3


class LanguageModel(DeepseekV3):
    """A DeepseekV3 that talks. Starts in eval mode."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.eval()

    def new_cache(self, batch: int = 1) -> LatentCache:
        """An empty cache in the dtype and on the device of the weights."""
        return LatentCache(self.config, batch, self.lm_head.weight.detach())

    def forward_cached(self, input_ids: Tensor, cache: LatentCache, last_only: bool = False) -> Tensor:
        """See minids.infer.forward.forward_cached."""
        return forward_cached(self, input_ids, cache, last_only)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop_ids: Collection[int] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Callable[[list[int]], Any] | None = None,
    ) -> Tensor:
        """input_ids [B, T] int64 -> [B, T + new]: the prompt, then up to `max_new_tokens` more.

        A row ends with the first of `stop_ids` (None: the config's eos_token_id), which is kept; behind it stands
        pad_token_id (eos_token_id where the config has none) until the longest row ends. `temperature` 0 is greedy;
        the others are as in `Sampling`. Random choices come from `generator`, or one seeded with `seed`, or torch's
        default. `streamer` is called with the B new ids after each step.

        Raises InputError, before any work, for an empty prompt, ids outside the vocabulary, settings out of range, or
        T + max_new_tokens over max_position_embeddings.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
        )  # fmt: skip
        if seed is not None:
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        steps = []
        for ids in self.stream(input_ids, max_new_tokens, sampling, stop_ids, generator):
            steps.append(ids)
            if streamer is not None:
                streamer(ids)
        new = torch.tensor(steps, dtype=input_ids.dtype, device=input_ids.device).reshape(-1, input_ids.shape[0])
        return torch.cat((input_ids, new.T), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] | None = None,
        generator: torch.Generator | None = None,
        cache: LatentCache | None = None,
    ) -> Iterator[list[int]]:
        """Yields the B ids of each step as soon as they are chosen; the arguments and errors of `generate`.

        `cache`: holds the first tokens of `input_ids` [B, T] already, fewer than T. It gains the rest of them and
        every id yielded but the last. The weights must not change between the steps, nor while a cache is in use.
        """
        self._check(input_ids, max_new_tokens, cache)
        stops = {self.config.eos_token_id} if stop_ids is None else set(stop_ids)
        cache = self.new_cache(input_ids.shape[0]) if cache is None else cache
        return _stream(self, input_ids, max_new_tokens, sampling or Sampling(), stops, generator, cache)

    def _check(self, input_ids: Tensor, max_new_tokens: int, cache: LatentCache | None) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, wanted int64 [B, T], B and T >= 1"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"input_ids: got ids {low} to {high}, wanted 0 to vocab_size - 1 = {self.config.vocab_size - 1}"
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: got {max_new_tokens}, wanted a whole number >= 1")
        if cache is not None and not (cache.length < input_ids.shape[1] and cache.batch == input_ids.shape[0]):
            raise InputError(
                f"cache: holds {cache.length} tokens of {cache.batch} sequences, wanted the first tokens of input_ids' "
                f"{tuple(input_ids.shape)}, not all"
            )
        check_length(self, input_ids.shape[1] + max_new_tokens)


class _Forward:
    """The Stepper of models that no other fits."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def step(self, tokens: list[int], cache: LatentCache) -> Tensor:
        input_ids = torch.tensor(tokens, device=cache.rows.device).unsqueeze(1)
        return forward_cached(self.model, input_ids, cache)[:, -1]


def _stepper(model: LanguageModel, cache: LatentCache) -> Stepper:
    if Decoder.fits(model, cache.batch):
        return Decoder(model)
    return RecordedDecoder(model) if cache.rows.is_cuda else _Forward(model)


@torch.inference_mode()
def _stream(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stops: set[int],
    generator: torch.Generator | None,
    cache: LatentCache,
) -> Iterator[list[int]]:
    config = model.config
    pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(input_ids.shape[0], config.vocab_size, dtype=torch.bool, device=input_ids.device)
        seen.scatter_(1, input_ids, True)
    done = [False] * len(input_ids)
    logits = forward_cached(model, input_ids[:, cache.length :], cache, last_only=True)[:, 0]
    for left in range(max_new_tokens - 1, -1, -1):
        chosen = next_token(logits, sampling, seen, generator)
        ids = [pad if over else id for over, id in zip(done, chosen.tolist(), strict=True)]
        yield ids
        done = [over or id in stops for over, id in zip(done, ids, strict=True)]
        if left == 0 or all(done):
            return
        if seen is not None:
            seen.scatter_(1, torch.tensor(ids, device=input_ids.device).unsqueeze(1), True)
        if cache.stepper is None:
            cache.stepper = _stepper(model, cache)
        logits = cache.stepper.step(ids, cache)
