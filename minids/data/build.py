"""Documents in, a folder of token shards out: one packer per split and source in front of a ShardWriter."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minids.data.pack import Packer, PackReport, Sample
from minids.data.store import HOLDOUT, SPLITS, TRAIN, ShardWriter
from minids.errors import FULL, InputError
from minids.files import atomic_directory
from minids.tokenizer import Tokenizer


def in_holdout(digest: int, holdout: float) -> bool:
    """Whether the document of this 64-bit hash is held out: depends on nothing else, so copies stay on one side."""
    return digest < holdout * 2.0**64


class ShardBuilder:
    """Packs documents and writes the rows. Made by `shard_folder`."""

    def __init__(self, writer: ShardWriter, cut: bool) -> None:
        self.writer, self.cut = writer, cut
        self.expected: int | None = None  # bytes of all shards, as far as is known: for the message of a full disk
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self._packers: dict[tuple[str, int], Packer] = {}

    def add(self, sample: Sample, text_bytes: int, held_out: bool, source: int = 0) -> None:
        """One document; text_bytes: UTF-8 length of its text."""
        split = HOLDOUT if held_out else TRAIN
        if (split, source) not in self._packers:
            self._packers[split, source] = Packer(self.writer.seq_len, self.writer.pad_id, self.cut)
        self.text_bytes[split] += text_bytes
        for row in self._packers[split, source].add(sample):
            self.writer.add(row, split, source)

    def report(self, split: str, source: int) -> PackReport:
        packer = self._packers.get((split, source))
        return packer.report if packer else PackReport()

    def finish(self, sources: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
        """Writes what still waits and the index (see ShardWriter.finish); returns the index."""
        for (split, source), packer in sorted(self._packers.items(), key=lambda item: item[0]):
            for row in packer.flush():
                self.writer.add(row, split, source)
        splits = {}
        for split in SPLITS:
            reports = [self.report(split, source) for source in range(len(sources))]
            tokens, padding = sum(report.tokens for report in reports), sum(report.padding for report in reports)
            splits[split] = {
                "documents": sum(report.documents for report in reports),
                "bytes": self.text_bytes[split],
                "tokens": tokens,
                "fill": round(tokens / max(1, tokens + padding), 6),
                "cut_documents": sum(report.cut for report in reports),
                "cut_longer_than_a_row": sum(report.cut_long for report in reports),
            }
        versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "numpy")}
        return self.writer.finish(sources, splits, **facts, versions=versions)


@contextlib.contextmanager
def shard_folder(
    out: str | Path, tokenizer: Tokenizer, seq_len: int, has_mask: bool, cut: bool, replace: bool = False
) -> Iterator[ShardBuilder]:
    """Yields the builder of a shard folder that takes the name `out` when the block ends without an error.

    A full disk, and an `out` that exists (unless `replace`), raise InputError; then nothing is left behind.
    """
    builder = None
    try:
        with atomic_directory(out, replace) as folder:
            head = (folder, seq_len, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.fingerprint, has_mask)
            builder = ShardBuilder(ShardWriter(*head), cut)
            try:
                yield builder
            finally:
                builder.writer.close()
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = builder.writer.written if builder else 0
        needed = max(written, builder.expected or 0) if builder else 0
        raise InputError(
            f"{out}: the disk is full after {written} bytes of shards, about {needed} are needed; "
            "free that much or give a folder on another disk"
        ) from None
