"""Hugging Face folders: config.json, layout on disk, round trips, FP8, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

import minids
from minids.config import PRESETS, ModelConfig, PretrainConfig, from_dict, load_toml, preset
from minids.convert.hf import HFFolder, dequantize_blocks, export_hf, import_hf, load_hf, to_hf_state
from minids.convert.hf_config import from_hf_config, to_hf_config
from minids.errors import InputError
from minids.model.model import DeepseekV3
from minids.tokenizer import Tokenizer
from minids.train.checkpoint import load_checkpoint, load_model_config
from tests.minids.hf_peer import (
    CONFIGS,
    NAMED,
    build,
    exported,
    their_model,
    tiny,
    tokens,
    write_run,
    write_tokenizer,
)

E4M3_ROUNDING = 2**-4  # half the distance of neighbouring codes, 3 bits of mantissa


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_state(a: DeepseekV3, b: DeepseekV3) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- config.json


@pytest.mark.parametrize("config", [*CONFIGS.values(), *map(preset, PRESETS)], ids=[*CONFIGS, *PRESETS])
def test_config_survives_us_and_transformers(config: ModelConfig) -> None:
    values = json.loads(json.dumps(to_hf_config(config, "bfloat16")))
    assert from_hf_config(values) == config
    theirs = DeepseekV3Config.from_dict(values)
    assert theirs.dtype == torch.bfloat16
    assert theirs.num_mtp_layers == config.num_nextn_predict_layers
    assert from_hf_config(json.loads(theirs.to_json_string())) == config


def test_no_pad_token_as_older_files_have_it() -> None:
    values = to_hf_config(dataclasses.replace(NAMED["v3"], pad_token_id=None)) | {"pad_token_id": -1}
    assert from_hf_config(values).pad_token_id is None


def test_several_end_tokens_are_not_dropped_in_silence() -> None:
    with pytest.warns(UserWarning, match=r"eos_token_id: got \[1, 5\]; 1 alone ends an answer here"):
        assert from_hf_config(to_hf_config(NAMED["v3"]) | {"eos_token_id": [1, 5]}).eos_token_id == 1


def test_config_of_the_official_release() -> None:
    """The keys as deepseek-ai/DeepSeek-V3 has them, older than `rope_parameters` and `dtype`."""
    values = dict(
        architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, bos_token_id=0, eos_token_id=1, ep_size=1,
        first_k_dense_replace=3, hidden_act="silu", hidden_size=7168, initializer_range=0.02, intermediate_size=18432,
        kv_lora_rank=512, max_position_embeddings=163840, model_type="deepseek_v3", moe_intermediate_size=2048,
        moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
        num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128,
        num_nextn_predict_layers=1, pretraining_tp=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
        quantization_config=dict(
            activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
        ),
        rms_norm_eps=1e-06, rope_scaling=dict(
            beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=4096, type="yarn",
        ), rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", seq_aux=True, tie_word_embeddings=False,
        topk_group=4, topk_method="noaux_tc", torch_dtype="bfloat16", transformers_version="4.33.1", use_cache=True,
        v_head_dim=128, vocab_size=129280,
    )  # fmt: skip
    assert from_hf_config(values) == preset("v3", initializer_range=0.02)


def test_what_config_json_leaves_out_is_transformers_default() -> None:
    ours, theirs = from_hf_config({"model_type": "deepseek_v3"}), DeepseekV3Config()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("rope_theta", "rope_scaling"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type is 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "has no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 3.0}}, "attention_factor is 3.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": "big"}}, "attention_factor is big"),
        ({"hidden_size": "wide"}, "hidden_size: got 'wide'"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor: got 0.5"),
    ],
)
def test_config_that_cannot_run_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^there/config.json: .*{said}"):
        from_hf_config(to_hf_config(tiny()) | changes, "there/config.json")


# ---- export


def test_layout_is_the_official_one(tmp_path: Path) -> None:
    """Name by name against README_WEIGHTS.md of the release: one MoE layer, one prediction layer."""
    config = tiny(num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    folder = exported(tmp_path, build(config))
    tensors = load_file(folder / "model.safetensors")
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    layer = [f"self_attn.{name}" for name in attention] + ["input_layernorm", "post_attention_layernorm"]
    experts = [f"mlp.experts.{e}.{name}" for e in range(4) for name in mlp]
    moe = [*layer, *experts, *(f"mlp.shared_experts.{name}" for name in mlp), "mlp.gate"]
    mtp = [*moe, "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"]
    layers = {0: [*layer, *(f"mlp.{name}" for name in mlp)], 1: moe, 2: mtp}
    wanted = {f"model.layers.{index}.{name}.weight" for index, names in layers.items() for name in names}
    wanted |= {f"model.layers.{index}.mlp.gate.e_score_correction_bias" for index in (1, 2)}
    assert set(tensors) == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert tensors["model.layers.1.mlp.experts.0.gate_proj.weight"].shape == (24, 40)
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])


def test_exported_folder_speaks_to_transformers(tmp_path: Path) -> None:
    """Config, generation config and tokenizer, by their automatic classes."""
    folder = exported(tmp_path, build(NAMED["v3"]))
    assert AutoConfig.from_pretrained(folder).architectures == ["DeepseekV3ForCausalLM"]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, None)
    padded = build(dataclasses.replace(NAMED["v3"], pad_token_id=2))
    assert GenerationConfig.from_pretrained(exported(tmp_path / "padded", padded)).pad_token_id == 2
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    text = "深度求索 deep seek 1234\n"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id


def test_shards_and_index(tmp_path: Path) -> None:
    ours = build(NAMED["v3"])
    report = export_hf(write_run(tmp_path / "run", ours), tmp_path / "hf", max_shard_size=50_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert report["shards"] == len(files) > 3
    assert files[1] == f"model-00002-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        with safe_open(tmp_path / "hf" / file, "pt") as handle:
            held |= dict.fromkeys(handle.keys(), file)
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
            assert len(sizes) == 1 or sum(sizes) <= 50_000
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == report["bytes"]
    assert same_state(load_hf(tmp_path / "hf", DeepseekV3), ours)
    ids = tokens(ours.config, 1, 20)
    with torch.no_grad():
        assert (their_model(tmp_path / "hf")(ids).logits - ours(ids).logits).abs().max() < 1e-4


def test_bfloat16_export_keeps_the_router_bias(tmp_path: Path) -> None:
    ours = build(NAMED["v3"])
    folder = exported(tmp_path, ours, dtype="bf16")
    back = load_hf(folder, DeepseekV3)
    for name, tensor in ours.state_dict().items():
        exact = name.endswith("e_score_correction_bias")
        assert back.state_dict()[name].dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(back.state_dict()[name], tensor if exact else tensor.bfloat16())
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder)
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    assert theirs.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_export_refuses(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", build(tiny()))
    with pytest.raises(InputError, match="dtype: got 'fp4'"):
        export_hf(run, tmp_path / "hf", dtype="fp4")
    with pytest.raises(InputError, match="max-shard-size"):
        export_hf(run, tmp_path / "hf", max_shard_size=0)
    with pytest.raises(InputError, match="no such folder"):
        export_hf(tmp_path / "nowhere", tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        export_hf(run, tmp_path / "full")
    (run / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        export_hf(run, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "full"}


# ---- import


@pytest.mark.parametrize("name", ["v3", "two predicted tokens", "no shared experts", "direct queries", "dense"])
def test_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Run folder, Hugging Face folder, run folder: every tensor, the prediction modules' too."""
    ours = build(NAMED[name])
    report = import_hf(exported(tmp_path, ours), tmp_path / "back")
    assert report["parameters"] == ours.num_parameters()
    assert (tmp_path / "back" / "step_000000").is_dir()
    back = DeepseekV3(load_model_config(tmp_path / "back"))
    load_checkpoint(tmp_path / "back", back)
    assert back.config == ours.config
    assert same_state(back, ours)
    run = from_dict(PretrainConfig, load_toml(tmp_path / "back" / "config.toml"))
    assert run.model == ours.config and Tokenizer.load(run.tokenizer).vocab_size == ours.config.vocab_size


def quantize(folder: Path, block: int = 128) -> dict[str, torch.Tensor]:
    """Turns the folder's linear layers into FP8 blocks with scales, as the release has them; returns the originals."""
    originals: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "_proj" in n and "eh_proj" not in n]:
            originals[name] = weight = tensors[name].clone()
            scales = torch.empty(-(-weight.shape[0] // block), -(-weight.shape[1] // block))
            codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                    scales[i, j] = weight[place].abs().max() / 448
                    codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            tensors[name], tensors[name + "_scale_inv"] = codes, scales

    edit_tensors(folder, change)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    return originals


@pytest.mark.parametrize("block", [128, 16])
def test_fp8_blocks_are_dequantised(block: int, tmp_path: Path) -> None:
    config = tiny(hidden_size=136, intermediate_size=264, num_hidden_layers=2)  # tails of 8 behind whole blocks
    ours = build(config)
    folder = exported(tmp_path, ours)
    originals = quantize(folder, block)
    back = load_hf(folder, DeepseekV3)
    loaded = dict(to_hf_state(back.state_dict(), config))
    exact = dict(to_hf_state(ours.state_dict(), config))
    for name, tensor in loaded.items():
        if name in originals:
            bound = (originals[name].abs() * E4M3_ROUNDING).clamp(min=originals[name].abs().max() * 2**-9 / 448)
            assert ((tensor - originals[name]).abs() <= bound).all(), name
            assert not torch.equal(tensor, originals[name])
        else:
            assert torch.equal(tensor, exact[name]), name
    import_hf(folder, tmp_path / "back")
    again = DeepseekV3(config)
    load_checkpoint(tmp_path / "back", again)
    assert same_state(again, back)


def test_dequantised_tails_have_their_own_scale() -> None:
    codes = torch.ones(130, 257).to(torch.float8_e4m3fn)
    values = dequantize_blocks(codes, torch.arange(6.0).view(2, 3))
    assert [values[0, 0], values[127, 255], values[128, 0], values[129, 256]] == [0, 1, 3, 5]


def test_folder_without_prediction_layers(tmp_path: Path) -> None:
    """As transformers' own save_pretrained leaves it."""
    ours = build(NAMED["v3"])
    their_model(exported(tmp_path, ours)).save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="no multi-token-prediction layers"):
        back = load_hf(tmp_path / "theirs", DeepseekV3)
    assert back.config == dataclasses.replace(ours.config, num_nextn_predict_layers=0)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_prediction_layer_may_lack_the_shared_matrices_or_differ(tmp_path: Path) -> None:
    ours = build(NAMED["v3"])
    folder = exported(tmp_path, ours)
    copy = "model.layers.3.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: tensors[copy].add_(1))
    with pytest.warns(UserWarning, match=f"{copy} differs from model.embed_tokens.weight"):
        assert same_state(load_hf(folder, DeepseekV3), ours)
    edit_tensors(folder, lambda tensors: tensors.pop(copy))
    assert same_state(load_hf(folder, DeepseekV3), ours)


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(GATE), rf"1 missing \({GATE}\)"),
        (lambda t: t.pop("model.layers.3.enorm.weight"), "1 missing .model.layers.3.enorm.weight"),
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), r"1 missing .*experts\.5\.up_proj"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 unexpected \(extra\)"),
        (lambda t: t.update({GATE: t[GATE][1:].clone()}), r"1 of another shape \(.*\[7, 40\], not \[8, 40\]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), f"1 missing .{GATE}_scale_inv"),
        (lambda t: t.update({GATE + "_scale_inv": torch.ones(2, 2)}), r"\[2, 2\], not \[1, 1\]"),
    ],
)
def test_wrong_tensors_are_named(change: Callable[[Any], object], said: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, build(NAMED["v3"]))
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=said):
        import_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, build(tiny()), max_shard_size=30_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=shard.name):
        HFFolder(folder)
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        HFFolder(folder)
    shard.write_bytes(whole)
    edit_config(folder, quantization_config={"weight_block_size": [0, 128]})
    with pytest.raises(InputError, match="weight_block_size is"):
        HFFolder(folder)
    edit_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match="quantization 'awq'"):
        HFFolder(folder)
    edit_config(folder, quantization_config=None)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no weight_map"):
        HFFolder(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        HFFolder(folder)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        HFFolder(tmp_path / "nowhere")


def test_import_needs_a_tokenizer_that_fits(tmp_path: Path) -> None:
    folder = exported(tmp_path, build(tiny()))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        import_hf(folder, tmp_path / "back")
    small = DeepseekV3Config.from_dict(to_hf_config(tiny(vocab_size=100, num_nextn_predict_layers=0)))
    DeepseekV3ForCausalLM(small).save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    with pytest.raises(InputError, match="has 259 ids, the model's vocab_size is 100"):
        import_hf(tmp_path / "small", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ---- minids.load


def test_load_takes_every_kind_of_folder(tmp_path: Path) -> None:
    ours = build(NAMED["v3"])
    folder = exported(tmp_path, ours)
    for path in (tmp_path / "run", tmp_path / "run" / "step_000007", folder):
        model, tokenizer = minids.load(path)
        assert same_state(model, ours) and not model.training
        assert tokenizer.decode(tokenizer.encode("你好")) == "你好"
    half, _ = minids.load(str(tmp_path / "run"), dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    with pytest.raises(InputError, match="neither a checkpoint"):
        minids.load(tmp_path)


def test_package_offers_its_names() -> None:
    assert minids.ModelConfig is ModelConfig and minids.DeepseekV3 is DeepseekV3
    assert callable(minids.load)
    assert set(minids.__all__) == set(dir(minids))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = minids.lode
