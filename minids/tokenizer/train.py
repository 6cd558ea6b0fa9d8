"""Training a tokenizer: one pass over the text, a bounded seeded sample of it, byte-level BPE on the sample."""

from __future__ import annotations

import heapq
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from minids.errors import InputError, require_seed
from minids.files import atomic_directory, read_json
from minids.tokenizer.chat import CHAT_TEMPLATE
from minids.tokenizer.tokenizer import BOS, CJK, EOS, PAD, PRE_SPLITS, ROLES, SPECIAL_TOKENS, UNK, Tokenizer

PIECE = 4096  # characters: longer documents are cut, so that no single one fills the sample
HELD_OUT = 50  # every 50th piece measures the tokenizer instead of training it
# Training sees runs of CJK in parts of this many characters: whole unspaced runs are nearly all different from each
# other, and the trainer's time and memory grow with the different words. Shorter parts cost bytes per token.
CJK_PART = 4
# Settings of another tokenizer's config that hold for its own vocabulary or class only.
NOT_INHERITED = {"added_tokens_decoder", "auto_map", "name_or_path", "tokenizer_class", "tokenizer_file", "backend"}


def train_tokenizer(
    files: list[str],
    vocab_size: int,
    out: str | Path,
    like: str | None = None,
    sample_bytes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains on the text of row files (any shape `read_rows` knows; chats by their contents) and saves to folder `out`.

    See `train_from_texts` for the rest and the report, to which bad rows are added (skipped_rows, skipped_examples).
    Raises InputError, also when `out` exists and is not empty.
    """
    from minids.data.rows import RowReport, read_rows  # minids.data imports this package

    bad = RowReport()
    texts = (text for row in read_rows(files, report=bad) for text in _row_texts(row))
    with atomic_directory(out) as folder:  # fails on an existing `out` before the work, not after
        tokenizer, report = train_from_texts(texts, vocab_size, like, sample_bytes, seed)
        tokenizer.save(folder)
    return {"out": str(out), **report, "skipped_rows": bad.skipped, "skipped_examples": bad.examples}


def train_from_texts(
    texts: Iterable[str],
    vocab_size: int = 6400,
    like: str | Path | None = None,
    sample_bytes: int | None = None,
    seed: int = 0,
) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer of at most `vocab_size` tokens (fewer when the text has too few different words) and a report.

    Reads `texts` once and keeps a random sample of at most `sample_bytes` UTF-8 bytes; None: 1280 for every token, at
    most 32 MiB (8 MB for 6400 tokens: three times as much changes bytes per token by less than 1 %). The same texts in
    the same order give the same tokenizer byte for byte. `like`: a folder with another byte-level BPE, whose
    normalizer, pre-tokenizer, special tokens and chat template the new one takes over, as with transformers'
    train_new_from_iterator; the roles it has no token for get DeepSeek's.

    The report: vocab_size, special_tokens (their number), bytes_seen, sample_bytes, held_out_bytes, bytes_per_token and
    lossless (on held-out pieces; on the training text where there is only one piece), seconds.
    Raises InputError for a vocabulary too small for the special tokens and the 256 bytes, for an empty sample and for
    no text at all.
    """
    started = time.perf_counter()
    require_seed("seed", seed)
    bare, config, special = _settings(like)
    least = len(special) + 256
    if vocab_size < least:
        raise InputError(
            f"vocab size: got {vocab_size}, wanted at least {least} ({len(special)} special tokens, 256 bytes)"
        )
    limit = min(32 << 20, vocab_size * 1280) if sample_bytes is None else sample_bytes
    if limit < 1:
        raise InputError(f"sample bytes: got {limit}, wanted at least 1")
    pieces, bytes_seen = sample_texts(texts, limit, seed)
    if not pieces:
        raise InputError("tokenizer: the data holds no text; wanted at least one row with text")
    held_out = pieces[::HELD_OUT] if len(pieces) > 1 else []
    training = [piece for i, piece in enumerate(pieces) if i % HELD_OUT] or pieces
    definition = _train(bare, special, training, vocab_size)
    tokenizer = Tokenizer(definition, config)
    measured = held_out or pieces
    ids = tokenizer.encode_batch(measured)
    report = {
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(special),
        "bytes_seen": bytes_seen,
        "sample_bytes": _size(training),
        "held_out_bytes": _size(held_out),
        "bytes_per_token": round(_size(measured) / sum(map(len, ids)), 4),
        "lossless": all(tokenizer.decode(row) == text for row, text in zip(ids, measured, strict=True)),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return tokenizer, report


def sample_texts(texts: Iterable[str], limit: int, seed: int) -> tuple[list[str], int]:
    """A uniform random sample of pieces of `texts`, at most `limit` UTF-8 bytes (one piece at least), in their order.

    One pass; memory grows with `limit` only. Every piece draws a number and those with the smallest numbers stay.
    Returns (pieces, bytes seen).
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, bytes]] = []  # a heap: the largest number (negated) on top
    held = seen = index = 0
    with tqdm(unit="B", unit_scale=True, desc="reading text", disable=None) as progress:
        for text in texts:
            for start in range(0, len(text), PIECE):
                data = text[start : start + PIECE].encode("utf-8", "replace")  # lone surrogates become "?"
                seen, held, index = seen + len(data), held + len(data), index + 1
                progress.update(len(data))
                heapq.heappush(kept, (-rng.random(), index, data))
                while held > limit and len(kept) > 1:
                    held -= len(heapq.heappop(kept)[2])
    kept.sort(key=lambda entry: entry[1])
    return [data.decode() for _, _, data in kept], seen


def _size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _row_texts(row: Any) -> Iterator[str]:
    """The texts of a data row: its text, or the contents of its messages (of a preference's shared prompt once)."""
    if row.text:
        yield row.text
    shared = len(row.messages)
    for message in (*row.messages, *row.chosen[shared:], *row.rejected[shared:]):
        for key in ("reasoning_content", "content"):
            if message.get(key):
                yield message[key]


def _settings(like: str | Path | None) -> tuple[dict[str, Any], dict[str, Any], list[AddedToken]]:
    """An untrained tokenizer.json, the tokenizer_config.json to go with it, and the special tokens in id order."""
    if like is None:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_SPLITS]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
        tokenizer.decoder = decoders.ByteLevel()
        # transformers then starts a plain text with bos, as DeepSeek-V3's tokenizer does
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
        bare, config = json.loads(tokenizer.to_str()), {"chat_template": CHAT_TEMPLATE, "model_max_length": 1 << 20}
        special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
        names = {"bos": BOS, "eos": EOS, "pad": PAD, "unk": UNK}
    else:
        old = Tokenizer.load(like)
        bare = read_json(Path(like) / "tokenizer.json")
        if bare["model"].get("type") != "BPE":
            raise InputError(f"{like}: its model is {bare['model'].get('type')}, wanted a byte-level BPE")
        bare["model"] |= {"vocab": {}, "merges": []}
        special = []
        for token in bare["added_tokens"]:
            special.append(
                AddedToken(**{key: value for key, value in token.items() if key not in ("id", "special")}, special=True)
            )
        names = {role: old.role_token(role) or token for role, token in ROLES.items()}
        known = {token.content for token in special}
        special += [AddedToken(token, normalized=False, special=True) for token in names.values() if token not in known]
        config = {key: value for key, value in old.config.items() if key not in NOT_INHERITED}
    config |= {f"{role}_token": names[role] for role in ("bos", "eos", "pad", "unk")}
    # the class that takes tokenizer.json as it is, whatever model lies beside it
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return bare, config, special


def _train(bare: dict[str, Any], special: list[AddedToken], texts: list[str], vocab_size: int) -> str:
    """The trained tokenizer.json."""
    processor = bare["post_processor"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare | {"added_tokens": [], "post_processor": None}))
    split = tokenizer.pre_tokenizer
    parts = pre_tokenizers.Split(Regex(f"{CJK}{{1,{CJK_PART}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, split])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = split
    trained = json.loads(tokenizer.to_str())
    trained["post_processor"] = _with_new_ids(processor, tokenizer)
    return json.dumps(trained, ensure_ascii=False, indent=1) + "\n"


def _with_new_ids(processor: dict[str, Any] | None, tokenizer: tokenizers.Tokenizer) -> dict[str, Any] | None:
    """A post-processor with the ids that its tokens have in `tokenizer`."""
    if processor is None:
        return None
    new = dict(processor)
    if "processors" in new:  # a sequence
        new["processors"] = [_with_new_ids(part, tokenizer) for part in new["processors"]]
    if "special_tokens" in new:  # a template
        new["special_tokens"] = {
            name: entry | {"ids": [tokenizer.token_to_id(token) for token in entry["tokens"]]}
            for name, entry in new["special_tokens"].items()
        }
    for name in ("cls", "sep"):  # BERT's and RoBERTa's
        if name in new:
            new[name] = [new[name][0], tokenizer.token_to_id(new[name][0])]
    return new
