"""Files that are either whole or absent: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minids.errors import FULL, InputError


def fsync_path(path: Path) -> None:
    """Flushes one file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replaces `path` by `data`; a reader sees the old content or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    atomic_write(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Raises InputError naming the file when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to fill; it takes the name `path` only when the block ends without an error.

    `replace`: an existing `path` is swapped out; otherwise it raises InputError when `path` exists and is not empty, be
    it before the block or by the end of it. A symbolic link is followed and stays. An empty folder that cannot be
    replaced stays, too: the finished entries are moved into it. The OSError of a full disk names `path`.
    """
    if not os.fspath(path):
        raise InputError("out: got an empty path, wanted a folder to write")
    place = Path(os.path.realpath(path))
    if not replace:
        _refuse_content(place, path)
    temporary = _make_temporary(place)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            fsync_path(file)
        if replace and place.exists() and not _is_empty(place):
            old = place.with_name(f".{place.name}.{os.getpid()}.old")
            os.replace(place, old)
            os.replace(temporary, place)
            shutil.rmtree(old)
        else:
            _take_place(temporary, place, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL and not error.filename:
            error.filename = os.fspath(path)
        raise
    fsync_path(temporary.parent)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def _refuse_content(place: Path, path: str | os.PathLike[str], own: Path | None = None) -> None:
    """InputError, naming it `path`, when anything but an empty folder is at `place`; `own`: an entry that may be."""
    if place.is_dir():
        entry = next((entry.name for entry in place.iterdir() if entry != own), None)
        if entry is not None:
            raise InputError(
                f"{path}: already exists and is not empty (it holds {entry}); give another folder or remove it"
            )
    elif os.path.lexists(place):
        raise InputError(f"{path}: already exists and is no folder; give another name or remove it")


def _make_temporary(place: Path) -> Path:
    """A new folder beside `place`; within it where that is an empty folder to keep: a mount point, which nothing beside
    it can be renamed to, the working directory, or one whose parent cannot be written."""
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    if not _is_empty(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        return beside
    within = place / beside.name
    within.mkdir()
    if os.path.samefile(place, os.curdir):
        return within
    try:
        os.rename(within, beside)
    except OSError:
        return within
    return beside


def _take_place(temporary: Path, place: Path, path: str | os.PathLike[str]) -> None:
    """Makes the finished folder `place`, which is absent or an empty folder; InputError when it no longer is."""
    try:
        os.replace(temporary, place)  # the system refuses when `place` is a file or has content
    except OSError:
        _refuse_content(place, path, own=temporary)
        if not place.is_dir():
            raise
        _move_entries(temporary, place)


def _move_entries(temporary: Path, place: Path) -> None:
    """Moves all entries in the order they were written, so that an index follows what it lists; on an error, none."""
    moved: list[str] = []
    try:
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
            os.rename(entry, place / entry.name)
            moved.append(entry.name)
    except BaseException:
        for name in moved:
            os.rename(place / name, temporary / name)
        raise
    temporary.rmdir()


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
