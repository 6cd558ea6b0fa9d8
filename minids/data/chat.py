"""Rows for post-training: chats to shards with a mask of what the assistant wrote, preferences to pairs of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from minids.data.build import in_holdout, shard_folder
from minids.data.pack import Sample
from minids.data.rows import Row, RowReport
from minids.data.store import SPLITS, TRAIN
from minids.errors import InputError
from minids.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Preference:
    """A chosen and a rejected answer to the same prompt; each mask is True on the answer's tokens, its eos included.

    `digest`: 64-bit hash of the prompt, for `in_holdout`: all pairs of a prompt fall on the same side.
    """

    chosen: Sample
    rejected: Sample
    digest: int


def write_chat_shards(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    out: str | Path,
    seq_len: int,
    holdout: float = 0.02,
    replace: bool = False,
    report: RowReport | None = None,
) -> dict[str, Any]:
    """Packs whole conversations into masked shards at `out`; returns what they hold.

    A conversation longer than `seq_len` loses its end, and is dropped when no token of an answer is left. The split
    goes by the hash of the rendered conversation; bytes are those of the answers. Rows that are no chats are counted
    and left out, and so, in `report` (that of `read_rows`), are chats that the template refuses; the index keeps both
    counts. InputError: none left, or a chat template that marks no answers.
    """
    tokenizer.require_marked_answers()
    bad = RowReport() if report is None else report
    dropped: dict[str, int] = {}
    with shard_folder(out, tokenizer, seq_len, has_mask=True, cut=False, replace=replace) as builder:
        for row in rows:
            if row.kind != "chat":
                _count(dropped, f"{row.kind} row")
                continue
            try:
                ids, written = tokenizer.encode_chat(row.messages, row.tools)
            except InputError as error:
                bad.refuse(row.source, row.number, error)
                continue
            if not any(written[1:seq_len]):
                _count(dropped, f"no answer within {seq_len} tokens")
                continue
            sample = Sample(np.array(ids), np.array(written))
            answers = [id for id, counts in zip(ids[:seq_len], written, strict=False) if counts]
            text_bytes = len(tokenizer.decode_bytes(answers))
            builder.add(sample, text_bytes, in_holdout(_digest(ids), holdout))
        if not builder.report(TRAIN, 0).documents:
            why = bad.left_out(dropped) or "no rows"
            raise InputError(f"no conversation to train on ({why}); wanted rows with messages and an answer")
        index = builder.finish([{"name": "chat", "weight": None}], **bad.facts(dropped))
    return {
        "out": str(out),
        "documents": sum(index["splits"][split]["documents"] for split in SPLITS),
        **bad.facts(dropped),
        "splits": index["splits"],
    }


def preference_samples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    seq_len: int,
    dropped: dict[str, int] | None = None,
    report: RowReport | None = None,
) -> Iterator[Preference]:
    """The pairs of the preference rows, sequences cut to `seq_len` tokens at the end.

    Left out and counted in `dropped`, by reason: other rows, pairs whose prompt leaves no room for an answer, and pairs
    that are the same after cutting. Left out and counted in `report`: pairs that the chat template refuses. InputError:
    it marks no answers.
    """
    tokenizer.require_marked_answers()
    dropped = {} if dropped is None else dropped
    bad = RowReport() if report is None else report
    for row in rows:
        if row.kind != "preference":
            _count(dropped, f"{row.kind} row")
            continue
        try:
            prompt = tokenizer.encode_chat(row.messages, row.tools, add_generation_prompt=True)[0]
            encoded = [tokenizer.encode_chat(side, row.tools) for side in (row.chosen, row.rejected)]
        except InputError as error:
            bad.refuse(row.source, row.number, error)
            continue
        sides = [_answer(ids, written, len(prompt), seq_len) for ids, written in encoded]
        if not all(side.mask is not None and side.mask.any() for side in sides):
            _count(dropped, f"no answer within {seq_len} tokens")
        elif np.array_equal(sides[0].tokens, sides[1].tokens):
            _count(dropped, f"same within {seq_len} tokens")
        else:
            yield Preference(sides[0], sides[1], _digest(prompt))


def _answer(ids: Sequence[int], written: Sequence[bool], prompt: int, seq_len: int) -> Sample:
    """What the assistant wrote after the first `prompt` tokens: the answers that the pair compares."""
    mask = np.array(written[:seq_len])
    mask[:prompt] = False
    return Sample(np.array(ids[:seq_len]), mask)


def _digest(ids: Sequence[int]) -> int:
    return int.from_bytes(blake2b(np.array(ids, dtype="<u4").tobytes(), digest_size=8).digest(), "little")


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1
