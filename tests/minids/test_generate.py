"""Decoding token by token against the full forward pass, sampling against transformers' logits processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import moe_gate
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minids.config import ModelConfig
from minids.errors import InputError
from minids.infer.decoder import MOST_SEQUENCES, Decoder, choose_experts
from minids.infer.generate import LanguageModel
from minids.infer.sampling import Sampling, keep_top_k, keep_top_p, next_token, penalise
from tests.minids.hf_peer import CONFIGS, randomise, tiny, tokens

CLOSE: dict[str, float] = dict(atol=1e-4, rtol=1e-4)


def build(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build(tiny())


def decoded(model: LanguageModel, ids: Tensor, prompt: int) -> Tensor:
    """Logits of ids[:, prompt:] by the decoder."""
    cache = model.new_cache(len(ids))
    model.forward_cached(ids[:, :prompt], cache)
    decoder = Decoder(model)
    return torch.stack([decoder.step(step, cache) for step in ids.T[prompt:].tolist()], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_of_decoding_agrees_with_the_full_forward(name: str) -> None:
    config = CONFIGS[name]
    model = build(config)
    ids = tokens(config, 2, 40)
    with torch.no_grad():
        full = model(ids).logits
    cache = model.new_cache(2)
    pieces = ids.split([9, 13, *[1] * 18], dim=1)  # the prompt, a chunk after it, then single tokens
    torch.testing.assert_close(torch.cat([model.forward_cached(p, cache) for p in pieces], dim=1), full, **CLOSE)
    if Decoder.fits(model):
        torch.testing.assert_close(decoded(model, ids, 9), full[:, 9:], **CLOSE)
    else:
        assert config.kv_lora_rank % 2 or config.qk_nope_head_dim % 2


def test_the_decoder_gives_torchs_threads_back(model: LanguageModel) -> None:
    threads, cache = torch.get_num_threads(), model.new_cache()
    try:
        torch.set_num_threads(3)
        Decoder(model).step([1], cache)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_chunks_longer_than_the_decoder_takes_at_once() -> None:
    config = tiny(max_position_embeddings=700)
    model = build(config)
    ids = tokens(config, 1, 640)
    cache = model.new_cache()
    parts = [model.forward_cached(piece, cache) for piece in ids.split([20, 620], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("length", [330, pytest.param(2000, marks=pytest.mark.slow)])
def test_rounding_does_not_build_up(length: int) -> None:
    config = tiny(max_position_embeddings=length)
    model = build(config)
    ids = tokens(config, 1, length)
    torch.testing.assert_close(decoded(model, ids, 5), model(ids).logits[:, 5:], **CLOSE)


def greedy(model: LanguageModel, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("rows", [1, 3, MOST_SEQUENCES + 1])
def test_greedy_generation_is_repeated_forward(model: LanguageModel, rows: int) -> None:
    ids = tokens(model.config, rows, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=25, stop_ids=()), greedy(model, ids, 25))


def test_bfloat16_decodes_near_fp32() -> None:
    config = CONFIGS["dense"]  # no experts, whose choice could flip
    half = build(config).bfloat16()
    ids = tokens(config, 1, 20)
    cache = half.new_cache()
    logits = torch.cat([half.forward_cached(piece, cache) for piece in ids.split(5, dim=1)], dim=1)
    want = build(config)(ids).logits
    assert cache.rows.dtype == logits.dtype == torch.bfloat16
    assert (logits - want).norm() < 0.05 * want.norm()
    assert half.generate(ids, max_new_tokens=3, stop_ids=()).shape == (1, 23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_decoder_takes_half_precision(dtype: torch.dtype) -> None:
    """It computes in fp32 with the rounded weights; what others add to the cache then is theirs."""
    half = build(tiny()).to(dtype)
    ids = tokens(half.config, 2, 12)
    cache, decoder = half.new_cache(2), Decoder(half)
    logits = torch.stack([decoder.step(step, cache) for step in ids.T.tolist()], dim=1)
    torch.testing.assert_close(logits, build(tiny()).to(dtype).float()(ids).logits, **CLOSE)
    assert half.forward_cached(ids[:, :1], cache).dtype == cache.rows.dtype == dtype and cache.length == 13
    assert Decoder.fits(half) and not Decoder.fits(half.double())


def test_generated_ids_can_be_trained_on(model: LanguageModel) -> None:
    """Nothing of inference mode sticks to the result."""
    ids = model.generate(tokens(model.config, 2, 4), max_new_tokens=3, stop_ids=())
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    model.zero_grad()


def test_changed_weights_are_seen_at_once(model: LanguageModel) -> None:
    """Also changes that no version counter shows."""
    model = build(model.config)
    ids = tokens(model.config, 1, 6)
    model.generate(ids, max_new_tokens=4)
    randomise(model, seed=5)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    assert torch.equal(model.generate(ids, max_new_tokens=12, stop_ids=()), greedy(model, ids, 12))


def test_rows_end_with_a_stop_token_and_padding(model: LanguageModel) -> None:
    ids = tokens(model.config, 4, 5)
    free = model.generate(ids, max_new_tokens=20, stop_ids=())[:, 5:].tolist()
    stops = {free[0][2], free[1][9]}
    ended = model.generate(ids, max_new_tokens=20, stop_ids=stops)[:, 5:].tolist()
    ends = [next((i for i, id in enumerate(row) if id in stops), 19) for row in free]
    assert len(ended[0]) == max(ends) + 1
    for row, kept, end in zip(free, ended, ends, strict=True):
        assert kept == row[: end + 1] + [model.config.eos_token_id] * (max(ends) - end)


def test_streamer_gets_each_step(model: LanguageModel) -> None:
    steps: list[list[int]] = []
    ids = model.generate(tokens(model.config, 3, 5), max_new_tokens=7, stop_ids=(), streamer=steps.append)
    assert torch.equal(torch.tensor(steps).T, ids[:, 5:])


def test_a_conversation_goes_on_from_its_cache(model: LanguageModel) -> None:
    ids = tokens(model.config, 1, 30)
    sampling = Sampling(repetition_penalty=1.3)
    expected = [step[0] for step in model.stream(ids, 9, sampling, ())]
    cache = model.new_cache()
    list(model.stream(ids[:, :12], 1, sampling, (), cache=cache))
    assert cache.length == 12
    assert [step[0] for step in model.stream(ids, 9, sampling, (), cache=cache)] == expected
    assert cache.length == 30 + 8


def test_seed_decides_the_sample(model: LanguageModel) -> None:
    ids = tokens(model.config, 2, 5)

    def sample(**how: Any) -> list[list[int]]:
        return model.generate(ids, max_new_tokens=12, temperature=1.0, stop_ids=(), **how).tolist()

    assert sample(seed=1) == sample(seed=1) == sample(generator=torch.Generator().manual_seed(1))
    assert sample(seed=1) != sample(seed=2)


def test_the_smallest_temperatures_are_greedy() -> None:
    logits = torch.tensor([[1e4, 3.0, 1e4 - 1, -1e4]])
    for temperature in (1e-3, 1e-38, 1e-45, 1e-300):
        assert next_token(logits, Sampling(temperature=temperature), None, None).tolist() == [0]


def test_penalty_counts_the_prompt_and_the_answer(model: LanguageModel) -> None:
    """So strong a penalty that nothing is said twice, as long as unsaid tokens have positive logits."""
    ids = tokens(model.config, 1, 20)
    said = model.generate(ids, max_new_tokens=30, repetition_penalty=1e6, stop_ids=())[0].tolist()
    assert len(set(said[20:])) == 30 and not set(said[20:]) & set(said[:20])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.01, 1),
    penalty=st.floats(0.5, 2),
)
def test_filters_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 50, generator=generator) * 3
    ids = torch.randint(50, (3, 9), generator=generator)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    theirs = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
    ])(ids, logits.clone())  # fmt: skip
    ours = keep_top_p(keep_top_k(penalise(logits, seen, penalty) / temperature, top_k), top_p)
    torch.testing.assert_close(ours, theirs)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    chosen = next_token(logits, sampling, seen, torch.Generator().manual_seed(seed))
    drawn = torch.multinomial(theirs.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(chosen, drawn.squeeze(1))


def test_temperature_zero_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert next_token(logits, Sampling(), None, None).tolist() == [0]
    assert next_token(logits, Sampling(repetition_penalty=1.2), seen, None).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16), groups=st.sampled_from([1, 2, 4]), data=st.data(), norm=st.booleans()
)  # fmt: skip
def test_experts_of_one_token_are_those_of_the_gate(seed: int, groups: int, data: st.DataObject, norm: bool) -> None:
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, 16 // groups * topk_group))
    config = tiny(
        n_routed_experts=16, n_group=groups, topk_group=topk_group, num_experts_per_tok=top_k, norm_topk_prob=norm
    )
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(2, 16, generator=generator).unbind()
    ids, weights, scores = moe_gate(logits[None], bias, top_k, groups, topk_group, norm, config.routed_scaling_factor)
    ours, our_weights = choose_experts(scores[0].tolist(), bias.tolist(), config)
    assert dict(zip(ours, our_weights, strict=True)) == pytest.approx(
        dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([[]], {}, r"input_ids: got torch.int64 of shape \(1, 0\)"),
        ([1, 2], {}, r"input_ids: got torch.int64 of shape \(2,\)"),
        ([[1, 9999]], {}, "input_ids: got ids 1 to 9999, wanted 0 to vocab_size - 1 = 258"),
        ([[-1]], {}, "input_ids: got ids -1 to -1"),
        ([[1] * 250], {"max_new_tokens": 7}, "257 tokens .* max_position_embeddings is 256"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ([[1]], {"temperature": -0.5}, "temperature: got -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature: got nan"),
        ([[1]], {"top_k": -1}, "top_k: got -1"),
        ([[1]], {"top_p": 0.0}, "top_p: got 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p: got 1.5"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
    ],
)
def test_bad_input(model: LanguageModel, ids: list[Any], settings: dict[str, Any], message: str) -> None:
    steps: list[list[int]] = []
    with pytest.raises(InputError, match=message):
        model.generate(torch.tensor(ids, dtype=torch.int64), streamer=steps.append, **settings)
    assert not steps


def test_a_cache_must_leave_something_to_do(model: LanguageModel) -> None:
    ids = tokens(model.config, 1, 6)
    cache = model.new_cache()
    model.forward_cached(ids, cache)
    with pytest.raises(InputError, match=r"cache: holds 6 tokens of 1 sequences"):
        model.stream(ids, 3, cache=cache)
    with pytest.raises(InputError, match="300 tokens"):
        model.forward_cached(tokens(model.config, 1, 294), cache)
    assert cache.length == 6
