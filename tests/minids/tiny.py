"""Runs small enough for tests: a tokenizer of bytes and a few merges, its data, a model that learns it in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minids.config import CheckpointConfig, DPOConfig, ModelConfig, PretrainConfig, SFTConfig, TrainConfig
from minids.tokenizer import Tokenizer

ANIMALS = (("fox", "狐狸"), ("owl", "猫头鹰"), ("bear", "熊"), ("crab", "螃蟹"), ("wolf", "狼"), ("swan", "天鹅"))
TEXTS = [  # different enough for the cleaner
    f"The {color} {animal} sees {count} {thing}s near the {place}. 一只{word}在{where}看{number}个东西。"
    f"{thing} {animal}!\nIt is {color}, says the {animal} of the {place}, and counts to {count}."
    for animal, word in ANIMALS
    for color, count, number, thing, place, where in (
        ("red", 2, "两", "stone", "mountain", "山上"),
        ("grey", 31, "三十一", "river", "valley", "山谷里"),
        ("golden", 47, "四十七", "star", "old city wall", "城墙边"),
    )
]
TIMING = ("seconds", "tokens_per_second")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are slower on more threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_config(vocab_size: int, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=128, initializer_range=0.05, **changes,
    )  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    from minids.tokenizer import train_from_texts

    return train_from_texts(TEXTS, vocab_size=320)[0]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_shards(folder: Path, seq_len: int = 32, holdout: float = 0.3) -> None:
    """`folder`/tok and `folder`/shards."""
    from minids.data.prepare import prepare

    tokenizer().save(folder / "tok")
    rows = write_rows(folder / "text.jsonl", [{"text": text} for text in TEXTS])
    prepare([rows], tokenizer(), folder / "shards", seq_len, fim_rate=0.0, split_rate=0.0, holdout=holdout, workers=1)


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]}
        for n in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} and 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea at all."} for n in range(count)]


def refused_chat() -> dict[str, Any]:
    """A conversation that the chat template refuses: a tool call without a name."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}
    return {"messages": [{"role": "user", "content": "call something, whatever it is"}, call]}


def unmark_answers(run: Path) -> None:
    """Takes {% generation %} out of the chat template of a run, as most published templates have none."""
    file = run / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert mark in config["chat_template"]
        config["chat_template"] = config["chat_template"].replace(mark, "")
    file.write_text(json.dumps(config), encoding="utf-8")


def settings(steps: int, **changes: Any) -> TrainConfig:
    """fp32, whatever the machine prefers; log and evaluation steps that checkpoints cut across."""
    defaults = dict(steps=steps, batch_size=2, lr=1e-2, dtype="fp32", device="cpu", seed=5, log_every=3, eval_every=4)
    return TrainConfig(**{**defaults, "eval_batches": 2, **changes})


def pretrain_config(folder: Path, out: str, steps: int = 10, every: int = 2, **changes: Any) -> PretrainConfig:
    return PretrainConfig(
        data=str(folder / "shards"), tokenizer=str(folder / "tok"), out=str(folder / out),
        model=model_config(tokenizer_size(folder)), train=settings(steps, **changes),
        checkpoint=CheckpointConfig(every=every, keep=2),
    )  # fmt: skip


def tokenizer_size(folder: Path) -> int:
    return Tokenizer.load(folder / "tok").vocab_size


def sft_config(folder: Path, out: str, base: str, steps: int = 8, every: int = 2, **changes: Any) -> SFTConfig:
    return SFTConfig(
        data=[str(folder / "chats.jsonl")], base=str(folder / base), out=str(folder / out), holdout=0.3,
        train=settings(steps, **{"schedule": "cosine", **changes}), checkpoint=CheckpointConfig(every=every, keep=2),
    )  # fmt: skip


def dpo_config(folder: Path, out: str, base: str, steps: int = 8, every: int = 2, **changes: Any) -> DPOConfig:
    plain = {"schedule": "cosine", "mtp_loss_weight": 0.0, "bias_update_speed": 0.0, "lr": 1e-3}
    return DPOConfig(
        data=[str(folder / "pairs.jsonl")], base=str(folder / base), out=str(folder / out), holdout=0.3,
        train=settings(steps, **{**plain, **changes}), checkpoint=CheckpointConfig(every=every, keep=2),
    )  # fmt: skip


def with_steps(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the optimizer's included."""
    from safetensors.torch import load_file

    return {
        f"{name}:{key}": value
        for name in ("model", "optimizer")
        for key, value in load_file(Path(checkpoint) / f"{name}.safetensors").items()
    }


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The deterministic part of metrics.jsonl."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    from minids.train.checkpoint import resolve

    first, second = resolve(one), resolve(other)
    assert first.name == second.name
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:3]}"
    assert metrics(one) == metrics(other)
