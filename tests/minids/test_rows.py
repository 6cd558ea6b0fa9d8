"""Row files written by the standard libraries come back as they were; bad ones give one clear line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minids.data import rows as rows_module
from minids.data.rows import Row, RowReport, expand_paths, read_rows
from minids.data.shapes import shared_prefix
from minids.errors import InputError

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def only(tmp_path: Path, record: dict[str, Any]) -> Row:
    [row] = read_rows(write(tmp_path / "one.jsonl", lines(record)), strict=True)
    return row


def error_of(path: Any, strict: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path, strict=strict))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# round trips


@SETTINGS
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=8),
    ending=st.sampled_from(list(COMPRESS)),
    shape=st.sampled_from(["jsonl", "escaped.jsonl", "json", "pretty.json"]),
)
def test_json_round_trip(tmp_path: Path, texts: list[str], ending: str, shape: str) -> None:
    records = [{"text": text, "n": i} for i, text in enumerate(texts)]
    if shape == "jsonl":
        content = lines(*records)
    elif shape == "escaped.jsonl":
        content = "\r\n".join(json.dumps(record) for record in records)
    else:
        content = json.dumps(records, indent=2 if shape.startswith("pretty") else None)
    rows = list(read_rows(write(tmp_path / f"x.{shape}{ending}", COMPRESS[ending](content.encode())), strict=True))
    assert [(row.text, row.columns["n"]) for row in rows] == [(text, i) for i, text in enumerate(texts)]
    assert [row.kind for row in rows] == ["text"] * len(texts)


@SETTINGS
@given(
    texts=st.lists(TEXTS.map(lambda text: text.replace("\0", "0")), min_size=1, max_size=8),
    ending=st.sampled_from(list(COMPRESS)),
    mark=st.booleans(),
    terminator=st.sampled_from(["\n", "\r\n"]),
    kind=st.sampled_from(["csv", "tsv"]),
)
def test_csv_round_trip(tmp_path: Path, texts: list[str], ending: str, mark: bool, terminator: str, kind: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="," if kind == "csv" else "\t", lineterminator=terminator)
    writer.writerows([["n", "text"], *([i, text] for i, text in enumerate(texts))])
    data = buffer.getvalue().encode("utf-8-sig" if mark else "utf-8")
    rows = list(read_rows(write(tmp_path / f"x.{kind}{ending}", COMPRESS[ending](data)), strict=True))
    assert [row.text for row in rows] == texts


@SETTINGS
@given(texts=st.lists(TEXTS, min_size=1, max_size=300), ending=st.sampled_from(["", ".gz"]))
def test_parquet_round_trip(tmp_path: Path, texts: list[str], ending: str) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=100)
    rows = read_rows(write(tmp_path / f"x.parquet{ending}", COMPRESS[ending](buffer.getvalue())), strict=True)
    assert [row.text for row in rows] == texts


def test_parquet_holds_conversations(tmp_path: Path) -> None:
    conversations = [turns("你好", "hello"), [{"role": "system", "content": "be short"}, *turns("a", "b")]]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"conversations": conversations}), path)
    assert [row.messages for row in read_rows(path)] == conversations


def test_huge_csv_field(tmp_path: Path) -> None:
    text = "长" * 1_000_000  # beyond the csv module's own limit
    [row] = read_rows(write(tmp_path / "x.csv", f'text\n"{text}"\n'))
    assert row.text == text


def test_json_array_element_longer_than_the_buffer(tmp_path: Path) -> None:
    texts = ["x" * size for size in (10, 300_000, 65_530, 1, 1_000_000, 7)]
    path = write(tmp_path / "x.json", json.dumps([{"text": text} for text in texts]))
    assert [row.text for row in read_rows(path)] == texts


def test_concatenated_zstd_frames(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"text": text}).encode()) for text in ("a", "b", "c")]
    assert [row.text for row in read_rows(write(tmp_path / "x.jsonl.zst", b"".join(frames)))] == ["a", "b", "c"]


def test_txt_pieces_lose_nothing(tmp_path: Path) -> None:
    paragraphs = [f"第{i}回 " + "话说天下大势，" * 40 + "\n\n" for i in range(200)]
    rows = list(read_rows(write(tmp_path / "x.txt", "".join(paragraphs))))
    assert "".join(row.text or "" for row in rows) == "".join(paragraphs)
    assert all(rows_module.TEXT_PIECE <= len(row.text or "") <= 2 * rows_module.TEXT_PIECE for row in rows[:-1])
    assert all((row.text or "").endswith("\n\n") for row in rows)
    source = "".join(paragraphs).split("\n")
    assert all((row.text or "").startswith(source[row.number - 1]) for row in rows)


def test_txt_separators_and_one_long_line(tmp_path: Path) -> None:
    text = "one\n<|endoftext|>\ntwo\n\nstill two\n<|endoftext|>\n" + "x" * 50_000
    rows = [row.text or "" for row in read_rows(write(tmp_path / "x.txt", text))]
    assert rows[:2] == ["one\n", "two\n\nstill two\n"]
    assert "".join(rows[2:]) == "x" * 50_000 and max(map(len, rows)) <= 2 * rows_module.TEXT_PIECE


# shapes


CHAT = turns("1+1?", "2")
CALL = [{"name": "add", "arguments": {"a": 1}}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": CHAT},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}, CHAT[1]]},
        {"prompt": "1+1?", "completion": "2"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": "1+1?", "input": "", "output": "2"},
        {"q": "1+1?", "a": "2", "history": "[]"},
        {"q": "1+1?", "a": "2", "history": None},
        {"prompt": "1+1?", "messages": CHAT},
        {"instruction": "1+1?", "output": "2", "text": "### Instruction: 1+1? ### Response: 2"},
    ],
)
def test_chat_shapes(tmp_path: Path, record: dict[str, Any]) -> None:
    row = only(tmp_path, record)
    assert (row.kind, row.messages, row.number) == ("chat", CHAT, 1)


def test_minimind_tools(tmp_path: Path) -> None:
    row = only(
        tmp_path,
        {
            "conversations": [
                {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "", "tool_calls": json.dumps(CALL), "reasoning_content": ""},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "two", "reasoning_content": "add says 2"},
            ]
        },
    )
    assert row.kind == "chat" and row.tools == TOOLS and "tools" not in row.messages[0]
    assert row.messages[2] == {"role": "assistant", "content": "", "tool_calls": CALL}
    assert row.messages[3]["role"] == "tool" and row.messages[4]["reasoning_content"] == "add says 2"


def test_alpaca_with_input_history_and_system(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be short.", "history": [["hi", "hello"]]}
    row = only(tmp_path, record)
    assert row.messages == [{"role": "system", "content": "Be short."}, *turns("hi", "hello", "Add.\n1 1", "2")]


def test_old_minimind_csv(tmp_path: Path) -> None:
    rows = [["[]", "q1", "a1"], ["[['早', \"it's\"], ('b', 'c\\n')]", "q2", "a2"], ["", "q3", "a3"]]
    bad = ["__import__('os').abort()", "q", "a"]
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["history", "q", "a"], *rows, bad])
    report = RowReport()
    read = [row.messages for row in read_rows(tmp_path / "x.csv", report=report)]
    assert read == [turns("q1", "a1"), turns("早", "it's", "b", "c\n", "q2", "a2"), turns("q3", "a3")]
    assert report.skipped == {"bad value": 1} and "x.csv:5: history: wanted a list" in report.examples["bad value"][0]


@pytest.mark.parametrize(
    "cell", ["{{}}", "{[1]}", "[{[]: 1}]", "[[b'a', 'b']]", "[{(1, 2): 3}]", "['\\ud800']", '["\\ud83d"]']
)
@pytest.mark.parametrize("column", ["history", "messages"])
def test_literals_that_no_json_could_hold_are_bad_rows(tmp_path: Path, column: str, cell: str) -> None:
    answers = ["q", "a"] if column == "history" else []
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as file:
        good = "[]" if column == "history" else json.dumps(CHAT)
        csv.writer(file).writerows([[column, *answers], [good, *answers], [cell, *answers]])
    report = RowReport()
    assert len(list(read_rows(tmp_path / "x.csv", report=report))) == 1
    assert report.skipped == {"bad value": 1}
    assert f"x.csv:3: {column}: wanted a list in JSON or Python form, got" in report.examples["bad value"][0]


def test_an_empty_answer_before_the_last_turn_is_no_answer(tmp_path: Path) -> None:
    report = RowReport()
    silent = {"role": "assistant", "content": " "}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [[*CHAT[:1], silent, *CHAT], [*CHAT[:1], calls, *CHAT], [*CHAT[:1], silent] * 2]
    rows = [{"messages": messages} for messages in turns]
    read = list(read_rows(write(tmp_path / "x.jsonl", lines(*rows)), report=report))
    assert [row.number for row in read] == [2] and report.skipped == {"empty": 2}


def test_prompts_keep_their_columns(tmp_path: Path) -> None:
    empty_answer = only(tmp_path, {"conversations": [CHAT[0], {"role": "assistant", "content": ""}], "gt": ["2"]})
    assert (empty_answer.kind, empty_answer.messages, empty_answer.columns) == ("prompt", CHAT[:1], {"gt": ["2"]})
    trl = only(tmp_path, {"prompt": CHAT[:1], "answer": 2})
    assert (trl.kind, trl.messages, trl.columns) == ("prompt", CHAT[:1], {"answer": 2})
    kto = only(tmp_path, {"prompt": "1+1?", "completion": "3", "label": False})
    assert (kto.kind, kto.messages, kto.columns) == ("prompt", CHAT[:1], {"completion": "3", "label": False})


def test_chatml_inside_text_stays_text(tmp_path: Path) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    assert only(tmp_path, {"text": text}).text == text


def trl_extract_prompt(chosen: Any, rejected: Any) -> int:
    """TRL's loop: the cut is at the first difference, and a space before it goes to the answers."""
    for index in range(min(len(chosen), len(rejected))):
        if chosen[index] != rejected[index]:
            if chosen[index - 1] == " ":
                index -= 1
            break
    return index


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": CHAT[:1], "chosen": [CHAT[1]], "rejected": turns("", "3")[1:]},
        {"chosen": CHAT, "rejected": turns("1+1?", "3")},
        {"prompt": "1+1?", "chosen": CHAT, "rejected": turns("1+1?", "3")},
        {"chosen": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "rejected": turns("1+1?", "3")},
    ],
)
def test_preference_shapes(tmp_path: Path, record: dict[str, Any]) -> None:
    row = only(tmp_path, record)
    assert row.kind == "preference" and row.messages == CHAT[:1]
    assert (row.chosen, row.rejected) == (CHAT, turns("1+1?", "3"))


def test_implicit_text_preference(tmp_path: Path) -> None:
    row = only(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert [m["content"] for m in row.chosen] == ["The sky is", " blue."]
    assert [m["content"] for m in row.rejected] == ["The sky is", " green."]


@SETTINGS
@given(
    prompt=st.lists(st.sampled_from("ab "), min_size=1, max_size=4),
    chosen=st.lists(st.sampled_from("ab "), max_size=4),
    rejected=st.lists(st.sampled_from("ab "), max_size=4),
)
def test_shared_prefix_is_trls(prompt: list[str], chosen: list[str], rejected: list[str]) -> None:
    left, right = "".join(prompt + chosen), "".join(prompt + rejected)
    cut = shared_prefix(left, right)
    assert left[:cut] == right[:cut] and cut < min(len(left), len(right))
    if left[0] == right[0]:  # TRL looks at the last character when the first ones differ
        assert cut == trl_extract_prompt(left, right) or left[cut] == " "


# what is wrong with a file


def test_bad_rows_are_counted_and_passed_over(tmp_path: Path) -> None:
    bad = [
        '{"text": 3}',
        '{"text": "cut',
        "[1]",
        '{"foo": 1}',
        '{"text": "\\ud83d"}',
        '{"text": " "}',
        '{"text": null}',
    ]
    content = "\n".join(['{"text": "first"}', *bad]).encode() + b'\n{"text": "\xff\xfe"}\n\n{"text": "\\ud83d\\ude00"}'
    path = write(tmp_path / "x.jsonl", content)
    report = RowReport()
    assert [(row.text, row.number) for row in read_rows(path, report=report)] == [("first", 1), ("😀", 11)]
    assert report.skipped == {
        "bad value": 1,
        "not valid JSON": 1,
        "not an object": 1,
        "wrong columns": 1,
        "not UTF-8": 2,
        "empty": 2,
    }
    assert report.examples["not valid JSON"][0].startswith(f"{path}:3: not valid JSON (Invalid control character")
    assert [place.split(": ")[0] for place in report.examples["not UTF-8"]] == [f"{path}:6", f"{path}:9"]
    assert error_of(path, strict=True).startswith(f"{path}:2: text: wanted a string, got int")


def test_report_merges(tmp_path: Path) -> None:
    one, two = RowReport(), RowReport()
    list(read_rows(write(tmp_path / "a.jsonl", '{"text":"a"}\n' + "{\n" * 2), report=one))
    list(read_rows(write(tmp_path / "b.jsonl", lines({"messages": CHAT}) + "{\n" * 2), report=two))
    one.merge(two)
    whole = RowReport()
    list(read_rows(tmp_path, report=whole))
    assert one.asdict() == whole.asdict()
    assert whole.kinds == {"text": 1, "chat": 1} and len(whole.examples["not valid JSON"]) == 3


def test_wrong_columns(tmp_path: Path) -> None:
    accepted = "wanted one of: text | messages or conversations | "
    path = write(tmp_path / "x.jsonl", lines({"body": "a", "id": 1}, {"text": "b"}))
    assert error_of(path).startswith(f"{path}:1: columns found: body, id; {accepted}")
    path = write(tmp_path / "x.csv", "body,id\na,1\n")
    assert error_of(path).startswith(f"{path}:1: columns found: body, id; {accepted}")
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    assert error_of(path).startswith(f"{path}:1: columns found: body; {accepted}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("x.jsonl", b"\n\n", "no usable row"),
        ("x.csv", b"text\n", "no usable row"),
        ("x.csv", b'text\na\n"never closed\nb\nc\n', "x.csv:3: not valid csv (cut off, or a quote"),
        ("x.csv", b'"text" of\na\n', "x.csv:1: not valid csv ("),
        ("x.json", b"[]", "no usable row"),
        ("x.jsonl", b"{\n}\n", "no usable row (2 not valid JSON; first bad row: "),
        ("x.csv", "text\n你好\n".encode("gb18030"), "iconv -f gb18030 -t utf-8"),
        ("x.txt", "你好\n".encode("gb18030"), "iconv -f gb18030 -t utf-8"),
        ("x.csv", "text\n你好\n".encode("utf-16"), "UTF-16; wanted UTF-8"),
        ("x.json", b'[{"text": "a"}, {"text": "b"', ":2: this element is not valid JSON"),
        ("x.json", b'[{"text": "a"} {"text": "b"}]', ":1: after this element wanted ',' or ']', got '{'"),
        ("x.parquet", b"PAR1 and no more", "damaged or cut off"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "damaged or cut off"),
        ("x.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 9)[:-3], "damaged or cut off"),
        ("x.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 9)[:-9], "damaged or cut off"),
        ("x.bin", b"\0\1", "unknown format; wanted a name ending in .jsonl"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    error = error_of(path)
    assert error.startswith(str(path)) and message in error


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    report = RowReport()
    path = write(tmp_path / "x.csv", 'text,n\n"two\nlines",1\nshort\n\nlast,2\n')
    assert [(row.text, row.number) for row in read_rows(path, report=report)] == [("two\nlines", 2), ("last", 6)]
    assert report.examples == {"field count": [f"{path}:4: 1 fields; the header has 2: text, n"]}


def test_csv_rows_whose_quotes_are_wrong(tmp_path: Path) -> None:
    report = RowReport()
    path = write(tmp_path / "x.csv", 'text,n\nsay "hi",1\n"a" b,2\n"open,3\nnext,"4"\n"last ""one""",5\n')
    assert [row.text for row in read_rows(path, report=report)] == ['say "hi"', 'last "one"']
    assert report.skipped == {"not valid csv": 2}
    assert [place.split(" (")[0] for place in report.examples["not valid csv"]] == [
        f"{path}:3: not valid csv", f"{path}:4: not valid csv",
    ]  # fmt: skip


def test_records_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_RECORD", 1000)
    report = RowReport()
    long = {"text": "x" * 5000}
    path = write(tmp_path / "x.jsonl", lines({"text": "a"}, long, {"text": "b"}))
    assert [(row.text, row.number) for row in read_rows(path, report=report)] == [("a", 1), ("b", 3)]
    assert report.skipped == {"too long": 1}
    path = write(tmp_path / "x.csv", "text\na\n" + '"never closed\n' + "line\n" * 500)
    report = RowReport()
    assert next(iter(read_rows(path, report=report))).text == "a"
    list(read_rows(path, report=report))
    assert report.skipped["not valid csv"] == 1
    assert "a line is longer than 1000" in error_of(write(tmp_path / "y.csv", "text\n" + "x" * 5000))


# which files


def test_expand_paths(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    names = ["b.jsonl", "a.txt", "sub/c.csv.gz", "sub/readme.md", "sub/.hidden/d.txt", ".e.txt"]
    for name in names:
        write(tmp_path / name, "x")
    assert expand_paths([tmp_path]) == [tmp_path / name for name in ("a.txt", "b.jsonl", "sub/c.csv.gz")]
    assert expand_paths([tmp_path / "b.jsonl", tmp_path]) == [
        tmp_path / name for name in ("b.jsonl", "a.txt", "sub/c.csv.gz")
    ]
    assert expand_paths(str(tmp_path / "**" / "*.gz")) == [tmp_path / "sub/c.csv.gz"]


def test_missing_files_are_named_before_reading(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines({"text": "a"}))
    for missing in ("nope.jsonl", "*.csv"):
        with pytest.raises(InputError, match="no such file"):
            read_rows([tmp_path / "a.jsonl", tmp_path / missing])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no row files in this folder"):
        read_rows(tmp_path / "folder")
    with pytest.raises(InputError, match="no row files named"):
        read_rows([])


# streaming


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_first_row_reads_little_and_all_rows_hold_little(tmp_path: Path, name: str) -> None:
    records = [{"text": f"row {i} " + "some words " * 180} for i in range(10_000)]  # 20 MB
    path = tmp_path / name
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=500)
    else:
        kind = name.split(".")[1]
        if kind == "jsonl":
            content = lines(*records)
        elif kind == "json":
            content = json.dumps(records)
        else:
            content = ("text\n" if kind == "csv" else "") + "".join(record["text"] + "\n" for record in records)
        write(path, COMPRESS[Path(name).suffix if name.count(".") == 2 else ""](content.encode()))
        del content
    del records
    tracemalloc.start()
    try:
        rows = iter(read_rows(path))
        next(rows)
        first = tracemalloc.get_traced_memory()[1]
        assert sum(1 for _ in rows) > 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first < 2 << 20 and peak < 3 << 20
