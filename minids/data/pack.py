"""Documents into fixed-length rows, and fill-in-the-middle.

Packing is best fit over a bounded buffer (Ding et al. 2024, arXiv 2404.10830): a row opens with the longest document
waiting, then takes one or two that fill the gap exactly, else the longest that fits. A gap nothing fits is filled with
the head of the longest document waiting, whose rest returns to the buffer; so every row but the last is full.
Fill-in-the-middle is DeepSeek-V3's (arXiv 2412.19437, section 4.1): prefix-suffix-middle, on whole documents, before
packing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minids.errors import InputError

BUFFER = 2048  # documents waiting to be placed


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: tokens int [n], and bool [n] where the loss counts (None: everywhere)."""

    tokens: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row: tokens [seq_len]; mask bool [seq_len] or None; bounds: where documents start, then seq_len.

    Padding (only where documents may not be cut, and in a last row) is a segment of its own, outside the mask.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    bounds: list[int]


@dataclass(slots=True)
class PackReport:
    documents: int = 0
    cut: int = 0  # documents that lie in more than one row, or lost their end
    cut_long: int = 0  # of these: longer than a row, so no packing keeps them whole
    tokens: int = 0  # without padding
    rows: int = 0
    padding: int = 0


@dataclass(slots=True)
class _Piece:
    tokens: np.ndarray
    mask: np.ndarray | None
    counted: bool  # as a cut document already

    def split(self, at: int) -> tuple[_Piece, _Piece]:
        head, tail = (None, None) if self.mask is None else (self.mask[:at], self.mask[at:])
        return _Piece(self.tokens[:at], head, True), _Piece(self.tokens[at:], tail, True)


class Packer:
    """Feeds on documents with `add`, gives rows as they fill up; `flush` gives the rest.

    cut=True: rows are full and documents are cut where needed; the pieces keep their order.
    cut=False: no document is cut; rows end in padding, and of a document longer than `seq_len` only the start is kept.
    """

    def __init__(self, seq_len: int, pad_id: int, cut: bool = True, buffer: int = BUFFER) -> None:
        if seq_len < 2:
            raise InputError(f"seq_len: got {seq_len}, wanted a whole number >= 2")
        self.seq_len, self.pad_id, self.cut, self.buffer = seq_len, pad_id, cut, buffer
        self.report = PackReport()
        self._by_length: list[deque[_Piece]] = [deque() for _ in range(seq_len + 1)]
        self._present = np.zeros(seq_len + 1, dtype=bool)  # _present[n]: a piece of n tokens waits
        self._waiting = self._waiting_tokens = 0

    def add(self, sample: Sample) -> Iterator[PackedRow]:
        """The rows that became ready, in order. An empty document is ignored."""
        if not len(sample.tokens):
            return
        self.report.documents += 1
        piece = _Piece(sample.tokens, sample.mask, False)
        if len(piece.tokens) > self.seq_len:
            self.report.cut += 1
            self.report.cut_long += 1
            while len(piece.tokens) > self.seq_len:
                head, piece = piece.split(self.seq_len)
                if not self.cut:
                    piece = head
                    break
                yield self._row([head])
        self._put(piece)
        while self._waiting > self.buffer and self._waiting_tokens >= self.seq_len:
            yield self._row(self._fill())

    def flush(self) -> Iterator[PackedRow]:
        while self._waiting:
            yield self._row(self._fill())

    def _put(self, piece: _Piece) -> None:
        piece.tokens = piece.tokens.copy()  # a view would keep alive the array it was cut from
        self._by_length[len(piece.tokens)].append(piece)
        self._present[len(piece.tokens)] = True
        self._waiting += 1
        self._waiting_tokens += len(piece.tokens)

    def _take(self, length: int) -> _Piece:
        pieces = self._by_length[length]
        piece = pieces.popleft()
        self._present[length] = bool(pieces)
        self._waiting -= 1
        self._waiting_tokens -= length
        return piece

    def _longest(self, limit: int) -> int:
        """Length of the longest piece of at most `limit` tokens; 0 when there is none."""
        lengths = np.flatnonzero(self._present[: limit + 1])
        return int(lengths[-1]) if len(lengths) else 0

    def _next(self, gap: int) -> int:
        """Length of the piece to put into a gap; 0 when none fits."""
        present = self._present
        if present[gap]:
            return gap
        pairs = np.flatnonzero(present[1:gap] & present[gap - 1 : 0 : -1]) + 1
        for length in map(int, pairs[len(pairs) // 2 :]):  # each pair once, even ones first: short pieces are precious
            if 2 * length != gap or len(self._by_length[length]) > 1:
                return length
        return self._longest(gap)

    def _fill(self) -> list[_Piece]:
        """The pieces of the next row, taken out of the buffer."""
        pieces = [self._take(self._longest(self.seq_len))]
        gap = self.seq_len - len(pieces[0].tokens)
        while gap and self._waiting:
            if length := self._next(gap):
                pieces.append(self._take(length))
            elif self.cut:
                whole = self._take(self._longest(self.seq_len))
                self.report.cut += not whole.counted
                head, tail = whole.split(gap)
                self._put(tail)
                pieces.append(head)
            else:
                break
            gap -= len(pieces[-1].tokens)
        return pieces

    def _row(self, pieces: list[_Piece]) -> PackedRow:
        bounds = [0]
        for piece in pieces:
            bounds.append(bounds[-1] + len(piece.tokens))
        used = bounds[-1]
        tokens = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        tokens[:used] = np.concatenate([piece.tokens for piece in pieces])
        mask = None
        if pieces[0].mask is not None:
            mask = np.zeros(self.seq_len, dtype=bool)
            mask[:used] = np.concatenate([piece.mask for piece in pieces if piece.mask is not None])
        if used < self.seq_len:
            bounds.append(self.seq_len)
        self.report.rows += 1
        self.report.tokens += used
        self.report.padding += self.seq_len - used
        return PackedRow(tokens, mask, bounds)


def pack(
    documents: Iterable[Sample], seq_len: int, pad_id: int, cut: bool = True, buffer: int = BUFFER
) -> Iterator[PackedRow]:
    """Rows of `seq_len` tokens from a stream of documents; memory holds at most `buffer` of them. See Packer."""
    packer = Packer(seq_len, pad_id, cut, buffer)
    for document in documents:
        yield from packer.add(document)
    yield from packer.flush()


def fim_split(text: str, rate: float, rng: random.Random) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) cut at two random characters, for a share `rate` of documents; else None.

    Characters rather than tokens, so that a model also learns to go on from inside a word (arXiv 2207.14255).
    """
    if rng.random() >= rate or len(text) < 3:
        return None
    first, second = sorted(rng.sample(range(1, len(text)), 2))
    return text[:first], text[first:second], text[second:]


def fim_join(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], begin: int, hole: int, end: int
) -> list[int]:
    """`<fim_begin>prefix<fim_hole>suffix<fim_end>middle`, as token ids; begin, hole, end are the special tokens'."""
    return [begin, *prefix, hole, *suffix, end, *middle]
