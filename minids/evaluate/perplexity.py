"""Bits per byte of a model on row files: of whole texts, and of what the assistant says in conversations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minids.data.loader import Batch
from minids.data.pack import Sample
from minids.data.rows import REFUSED, Row, RowReport, read_rows
from minids.errors import InputError
from minids.loading import load
from minids.precision import autocast, pick_dtype
from minids.tokenizer import Tokenizer
from minids.train.log import note
from minids.train.loop import pick_device
from minids.train.measure import join, likelihood, token_bytes


def _windows(ids: list[int], mask: list[bool], seq_len: int) -> Iterator[Sample]:
    """`ids` in pieces of at most `seq_len`, each beginning with the last token of the one before, so that every token
    but the first is predicted exactly once."""
    for start in range(0, max(1, len(ids) - 1), seq_len - 1):
        piece = slice(start, start + seq_len)
        yield Sample(np.array(ids[piece]), np.array(mask[piece], dtype=bool))


def _samples(
    rows: Iterable[Row], tokenizer: Tokenizer, seq_len: int, dropped: dict[str, int], report: RowReport
) -> Iterator[Sample]:
    """Rows of other kinds are counted in `dropped`, chats that the template refuses in `report`."""
    for row in rows:
        if row.kind == "text" and row.text is not None:
            ids = tokenizer.encode(row.text, add_bos=True, add_eos=True)
            mask = [True] * len(ids)
        elif row.kind == "chat":
            tokenizer.require_marked_answers()
            try:
                ids, mask = tokenizer.encode_chat(row.messages, row.tools)
            except InputError as error:
                report.refuse(row.source, row.number, error)
                continue
        else:
            reason = f"{row.kind} row"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        yield from _windows(ids, mask, seq_len)


def _batches(samples: Iterable[Sample], tokens: int, seq_len: int, pad_id: int) -> Iterator[Batch]:
    """The samples in batches of at most `tokens` tokens."""
    waiting: list[Sample] = []
    size = 0
    for sample in samples:
        if waiting and size + len(sample.tokens) > tokens:
            yield join(waiting, seq_len, pad_id)
            waiting, size = [], 0
        waiting.append(sample)
        size += len(sample.tokens)
    if waiting:
        yield join(waiting, seq_len, pad_id)


def bits_per_byte(
    path: str | Path,
    files: Sequence[str],
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measures the model at `path` (as `minids.load`) on all rows of `files`.

    seq_len: longest context (None: the model's maximum, at most 2048); longer texts are measured in pieces of it. A
    batch holds batch_size * seq_len tokens. Returns {"bits_per_byte", "nll" (nats per token), "perplexity", "tokens",
    "bytes", "rows" (measured), "dropped" (rows of other kinds), "skipped_rows" and "skipped_examples" (bad rows, by
    reason)}. Raises InputError for unusable files, a seq_len the model does not take, or conversations and a chat
    template that marks no answers.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size: got {batch_size}, wanted a whole number >= 1")
    where = pick_device(device)
    products = pick_dtype(dtype, where)
    model, tokenizer = load(path, device=where)
    if model.lm_head.weight.dtype != products:  # autocast only lowers precision, and does not mix fp16 with bf16
        model.float()
    longest = model.config.max_position_embeddings
    length = min(longest, 2048) if seq_len is None else seq_len
    if not 2 <= length <= longest:
        raise InputError(f"--seq-len: got {length}, wanted 2 to {longest}, the longest the model in {path} takes")
    dropped: dict[str, int] = {}
    report = RowReport()
    samples = _samples(read_rows(files, report=report), tokenizer, length, dropped, report)
    with autocast(where, products):
        batches = _batches(samples, batch_size * length, length, tokenizer.pad_id)
        values = likelihood(model, batches, token_bytes(tokenizer))
    left_out = report.left_out(dropped)
    if "nll" not in values:
        why = f" (left out: {left_out})" if left_out else ""
        raise InputError(f"{', '.join(map(str, files))}: no text and no assistant's answer to measure{why}")
    if left_out:
        note(f"left out: {left_out}")
    measured = report.rows - sum(dropped.values()) - report.skipped.get(REFUSED, 0)
    perplexity = math.exp(min(values["nll"], 700.0))
    return {**values, "perplexity": perplexity, "rows": measured, **report.facts(dropped)}
