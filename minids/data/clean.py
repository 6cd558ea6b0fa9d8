"""Cleaning of pretraining text: junk in a document is taken out, a document that is junk or a copy is dropped.

`examine` holds the expensive work (normalisation, rules, hashing). It is a pure function of the text, so that workers
can run it in parallel; `Cleaner.admit` then compares digests in document order, in one process. `clean` is both.

Normalisation is NFC, not NFKC: NFKC would turn the full-width punctuation of Chinese (，：？！) into ASCII.
Repetition is measured as in Gopher (Rae et al. 2021, table A1), with windows of 24 bytes in place of word n-grams:
about 5 English words or 8 Chinese characters, so that no word segmentation is needed. Near-duplicates are found on the
same windows by MinHash with locality-sensitive hashing. The minimum is taken per bin of one hash function, and empty
bins borrow from the next (one permutation hashing with rotation; Li et al. 2012, Shrivastava & Li 2014): after the sort
that counting repeats needs anyway, that costs one binary search per bin.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from minids.errors import InputError

WINDOW = 24  # bytes of a shingle, white space not counted
# A pair of Jaccard similarity s is caught with probability 1 - (1 - s^8)^16: 6 % at s = 0.5, 95 % at 0.8; fewer of
# documents with so few shingles that bands share some.
BANDS, BAND_ROWS = 16, 8
SHORT = 64  # shingles; below it a document has no signature: short texts of one template are not copies
MEASURED = 1 << 20  # bytes of a document that repetition and similarity are measured on

# Terminal colours; C0 and C1 controls but tab and line ends; soft hyphen; zero-width and direction marks, but not the
# joiners U+200C and U+200D, which emoji and several scripts need; byte order mark; interlinear marks; non-characters.
_JUNK = re.compile(
    "\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_LINE_TAIL = re.compile(r"[ \t\u3000]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_LOWER = bytes(range(65)) + bytes(range(97, 123)) + bytes(range(91, 256))
_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_HALF = np.uint64(32)
_BAND_ODDS = np.arange(BAND_ROWS, dtype=np.uint64) * (_MIX[0] - np.uint64(1)) + _MIX[1]
_BIN_EDGES = np.arange(BANDS * BAND_ROWS, dtype=np.uint64) * np.uint64((1 << 64) // (BANDS * BAND_ROWS))


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanRules:
    """Limits of `examine`; the shares are of characters, lines' characters and shingles."""

    min_chars: int = 5
    max_chars: int = 10_000_000  # longer ones are dumps; long documents are cut when packed, not here
    max_undecodable: float = 0.01  # U+FFFD
    max_repeated_lines: float = 0.2  # characters in lines that stood before in the document
    max_repeated: float = 0.3  # shingles that stood before in the document
    near_duplicates: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_chars <= self.max_chars:
            raise InputError(f"min_chars, max_chars: got {self.min_chars}, {self.max_chars}; wanted 0 <= min <= max")
        for name in ("max_undecodable", "max_repeated_lines", "max_repeated"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Examined:
    """A normalised document, or the `reason` it was dropped for (then `text` is None).

    `digest`: 64 bits of the whole text. `signature`: uint64 [BANDS], one key per band, None for short documents.
    """

    text: str | None
    reason: str | None = None
    digest: int = 0
    signature: np.ndarray | None = None


def normalise(text: str) -> str:
    """NFC; junk characters out; line ends as "\\n"; no-break space as space; no trailing white space, at most one blank
    line in a row, none at the ends. Indentation stays. Applying it twice changes nothing."""
    text = _LINE_END.sub("\n", _JUNK.sub("", text)).replace("\xa0", " ")
    text = unicodedata.normalize("NFC", text)
    text = _BLANK_LINES.sub("\n\n", _LINE_TAIL.sub("", text))
    return text.strip("\n").rstrip()


def examine(text: str, rules: CleanRules | None = None) -> Examined:
    """Everything about a document that does not depend on other documents; pure, and its result can be pickled."""
    rules = rules or CleanRules()
    text = normalise(text)
    if len(text) < rules.min_chars or not text:
        return Examined(None, "too short")
    if len(text) > rules.max_chars:
        return Examined(None, "too long")
    if text.count("\ufffd") > rules.max_undecodable * len(text):
        return Examined(None, "undecodable characters")
    if _repeated_lines(text) > rules.max_repeated_lines:
        return Examined(None, "repeated lines")
    try:
        data = text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return Examined(None, "undecodable characters")
    shingles = _shingles(data)
    if shingles.size < SHORT:
        repeated = _repeated_grams(text)
    else:
        repeated = np.count_nonzero(shingles[1:] == shingles[:-1]) / shingles.size
    if repeated > rules.max_repeated:
        return Examined(None, "repetition")
    signature = _signature(shingles) if rules.near_duplicates and shingles.size >= SHORT else None
    return Examined(text, None, int.from_bytes(blake2b(data, digest_size=8).digest(), "little"), signature)


def _repeated_lines(text: str) -> float:
    """Share of characters in lines that stood before in the document."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) < 4:
        return 0.0
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total


def _repeated_grams(text: str) -> float:
    """Share of repeated 4-grams of characters: for texts too short to have many windows."""
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _shingles(data: bytes) -> np.ndarray:
    """Hashes of all windows of WINDOW bytes that begin a character, sorted: uint64 [n]. Case (of ASCII) and white space
    do not count."""
    data = data[:MEASURED].translate(_LOWER, b" \t\n")
    size = len(data) - WINDOW + 1
    if size <= 0:
        return np.empty(0, np.uint64)
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # the 8 bytes from each position on
    starts: slice | np.ndarray = slice(0, size)
    if not data.isascii():
        starts = np.flatnonzero((np.frombuffer(data, np.uint8, size) & 0xC0) != 0x80)
    hashes = np.zeros(size if isinstance(starts, slice) else starts.size, np.uint64)
    for offset, odd in zip((0, 8, 16), _MIX, strict=True):
        hashes += words[offset : offset + size][starts]
        hashes *= odd
        hashes ^= hashes >> _HALF
    hashes *= _MIX[0]  # the bins go by the upper bits
    hashes.sort()
    return hashes


def _signature(shingles: np.ndarray) -> np.ndarray:
    """Band keys uint64 [BANDS] of sorted shingle hashes."""
    smallest = shingles[np.searchsorted(shingles, _BIN_EDGES) % shingles.size]
    # a band takes bins far apart: neighbours may have borrowed the same shingle
    return _BAND_ODDS @ smallest.reshape(BAND_ROWS, BANDS)


class _Digests:
    """An exact set of 64-bit numbers at 8 bytes each: a small set of recent ones before a sorted array."""

    RECENT = 1 << 19

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.empty(0, np.uint64)

    def add(self, digest: int) -> bool:
        """False when it was there."""
        if digest in self._recent:
            return False
        key = np.uint64(digest)
        place = int(np.searchsorted(self._sorted, key)) if self._sorted.size else 0
        if place < self._sorted.size and self._sorted[place] == key:
            return False
        self._recent.add(digest)
        if len(self._recent) >= self.RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True


class _Bands:
    """Band keys seen: one table per band, each key at the place its low bits say. Tables double as they fill, up to
    `max_bytes` together; from there on a new key takes the place of an old one, so old documents are forgotten."""

    def __init__(self, max_bytes: int) -> None:
        self._max_slots = 1 << max(10, (max_bytes // (8 * BANDS)).bit_length() - 1)
        self._table = np.zeros((BANDS, 1 << 10), np.uint64)
        self._band = np.arange(BANDS)
        self._documents = 0

    def add(self, keys: np.ndarray) -> bool:
        """False, and nothing added, when one of the keys is there in its band. Key 0 marks an empty place."""
        slots = self._table.shape[1]
        if 2 * self._documents >= slots < self._max_slots:
            self._grow(2 * slots)
        places = keys & np.uint64(self._table.shape[1] - 1)
        if (self._table[self._band, places] == keys).any():
            return False
        self._table[self._band, places] = keys
        self._documents += 1
        return True

    def _grow(self, slots: int) -> None:
        table = np.zeros((BANDS, slots), np.uint64)
        for old, new in zip(self._table, table, strict=True):  # band by band: the indices of all would take more memory
            keys = old[old != 0]
            new[keys & np.uint64(slots - 1)] = keys
        self._table = table


class Cleaner:
    """Drops what `examine` objects to, exact copies and near-copies of documents admitted before. Deterministic: the
    outcome depends on the documents and their order only.

    `counts`: documents dropped, by reason. `kept`: documents admitted. Memory: 8 bytes per document for exact copies,
    about 250 for near-copies up to `near_memory` bytes; beyond that the oldest documents' copies are no longer noticed.
    """

    def __init__(self, rules: CleanRules | None = None, near_memory: int = 256 << 20) -> None:
        self.rules = rules or CleanRules()
        self.counts: dict[str, int] = {}
        self.kept = 0
        self._digests = _Digests()
        self._bands = _Bands(near_memory)

    def admit(self, examined: Examined) -> str | None:
        """The document's text, or None when it is dropped. Call it in document order."""
        reason = examined.reason
        if reason is None and not self._digests.add(examined.digest):
            reason = "duplicate"
        if reason is None and examined.signature is not None and not self._bands.add(examined.signature):
            reason = "near-duplicate"
        if reason is not None:
            self.counts[reason] = self.counts.get(reason, 0) + 1
            return None
        self.kept += 1
        return examined.text

    def clean(self, text: str) -> str | None:
        """The cleaned text, or None when the document is dropped."""
        return self.admit(examine(text, self.rules))
