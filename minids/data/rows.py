"""Row files: jsonl, json, csv, tsv, parquet and txt, plain or compressed, read row by row in bounded memory.

`read_rows` turns files into `Row`s (shapes in `minids.data.shapes`). Nothing is read further ahead than one record and
an I/O buffer, and no record may be larger than MAX_RECORD. Everything is UTF-8 (a byte order mark is skipped): a row
that is not is counted and left out, never repaired by guessing; in txt and json arrays it is an error.

A txt file is one document, cut into pieces that a training sequence can use: after TEXT_PIECE characters at the next
blank line, after twice as many at the next line end, and at a line that is just `<|endoftext|>`.
Compression (gzip, zstd, bz2, xz) is recognised by the file's first bytes; the format by its name without .gz, .zst etc.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet

from minids.data.shapes import WRONG_COLUMNS, BadRow, Message, Row, as_row, find_shape, wrong_columns
from minids.errors import InputError

__all__ = ["Message", "Row", "RowReport", "expand_paths", "read_rows"]

MAX_RECORD = 64 << 20  # bytes of one line, or characters of one csv field or array element
TEXT_PIECE = 8192  # characters
FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "txt")
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
EXAMPLES = 3  # places named per reason in a report
NOT_UTF8 = "not UTF-8"
REFUSED = "refused by the chat template"
CONVERT = "convert it first, for example: iconv -f gb18030 -t utf-8"

Record = tuple[int, dict[str, Any] | BadRow]


@dataclass
class RowReport:
    """What was read: `rows` used, and `skipped` by reason with the first few places ("file:line: why") of each."""

    files: int = 0
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def count(self, row: Row) -> None:
        self.rows += 1
        self.kinds[row.kind] = self.kinds.get(row.kind, 0) + 1

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(example)

    def refuse(self, source: str, number: int, why: object) -> None:
        """A row that was read, but that the chat template refuses."""
        self.skip(REFUSED, f"{source}:{number}: {why}")

    def left_out(self, dropped: Mapping[str, int] | None = None) -> str:
        """In words, "" for nothing: `dropped` (rows of no use, by reason) and bad rows with the place of the first."""
        counts = ", ".join(f"{number} {reason}" for reason, number in {**(dropped or {}), **self.skipped}.items())
        first = next(iter(self.examples.values()), None)
        return f"{counts}; first bad row: {first[0]}" if first else counts

    def facts(self, dropped: Mapping[str, int]) -> dict[str, Any]:
        """What a command's result says about the rows it did not use."""
        return {"dropped": dropped, "skipped_rows": self.skipped, "skipped_examples": self.examples}

    def merge(self, other: RowReport) -> None:
        """Adds another report's counts to this one."""
        self.files += other.files
        self.rows += other.rows
        for mine, theirs in ((self.kinds, other.kinds), (self.skipped, other.skipped)):
            for key, number in theirs.items():
                mine[key] = mine.get(key, 0) + number
        for reason, places in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + places)[:EXAMPLES]

    def asdict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def expand_paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files behind files, folders (searched recursively) and globs: sorted within each, each file once, order kept.

    Folders give the files whose names say a known format; hidden ones are passed over. Raises InputError for a path
    that is not there, a folder or glob without usable files, and a file of unknown format.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[Path, Path] = {}
    for given in paths:
        if not os.fspath(given):
            raise InputError("--data: got an empty path, wanted a file, a folder or a pattern")
        path = Path(given)
        if path.is_dir():
            files = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file() and _format(file) and not any(p.startswith(".") for p in file.relative_to(path).parts)
            ]
            if not files:
                raise InputError(f"{path}: no row files in this folder; wanted names ending in {_endings()}")
        elif path.exists():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
            if not files:
                raise InputError(f"{path}: no such file")
        for file in files:
            if not _format(file):
                raise InputError(f"{file}: unknown format; wanted a name ending in {_endings()}")
            found.setdefault(file.resolve(), file)
    if not found:
        raise InputError("no row files named; wanted at least one")
    return list(found.values())


def read_rows(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    strict: bool = False,
    report: RowReport | None = None,
) -> Iterator[Row]:
    """The rows of all files (see `expand_paths`), in order.

    A row that cannot be used is counted in `report` and passed over; with `strict` it raises InputError
    "file:line: why". Always InputError: a missing, empty or damaged file, a file whose first row (or header) has the
    wrong columns, a file without one usable row. Paths are checked before this returns, the content as it is read.
    """
    counts = RowReport() if report is None else report
    return itertools.chain.from_iterable(_file_rows(file, strict, counts) for file in expand_paths(paths))


def _file_rows(path: Path, strict: bool, report: RowReport) -> Iterator[Row]:
    here = RowReport(files=1)
    report.files += 1
    for number, record in _records(path):
        try:
            if isinstance(record, BadRow):
                raise record
            row = as_row(record, str(path), number)
        except BadRow as bad:
            if strict or (bad.reason == WRONG_COLUMNS and not here.rows):
                raise InputError(f"{path}:{number}: {bad}") from None
            for each in (here, report):
                each.skip(bad.reason, f"{path}:{number}: {bad}")
            continue
        here.count(row)
        report.count(row)
        yield row
    if not here.rows:
        hint = f"; {CONVERT}" if NOT_UTF8 in here.skipped else ""
        raise InputError(f"{path}: no usable row ({here.left_out() or 'it has no rows'}){hint}")


def _endings() -> str:
    return f".{', .'.join(FORMATS)}, each also with .{', .'.join(COMPRESSIONS)}"


def _format(path: Path) -> str | None:
    endings = [suffix[1:].lower() for suffix in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FORMATS else None


def _records(path: Path) -> Iterator[Record]:
    """(line or element number, columns or what is wrong with it), one at a time."""
    try:
        with open(path, "rb") as file:
            stream = _decompressed(file)
            start = stream.peek(4)[:4]
            if not start:
                raise InputError(f"{path}: the file is empty")
            kind = _format(path)
            if kind == "parquet":
                yield from _parquet(path, stream)
                return
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"{path}: the file is UTF-16; wanted UTF-8")
            if start[:3] == b"\xef\xbb\xbf":
                stream.read(3)
            if kind == "txt":
                yield from _text(stream)
            elif kind in ("csv", "tsv"):
                yield from _csv(path, stream, "," if kind == "csv" else "\t")
            elif stream.peek(64).lstrip()[:1] == b"[":
                yield from _json_array(path, stream)
            else:
                yield from _json_lines(stream)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} {error.object[error.start]:#04x}); {CONVERT}") from None
    except (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: damaged or cut off ({error})") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})" if error.strerror else f"damaged or cut off ({error})"
        raise InputError(f"{path}: {problem}") from None


def _decompressed(file: io.BufferedReader) -> io.BufferedReader:
    start = file.peek(10)[:10]
    if start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), 1 << 18)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        # Arrow's reader, as zstandard's ends without an error where a file is cut off
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 18)
    if start[:3] == b"BZh" and start[4:] == b"1AY&SY":
        return io.BufferedReader(cast(io.RawIOBase, bz2.BZ2File(file)), 1 << 18)
    if start.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(cast(io.RawIOBase, lzma.LZMAFile(file)), 1 << 18)
    return file


def _encodable(text: str) -> bool:
    """False for lone surrogates: undecodable bytes carried through csv, or a broken \\ud8xx escape in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_record(value: Any, escaped: bool) -> dict[str, Any] | BadRow:
    if not isinstance(value, dict):
        return BadRow("not an object", f"wanted a JSON object, got {type(value).__name__} {str(value)[:60]!r}")
    if escaped and not _encodable(json.dumps(value, ensure_ascii=False)):
        return BadRow(NOT_UTF8, "a \\ud800-\\udfff escape without its other half")
    return value


def _json_lines(stream: io.BufferedReader) -> Iterator[Record]:
    for number in itertools.count(1):
        line = stream.readline(MAX_RECORD)
        if not line:
            return
        if len(line) == MAX_RECORD and not line.endswith(b"\n"):
            while (more := stream.readline(MAX_RECORD)) and not more.endswith(b"\n"):
                continue
            yield number, BadRow("too long", f"the line is longer than {MAX_RECORD} bytes")
        elif line.strip():
            try:
                yield number, _json_record(json.loads(line.decode()), b"\\ud" in line or b"\\uD" in line)
            except UnicodeDecodeError as error:
                yield number, BadRow(NOT_UTF8, f"not UTF-8 at byte {error.start} of the line ({error.reason})")
            except (ValueError, RecursionError) as error:
                yield (
                    number,
                    BadRow("not valid JSON", f"not valid JSON ({error}): {line[:60].decode(errors='replace')!r}"),
                )


def _json_array(path: Path, stream: io.BufferedReader) -> Iterator[Record]:
    """Elements of a top-level array; the buffer holds one element and what was read beside it."""
    text = io.TextIOWrapper(stream, "utf-8")
    decoder = json.JSONDecoder()
    buffer, position, wanted = text.read(1 << 16), 0, 1 << 16

    def skip_space() -> str:
        """The next character that is not white space ("" at the end), with `position` on it."""
        nonlocal buffer, position
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            if position < len(buffer):
                return buffer[position]
            buffer, position = text.read(1 << 16), 0
            if not buffer:
                return ""

    skip_space()
    position += 1  # the opening bracket
    if skip_space() == "]":
        return
    for number in itertools.count(1):
        skip_space()
        while True:
            try:
                value, end = decoder.raw_decode(buffer, position)
                if end == len(buffer) and (more := text.read(wanted)):  # a number could go on
                    buffer += more
                    continue
                break
            except (ValueError, RecursionError) as error:
                # cut in the middle, most likely: read as much again, so that the work stays linear
                more = text.read(wanted) if len(buffer) - position <= MAX_RECORD else ""
                if not more:
                    raise InputError(f"{path}:{number}: this element is not valid JSON ({error})") from None
                buffer, position, wanted = buffer[position:] + more, 0, max(wanted, len(buffer) - position)
        yield number, _json_record(value, "\\ud" in buffer[position:end].lower())
        buffer, position, wanted = (buffer[end:], 0, 1 << 16) if end > 1 << 16 else (buffer, end, 1 << 16)
        mark = skip_space()
        position += 1
        if mark == "]":
            return
        if mark != ",":
            raise InputError(
                f"{path}:{number}: after this element wanted ',' or ']', got {mark or 'the end of the file'!r}"
            )


def _csv(path: Path, stream: io.BufferedReader, delimiter: str) -> Iterator[Record]:
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        while line := text.readline(MAX_RECORD):
            if len(line) == MAX_RECORD:
                raise InputError(
                    f"{path}: a line is longer than {MAX_RECORD} characters; wanted rows on lines of their own"
                )
            yield line
        ended = True

    csv.field_size_limit(MAX_RECORD)  # the module's own limit is 128 KiB, and one for the whole process
    # not strict, it takes all that follows an open quote as one field, and glues what follows a closed one to it
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if ended or not header:
                why = "cut off, or a quote opened in this row is never closed" if ended else error
                raise InputError(f"{path}:{number}: not valid csv ({why})") from None
            yield number, BadRow("not valid csv", f"not valid csv ({error})")
            continue
        if not header:
            header = [name.strip() for name in fields]
            if find_shape(header) is None:
                raise InputError(f"{path}:{number}: {wrong_columns(header)}")
        elif not fields:
            continue
        elif not _encodable("".join(fields)):
            yield number, BadRow(NOT_UTF8, "the row is not UTF-8")
        elif len(fields) != len(header):
            yield (
                number,
                BadRow("field count", f"{len(fields)} fields; the header has {len(header)}: {', '.join(header)}"),
            )
        else:
            yield number, dict(zip(header, fields, strict=True))


def _parquet(path: Path, stream: io.BufferedReader) -> Iterator[Record]:
    with contextlib.ExitStack() as stack:
        source: Any = path
        if not isinstance(stream.raw, io.FileIO):
            # parquet is read from its end: one that is compressed as a whole is unpacked on disk first
            source = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, source)
        with pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if find_shape(names) is None:
                raise InputError(f"{path}:1: {wrong_columns(names)}")
            batches = table.iter_batches(batch_size=128, use_threads=False)
            yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _text(stream: io.BufferedReader) -> Iterator[Record]:
    text = io.TextIOWrapper(stream, "utf-8")
    pieces: list[str] = []
    size, number, start = 0, 1, 1
    while piece := text.readline(2 * TEXT_PIECE):
        separator = piece.strip() == "<|endoftext|>"
        if not separator:
            pieces.append(piece)
            size += len(piece)
        number += piece.endswith("\n")
        blank = not piece.strip()
        if separator or size >= 2 * TEXT_PIECE or (size >= TEXT_PIECE and blank):
            document = "".join(pieces)
            if document.strip():
                yield start, {"text": document}
            pieces, size, start = [], 0, number
    if "".join(pieces).strip():
        yield start, {"text": "".join(pieces)}
