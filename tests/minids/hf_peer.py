"""Tiny models beside transformers' DeepseekV3ForCausalLM: configurations, weights that show differences, folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import DeepseekV3ForCausalLM

from minids.config import ModelConfig, YarnConfig
from minids.convert.hf import export_hf
from minids.model.model import DeepseekV3
from minids.train.checkpoint import save_checkpoint

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
VOCAB = len(SPECIAL) + 256


def tiny(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=3, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
        first_k_dense_replace=1, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=256,
    )  # fmt: skip
    return ModelConfig(**values | changes)


def yarn(**changes: float) -> YarnConfig:
    values: dict[str, Any] = dict(factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)
    return YarnConfig(**values | changes)


# Every feature once for certain, ...
NAMED = {
    "v3": tiny(rope_scaling=yarn()),
    "direct queries": tiny(q_lora_rank=None),
    "no groups": tiny(n_group=1, topk_group=1, norm_topk_prob=False),
    "two shared experts": tiny(n_shared_experts=2),
    "no shared experts": tiny(n_shared_experts=0),
    "unequal mscales": tiny(rope_scaling=yarn(mscale=0.4, mscale_all_dim=1.3)),
    "mscale alone": tiny(rope_scaling=yarn(mscale=0.7, mscale_all_dim=0.0)),
    "mscale_all_dim alone": tiny(rope_scaling=yarn(mscale=0.0, mscale_all_dim=0.8)),
    "dense": tiny(first_k_dense_replace=4),
    "one layer": tiny(num_hidden_layers=1, first_k_dense_replace=0),
    "two predicted tokens": tiny(num_nextn_predict_layers=2, rms_norm_eps=1e-3, rope_theta=500.0),
    "no predicted tokens": tiny(num_nextn_predict_layers=0),
}


def random_config(seed: int) -> ModelConfig:
    """... and in mixtures nobody thought of."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    topk_group = rng.randint(1, groups)
    experts = groups * rng.choice([2, 3, 5])
    layers = rng.randint(1, 4)
    unequal = yarn(factor=rng.uniform(1, 40), mscale=rng.uniform(0.1, 2), mscale_all_dim=rng.uniform(0.1, 2))
    return tiny(
        hidden_size=rng.choice([24, 32, 48]),
        intermediate_size=rng.randint(8, 90),
        moe_intermediate_size=rng.choice([8, 24, 40]),
        num_hidden_layers=layers,
        num_attention_heads=rng.randint(1, 5),
        q_lora_rank=rng.choice([None, 7, 24]),
        kv_lora_rank=rng.choice([5, 16, 32]),
        qk_nope_head_dim=rng.choice([3, 8, 16]),
        qk_rope_head_dim=rng.choice([2, 6, 16]),
        v_head_dim=rng.choice([4, 9, 24]),
        first_k_dense_replace=rng.randint(0, layers),
        n_shared_experts=rng.randint(0, 2),
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, experts // groups * topk_group),
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=rng.random() < 0.5,
        routed_scaling_factor=rng.uniform(0.5, 3),
        num_nextn_predict_layers=rng.randint(0, 2),
        rope_theta=rng.choice([100.0, 10000.0]),
        rope_scaling=rng.choice([None, unequal]),
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
    )


CONFIGS = NAMED | {f"random {seed}": random_config(seed) for seed in range(8)}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong one shows in the logits, and a router bias that changes the choice."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.numel():
            continue
        if tensor.dim() > 1:
            spread = 1.0 if "embed" in name else 1.3 * tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        elif "bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        else:
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))


def build(config: ModelConfig, seed: int = 0) -> DeepseekV3:
    model = DeepseekV3(config)
    randomise(model, seed)
    return model.eval()


def tokens(config: ModelConfig, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), config.vocab_size, (rows, length), generator=generator)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, made by the tokenizers library itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(SPECIAL + letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_run(folder: Path, model: DeepseekV3) -> Path:
    """A run folder holding `model` as its only checkpoint."""
    write_tokenizer(folder / "tokenizer")
    save_checkpoint(folder, 7, model, None, {}, keep=1)
    return folder


def exported(folder: Path, model: DeepseekV3, **options: Any) -> Path:
    """`model` as a Hugging Face folder, by way of a run folder."""
    export_hf(write_run(folder / "run", model), folder / "hf", **options)
    return folder / "hf"


def their_model(folder: Path) -> DeepseekV3ForCausalLM:
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval()
