"""The model against transformers' DeepseekV3ForCausalLM, in fp32: logits, gradients, prediction modules, packing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import minids
from minids.config import ModelConfig
from minids.convert.hf import load_hf, to_hf_config
from minids.model.model import DeepseekV3
from tests.minids.hf_peer import CONFIGS, NAMED, build, exported, randomise, their_model, tiny, tokens, yarn

BAR = 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def their_twin(config: ModelConfig, seed: int = 0) -> DeepseekV3ForCausalLM:
    theirs = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config.from_dict(to_hf_config(config)), attn_implementation="eager"
    )
    randomise(theirs, seed)
    return theirs.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_agree_after_export(config: ModelConfig, tmp_path: Path) -> None:
    ours = build(config)
    theirs = their_model(exported(tmp_path, ours))
    ids = tokens(config, 2, 50)
    with torch.no_grad():
        mine, other = ours(ids).logits, theirs(ids).logits
    assert other.std() > 0.5  # large enough for the bar to mean something
    assert (mine - other).abs().max() < BAR


@pytest.mark.filterwarnings("ignore:.*no multi-token-prediction layers")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_agree_after_their_save(config: ModelConfig, tmp_path: Path) -> None:
    theirs = their_twin(config)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, DeepseekV3)
    ids = tokens(config, 2, 50)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < BAR


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_incremental_decoding_agrees(config: ModelConfig, tmp_path: Path) -> None:
    """Greedy answers and the logits of every step, each side with its own cache; two sequences, and one alone."""
    ours, _ = minids.load(exported(tmp_path, build(config)))
    theirs = their_model(tmp_path / "hf")
    prompt, steps = tokens(config, 2, 30), 12
    answer = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, use_cache=True,
        eos_token_id=config.vocab_size, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for rows in (1, 2):
        ids, other = answer.sequences[:rows], torch.stack(answer.logits, dim=1)[:rows]
        assert torch.equal(ours.generate(prompt[:rows], max_new_tokens=steps, stop_ids=()), ids)
        cache = ours.new_cache(rows)
        # prompt in two pieces, then one token at a time, then two at once
        pieces = ids[:, :-1].split([20, 10, *[1] * (steps - 3), 2], dim=1)
        mine = torch.cat([ours.forward_cached(piece, cache) for piece in pieces], dim=1)[:, 29:]
        assert mine.shape == other.shape == (rows, steps, config.vocab_size)
        assert (mine - other).abs().max() < BAR


@pytest.mark.parametrize("name", ["v3", "direct queries", "unequal mscales", "no shared experts", "dense", "no groups"])
def test_loss_and_gradients_agree(name: str, tmp_path: Path) -> None:
    ours = build(NAMED[name])
    theirs = their_model(exported(tmp_path, ours))
    ids = tokens(ours.config, 2, 40)
    labels = ids.clone()
    labels[:, :7] = -100
    mine, other = ours(ids, labels).loss, theirs(ids, labels=labels).loss
    assert mine is not None
    mine.backward()
    other.backward()
    assert abs(mine.item() - other.item()) < BAR
    checked = 0
    ours_by_name, theirs_by_name = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for parameter_name, parameter in theirs_by_name.items():
        if parameter.numel():
            gradient = ours_by_name[parameter_name].grad
            assert gradient is not None and parameter.grad is not None
            assert (gradient - parameter.grad).norm() < BAR * parameter.grad.norm(), parameter_name
            checked += 1
    mtp = f"model.layers.{ours.config.num_hidden_layers}."
    assert checked == sum(not n.startswith(mtp) for n in ours_by_name)


@pytest.mark.parametrize("name", ["v3", "two predicted tokens"])
def test_prediction_modules_agree(name: str, tmp_path: Path) -> None:
    """Every depth of transformers' MtpModel, read from our export, on the same tokens."""
    ours = build(NAMED[name])
    config = ours.config
    theirs = their_model(exported(tmp_path, ours))
    # transformers knows the layer's number of the 671B model only
    theirs._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{config.num_hidden_layers + d}\..*" for d in range(config.num_nextn_predict_layers)
    ]
    their_mtp = MtpModel.from_pretrained(theirs).eval()
    ids = tokens(config, 1, 40)
    length = ids.shape[1] - config.num_nextn_predict_layers
    batch = ours._pack(ids, None)
    with torch.no_grad():
        mine, _ = ours._hidden(batch)
        other = theirs(ids, output_hidden_states=True).hidden_states[-1][:, :length]
        for depth in range(config.num_nextn_predict_layers):
            mine, _ = ours._mtp_hidden(batch, mine, depth)
            positions = torch.arange(1 + depth, 1 + depth + length).unsqueeze(0)
            cache = MtpCache(config=theirs.config.get_mtp_config())
            other = their_mtp.forward_layer(
                depth, other, positions, cache, input_ids=ids[:, 1 + depth : 1 + depth + length]
            )
            seen = length - depth  # behind that, the depth before saw tokens that only one side has
            mine_logits, their_logits = ours.lm_head(mine[:seen]), theirs.lm_head(other[0, :seen])
            assert (mine_logits - their_logits).abs().max() < BAR


@pytest.mark.parametrize("name", ["v3", "dense"])
def test_packed_documents_are_as_if_alone(name: str) -> None:
    model = build(NAMED[name])
    ids = tokens(model.config, 2, 60)
    bounds = [0, 1, 24, 60, 60 + 33, 120]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits.flatten(0, 1)
        for start, end in itertools.pairwise(bounds):
            alone = model(ids.flatten()[None, start:end]).logits[0]
            assert (packed[start:end] - alone).abs().max() < 1e-5


def test_rotary_halves_are_brought_into_pairs(tmp_path: Path) -> None:
    """rope_interleave false: the same function of the rows in another order."""
    theirs = their_twin(tiny(rope_scaling=yarn()))
    theirs.config.rope_interleave = False
    theirs.config.num_nextn_predict_layers = 0
    theirs.save_pretrained(tmp_path)
    ids = tokens(tiny(), 2, 50)
    with torch.no_grad():
        assert (load_hf(tmp_path, DeepseekV3)(ids).logits - theirs(ids).logits).abs().max() < BAR
