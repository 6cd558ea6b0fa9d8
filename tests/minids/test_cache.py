"""The latent cache keeps what was written while it grows, and holds what the model computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.config import ModelConfig
from minids.infer.cache import CHUNK, LatentCache
from minids.infer.generate import LanguageModel

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=5))
def test_growing_keeps_the_rows(pieces: list[int]) -> None:
    cache = LatentCache(CONFIG, batch=2)
    written = torch.randn(3, 2, sum(pieces), 10)
    for piece in pieces:
        start = cache.length
        cache.reserve(piece)
        assert cache.capacity >= start + piece
        cache.rows[:, :, start : start + piece] = written[:, :, start : start + piece]
        cache.length += piece
    assert torch.equal(cache.rows[:, :, : cache.length], written)


def test_size_is_the_latent_and_the_shared_key() -> None:
    cache = LatentCache(CONFIG, batch=5, like=torch.empty(0, dtype=torch.bfloat16))
    cache.reserve(1)
    assert (cache.batch, cache.capacity, cache.rows.dtype) == (5, CHUNK, torch.bfloat16)
    assert cache.rows.shape == (3, 5, CHUNK, 6 + 4)


def test_reserving_what_there_is_room_for_moves_nothing() -> None:
    cache = LatentCache(CONFIG)
    cache.reserve(10)
    before = cache.rows.data_ptr()
    cache.reserve(CHUNK)
    assert cache.rows.data_ptr() == before


def test_truncated_tokens_are_forgotten() -> None:
    """After truncation the model answers as if the cut tokens had never been."""
    model = LanguageModel(CONFIG)
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(64, (1, 12))
    cache = model.new_cache()
    model.forward_cached(ids, cache)
    cache.truncate(7)
    assert cache.length == 7
    again = model.forward_cached(ids[:, 7:], cache)
    torch.testing.assert_close(again, model(ids).logits[:, 7:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [-1, 8])
def test_truncating_to_an_impossible_length(length: int) -> None:
    cache = LatentCache(CONFIG)
    cache.reserve(7)
    cache.length = 7
    with pytest.raises(ValueError, match=f"length: got {length}, allowed is 0 to the cache's 7"):
        cache.truncate(length)


def test_no_new_tokens_change_nothing() -> None:
    model = LanguageModel(CONFIG)
    cache = model.new_cache()
    model.forward_cached(torch.randint(64, (1, 5)), cache)
    before = cache.rows[:, :, :5].clone()
    logits = model.forward_cached(torch.empty(1, 0, dtype=torch.long), cache)
    assert logits.shape == (1, 0, 64)
    assert cache.length == 5 and torch.equal(cache.rows[:, :, :5], before)
