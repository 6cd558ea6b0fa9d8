"""`minids prepare`: row files to token shards, in one pass and bounded memory, on all cores.

    read rows -> workers: clean, fill-in-the-middle, tokenise -> in order again: drop copies, pack, write

Files stream; a bounded number of chunks is under way. The shards depend on the files, their order and the settings, not
on the number of workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minids.data.build import ShardBuilder, in_holdout, shard_folder
from minids.data.clean import Cleaner, CleanRules
from minids.data.encode import Document, Encoded, EncodeRules, encode_documents, start_worker, work
from minids.data.pack import Sample
from minids.data.rows import RowReport, expand_paths, read_rows
from minids.data.store import HOLDOUT, SPLITS, TRAIN
from minids.errors import InputError, require_seed
from minids.signals import STOPS, answered_by
from minids.tokenizer import Tokenizer

CHUNK_BYTES = 256 << 10  # text that a worker gets at a time
CHUNKS_PER_WORKER = 4  # under way
WORTH_PROCESSES = 4 << 20  # bytes of input; below it starting processes takes longer than the work
HOLDOUT_BYTES = 256 << 10  # held out of a small corpus by default, at most HOLDOUT_MOST of it
HOLDOUT_MOST = 0.05


@dataclass(frozen=True)
class DataSource:
    """Files that share a name and, where weights are used, a share of the training tokens."""

    name: str
    files: list[Path]
    weight: float | None


@dataclass(frozen=True)
class Chunk:
    source: int
    documents: list[Document]
    size: int  # UTF-8 bytes of text


def parse_sources(arguments: Sequence[str | Path], weights: Mapping[str, float] | None = None) -> list[DataSource]:
    """Files, folders or globs, each `PATH` or `PATH=WEIGHT`, as sources; `weights` maps paths as given to weights.

    Raises InputError for a missing path, one named twice, and weights that are not positive or not given for all.
    """
    given = dict(weights or {})
    found: dict[str, DataSource] = {}
    for argument in map(str, arguments):
        name, equals, tail = argument.rpartition("=")
        if equals and not Path(argument).exists():
            try:
                given[name] = float(tail)
            except ValueError:
                raise InputError(f"{argument}: no such file, and {tail!r} is no weight (PATH=0.7)") from None
        else:
            name = argument
        if name in found:
            raise InputError(f"{name}: named twice; name each source once, with a weight to repeat it")
        found[name] = DataSource(name, expand_paths([name]), given.get(name))
    if unknown := set(given) - set(found):
        raise InputError(f"weights: {', '.join(sorted(unknown))} is none of the sources {', '.join(found)}")
    for source in found.values():
        if given and source.weight is None:
            raise InputError(f"{source.name}: has no weight but others have; give PATH=WEIGHT for all or none")
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise InputError(f"{source.name}: weight {source.weight}; wanted a number > 0")
    if not found:
        raise InputError("no data named; wanted files, folders or globs")
    return list(found.values())


def prepare(
    files: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    seq_len: int = 512,
    fim_rate: float = 0.1,
    split_rate: float = 0.1,
    holdout: float | None = None,
    weights: Mapping[str, float] | None = None,
    strict: bool = False,
    workers: int | None = None,
    seed: int = 0,
    rules: CleanRules | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Writes the shard folder `out` (see minids.data.store) from rows of text or chats; returns the report.

    files, weights: see `parse_sources`. fim_rate: share of training documents rewritten for fill-in-the-middle.
    split_rate: share of joined punctuation-and-line-break tokens split in training documents. holdout: share of
    documents held out, by the hash of their text; None: 0.005, more where that would be less than 256 KiB, up to 0.05.
    strict: a bad row is an error. workers: processes, None: all cores. Raises InputError for bad input and a full disk;
    nothing is left behind then.
    """
    for name, share in (("fim_rate", fim_rate), ("split_rate", split_rate), ("holdout", holdout or 0.0)):
        if not 0 <= share < 1:
            raise InputError(f"{name}: got {share}, wanted a share from 0 to below 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers: got {workers}, wanted a whole number >= 1")
    require_seed("seed", seed)
    started = time.perf_counter()
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    sources = parse_sources(files, weights)
    input_bytes = sum(file.stat().st_size for source in sources for file in source.files)
    if holdout is None:
        holdout = min(HOLDOUT_MOST, max(0.005, HOLDOUT_BYTES / max(1, input_bytes)))
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers if input_bytes >= WORTH_PROCESSES else 1
    encode_rules = EncodeRules(rules or CleanRules(), holdout, fim_rate, split_rate, seed)
    cleaner, row_report = Cleaner(encode_rules.clean), RowReport()
    dropped: dict[str, int] = {}
    read = 0
    with shard_folder(out, tokenizer, seq_len, has_mask=False, cut=True, replace=replace) as builder:
        chunks = _chunks(sources, strict, row_report, dropped)
        encoded = _encode(chunks, tokenizer, encode_rules, workers)
        progress = tqdm(desc="prepare", unit="B", unit_scale=True, disable=None)
        with progress, contextlib.closing(encoded):
            for chunk, result in encoded:
                _skip_refused(chunk, result, strict, row_report)
                _admit(builder, cleaner, result, chunk.source, holdout)
                read += chunk.size
                progress.update(chunk.size)
                builder.expected = builder.writer.written * max(input_bytes, read) // max(1, read)
        dropped |= cleaner.counts
        dropped = dict(sorted(dropped.items()))
        _check_not_empty(builder, sources, row_report.left_out(dropped) or "none dropped")
        settings = {"fim_rate": fim_rate, "split_rate": split_rate, "holdout": holdout, "seed": seed}
        index = builder.finish(
            [{"name": source.name, "weight": source.weight} for source in sources],
            dropped=dropped,
            skipped_rows=dict(sorted(row_report.skipped.items())),
            settings=settings,
        )
    seconds = time.perf_counter() - started
    train = index["splits"][TRAIN]
    return {
        "out": str(out),
        "rows_read": row_report.rows,
        **row_report.facts(dropped),
        "documents": sum(index["splits"][split]["documents"] for split in SPLITS),
        "splits": index["splits"],
        "sources": {source.name: _source_facts(builder, number, source) for number, source in enumerate(sources)},
        "bytes_per_token": round(train["bytes"] / max(1, train["tokens"]), 4),
        "shard_bytes": builder.writer.written,
        "workers": workers,
        "seconds": round(seconds, 2),
        "mb_per_second": round(read / 1e6 / seconds, 2),
        **settings,
    }


def _chunks(sources: list[DataSource], strict: bool, row_report: RowReport, dropped: dict[str, int]) -> Iterator[Chunk]:
    """Documents of about CHUNK_BYTES, source by source; rows of other kinds are counted in `dropped`."""
    for number, source in enumerate(sources):
        documents: list[Document] = []
        size = 0
        for row in read_rows(source.files, strict, row_report):
            if row.kind not in ("text", "chat"):
                reason = f"{row.kind} row"
                if strict:
                    raise InputError(f"{row.source}:{row.number}: a {reason}; prepare takes text and chats")
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            documents.append(Document(row.text, row.messages, row.tools, row.source, row.number))
            texts = [row.text] if row.text is not None else [message["content"] for message in row.messages]
            size += sum(len(text.encode()) for text in texts)
            if size >= CHUNK_BYTES:
                yield Chunk(number, documents, size)
                documents, size = [], 0
        if documents:
            yield Chunk(number, documents, size)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Around the start of processes: signals are answered at its end, since a process that has come halfway complains,
    and Ctrl-C, which reaches the whole group, does not reach the new ones from their first instruction on."""
    came: list[int] = []
    with answered_by(lambda number, frame: came.append(number), *STOPS):
        if sys.platform != "win32":
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            if sys.platform != "win32":
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in came:
        signal.raise_signal(number)


def _encode(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, rules: EncodeRules, workers: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Every chunk with its encoding, in order, at most CHUNKS_PER_WORKER per worker under way."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_documents(chunk.documents, tokenizer, rules)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        # spawned: forking a process in which torch or tokenizers run threads can deadlock
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, start_worker, (folder, rules))
        try:
            under_way: deque[tuple[Chunk, Any]] = deque()
            for chunk in chunks:
                with _signals_wait():
                    under_way.append((chunk, pool.submit(work, chunk.documents)))
                if len(under_way) >= CHUNKS_PER_WORKER * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for first, future in under_way:
                yield first, future.result()
        except BrokenProcessPool:
            raise InputError(f"a worker process died (out of memory?); try fewer workers than {workers}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _skip_refused(chunk: Chunk, encoded: Encoded, strict: bool, row_report: RowReport) -> None:
    for number, why in encoded.refused.items():
        document = chunk.documents[number]
        if strict:
            raise InputError(f"{document.source}:{document.number}: {why}")
        row_report.refuse(document.source, document.number, why)


def _admit(builder: ShardBuilder, cleaner: Cleaner, encoded: Encoded, source: int, holdout: float) -> None:
    start = 0
    documents = zip(encoded.examined, encoded.text_bytes, encoded.ends.tolist(), strict=True)
    for number, (examined, text_bytes, end) in enumerate(documents):
        if number not in encoded.refused and cleaner.admit(examined) is not None:
            sample = Sample(encoded.tokens[start:end])
            builder.add(sample, text_bytes, in_holdout(examined.digest, holdout), source)
        start = end


def _check_not_empty(builder: ShardBuilder, sources: list[DataSource], left_out: str) -> None:
    empty = [source for number, source in enumerate(sources) if not builder.report(TRAIN, number).documents]
    if len(empty) == len(sources):
        raise InputError(f"{', '.join(source.name for source in sources)}: no document left to train on ({left_out})")
    for source in empty:
        if source.weight is not None:
            raise InputError(f"{source.name}: has a weight but no document left to train on ({left_out})")


def _source_facts(builder: ShardBuilder, number: int, source: DataSource) -> dict[str, Any]:
    reports = {split: builder.report(split, number) for split in SPLITS}
    return {
        "files": len(source.files),
        "weight": source.weight,
        "documents": reports[TRAIN].documents,
        "tokens": reports[TRAIN].tokens,
        "holdout_documents": reports[HOLDOUT].documents,
    }
