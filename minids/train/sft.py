"""Supervised fine-tuning of all parameters on conversations: only what the assistant says counts."""

from __future__ import annotations

from typing import Any

import torch

from minids.config import SFTConfig
from minids.data.chat import write_chat_shards
from minids.data.rows import RowReport, read_rows
from minids.data.store import TRAIN, TokenShards
from minids.errors import InputError
from minids.train.log import note
from minids.train.loop import pick_device, train
from minids.train.pretrain import LanguageModelTask
from minids.train.run import absolute, open_base, open_run, steps_for


def sft(config: SFTConfig, resume: bool = False) -> dict[str, Any]:
    """Trains the model `config.base` on the conversations in `config.data` into the run folder `config.out`.

    Conversations are packed whole into rows, attend only to themselves, and are written once to out/data, from which a
    resumed run continues: it needs neither the row files nor the base run any more. Returns `loop.train`'s dict
    (held-out loss before and after) and which rows were left out; raises InputError and Interrupted.
    """
    if not config.data:
        raise InputError("--data: not given; name files of conversations")
    config = absolute(config)
    device = pick_device(config.train.device)
    with open_run(config, resume) as run:
        base = open_base(config, run)
        base.tokenizer.save(run.out / "tokenizer")
        data = run.out / "data"
        if run.checkpoint is None:
            # replace: what a start that was killed before its first checkpoint may have left
            report = RowReport()
            rows = read_rows(config.data, report=report)
            head = (rows, base.tokenizer, data, base.seq_len, config.holdout)
            written = write_chat_shards(*head, replace=True, report=report)
            if left_out := report.left_out(written["dropped"]):
                note(f"left out: {left_out}")
        shards = TokenShards(data)
        facts = {name: shards.index.get(name, {}) for name in ("dropped", "skipped_rows", "skipped_examples")}
        shards.require(base.tokenizer.fingerprint, base.model.vocab_size, base.model.max_position_embeddings)
        settings = steps_for(config.train, config.epochs, shards.rows(TRAIN))
        torch.manual_seed(settings.seed)
        task = LanguageModelTask("sft", shards, base.tokenizer, settings)
        return train(task, base.load(device), settings, config, run) | facts
