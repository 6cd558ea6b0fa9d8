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


@pytest.mark.parametrize("content", [set(), {"old"}])
def test_atomic_directory_follows_a_link(tmp_path: Path, content: set[str]) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    for name in content:
        (tmp_path / "disk" / "real" / name).touch()
    (tmp_path / "run").symlink_to("disk/real")
    with files.atomic_directory(tmp_path / "run", replace=bool(content)) as folder:
        (folder / "new").touch()
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk" / "real") == {"new"}
    assert names(tmp_path) == {"run", "disk"} and names(tmp_path / "disk") == {"real"}


def test_atomic_directory_puts_the_folder_where_a_dangling_link_points(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("disk/real")
    with files.atomic_directory(tmp_path / "run") as folder:
        (folder / "new").touch()
    assert (tmp_path / "run").is_symlink() and names(tmp_path / "disk" / "real") == {"new"}


def test_atomic_directory_refuses_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(InputError, match="run: already exists"), files.atomic_directory(tmp_path / "run"):
        pytest.fail("the block must not run")


def mount(monkeypatch: pytest.MonkeyPatch, volume: Path) -> list[Path]:
    """Makes renames meet `volume` as a mount point; returns what is renamed into it, in order."""
    rename, arrived = os.rename, []

    def checked(source: Path, target: Path) -> None:
        source, target = Path(source), Path(target)
        if volume in (source, target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        if (volume in source.parents) != (volume in target.parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)
        arrived.append(target)

    monkeypatch.setattr(os, "rename", checked)
    monkeypatch.setattr(os, "replace", checked)
    return arrived


def test_atomic_directory_fills_an_empty_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    arrived = mount(monkeypatch, volume)
    with files.atomic_directory(volume) as folder:
        for number, name in enumerate(["shards", "train", "index"]):
            (folder / name).mkdir() if name == "shards" else (folder / name).write_text("x")
            os.utime(folder / name, (number, number))
        assert names(volume) == {folder.name}
    assert [path.name for path in arrived] == ["shards", "train", "index"]  # as they were written
    assert names(volume) == {"shards", "train", "index"} and names(tmp_path) == {"volume"}


def test_atomic_directory_that_cannot_fill_a_mount_point_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    mount(monkeypatch, volume)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if target == volume / "second":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), files.atomic_directory(volume) as folder:
        for number, name in enumerate(["first", "second"]):
            (folder / name).touch()
            os.utime(folder / name, (number, number))
    assert names(volume) == set() and names(tmp_path) == {"volume"}


def test_atomic_directory_fills_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with files.atomic_directory(".") as folder:
        (folder / "new").touch()
    assert os.listdir() == ["new"]  # the shell that stands in the folder sees it, too
    assert names(tmp_path) == {"here"}


def test_atomic_directory_wants_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="got an empty path"), files.atomic_directory(""):
        pytest.fail("the block must not run")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("before", ["absent", "empty", "mounted"])
@pytest.mark.parametrize("theirs", ["folder", "file"])
def test_atomic_directory_keeps_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, theirs: str
) -> None:
    out = tmp_path / "run"
    if before != "absent":
        out.mkdir()
    if before == "mounted":
        mount(monkeypatch, out)
    content = out
    with pytest.raises(InputError, match="run: already exists"), files.atomic_directory(out) as folder:
        (folder / "result").write_text("mine")
        if theirs == "folder" or before == "mounted":
            out.mkdir(exist_ok=True)
            content = out / "result"
        elif before == "empty":
            out.rmdir()
        content.write_text("theirs")
    assert content.read_text() == "theirs"
    assert names(tmp_path) == {"run"} and (out.is_file() or names(out) == {"result"})


def test_atomic_directory_names_the_folder_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, files.atomic_directory(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "run")
    assert names(tmp_path) == set()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
