"""Every setting of minids: the model's (names as in Hugging Face's `DeepseekV3Config`), the presets, and a run's.

A run's configuration is a tree of dataclasses. It comes from defaults, then a preset, then a TOML file, then dotted
flags (`--train.lr 3e-4`); each of them reaches every field, and a key that does not exist is an error naming the
nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from minids.errors import InputError, require_seed

C = TypeVar("C")


@dataclass(kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071; DeepSeek-V3 report, section 4.3), on the decoupled rope part."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"model.rope_scaling.{name}: got {getattr(self, name)}, wanted a number > 0")
        if self.factor < 1:
            raise InputError(f"model.rope_scaling.factor: got {self.factor}, wanted a number >= 1")
        for name in ("mscale", "mscale_all_dim"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"model.rope_scaling.{name}: got {getattr(self, name)}, wanted a number")


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture of DeepSeek-V3 (arXiv 2412.19437, section 2). Defaults are those of a small model."""

    vocab_size: int = 6400
    hidden_size: int = 192
    intermediate_size: int = 512  # dense SwiGLU width, first `first_k_dense_replace` layers
    moe_intermediate_size: int = 128  # width of one routed expert; shared experts are n_shared_experts times this
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    q_lora_rank: int | None = 96  # None: queries are projected directly
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    first_k_dense_replace: int = 1
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 1  # multi-token prediction depth
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int = 0  # this and the next: `minids pretrain` takes the tokenizer's
    eos_token_id: int = 1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings n_group topk_group"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: got {getattr(self, name)}, wanted a whole number >= 1")
        for name in ("n_shared_experts", "num_nextn_predict_layers", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name}: got {getattr(self, name)}, wanted a whole number >= 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise InputError(f"model.q_lora_rank: got {self.q_lora_rank}, wanted a whole number >= 1, or none")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"model.{name}: got {getattr(self, name)}, wanted a number > 0")
        if self.qk_rope_head_dim % 2:
            raise InputError(f"model.qk_rope_head_dim: got {self.qk_rope_head_dim}, wanted an even number")
        if self.num_hidden_layers + self.num_nextn_predict_layers > self.first_k_dense_replace:
            self._check_experts()  # MTP modules lie behind the last layer, so they have experts too

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts < 1 or self.moe_intermediate_size < 1:
            raise InputError(
                f"model.n_routed_experts, moe_intermediate_size: got {experts}, {self.moe_intermediate_size}; both "
                f"must be >= 1; for a dense one, first_k_dense_replace >= num_hidden_layers + num_nextn_predict_layers"
            )
        if experts % groups or (groups > 1 and experts // groups < 2):
            raise InputError(
                f"model.n_group: got {groups} groups for {experts} routed experts, wanted a divisor that leaves at "
                f"least 2 experts a group (a group is scored by its two best)"
            )
        if self.topk_group > groups:
            raise InputError(f"model.topk_group: got {self.topk_group}, wanted at most n_group = {groups}")
        allowed = experts // groups * self.topk_group
        if not 1 <= self.num_experts_per_tok <= allowed:
            raise InputError(
                f"model.num_experts_per_tok: got {self.num_experts_per_tok}, wanted 1 to {allowed} (experts in the "
                f"{self.topk_group} groups a token may use)"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(qk_head_dim), times YaRN's squared attention factor (official inference/model.py)."""
        scale = self.qk_head_dim**-0.5
        yarn = self.rope_scaling
        if yarn is not None and yarn.mscale_all_dim and yarn.factor > 1:
            scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
        return scale


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # trains in minutes on two CPU cores. V3's initial 0.006 at width 7168 is 0.045 at width 128, by 1 / sqrt(width):
    # with 0.006 a short run ends before attention has begun to form
    "nano": dict(
        hidden_size=128, intermediate_size=384, moe_intermediate_size=96, num_attention_heads=4, q_lora_rank=64,
        kv_lora_rank=48, n_routed_experts=4, initializer_range=0.045,
    ),
    # 26M parameters, the size of the first MiniMind
    "mini": dict(
        hidden_size=384, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        q_lora_rank=128, kv_lora_rank=96, num_nextn_predict_layers=1, max_position_embeddings=4096,
    ),
    # about 200M parameters, 64M active: a day on one consumer GPU
    "small": dict(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, moe_intermediate_size=384, num_hidden_layers=12,
        num_attention_heads=12, q_lora_rank=256, kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, n_routed_experts=16, num_experts_per_tok=2, max_position_embeddings=8192,
    ),
    # DeepSeek-V2-Lite's shape (16B) with V3's gate
    "v2-lite": dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, num_nextn_predict_layers=0,
        max_position_embeddings=163840, rope_scaling=YarnConfig(mscale=0.707, mscale_all_dim=0.707),
    ),
    # DeepSeek-V3 itself: 671B parameters, 37B active
    "v3": dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, first_k_dense_replace=3, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
        n_group=8, topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=163840,
        rope_scaling=YarnConfig(),
    ),
}
# fmt: on


def preset(name: str, **changes: Any) -> ModelConfig:
    """The named preset as a ModelConfig, with `changes` applied."""
    if name not in PRESETS:
        raise InputError(f"--preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
    return ModelConfig(**{**PRESETS[name], **changes})


@dataclass(kw_only=True)
class TrainConfig:
    """The recipe, shared by pretrain, sft and dpo (each has its own defaults). Source: DeepSeek-V3 report, 4.2."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # packed sequences (dpo: pairs) in one forward pass
    grad_accumulation_steps: int = 1  # forward passes per optimizer step
    lr: float = 2e-3  # peak
    schedule: Literal["v3", "cosine"] = "v3"
    warmup_steps: int | None = None  # None: 2000, at most 5 % of the run
    weight_decay: float = 0.1  # matrices and embeddings; never norms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    bias_update_speed: float = 1e-3  # gamma of the auxiliary-loss-free balancing; 0 for the last 3.4 % of the run
    balance_loss_alpha: float = 1e-4  # sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # lambda; a third of it after 67.6 % of the run
    # Of matrix products; weights, gradients and optimizer state stay fp32. fp8: those of the blocks' linear layers, the
    # rest in bf16 (minids/precision.py). Dense layers then keep their inputs for the backward as fp8 codes, half of
    # bf16's memory. On an H200 a layer with its gradients was not faster than in bf16 when last measured (goal 14 in
    # benchmarks/results/README.md); a whole step has not been. auto: bf16 or fp32, by the hardware.
    dtype: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    device: str = "auto"
    cuda_graph: bool = True  # on a GPU: pretrain and sft launch a step as one CUDA graph, which takes some more memory
    seed: int = 0
    eval_every: int = 200  # steps; 0: at the end only
    eval_batches: int = 16
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accumulation_steps", "eval_batches", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}: got {getattr(self, name)}, wanted a whole number >= 1")
        for name in ("lr", "eps", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"train.{name}: got {getattr(self, name)}, wanted a number > 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"train.{name}: got {getattr(self, name)}, wanted a number from 0 to below 1")
        for name in ("weight_decay", "bias_update_speed", "balance_loss_alpha", "mtp_loss_weight", "eval_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"train.{name}: got {getattr(self, name)}, wanted 0 or more")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"train.warmup_steps: got {self.warmup_steps}, wanted 0 or more, or none")
        require_seed("train.seed", self.seed)


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 200  # steps; 0: at the end only
    keep: int = 3  # newest checkpoints kept

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise InputError(f"checkpoint.every, keep: got {self.every}, {self.keep}; wanted every >= 0, keep >= 1")


@dataclass(kw_only=True)
class PretrainConfig:
    data: str = ""  # shard folder written by `minids prepare`
    tokenizer: str = ""
    out: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cross_document_attention: bool = False  # True: tokens see earlier documents packed into their sequence, as in V3


def _check_tuning(config: SFTConfig | DPOConfig) -> None:
    if config.seq_len is not None and config.seq_len < 2:
        raise InputError(f"seq_len: got {config.seq_len}, wanted a whole number >= 2, or none")
    if config.epochs is not None and not 0 < config.epochs < math.inf:
        raise InputError(f"epochs: got {config.epochs}, wanted a number > 0, or none")
    if not 0 <= config.holdout < 1:
        raise InputError(f"holdout: got {config.holdout}, wanted a share from 0 to below 1")


@dataclass(kw_only=True)
class SFTConfig:
    data: list[str] = field(default_factory=list)  # row files
    base: str = ""  # run folder or checkpoint to start from (--from)
    out: str = ""
    seq_len: int | None = None  # None: that of the base run
    epochs: float | None = None  # given: sets train.steps
    holdout: float = 0.02  # share of conversations kept for evaluation
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500, lr=5e-4, schedule="cosine", weight_decay=0.1, mtp_loss_weight=0.1
        )
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _check_tuning(self)


@dataclass(kw_only=True)
class DPOConfig:
    data: list[str] = field(default_factory=list)  # preference rows
    base: str = ""
    out: str = ""
    seq_len: int | None = None
    epochs: float | None = None
    holdout: float = 0.1
    beta: float = 0.1
    sft_loss_weight: float = 0.2  # NLL of the chosen answer beside the preference loss: keeps the model from collapsing
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=200, lr=5e-5, schedule="cosine", weight_decay=0.0, mtp_loss_weight=0.0, bias_update_speed=0.0
        )
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _check_tuning(self)
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta: got {self.beta}, wanted a number > 0")
        if not 0 <= self.sft_loss_weight < math.inf:
            raise InputError(f"sft_loss_weight: got {self.sft_loss_weight}, wanted 0 or more")


# Short names people type, for fields that keep Hugging Face's names.
ALIASES = {"model.n_layers": "model.num_hidden_layers"}


def _unknown(key: str, known: list[str], where: str) -> InputError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    return InputError(f"{where}unknown setting {key!r}{hint}")


def setting_names(cls: type, prefix: str = "") -> list[str]:
    """All dotted leaf names below a dataclass: "out", "train.lr", "model.rope_scaling.factor"."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = _dataclass_of(hint)
        names += setting_names(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return names


def _dataclass_of(hint: Any) -> type | None:
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` (from TOML, or text from a flag) as the annotated type; InputError when it is not one."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return _convert(value, next(option for option in options if option is not type(None)), path)
    if origin is Literal:
        if value in options:
            return value
        raise InputError(f"{path}: got {value!r}, wanted one of {', '.join(map(str, options))}")
    if origin is list:
        return [_convert(item, options[0], path) for item in (value if isinstance(value, list) else [value])]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
            return str(value).lower() in ("true", "1", "yes")
    elif hint is str and isinstance(value, str):
        return value
    elif hint in (int, float) and not isinstance(value, bool):
        try:
            if hint is float:
                return float(value)
            if isinstance(value, int) or str(value).lstrip("+-").isdigit():
                return int(value)  # exact, where a float would round above 2**53
            if float(value).is_integer():  # 1e3
                return int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass  # falls to the error below, which names the value
    raise InputError(f"{path}: got {value!r}, wanted {getattr(hint, '__name__', hint)}")


def from_dict(cls: type[C], values: Mapping[str, Any], base: C | None = None, where: str = "", prefix: str = "") -> C:
    """A `cls` from nested `values` laid over `base` (default: the class's defaults). `where` opens error messages."""
    hints = typing.get_type_hints(cls)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        key = ALIASES.get(prefix + key, prefix + key).removeprefix(prefix)
        if key not in hints:
            sections = [prefix + name for name in hints]
            raise _unknown(prefix + key, list(dict.fromkeys([*sections, *setting_names(cls, prefix)])), where)
        nested = _dataclass_of(hints[key])
        if nested and isinstance(value, Mapping):
            old = getattr(base, key) if base is not None else None
            changes[key] = from_dict(nested, value, old, where, f"{prefix}{key}.")
        elif nested and value is not None and str(value).lower() not in ("none", "null"):
            wanted = ", ".join(setting_names(nested))
            raise InputError(f"{where}{prefix}{key}: got {value!r}, wanted a section of {wanted}")
        else:
            changes[key] = None if nested else _convert(value, hints[key], f"{where}{prefix}{key}")
    if base is None:
        return cls(**changes)
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def from_flags(base: C, flags: Mapping[str, Any]) -> C:
    """`base` with dotted `flags` ({"train.lr": "3e-4"}) applied."""
    cls = type(base)
    tree: dict[str, Any] = {}
    known = [*setting_names(cls), "model.rope_scaling"]
    for path, value in flags.items():
        path = ALIASES.get(path, path)
        if path not in known:
            raise _unknown(path, known, "")
        node = tree
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return from_dict(cls, tree, base, where="--")


def load_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from None


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_toml(config: Any) -> str:
    """TOML text that `from_dict(type(config), load_toml(...))` reads back to an equal object. None is left out."""

    def scalar(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
        if isinstance(value, list):
            return f"[{', '.join(map(scalar, value))}]"
        return repr(value)

    def lines(section: Mapping[str, Any], prefix: str) -> list[str]:
        leaves = {k: v for k, v in section.items() if v is not None and not isinstance(v, dict)}
        # a None that differs from the default must be written down to survive the round trip
        nones = [k for k, v in section.items() if v is None]
        out = [f"{k} = {scalar(v)}" for k, v in leaves.items()] + [f'{k} = "none"' for k in nones]
        for key, value in section.items():
            if isinstance(value, dict):
                out += ["", f"[{prefix}{key}]", *lines(value, f"{prefix}{key}.")]
        return out

    return "\n".join(lines(to_dict(config), "")).lstrip("\n") + "\n"
