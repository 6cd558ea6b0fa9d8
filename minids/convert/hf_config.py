"""`config.json` of a DeepSeek-V3 model as Hugging Face writes it, to and from ModelConfig.

Sources: transformers 5.23 `models/deepseek_v3/configuration_deepseek_v3.py` and `modeling_rope_utils.py`
(`_compute_yarn_parameters`), and the `config.json` of the official release, whose older keys (`rope_theta` beside
`rope_scaling: {type: yarn}`, `torch_dtype`) every reader still takes: transformers 4 and 5, vLLM, SGLang.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from minids.config import ModelConfig, YarnConfig, from_dict, preset
from minids.errors import InputError
from minids.model.rope import attention_factor

# What the architecture fixes. Written on export; on import another value means a model we cannot run.
FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}


def to_hf_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of `config.json`. `dtype`: of the weights beside it, as torch names it ("bfloat16")."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "rope_scaling"}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **FIXED,
        **values,
        "num_key_value_heads": config.num_attention_heads,  # transformers divides by it
        "rope_interleave": True,
        "rope_scaling": _to_hf_yarn(config.rope_scaling) if config.rope_scaling else None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def from_hf_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a `config.json`; fields it leaves out have DeepseekV3Config's defaults.

    Raises InputError (opened by `where`) naming a value that this architecture does not have.
    """
    try:
        return _from_hf_config(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    if not isinstance(values, Mapping):
        raise InputError(f"got a {type(values).__name__}, wanted an object of settings")
    if values.get("model_type") != FIXED["model_type"]:
        raise InputError(f"model_type is {values.get('model_type')!r}; only 'deepseek_v3' can be read")
    for name, wanted in FIXED.items():
        if values.get(name, wanted) != wanted:
            raise InputError(f"{name} is {values[name]!r}; only {wanted!r} is supported")
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"rope_theta", "rope_scaling"}
    fields = {name: value for name, value in values.items() if name in known}
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(fields.get(name), list):  # several end tokens: the first is the one the model was trained with
            given = fields[name]
            fields[name] = given[0] if given else None
            if len(given) > 1:
                warnings.warn(f"{name}: got {given}; {given[0]} alone ends an answer here", stacklevel=2)
        if fields.get(name, 0) is None:
            del fields[name]
    if (fields.get("pad_token_id") or 0) < 0:  # as older configurations say that there is none
        fields["pad_token_id"] = None
    for name in ("n_shared_experts", "num_nextn_predict_layers"):
        if fields.get(name, 0) is None:
            fields[name] = 0
    defaults = preset("v3", initializer_range=0.02, max_position_embeddings=4096, rope_scaling=None)
    config = dataclasses.asdict(defaults) | fields
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, Mapping):
        raise InputError(f"rope_scaling is {rope!r}; wanted an object")
    config["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    yarn = _from_hf_yarn(rope, config["max_position_embeddings"])
    config["rope_scaling"] = dataclasses.asdict(yarn) if yarn else None
    return from_dict(ModelConfig, config)


def _to_hf_yarn(yarn: YarnConfig) -> dict[str, Any]:
    return {"type": "yarn", **dataclasses.asdict(yarn)}


def _from_hf_yarn(rope: Mapping[str, Any], max_position_embeddings: int) -> YarnConfig | None:
    """YarnConfig of `rope_scaling` (or `rope_parameters`) with transformers' defaults; None for plain RoPE."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("yarn", "deepseek_yarn"):  # the second is vLLM's name for the same
        raise InputError(f"rope_scaling type is {kind!r}; only 'yarn' is supported")
    if rope.get("truncate", True) is False:
        raise InputError("rope_scaling.truncate is false; only true is supported")
    if rope.get("factor") is None:
        raise InputError("rope_scaling has no factor; YaRN needs one")
    defaults = YarnConfig(
        original_max_position_embeddings=max_position_embeddings,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.0,
        mscale_all_dim=0.0,
    )
    names = {field.name for field in dataclasses.fields(YarnConfig)}
    given = {name: value for name, value in rope.items() if name in names and value is not None}
    yarn = from_dict(YarnConfig, given, defaults, where="rope_scaling.")
    implied = attention_factor(yarn)
    given_factor = implied if rope.get("attention_factor") is None else rope["attention_factor"]
    if not isinstance(given_factor, int | float) or not math.isclose(given_factor, implied, rel_tol=1e-6):
        raise InputError(
            f"rope_scaling.attention_factor is {given_factor}; only the one that follows from mscale and "
            f"mscale_all_dim, {implied}, is supported"
        )
    return yarn
