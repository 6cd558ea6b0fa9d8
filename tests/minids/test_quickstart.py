"""Quickstart end to end at toy size, without the network: what it writes, resumes, refuses. How well a real one learns
is measured by the command itself (README)."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest

from minids import corpus, quickstart, tasks
from minids.config import ModelConfig
from minids.data.rows import read_rows
from minids.errors import InputError, Interrupted
from minids.loading import load

STAGES = ["data", "tokenizer", "shards", "pretrain", "sft", "dpo"]
TINY = ModelConfig(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
)  # fmt: skip


def words(seed: int, count: int) -> str:
    return " ".join(
        random.Random(seed).choices(["wind", "moon", "river", "old", "walks", "sees", "under", "green"], k=count)
    )


@pytest.fixture
def small(monkeypatch):
    """Two steps a stage of a tiny model, a handful of questions, and a corpus of its own for the packages'."""
    texts = corpus.Corpus(
        chats=[[words(4 * i + j, 4) for j in range(4)] for i in range(300)],
        idioms=[corpus.Idiom(word, f"比喻{word}。", "", "") for word in ("画蛇添足", "守株待兔")],
        novel=[f"第{i}回 {words(i, 30)}" for i in range(400)],
    )
    monkeypatch.setattr(corpus, "load", lambda: texts)
    monkeypatch.setattr(quickstart, "preset", lambda name, vocab_size: dataclasses.replace(TINY, vocab_size=vocab_size))
    monkeypatch.setattr(quickstart.Clock, "steps", lambda self, stage, per_step: 2)
    sizes = {"QUESTIONS": 3, "SAMPLES": 1, "PAIRS": 20, "HELDOUT_PAIRS": 6, "VOCAB_SIZE": 600, "SEQ_LEN": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(quickstart, name, value)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_stages_then_resume_repeats_nothing(small, tmp_path, capsys):
    out = tmp_path / "q"
    result = quickstart.quickstart(out, minutes=0.05)
    assert list(result["stages"]) == STAGES
    assert json.loads(json.dumps(result)) == json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    assert capsys.readouterr().out == ""  # stdout belongs to the one JSON line of the command
    for name in ("pretrain", "sft", "dpo"):
        assert result["stages"][name]["steps"] == 2
        model, tokenizer = load(out / name)
        assert model.config.vocab_size == tokenizer.vocab_size
    assert result["stages"]["dpo"]["questions"]["questions"] == 3
    assert all(isinstance(answer, str) for _, answer in result["sample"]) and len(result["sample"]) == 4
    text = (out / "report.md").read_text(encoding="utf-8")
    for row in quickstart.improvements(result["stages"]):
        assert row[1] in text and row[3] in text
    assert f"minids chat {out / 'dpo'}" in text

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = quickstart.quickstart(out, minutes=0.05, resume=True)
    assert again["stages"] == json.loads(json.dumps(result["stages"])) and len(before) >= 6
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}

    with pytest.raises(InputError, match=r"already exists.*--resume"):
        quickstart.quickstart(out)


def test_an_interrupted_stage_goes_on_with_its_settings(small, tmp_path, monkeypatch):
    out = tmp_path / "q"
    real = quickstart.sft

    def interrupted(config, resume):
        real(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), resume)
        raise Interrupted("SIGINT: saved")

    monkeypatch.setattr(quickstart, "sft", interrupted)
    with pytest.raises(Interrupted):
        quickstart.quickstart(out, minutes=0.05)
    partial = json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    assert list(partial["stages"]) == ["data", "tokenizer", "shards", "pretrain"]
    monkeypatch.setattr(quickstart, "sft", real)
    monkeypatch.setattr(quickstart.Clock, "steps", lambda self, stage, per_step: 3)
    result = quickstart.quickstart(out, minutes=0.05, resume=True)
    assert result["stages"]["sft"]["steps"] == 2  # as it began
    assert result["stages"]["dpo"]["steps"] == 3  # begun now


def test_the_users_chats_and_pairs_are_used(small, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load", lambda: pytest.fail("the packages are not needed"))
    chats = tmp_path / "chats.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    chats.write_text(
        "".join(json.dumps({"q": f"ask {i}", "a": words(i, 6)}) + "\n" for i in range(40)), encoding="utf-8"
    )
    pairs.write_text(
        "".join(json.dumps({"prompt": f"p {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(30)),
        encoding="utf-8",
    )
    folder = tmp_path / "data"
    folder.mkdir()
    facts = quickstart.write_data(folder, [str(chats), str(pairs)], minutes=0.05)
    sft = read(folder / "sft.jsonl")
    asked = [row["messages"][0]["content"] for row in sft]
    assert set(asked) >= {f"ask {i}" for i in range(40)}
    assert len(asked) > 100  # generated questions beside them
    text = "\n".join(row["text"] for row in read(folder / "pretrain.jsonl"))
    assert "ask 7\n" in text and "plus" in text
    held_out = {row.messages[0]["content"] for row in read_rows(str(folder / "heldout_preferences.jsonl"))}
    trained = {row.messages[0]["content"] for row in read_rows(str(folder / "preferences.jsonl"))}
    assert len(held_out) == 3 and held_out | trained == {f"p {i}" for i in range(30)} and not held_out & trained
    assert facts["preferences"] == 27 and facts["source"] == [str(chats), str(pairs)]


def test_the_users_plain_text_goes_through_all_stages(small, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load", lambda: pytest.fail("the packages are not needed"))
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(words(i, 60) for i in range(400)), encoding="utf-8")
    result = quickstart.quickstart(tmp_path / "q", data=[str(text)], minutes=0.05)
    assert list(result["stages"]) == STAGES
    assert "river" in (tmp_path / "q" / "data" / "pretrain.jsonl").read_text(encoding="utf-8")


def test_a_large_file_is_read_only_as_far_as_needed(small, tmp_path):
    text = tmp_path / "large.jsonl"
    text.write_text("".join(json.dumps({"text": words(i, 200)}) + "\n" for i in range(2000)), encoding="utf-8")
    (tmp_path / "data").mkdir()
    facts = quickstart.write_data(tmp_path / "data", [str(text)], minutes=0.1)
    assert facts["text_bytes"] == pytest.approx(0.1 * quickstart.TEXT_BYTES, rel=0.05)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_must_be_a_time(tmp_path, minutes):
    with pytest.raises(InputError, match="--minutes"):
        quickstart.quickstart(tmp_path / "q", minutes=minutes)


def test_without_network_nothing_is_left_and_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path / "cache"))
    failed = corpus.subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: failed)
    out = tmp_path / "q"
    with pytest.raises(InputError, match=r"no network.*--data FILE"):
        quickstart.quickstart(out)
    assert not out.exists() or not any(out.iterdir())


def test_prompts_alone_are_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "why?"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.jsonl: only prompts"):
        quickstart.quickstart(tmp_path / "q", data=[str(file)])


class Parrot:
    """Stands in for a model and a tokenizer: the answer to a question is looked up."""

    eos_id = 1

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def encode_chat(self, messages, add_generation_prompt):
        text = messages[0]["content"]
        if text not in self.asked:
            self.asked.append(text)
        return [self.asked.index(text) + 2] * (1 + len(text) % 3), []

    def generate(self, input_ids, max_new_tokens):
        torch = quickstart.torch
        rows = [[row[0], 1000 + row[0], 1, 5] for row in input_ids.tolist()]
        new = torch.tensor([row[1:] for row in rows])
        return torch.cat((input_ids, new), dim=1)

    def decode(self, ids):
        [id] = ids
        return self.answers(self.asked[id - 1002])


def test_score_counts_right_and_full_answers():
    questions = tasks.heldout_questions(30)
    by_text = {question.text: number for number, question in enumerate(questions)}

    def answer(text):
        question = questions[by_text[text]]
        return (question.full, question.bare, question.wrong)[by_text[text] % 3]

    parrot = Parrot(answer)
    found = quickstart.score(parrot, parrot, questions)
    assert (found["right"], found["full"]) == (round(20 / 30, 4), round(10 / 30, 4))
    assert found["questions"] == 30 and len(found["families"]) == len(tasks.FAMILIES)


def test_the_clock_shares_out_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: now[0])
    clock = quickstart.Clock(10)
    training = 600 - quickstart.RESERVE
    assert clock.steps("pretrain", 0.5) == int(training * quickstart.PARTS["pretrain"] / 0.5)
    now[0] += 400
    last = clock.steps("dpo", 0.5)
    assert last == pytest.approx((200 - quickstart.RESERVE / 3) / 0.5, abs=1)
    now[0] += 1000
    assert clock.steps("dpo", 0.5) == quickstart.LEAST_STEPS


def test_another_folder_is_not_gone_on_with(tmp_path):
    """Its data and tokenizer would be replaced."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no quickstart to go on with .*quickstart\.json"):
        quickstart.quickstart(tmp_path, minutes=0.05, resume=True)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_other_data_on_resume_are_refused(tmp_path):
    stages = {"data": {"source": "packages"}}
    (tmp_path / "quickstart.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(InputError, match=r"--data: got \['mine.jsonl'\], but the quickstart in .* began with packages"):
        quickstart.quickstart(tmp_path, data=["mine.jsonl"], minutes=0.05, resume=True)


def test_too_little_text_is_said(small, tmp_path):
    (tmp_path / "mine.txt").write_text("Two lines.\n\nOf text.\n")
    with pytest.raises(InputError, match="bytes of text are too few to hold any of them out"):
        quickstart.quickstart(tmp_path / "q", data=[str(tmp_path / "mine.txt")], minutes=0.001)


def test_bad_rows_of_the_user_are_told(small, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"text": "One."}\n{"text": \n' + '{"text": "Two, much longer."}\n' * 3)
    (tmp_path / "data").mkdir()
    quickstart.write_data(tmp_path / "data", [str(tmp_path / "mine.jsonl")], minutes=0.001)
    assert re.search(r"left out: 1 not valid JSON; first bad row: .*mine\.jsonl:2: ", capsys.readouterr().err)
