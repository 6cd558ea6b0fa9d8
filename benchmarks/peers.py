"""The models of other projects that benchmarks compare with: given our weights, or as many of their own."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize

from benchmarks.flops import active_matmul_parameters
from minids.config import ModelConfig
from minids.convert.hf import to_hf_state
from minids.convert.hf_config import to_hf_config
from minids.model import DeepseekV3


def transformers_model(model: DeepseekV3, experts_implementation: str = "eager") -> Any:
    """transformers' DeepseekV3ForCausalLM with `model`'s weights, fp32, sdpa attention; experts_implementation "eager",
    "grouped_mm" or "batched_mm"."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values = {
        key: value for key, value in to_hf_config(model.config).items() if key not in ("architectures", "auto_map")
    }
    peer = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**values), attn_implementation="sdpa", experts_implementation=experts_implementation
    )
    ours = dict(to_hf_state(model.state_dict(), model.config))
    state = peer.state_dict()
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if name in ours:
            tensor.copy_(ours[name])
        elif leaf == "down_proj":
            tensor.copy_(
                torch.stack([ours[f"{stem}.{e}.down_proj.weight"] for e in range(model.config.n_routed_experts)])
            )
        else:
            parts = [
                torch.cat([ours[f"{stem}.{e}.{half}_proj.weight"] for half in ("gate", "up")])
                for e in range(model.config.n_routed_experts)
            ]
            tensor.copy_(torch.stack(parts))
    return peer


class _Autocast(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        kind = weight.device.type
        return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def autocast_experts(peer: Any) -> Any:
    """`peer`, whose stacked experts come in autocast's dtype. Autocast itself knows no grouped products: these would be
    in fp32 beside everything else in bf16."""
    for module in list(peer.modules()):
        for name in {"gate_up_proj", "down_proj"} & module._parameters.keys():
            parametrize.register_parametrization(module, name, _Autocast())
    return peer


def minimind_settings(config: ModelConfig, use_moe: bool) -> dict[str, Any]:
    """Of a MiniMind (minimind-3, 2026) with as many layers, heads, experts and experts a token as `config`, two query
    heads to one of keys as by its default, and experts, or a dense FFN, of a width (a multiple of 8) with which a token
    is multiplied with as many weights as in ours."""
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    key_heads = heads // 2 if heads % 2 == 0 else heads
    attention = 2 * width * (heads + key_heads) * (width // heads)
    ffn = (active_matmul_parameters(config) - width * config.vocab_size) / layers - attention
    gate, each = (width * config.n_routed_experts, config.num_experts_per_tok) if use_moe else (0, 1)
    inner = 8 * round((ffn - gate) / (3 * width * each * 8))
    return dict(
        hidden_size=width, num_hidden_layers=layers, use_moe=use_moe, vocab_size=config.vocab_size,
        num_attention_heads=heads, num_key_value_heads=key_heads, num_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok, max_position_embeddings=config.max_position_embeddings,
        intermediate_size=inner, moe_intermediate_size=inner,
    )  # fmt: skip


def minimind_file(checkout: Path) -> Path:
    return checkout / "model" / "model_minimind.py"


def minimind_version(checkout: Path) -> str:
    """The first digits of its model file's SHA-256: a checkout need not know its commit."""
    return hashlib.sha256(minimind_file(checkout).read_bytes()).hexdigest()[:12]


def minimind_model(config: ModelConfig, checkout: Path, use_moe: bool) -> torch.nn.Module:
    """MiniMindForCausalLM from a checkout of MiniMind, with weights of its own."""
    spec = importlib.util.spec_from_file_location("model_minimind", minimind_file(checkout))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer: torch.nn.Module = module.MiniMindForCausalLM(module.MiniMindConfig(**minimind_settings(config, use_moe)))
    return peer
