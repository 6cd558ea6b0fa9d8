from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from minids.data import store
from minids.data.loader import IGNORED, Loader, eval_batches
from minids.data.prepare import parse_sources, prepare
from minids.data.store import HOLDOUT, TRAIN, TokenShards
from minids.errors import InputError
from minids.tokenizer import Tokenizer, train_from_texts
from tests.minids.tiny import write_rows

GIB = 1 << 30


def words(rng: np.random.Generator, count: int, letters: str, longest: int) -> list[str]:
    picks = rng.integers(0, len(letters), (count, longest)).tolist()
    sizes = rng.integers(1, longest + 1, count).tolist()
    return ["".join(letters[i] for i in row[:size]) for row, size in zip(picks, sizes, strict=True)]


def make_documents(seed: int, english: list[str], chinese: list[str]):
    """Endless documents of 50 to 4,000 characters, English and Chinese by turns, in lines."""
    rng = np.random.default_rng(seed)
    while True:
        for pool, joiner, stop in ((english, " ", ".\n"), (chinese, "", "。\n")):
            picks = (rng.random(4096) ** 3 * len(pool)).astype(int).tolist()
            start = 0
            for size in rng.integers(10, 300, 12).tolist():
                text = [pool[i] for i in picks[start : start + size]]
                start += size
                yield stop.join(joiner.join(text[i : i + 15]) for i in range(0, len(text), 15)) + stop


def pools(seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))
    return words(rng, 4_000, "abcdefghijklmnoprstuvwy", 9), words(rng, 4_000, han, 4)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = make_documents(0, *pools())
    return [next(documents) for _ in range(400)]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return train_from_texts(texts[:100], 1000)[0]


@pytest.fixture
def corpus(tmp_path, texts) -> list[Path]:
    """The documents as jsonl, csv and txt, with two copies, a chat, a preference row, a bad line, too short a text."""
    folder = tmp_path / "data"
    folder.mkdir()
    chat = [{"role": "user", "content": "is <｜User｜> a token?"}, {"role": "assistant", "content": "not in your text"}]
    rows = [{"text": text} for text in [*texts[:150], texts[3]]]
    rows += [{"messages": chat}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.insert(40, '{"text": "cut o')
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    with open(folder / "b.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text] for text in [*texts[150:350], texts[5]])
    (folder / "c.txt").write_text("\n<|endoftext|>\n".join(texts[350:]))
    return sorted(folder.iterdir())


def documents_of(shards: TokenShards, split: str) -> list[list[int]]:
    """Documents put together again from a split's rows: pieces of a cut one follow each other among the rows."""
    documents: list[list[int]] = []
    open_pieces: list[list[int]] = []
    bos, eos = 0, 1
    for number in range(shards.rows(split)):
        tokens, _, bounds = shards.row(split, number)
        for start, end in itertools.pairwise(bounds):
            piece = tokens[start:end].tolist()
            if piece[0] == shards.pad_id:
                continue
            if piece[0] == bos:
                open_pieces.append(piece)
            else:  # a piece without bos goes on with an unfinished document
                open_pieces[-1 if len(open_pieces) == 1 else 0] += piece
            documents += [piece for piece in open_pieces if piece[-1] == eos]
            open_pieces = [piece for piece in open_pieces if piece[-1] != eos]
    assert not open_pieces
    return documents


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_chats_that_differ_in_tool_calls_or_reasoning_are_no_copies(tmp_path, tokenizer):
    def chat(**answer):
        return {
            "messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "", **answer}]
        }

    def call(city):
        return {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]}

    rows = [chat(**call(city)) for city in ("Oslo", "Rome", "Oslo")]
    rows += [chat(content="So it is.", reasoning_content=why) for why in ("because of that", "because of this")]
    report = prepare([write_rows(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "o", seq_len=64, holdout=0.0)
    assert report["dropped"] == {"duplicate": 1} and report["documents"] == 4


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, corpus, tokenizer):
    options = dict(seq_len=64, fim_rate=0.3, holdout=0.1)
    one = prepare(corpus, tokenizer, tmp_path / "one", workers=1, **options)
    two = prepare(corpus, tokenizer, tmp_path / "two", workers=2, **options)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["dropped"] == {"duplicate": 2, "preference row": 1, "too short": 1}
    assert one["skipped_rows"] == {"not valid JSON": 1}
    assert "a.jsonl:41" in one["skipped_examples"]["not valid JSON"][0]
    assert one["documents"] == 401  # 400 texts and a chat


def test_every_text_is_in_the_shards_once(tmp_path, corpus, texts, tokenizer):
    report = prepare(corpus, tokenizer, tmp_path / "out", seq_len=4096, fim_rate=0, split_rate=0, holdout=0.1)
    train = report["splits"][TRAIN]
    assert train["tokens"] > (train["rows"] - 3) * 4096  # full but for the last row of each source
    shards = TokenShards(tmp_path / "out")
    kept = {split: {tokenizer.decode(ids) for ids in documents_of(shards, split)} for split in (TRAIN, HOLDOUT)}
    assert not kept[TRAIN] & kept[HOLDOUT]
    both = kept[TRAIN] | kept[HOLDOUT]
    assert {text.strip() for text in texts} <= both and len(both) == 401
    assert 15 < len(kept[HOLDOUT]) < 70
    for split in (TRAIN, HOLDOUT):
        facts = shards.index["splits"][split]
        # the chat's bytes are those of its messages
        assert abs(facts["bytes"] - sum(len(text.encode()) for text in kept[split])) < 40
        batches = list(eval_batches(shards, split, 4))
        assert facts["targets"] == sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        assert facts["tokens"] == sum(int((batch.input_ids != shards.pad_id).sum()) for batch in batches)
    assert report["splits"] == shards.index["splits"]
    assert shards.bytes_per_token(TRAIN) == pytest.approx(report["bytes_per_token"], rel=0.02)


def test_the_holdout_depends_on_the_text_alone(tmp_path, corpus, texts, tokenizer):
    options = dict(seq_len=4096, holdout=0.1)
    prepare(corpus, tokenizer, tmp_path / "all", **options)
    prepare([corpus[2], corpus[0]], tokenizer, tmp_path / "two", seed=5, **options)
    held = {
        name: {tokenizer.decode(ids) for ids in documents_of(TokenShards(tmp_path / name), HOLDOUT)}
        for name in ("all", "two")
    }
    elsewhere = {text.strip() for text in texts[150:350]}
    assert held["two"] and held["two"] - elsewhere == held["all"] - elsewhere


def test_fill_in_the_middle_and_split_tokens_change_training_documents_only(tmp_path, corpus, texts, tokenizer):
    prepare(corpus, tokenizer, tmp_path / "out", seq_len=4096, fim_rate=0.3, split_rate=0.5, holdout=0.2)
    shards = TokenShards(tmp_path / "out")
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    originals = {text.strip() for text in texts}
    rewritten = split = 0
    for ids in documents_of(shards, TRAIN):
        if ids[1] != begin:
            split += ids[1:-1] != tokenizer.encode(tokenizer.decode(ids))
            continue
        rewritten += 1
        at_hole, at_end = ids.index(hole), ids.index(end)
        parts = ids[2:at_hole], ids[at_end + 1 : -1], ids[at_hole + 1 : at_end]
        assert tokenizer.decode([id for part in parts for id in part]) in originals
    assert 60 < rewritten < 140 and split > 50
    for ids in documents_of(shards, HOLDOUT):
        assert begin not in ids
        if tokenizer.assistant_id not in ids:
            assert ids[1:-1] == tokenizer.encode(tokenizer.decode(ids))


def test_weights_reach_the_loader(tmp_path, corpus, tokenizer):
    prepare([f"{corpus[0]}=3", f"{corpus[2]}=1"], tokenizer, tmp_path / "out", seq_len=64)
    shards = TokenShards(tmp_path / "out")
    assert [(source.name, source.weight) for source in shards.sources(TRAIN)] == [
        (str(corpus[0]), 3.0),
        (str(corpus[2]), 1.0),
    ]
    first, second = Loader(shards, TRAIN, 1, 0).state()["shares"]
    assert abs(first - 3 * second) <= 3 and first + second == shards.rows(TRAIN)


def test_sources_and_weights_as_people_write_them(tmp_path, corpus):
    folder = corpus[0].parent
    (by_folder,) = parse_sources([folder])
    assert by_folder.files == corpus and by_folder.weight is None
    (by_glob,) = parse_sources([f"{folder}/*.csv=0.5"])
    assert by_glob.files == [corpus[1]] and by_glob.weight == 0.5
    odd = tmp_path / "x=1.txt"  # a name that looks like a weight
    odd.write_text("text")
    assert parse_sources([odd])[0].name == str(odd)
    assert parse_sources([odd], {str(odd): 2})[0].weight == 2
    for arguments, weights, message in (
        ([f"{odd}=0.5", corpus[0]], None, "has no weight but others have"),
        ([f"{odd}=-1"], None, "wanted a number > 0"),
        ([f"{odd}=nan"], None, "wanted a number > 0"),
        ([f"{odd}=much"], None, "is no weight"),
        ([odd, odd], None, "named twice"),
        ([odd], {"other": 1.0}, "other is none of the sources"),
        ([tmp_path / "missing.txt"], None, r"missing.txt: no such file"),
        ([], None, "no data named"),
    ):
        with pytest.raises(InputError, match=message):
            parse_sources(arguments, weights)


def test_bad_input_leaves_nothing_behind(tmp_path, corpus, tokenizer):
    before = sorted(tmp_path.iterdir())
    short = tmp_path / "data" / "d.jsonl"
    short.write_text('{"text": "x"}\n{"text": "y"}\n')
    for files, options, message in (
        (corpus, {"strict": True}, "a.jsonl:41: not valid JSON"),
        ([short], {}, r"no document left to train on \(2 too short\)"),
        ([f"{short}=1", f"{corpus[2]}=1"], {}, "d.jsonl: has a weight but no document left"),
        (corpus, {"seq_len": 1}, "seq_len: got 1"),
        (corpus, {"fim_rate": 1.5}, "fim_rate: got 1.5"),
        (corpus, {"workers": 0}, "workers: got 0"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(files, tokenizer, tmp_path / "out", **options)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="no tokenizer here"):
        prepare(corpus, tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        prepare(corpus, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chat_the_template_refuses_is_a_bad_row(tmp_path, corpus, tokenizer, workers):
    call = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}
    chat = {"messages": [{"role": "user", "content": "call something, whatever it is"}, call]}
    bad = tmp_path / "data" / "d.jsonl"
    bad.write_text(json.dumps({"text": "long enough to be kept, this one"}) + "\n" + json.dumps(chat) + "\n")
    report = prepare([bad, corpus[2]], tokenizer, tmp_path / "out", workers=workers, holdout=0)
    assert report["documents"] == 51 and "refused by the chat template" not in report["dropped"]
    assert report["skipped_rows"] == {"refused by the chat template": 1}
    (place,) = report["skipped_examples"]["refused by the chat template"]
    assert place.startswith(f"{bad}:2: chat: the template refuses")
    with pytest.raises(InputError, match=r"d\.jsonl:2: chat: the template refuses"):
        prepare([bad, corpus[2]], tokenizer, tmp_path / "strict", workers=workers, strict=True)
    assert not (tmp_path / "strict").exists()
    bad.write_text(json.dumps(chat) + "\n")
    with pytest.raises(InputError, match=r"no document left to train on \(1 refused .*; first bad row: .*d\.jsonl:1: "):
        prepare([bad], tokenizer, tmp_path / "none", workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_line(tmp_path, corpus, tokenizer, monkeypatch, workers):
    class FullDisk(io.BytesIO):
        def write(self, data):
            if self.tell() > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    # a file system that is really full needs root; the error is the one the system gives
    monkeypatch.setattr(store, "open", lambda path, mode: FullDisk(), raising=False)
    with pytest.raises(
        InputError, match=r"out: the disk is full after 2\d{4} bytes of shards, about \d{5,} are needed"
    ):
        prepare(corpus, tokenizer, tmp_path / "out", seq_len=64, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


PREPARE = (
    "import sys; from minids.data.prepare import prepare; prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2)"
)


def measured_prepare(file: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    """(peak of the summed resident memory of the process and its children in bytes, seconds)."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", PREPARE, file, tokenizer, out])
    peak = 0
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in tree))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.1)
    assert process.returncode == 0
    return peak, time.perf_counter() - started


def write_csv(path: Path, size: int) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        written = 0
        for text in make_documents(1, *pools(1)):
            writer.writerow([text])
            written += len(text.encode())
            if written >= size:
                return


def test_workers_end_with_a_killed_parent_and_nothing_takes_the_name(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    write_csv(tmp_path / "data.csv", 6_000_000)
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, *(tmp_path / n for n in ("data.csv", "tokenizer", "out"))]
    )
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while not any(child.cpu_times().user > 0.1 for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children and not psutil.wait_procs(children, timeout=20)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_csv_of_4_3_gb_streams_in_under_1_gib(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    write_csv(tmp_path / "big.csv", 4_300_000_000)
    peak, seconds = measured_prepare(tmp_path / "big.csv", tmp_path / "tokenizer", tmp_path / "out")
    print(f"peak {peak / 1e6:.0f} MB, {4300 / seconds:.1f} MB/s")
    (tmp_path / "big.csv").unlink()
    assert peak < GIB
