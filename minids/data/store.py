"""Token shards on disk: packed rows as fixed-size records in memory-mapped files, described by index.json.

A shard file is an array of little-endian records `tokens uint16|uint32 [seq_len], starts bits, [mask bits]`: bit i of
`starts` is set where a document starts at token i, bit i of `mask` where the loss counts token i (bits as np.packbits
writes them). index.json names the files with sizes and sha256 digests, the tokenizer they need, and what splits hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minids.data.pack import PackedRow
from minids.errors import InputError
from minids.files import read_json, sha256, write_json

INDEX = "index.json"
FORMAT = "minids-shards-1"
TRAIN, HOLDOUT = SPLITS = ("train", "holdout")
SHARD_BYTES = 256 << 20


def record_dtype(seq_len: int, vocab_size: int, has_mask: bool) -> np.dtype:
    """The record of one row; uint16 tokens as long as the vocabulary fits."""
    bits = (seq_len + 7) // 8
    fields: list[tuple[str, str, tuple[int]]] = [("tokens", "<u2" if vocab_size <= 1 << 16 else "<u4", (seq_len,))]
    fields.append(("starts", "u1", (bits,)))
    if has_mask:
        fields.append(("mask", "u1", (bits,)))
    return np.dtype(fields)


def is_padding(segment: np.ndarray, pad_id: int) -> bool:
    """Whether a row's last segment, token ids [n], is padding, which lies nowhere else: many tokenizers pad with the
    token that ends a document."""
    return bool((segment == pad_id).all())


class ShardWriter:
    """Writes rows to files of at most `shard_bytes` in `folder`, one sequence of files per (split, source)."""

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        vocab_size: int,
        pad_id: int,
        tokenizer_fingerprint: str,
        has_mask: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if seq_len < 2:
            raise InputError(f"seq_len: got {seq_len}, wanted a whole number >= 2")
        self.folder = folder
        self.seq_len, self.vocab_size, self.pad_id, self.has_mask = seq_len, vocab_size, pad_id, has_mask
        self.head = {
            "format": FORMAT,
            "seq_len": seq_len,
            "vocab_size": vocab_size,
            "pad_id": pad_id,
            "has_mask": has_mask,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        self.dtype = record_dtype(seq_len, vocab_size, has_mask)
        self.rows_per_shard = max(1, shard_bytes // self.dtype.itemsize)
        self.written = 0  # bytes
        self.targets = dict.fromkeys(SPLITS, 0)  # tokens that the loss counts
        self._open: dict[tuple[str, int], BinaryIO] = {}
        self._shards: list[dict[str, Any]] = []

    def add(self, row: PackedRow, split: str = TRAIN, source: int = 0) -> None:
        """Appends one row. Raises InputError when a token is outside the vocabulary."""
        largest = int(row.tokens.max())
        if largest >= self.vocab_size:
            raise InputError(f"{self.folder}: token {largest} outside the vocabulary of {self.vocab_size}")
        record = np.zeros((), dtype=self.dtype)
        record["tokens"] = row.tokens
        starts = np.zeros(len(row.tokens), dtype=bool)
        starts[row.bounds[:-1]] = True
        record["starts"] = np.packbits(starts)
        counted = ~starts
        if is_padding(row.tokens[row.bounds[-2] :], self.pad_id):
            counted[row.bounds[-2] :] = False
        if self.has_mask:
            if row.mask is None:
                raise ValueError("a row without a mask for shards with masks")
            record["mask"] = np.packbits(row.mask)
            counted &= row.mask
        shard = self._shard(split, source)
        shard["rows"] += 1
        self._open[split, source].write(record.tobytes())
        self.written += self.dtype.itemsize
        self.targets[split] += int(counted.sum())

    def _shard(self, split: str, source: int) -> dict[str, Any]:
        """The index entry of the file that takes the next row, opened if need be."""
        mine = [shard for shard in self._shards if (shard["split"], shard["source"]) == (split, source)]
        if mine and mine[-1]["rows"] < self.rows_per_shard:
            return mine[-1]
        if (split, source) in self._open:
            self._open.pop((split, source)).close()
        shard = {"file": f"{split}-{source:03d}-{len(mine):05d}.bin", "split": split, "source": source, "rows": 0}
        self._shards.append(shard)
        self._open[split, source] = open(self.folder / str(shard["file"]), "wb")  # noqa: SIM115 - closed by close()
        return shard

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def finish(
        self, sources: list[dict[str, Any]], splits: Mapping[str, Mapping[str, Any]], **facts: Any
    ) -> dict[str, Any]:
        """Closes the files and writes index.json; returns its content.

        sources: `{"name", "weight"}` (weight None: its natural share), by source number. splits: facts of each split,
        at least `bytes` (UTF-8 of its documents' text); `rows` and `targets` (tokens the loss counts) are added. facts:
        anything else worth keeping.
        """
        self.close()
        for shard in self._shards:
            path = self.folder / str(shard["file"])
            shard |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        rows = {name: sum(shard["rows"] for shard in self._shards if shard["split"] == name) for name in SPLITS}
        index = {
            **self.head,
            "sources": sources,
            "splits": {name: {"rows": rows[name], "targets": self.targets[name], **splits[name]} for name in SPLITS},
            **facts,
            "shards": sorted(self._shards, key=lambda shard: str(shard["file"])),
        }
        write_json(self.folder / INDEX, index)
        return index


@dataclass(frozen=True)
class Source:
    name: str
    weight: float | None  # share of the tokens of an epoch; None: as many as it has
    rows: int


class TokenShards:
    """Read access to a shard folder; rows stay on disk (memory-mapped).

    Opening checks sizes and, unless verify=False, every file's sha256 (about 1 s per GB; it also warms the page cache),
    so that a damaged file is refused by name. InputError when the folder is missing, damaged or of another format.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise InputError(f"{self.path}: no token shards here (no {INDEX}); write them with `minids prepare`")
        self.index: dict[str, Any] = read_json(self.path / INDEX)
        if not isinstance(self.index, dict) or self.index.get("format") != FORMAT:
            raise InputError(f"{self.path / INDEX}: not an index of format {FORMAT!r}; prepare the data again")
        try:
            self.seq_len: int = self.index["seq_len"]
            self.vocab_size: int = self.index["vocab_size"]
            self.pad_id: int = self.index["pad_id"]
            self.has_mask: bool = self.index["has_mask"]
            self.tokenizer_fingerprint: str = self.index["tokenizer_fingerprint"]
            self._dtype = record_dtype(self.seq_len, self.vocab_size, self.has_mask)
            self._maps: dict[tuple[str, int], list[np.ndarray]] = {}
            for shard in self.index["shards"]:
                self._maps.setdefault((shard["split"], shard["source"]), []).append(self._map(shard, verify))
            self._ends = {key: np.cumsum([len(part) for part in parts]) for key, parts in self._maps.items()}
            self._sources = {split: self._list_sources(split) for split in SPLITS}
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path / INDEX}: entry missing or wrong ({error}); prepare the data again") from None
        # identifies the rows, hence what a loader position means
        content = json.dumps([self.seq_len, self.index["shards"]], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def _map(self, shard: dict[str, Any], verify: bool) -> np.ndarray:
        path = self.path / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"] or size != shard["rows"] * self._dtype.itemsize:
            found = "missing" if size is None else f"{size} bytes long"
            raise InputError(f"{path}: {found}, the index says {shard['bytes']} bytes; prepare the data again")
        if verify and sha256(path) != shard["sha256"]:
            raise InputError(f"{path}: damaged (its sha256 is not the index's); prepare the data again")
        return np.memmap(path, dtype=self._dtype, mode="r")

    def _list_sources(self, split: str) -> list[Source]:
        return [
            Source(source["name"], source["weight"], sum(len(part) for part in self._maps.get((split, number), [])))
            for number, source in enumerate(self.index["sources"])
        ]

    def sources(self, split: str) -> list[Source]:
        if split not in self._sources:
            raise InputError(f"{self.path}: split {split!r} asked for; there are {', '.join(SPLITS)}")
        return self._sources[split]

    def rows(self, split: str) -> int:
        return sum(source.rows for source in self.sources(split))

    def row(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
        """tokens uint16|uint32 [seq_len]; mask bool [seq_len] or None; bounds: document starts, then seq_len.

        Rows are numbered from 0 through all sources of the split, in their order.
        """
        wanted = number
        for position, source in enumerate(self.sources(split)):
            if 0 <= number < source.rows:
                return self.source_row(split, position, number)
            number -= source.rows
        raise InputError(f"{self.path}: row {wanted} of {split!r} asked for; it has {self.rows(split)}")

    def source_row(self, split: str, source: int, number: int) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
        """Row `number` (0 <= number < rows) of one source; as `row`."""
        ends = self._ends[split, source]
        part = int(np.searchsorted(ends, number, side="right"))
        record = self._maps[split, source][part][number - (int(ends[part - 1]) if part else 0)]
        mask = np.unpackbits(record["mask"], count=self.seq_len).astype(bool) if self.has_mask else None
        starts = np.flatnonzero(np.unpackbits(record["starts"], count=self.seq_len))
        return record["tokens"], mask, [*map(int, starts), self.seq_len]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token that the loss counts: bits per byte = nats per token / ln 2 / this."""
        facts = self.index["splits"][split]
        return facts["bytes"] / max(1, facts["targets"])

    def require(
        self, tokenizer_fingerprint: str | None = None, vocab_size: int | None = None, max_seq_len: int | None = None
    ) -> None:
        """InputError unless the shards fit this tokenizer, a model's vocabulary and its longest sequence."""
        if tokenizer_fingerprint not in (None, self.tokenizer_fingerprint):
            raise InputError(
                f"{self.path}: made with another tokenizer ({self.tokenizer_fingerprint[:12]}, this one is "
                f"{str(tokenizer_fingerprint)[:12]}); prepare the data again with this tokenizer"
            )
        if vocab_size is not None and vocab_size < self.vocab_size:
            raise InputError(
                f"{self.path}: tokens of a vocabulary of {self.vocab_size}, the model has {vocab_size}; "
                f"set model.vocab_size to at least {self.vocab_size}"
            )
        if max_seq_len is not None and max_seq_len < self.seq_len:
            raise InputError(
                f"{self.path}: rows of {self.seq_len} tokens, the model takes at most {max_seq_len}; "
                f"prepare with --seq-len {max_seq_len} or raise model.max_position_embeddings"
            )
