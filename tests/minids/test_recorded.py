"""A decoding step that is recorded once gives what the model gives, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minids.infer import recorded
from minids.infer.cache import CHUNK, LatentCache
from minids.infer.forward import hidden_states
from minids.infer.generate import LanguageModel
from minids.infer.recorded import RecordedDecoder
from tests.minids.hf_peer import randomise, tiny, tokens

PROMPT, NEW = CHUNK - 10, 30  # the cache moves on the way


def model_and_caches(device: str, dtype: torch.dtype) -> tuple[LanguageModel, Tensor, LatentCache, LatentCache]:
    """Two caches that hold the same prompts."""
    config = tiny(max_position_embeddings=2 * CHUNK)
    model = LanguageModel(config)
    randomise(model)
    model.to(device, dtype)
    ids = tokens(config, 3, PROMPT + NEW).to(device)
    caches = [model.new_cache(3) for _ in range(2)]
    for cache in caches:
        model.forward_cached(ids[:, :PROMPT], cache)
    return model, ids, *caches


def assert_same_steps(
    decoder: RecordedDecoder, model: LanguageModel, ids: Tensor, cache: LatentCache, own: LatentCache
) -> None:
    """Also after the cache was cut to what a reply shares with the one before."""
    for start in (PROMPT, PROMPT + 3):
        cache.truncate(start)
        own.truncate(start)
        for column in ids[:, start:].split(1, dim=1):
            expected = model.forward_cached(column, own)[:, 0]
            assert torch.equal(decoder.step(column.flatten().tolist(), cache), expected)
            assert cache.length == own.length


@pytest.mark.parametrize("waits", [False, True])
def test_steps_are_the_models(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cache, own = model_and_caches("cpu", torch.float32)
    capacities: list[int] = []

    def replay(work: Callable[[list[Tensor], tuple[int, int]], Tensor], device: torch.device) -> Callable[..., Tensor]:
        def step(inputs: list[Tensor], memory: tuple[int, int]) -> Tensor:
            capacities.append(memory[1])
            return work(inputs, memory)

        return step

    monkeypatch.setattr(recorded, "Recorded", replay)
    monkeypatch.setattr(recorded, "unless_it_waits", lambda call: None if waits else call())
    assert_same_steps(RecordedDecoder(model), model, ids, cache, own)
    assert [*dict.fromkeys(capacities)] == ([] if waits else [CHUNK, 2 * CHUNK])


def test_a_step_reads_no_number_back() -> None:
    """Tensors without numbers refuse to be read: on a GPU that would be waited for."""
    with FakeTensorMode(), torch.no_grad():
        model, one = LanguageModel(tiny()), torch.ones(1, dtype=torch.int64)
        rows = model.new_cache(2).rows.new_empty(3, 2, CHUNK, 16 + 8)
        assert hidden_states(model, one.expand(2, 1), rows, one).shape == (2, 1, 40)
        with pytest.raises(DataDependentOutputException):
            one.item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cache, own = model_and_caches("cuda", dtype)
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(None), replay(graph)))
    decoder = RecordedDecoder(model)
    assert_same_steps(decoder, model, ids, cache, own)
    assert decoder.waits is False
    assert len(replays) == NEW + NEW - 3 - 2  # all but the first in each memory


@pytest.mark.gpu
def test_generation_on_a_gpu_is_repeated_forward() -> None:
    model, ids, _, cache = model_and_caches("cuda", torch.float32)
    said = model.generate(ids[:, :PROMPT], NEW, stop_ids=())
    logits = torch.cat([model.forward_cached(c, cache) for c in said[:, PROMPT:].split(1, dim=1)], dim=1)
    assert torch.equal(logits.argmax(-1)[:, :-1], said[:, PROMPT + 1 :])
