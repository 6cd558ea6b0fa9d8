"""The models of other projects that benchmarks compare with, given our weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrize

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
