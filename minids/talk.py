"""Text in, text out as it is made: what `minids generate` and `minids chat` do with a model and its tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from minids.errors import InputError, require_seed
from minids.infer.cache import LatentCache
from minids.infer.generate import LanguageModel
from minids.infer.sampling import Sampling
from minids.tokenizer import Tokenizer

ANSWER = 256  # new tokens where no number is given, less where the model's positions end first


@dataclass
class Voice:
    """A model, its tokenizer and how to sample from it. `max_new_tokens` None: ANSWER, as far as there is room."""

    model: LanguageModel
    tokenizer: Tokenizer
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.device = self.model.lm_head.weight.device
        self.generator = torch.Generator(self.device)
        if self.seed is None:
            self.generator.seed()
        else:
            require_seed("--seed", self.seed)
            self.generator.manual_seed(self.seed)
        self.stops = {self.model.config.eos_token_id, self.tokenizer.eos_id}

    @property
    def positions(self) -> int:
        return self.model.config.max_position_embeddings

    def stream(self, ids: list[int], said: list[int], cache: LatentCache | None = None) -> Iterator[str]:
        """Continues `ids`; the new ids, a stop token included, are appended to `said`, their text is yielded in whole
        characters, U+FFFD for what ends in the middle of one.

        `cache`: holds the first ids already. Raises InputError when `ids` leave no room for an answer.
        """
        wanted = self.max_new_tokens
        if wanted is None:
            wanted = min(ANSWER, self.positions - len(ids))
            if wanted < 1:
                limit = f"the model's max_position_embeddings is {self.positions}"
                raise InputError(f"the prompt has {len(ids)} tokens, which leaves no room for an answer: {limit}")
        prompt = torch.tensor([ids], device=self.device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for (token,) in self.model.stream(prompt, wanted, self.sampling, self.stops, self.generator, cache):
            said.append(token)
            if token not in self.stops:
                yield decoder.decode(self.tokenizer.decode_bytes([token]))
        yield decoder.decode(b"", final=True)


class Conversation:
    """Turns with one model. The latent cache is kept between turns, so only what is new is computed.

    When the model's positions run out, the oldest turns are forgotten (a system message never is).
    """

    def __init__(self, voice: Voice, system: str | None = None) -> None:
        self.voice = voice
        self.system = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self.turns: list[dict[str, str]] = []
        self.ids: list[int] = []  # of which the cache holds the first
        self.cache = self.voice.model.new_cache()

    def _prompt(self) -> list[int]:
        """The ids of the conversation up to where the assistant speaks, with room left for it to do so."""
        encode, positions = self.voice.tokenizer.encode_chat, self.voice.positions
        room = min(ANSWER, positions // 4) if self.voice.max_new_tokens is None else self.voice.max_new_tokens
        while True:
            ids, _ = encode([*self.system, *self.turns], add_generation_prompt=True)
            if len(ids) + room <= positions or len(self.turns) == 1:
                return ids
            del self.turns[:2]

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces. Leave the iterator early to stop the answer there."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except InputError:  # the template refuses it
            self.turns = before
            raise
        said, pieces = list[int](), list[str]()
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self.ids, strict=False)))
        self.cache.truncate(min(same, self.cache.length))
        try:
            for piece in self.voice.stream(ids, said, self.cache):
                pieces.append(piece)
                yield piece
        except InputError:
            self.turns = before
            raise
        finally:
            self.ids = ids + said
            if len(self.turns) % 2:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
