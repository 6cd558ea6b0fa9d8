from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from minids import files
from minids.errors import InputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "a", "旧")
    files.atomic_write(tmp_path / "a", b"\x00new")
    assert (tmp_path / "a").read_bytes() == b"\x00new"
    assert names(tmp_path) == {"a"}


def test_atomic_write_keeps_the_old_content_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.atomic_write(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"文": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"文": [1, None]}
    (tmp_path / "bad.json").write_text('{"a": 1')
    with pytest.raises(InputError, match=r"bad\.json: not valid JSON"):
        files.read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        files.read_json(tmp_path / "none.json")


def test_atomic_directory_appears_whole(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "run" / "deep") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
        assert not (tmp_path / "run" / "deep").exists()
    assert (tmp_path / "run" / "deep" / "sub" / "x").read_text() == "x"
    assert names(tmp_path / "run") == {"deep"}


@pytest.mark.parametrize("existing", [False, True])
def test_atomic_directory_leaves_nothing_after_an_error(tmp_path: Path, existing: bool) -> None:
    if existing:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "old").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "run", replace=existing) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ({"run"} if existing else set())
    assert not existing or names(tmp_path / "run") == {"old"}


def test_atomic_directory_replaces_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with files.atomic_directory(target) as folder:  # an empty folder is no content to lose
        (folder / "old").touch()
    with pytest.raises(InputError, match="already exists and is not empty"), files.atomic_directory(target):
        pytest.fail("the block must not run")
    with files.atomic_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(target) == {"new"}
    assert names(tmp_path) == {"run"}


def test_atomic_directory_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="already exists"), files.atomic_directory(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert (tmp_path / "run").read_text() == "a file"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
