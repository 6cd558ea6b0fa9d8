"""What a worker of `minids prepare` does: documents cleaned on their own, and encoded.

The result depends on the document and the settings alone (random choices are seeded by the document's hash), so it is
the same whichever worker does it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from minids.data.build import in_holdout
from minids.data.clean import CleanRules, Examined, examine, normalise
from minids.data.pack import fim_join, fim_split
from minids.errors import InputError
from minids.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Document:
    """Text of pretraining, or a chat, and where it is from, all as in a Row."""

    text: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str
    number: int


@dataclass(frozen=True, slots=True)
class EncodeRules:
    clean: CleanRules
    holdout: float  # share of documents held out: these are encoded plainly
    fim_rate: float
    split_rate: float  # of tokens that join punctuation and line breaks
    seed: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents of a chunk, in order: `examined` without their text; UTF-8 length of the text; tokens uint32 end to end
    (bos and eos included; none for a dropped document); where each document's end; and which documents (from 0) the
    chat template refuses, and why."""

    examined: list[Examined]
    text_bytes: list[int]
    tokens: np.ndarray
    ends: np.ndarray
    refused: dict[int, str]


def encode_documents(documents: list[Document], tokenizer: Tokenizer, rules: EncodeRules) -> Encoded:
    examined = [_examine(document, rules.clean) for document in documents]
    pieces: list[str] = []  # one or, for fill-in-the-middle, three of each text
    plans: list[tuple[random.Random, int] | None] = []
    for document, result in zip(documents, examined, strict=True):
        if result.text is None or document.text is None:
            plans.append(None)
            continue
        rng = random.Random(rules.seed << 64 | result.digest)
        rate = 0.0 if in_holdout(result.digest, rules.holdout) else rules.fim_rate
        parts = fim_split(result.text, rate, rng) or (result.text,)
        plans.append((rng, len(parts)))
        pieces += parts
    encoded = iter(tokenizer.encode_batch(pieces))
    tokens: list[list[int]] = []
    refused: dict[int, str] = {}
    for number, (document, result, plan) in enumerate(zip(documents, examined, plans, strict=True)):
        ids: list[int] = []
        if plan is not None:
            rng, count = plan
            parts_ids = [next(encoded) for _ in range(count)]
            if rules.split_rate and not in_holdout(result.digest, rules.holdout):
                parts_ids = [tokenizer.split_joined(part, rules.split_rate, rng) for part in parts_ids]
            body = parts_ids[0]
            if count == 3:
                prefix, middle, suffix = parts_ids
                marks = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
                body = fim_join(prefix, middle, suffix, *marks)
            ids = [tokenizer.bos_id, *body, tokenizer.eos_id]
        elif result.text is not None:
            try:
                ids = tokenizer.encode_chat(_cleaned(document.messages), document.tools)[0]
            except InputError as error:
                refused[number] = str(error)
        tokens.append(ids)
    return Encoded(
        [dataclasses.replace(result, text=result.text and "") for result in examined],
        [len((result.text or "").encode()) for result in examined],
        np.fromiter(itertools.chain.from_iterable(tokens), np.uint32),
        np.cumsum([len(ids) for ids in tokens]),
        refused,
    )


def _examine(document: Document, rules: CleanRules) -> Examined:
    text = document.text
    if text is None:
        text = "\n\n".join(part for message in document.messages for part in _said(message))
    return examine(text, rules)


def _said(message: dict[str, Any]) -> list[str]:
    """All that makes it differ from others: an assistant may call tools without a word."""
    calls = message.get("tool_calls")
    called = json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else ""
    return [part for part in (message.get("reasoning_content"), message["content"], called) if part]


def _cleaned(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": normalise(message["content"])} for message in messages]


_worker: tuple[Tokenizer, EncodeRules]


def start_worker(tokenizer_folder: str, rules: EncodeRules) -> None:
    """Initialiser of a worker process. Ctrl-C reaches the whole group: the parent alone handles it. A worker ends with
    its parent even when that is killed."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = Tokenizer.load(tokenizer_folder), rules


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(documents: list[Document]) -> Encoded:
    return encode_documents(documents, *_worker)
