from __future__ import annotations

import dataclasses
import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids import config as c
from minids.errors import InputError

STAGES = [c.PretrainConfig, c.SFTConfig, c.DPOConfig]


def leaf(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def test_presets_build_and_v3_is_the_published_one() -> None:
    assert list(c.PRESETS) == ["nano", "mini", "small", "v2-lite", "v3"]
    for name in c.PRESETS:
        assert isinstance(c.preset(name), c.ModelConfig)
    v3 = c.preset("v3")  # values of DeepSeek-V3's inference/configs/config_671B.json
    assert (v3.num_hidden_layers, v3.hidden_size, v3.n_routed_experts, v3.n_group, v3.topk_group) == (
        61,
        7168,
        256,
        8,
        4,
    )
    assert v3.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert v3.num_moe_layers == 58


def test_preset_takes_changes_and_names_the_choices() -> None:
    assert c.preset("mini", vocab_size=7).vocab_size == 7
    with pytest.raises(InputError, match="got 'huge', wanted one of nano, mini, small, v2-lite, v3"):
        c.preset("huge")


@pytest.mark.parametrize("cls", STAGES)
def test_every_field_is_reached_by_a_flag(cls: type) -> None:
    """A flag's text lands, converted, in the field of its name and nowhere else."""
    text = {bool: "true", int: "4", float: "0.25", str: "word"}
    for name in c.setting_names(cls):
        yarn = name.startswith("model.rope_scaling.")
        base = c.from_flags(cls(), {"model.rope_scaling.factor": "8"}) if yarn else cls()
        default = leaf(base, name)
        value = {"schedule": "cosine", "dtype": "bf16", "data": ["a", "b"], "topk_group": "1"}.get(name.split(".")[-1])
        if value is None or (name == "data" and isinstance(default, str)):
            value = "4" if yarn else text.get(type(default), "4")
        changed = c.from_flags(base, {name: value})
        assert str(leaf(changed, name)).lower() in (str(value), str(float(value)) if value == "4" else "")
        others = [n for n in c.setting_names(cls) if n != name and not n.startswith("model.rope_scaling.")]
        assert all(leaf(changed, n) == leaf(base, n) for n in others)


def test_flags_convert() -> None:
    config = c.from_flags(
        c.PretrainConfig(),
        {"train.lr": "3e-4", "model.n_layers": "8", "model.q_lora_rank": "none", "cross_document_attention": "yes"},
    )
    assert (config.train.lr, config.model.num_hidden_layers, config.model.q_lora_rank) == (3e-4, 8, None)
    assert config.cross_document_attention is True
    assert c.from_flags(config, {"train.steps": "1e3"}).train.steps == 1000
    yarn = c.from_flags(config, {"model.rope_scaling.factor": "8"})
    assert yarn.model.rope_scaling == c.YarnConfig(factor=8)
    assert c.from_flags(yarn, {"model.rope_scaling": "none"}).model.rope_scaling is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.lrr": "1"}, "unknown setting 'train.lrr'; did you mean 'train.lr'?"),
        ({"model.n_layer": "1"}, "did you mean"),
        ({"train.steps": "ten"}, "--train.steps: got 'ten', wanted int"),
        ({"train.steps": "1.5"}, "--train.steps: got '1.5', wanted int"),
        ({"train.steps": "0"}, "train.steps: got 0, wanted a whole number >= 1"),
        ({"train.lr": "nan"}, "train.lr: got nan, wanted a number > 0"),
        ({"train.lr": "inf"}, "train.lr: got inf, wanted a number > 0"),
        ({"train.beta1": "1.5"}, "train.beta1: got 1.5, wanted a number from 0 to below 1"),
        ({"train.grad_clip": "0"}, "train.grad_clip: got 0.0, wanted a number > 0"),
        ({"train.mtp_loss_weight": "nan"}, "train.mtp_loss_weight: got nan, wanted 0 or more"),
        ({"train.eval_every": "-1"}, "train.eval_every: got -1, wanted 0 or more"),
        ({"train.warmup_steps": "-3"}, "train.warmup_steps: got -3, wanted 0 or more, or none"),
        ({"train.seed": "99999999999999999999"}, "train.seed: got 99999999999999999999, wanted a whole number from 0"),
        ({"model.n_shared_experts": "-1"}, "model.n_shared_experts: got -1, wanted a whole number >= 0"),
        ({"model.q_lora_rank": "0"}, "model.q_lora_rank: got 0, wanted a whole number >= 1, or none"),
        ({"model.rope_theta": "0"}, "model.rope_theta: got 0.0, wanted a number > 0"),
        ({"train.schedule": "linear"}, "--train.schedule: got 'linear', wanted one of v3, cosine"),
        ({"cross_document_attention": "maybe"}, "got 'maybe', wanted bool"),
        ({"model.n_group": "3"}, "model.n_group: got 3 groups for 8 routed experts"),
        ({"model.topk_group": "2"}, "model.topk_group: got 2, wanted at most n_group = 1"),
        ({"model.num_experts_per_tok": "9"}, "model.num_experts_per_tok: got 9, wanted 1 to 8"),
        ({"model.qk_rope_head_dim": "7"}, "model.qk_rope_head_dim: got 7, wanted an even number"),
        ({"model.hidden_size": "0"}, "model.hidden_size: got 0"),
        ({"model.rope_scaling.factor": "0.5"}, "model.rope_scaling.factor: got 0.5, wanted a number >= 1"),
        ({"model.rope_scaling.factor": "nan"}, "model.rope_scaling.factor: got nan, wanted a number > 0"),
        ({"model.rope_scaling.beta_fast": "0"}, "model.rope_scaling.beta_fast: got 0.0, wanted a number > 0"),
        ({"model.rope_scaling.mscale": "inf"}, "model.rope_scaling.mscale: got inf, wanted a number"),
        ({"checkpoint.keep": "0"}, "wanted every >= 0, keep >= 1"),
    ],
)
def test_bad_values_name_setting_value_and_what_is_right(flags: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as error:
        c.from_flags(c.PretrainConfig(), flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_dense_model_needs_no_valid_expert_settings() -> None:
    dense = dict(num_hidden_layers=2, first_k_dense_replace=2, n_routed_experts=0)
    assert c.ModelConfig(**dense, num_nextn_predict_layers=0).num_moe_layers == 0
    with pytest.raises(InputError, match="num_nextn_predict_layers"):  # an MTP module has the last layer's kind
        c.ModelConfig(**dense, num_nextn_predict_layers=1)
    with pytest.raises(InputError, match="n_routed_experts"):
        c.ModelConfig(n_routed_experts=0)


def test_toml_file_errors_name_the_file(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        c.load_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("train = [")
    with pytest.raises(InputError, match=r"bad\.toml: not valid TOML"):
        c.load_toml(tmp_path / "bad.toml")
    with pytest.raises(InputError, match=r"run\.toml: unknown setting 'trian'; did you mean 'train'"):
        c.from_dict(c.PretrainConfig, {"trian": {"lr": 1}}, where="run.toml: ")
    with pytest.raises(InputError, match=r"run\.toml: train: got 3, wanted a section of steps"):
        c.from_dict(c.PretrainConfig, {"train": 3}, where="run.toml: ")


def test_later_layers_keep_what_earlier_ones_set() -> None:
    config = c.from_dict(c.PretrainConfig, {"train": {"lr": 1e-3, "steps": 5}})
    config = c.from_dict(c.PretrainConfig, {"train": {"steps": 6}}, config)
    config = c.from_flags(config, {"train.seed": "7"})
    assert (config.train.lr, config.train.steps, config.train.seed) == (1e-3, 6, 7)


TEXT = st.text(st.characters(codec="utf-8"))


@given(
    data=st.lists(TEXT),
    base=TEXT,
    seq_len=st.none() | st.integers(2, 2**60),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    holdout=st.floats(0, 1, exclude_max=True),
    warmup=st.none() | st.integers(0, 10**6),
)
def test_toml_round_trip_is_exact(data: Any, base: Any, seq_len: Any, lr: Any, holdout: Any, warmup: Any) -> None:
    train = c.TrainConfig(lr=lr, warmup_steps=warmup)
    config = c.SFTConfig(data=data, base=base, seq_len=seq_len, holdout=holdout, train=train)
    assert c.from_dict(c.SFTConfig, tomllib.loads(c.to_toml(config))) == config


@pytest.mark.parametrize("cls", [c.SFTConfig, c.DPOConfig])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seq_len": "-5"}, "seq_len: got -5, wanted a whole number >= 2, or none"),
        ({"epochs": "inf"}, "epochs: got inf, wanted a number > 0, or none"),
        ({"epochs": "0"}, "epochs: got 0.0, wanted a number > 0"),
        ({"holdout": "nan"}, "holdout: got nan, wanted a share from 0 to below 1"),
        ({"holdout": "1"}, "holdout: got 1.0, wanted a share from 0 to below 1"),
    ],
)
def test_bad_values_of_tuning(cls: type, flags: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        c.from_flags(cls(), flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"beta": "0"}, "beta: got 0.0, wanted a number > 0"), ({"sft_loss_weight": "-1"}, "sft_loss_weight: got -1.0")],
)
def test_bad_values_of_dpo(flags: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        c.from_flags(c.DPOConfig(), flags)


@pytest.mark.parametrize("name", c.PRESETS)
def test_toml_round_trip_of_presets(name: str) -> None:
    config = c.PretrainConfig(model=c.preset(name))
    assert c.from_dict(c.PretrainConfig, tomllib.loads(c.to_toml(config))) == config
    assert dataclasses.replace(config.model) == config.model
