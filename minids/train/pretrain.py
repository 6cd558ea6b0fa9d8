"""Pretraining: next-token prediction (and multi-token prediction) on token shards, and the task SFT shares with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minids.config import PretrainConfig, TrainConfig
from minids.data.loader import Batch, Loader, eval_batches
from minids.data.store import HOLDOUT, TRAIN, TokenShards
from minids.device import queue_copy
from minids.errors import InputError
from minids.model.model import DeepseekV3
from minids.tokenizer import Tokenizer
from minids.train.loop import StepLoss, Window, counted_tokens, pick_device, train
from minids.train.measure import likelihood, token_bytes
from minids.train.run import absolute, open_run


class LanguageModelTask:
    """Next-token prediction on packed rows; tokens outside the rows' mask (SFT: all but the assistant's) do not count.

    loss = nll / tokens + lambda / depths * MTP nll / tokens + alpha * balance, tokens being those counted in the step.
    """

    curves = (
        ("loss (nats per token)", ("nll", "mtp_nll")),
        ("bits per byte", ("bits_per_byte",)),
        ("learning rate", ("lr",)),
        ("expert imbalance", ("expert_imbalance",)),
    )
    lower_is_better = ("loss", "nll", "mtp_nll", "bits_per_byte")
    same_shapes = True

    def __init__(
        self,
        stage: str,
        shards: TokenShards,
        tokenizer: Tokenizer,
        settings: TrainConfig,
        cross_documents: bool = False,
    ) -> None:
        self.stage, self.shards, self.seq_len, self.settings = stage, shards, shards.seq_len, settings
        self.cross_documents = cross_documents
        self.loader = Loader(shards, TRAIN, settings.batch_size, settings.seed)
        self.token_bytes = token_bytes(tokenizer)

    def _joined(self, batch: Batch) -> Batch:
        """The batch as the model sees it: with `cross_documents`, every row is one document to attention."""
        if not self.cross_documents:
            return batch
        rows, length = batch.input_ids.shape
        whole_rows = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        return Batch(batch.input_ids, batch.labels, whole_rows)

    def next_batch(self) -> Batch:
        return self._joined(next(self.loader))

    def count(self, batch: Batch) -> int:
        return counted_tokens(batch)

    def tokens(self, batch: Batch) -> int:
        return batch.input_ids.numel()

    def loss(self, model: DeepseekV3, batch: Batch, window: Window) -> StepLoss:
        device = next(model.parameters()).device
        input_ids, labels = (queue_copy(x, device) for x in (batch.input_ids, batch.labels))
        losses = model.losses(input_ids, labels, batch.cu_seqlens, mtp=window.mtp)
        metrics = {"nll": losses.nll_sum / window.counted, "balance": losses.balance / window.batches}
        loss = metrics["nll"] + self.settings.balance_loss_alpha * metrics["balance"]
        if losses.mtp_nll_sum:
            metrics["mtp_nll"] = torch.stack(losses.mtp_nll_sum).mean() / window.counted
            loss = loss + window.mtp_weight * metrics["mtp_nll"]
        return StepLoss(loss, metrics, losses.expert_counts)

    def evaluate(self, model: DeepseekV3) -> dict[str, float]:
        """{"nll", "bits_per_byte"} of the held-out rows; empty when the data has none."""
        if not self.shards.rows(HOLDOUT):
            return {}
        batches: Iterator[Batch] = eval_batches(
            self.shards, HOLDOUT, self.settings.batch_size, self.settings.eval_batches
        )
        values = likelihood(model, map(self._joined, batches), self.token_bytes)
        return {name: values[name] for name in ("nll", "bits_per_byte") if name in values}

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state(state)

    def summary(self) -> list[str]:
        counts = ", ".join(f"{self.shards.rows(split)} rows {split}" for split in (TRAIN, HOLDOUT))
        unused = {**self.shards.index.get("dropped", {}), **self.shards.index.get("skipped_rows", {})}
        left_out = ", ".join(f"{count} {reason}" for reason, count in unused.items())
        return [
            f"data: {self.shards.path}, {counts} of {self.seq_len} tokens"
            + (f"; left out: {left_out}" if left_out else "")
        ]

    def next_commands(self, out: Path) -> list[str]:
        if self.stage == "sft":
            return [f"minids chat {out}", f"minids dpo --from {out} --data PAIRS.jsonl --out {out}-dpo"]
        return [
            f"minids generate {out} --prompt TEXT",
            f"minids sft --from {out} --data CHATS.jsonl --out {out}-sft",
            f"minids export {out} --to hf --out {out}-hf",
        ]


def pretrain(config: PretrainConfig, resume: bool = False) -> dict[str, Any]:
    """Trains `config.model` from nothing on the shards `config.data` into the run folder `config.out`.

    Returns `loop.train`'s dict. Raises InputError (see there; also when data, tokenizer and model do not fit together
    or `out` cannot be used) and Interrupted.
    """
    for name in ("data", "tokenizer"):
        if not getattr(config, name):
            raise InputError(f"--{name}: not given, nor {name!r} in a --config file")
    config = absolute(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = dataclasses.replace(config.model, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if model_config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size: got {model_config.vocab_size}, but the tokenizer {config.tokenizer} has "
            f"{tokenizer.vocab_size} tokens; wanted at least as many"
        )
    shards = TokenShards(config.data)
    shards.require(tokenizer.fingerprint, model_config.vocab_size, model_config.max_position_embeddings)
    device = pick_device(config.train.device)
    with open_run(config, resume) as run:
        tokenizer.save(run.out / "tokenizer")
        torch.manual_seed(config.train.seed)
        with device:
            model = DeepseekV3(model_config)
        task = LanguageModelTask("pretrain", shards, tokenizer, config.train, config.cross_document_attention)
        return train(task, model, config.train, config, run)
