"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in the order and with the meaning of
transformers' logits processors (generation/logits_process.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minids.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding."""

    temperature: float = 0.0  # 0: the likeliest token; else logits are divided by it
    top_k: int = 0  # the k likeliest tokens compete; 0: all
    top_p: float = 1.0  # the likeliest tokens that together reach this probability compete; 1: all
    repetition_penalty: float = 1.0  # > 1 makes tokens that occurred (prompt included) less likely; 1: none

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature: got {self.temperature}, wanted a number >= 0 (0: greedy)")
        if self.top_k < 0:
            raise InputError(f"top_k: got {self.top_k}, wanted a whole number >= 0 (0: no limit)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, wanted a number above 0 and at most 1 (1: no limit)")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty: got {self.repetition_penalty}, wanted a number > 0 (1: none)")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V], seen [B, V] bool: those of tokens seen are divided by `penalty` if positive, else multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest of each row (and those equal to the k-th)."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest likeliest tokens whose probabilities reach p, at least one a row."""
    ordered, order = logits.sort(dim=-1)
    remove = ordered.softmax(-1).cumsum(-1) <= 1 - p
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)


def next_token(logits: Tensor, sampling: Sampling, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> chosen ids [B]. `seen` [B, V] bool is needed with a repetition penalty only."""
    logits = logits.float()
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # 0 at most, so that the smallest temperatures make none infinite
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
