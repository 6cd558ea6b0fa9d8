from __future__ import annotations

import itertools

import numpy as np
import pytest

from minids.data.build import in_holdout
from minids.data.chat import preference_samples, write_chat_shards
from minids.data.loader import IGNORED, Loader, eval_batches
from minids.data.rows import RowReport
from minids.data.shapes import Row, as_row
from minids.data.store import HOLDOUT, TRAIN, TokenShards
from minids.errors import InputError
from minids.tokenizer import Tokenizer, train_from_texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_from_texts([f"What is {i} plus {i}? It is {2 * i}. 一加一等于二。" for i in range(300)], 500)[0]


def chat(i: int, turns: int = 1) -> Row:
    exchange = [
        {"role": "user", "content": f"What is {i} plus {i}?"},
        {"role": "assistant", "content": f"It is {2 * i}."},
    ]
    return as_row({"messages": [{"role": "system", "content": "Add."}, *exchange * turns]}, "a.jsonl", i)


def test_chats_stay_whole_and_only_answers_count(tmp_path, tokenizer):
    rows = [chat(i, 1 + i % 3) for i in range(60)]
    report = write_chat_shards(rows, tokenizer, tmp_path / "out", seq_len=128, holdout=0.2)
    shards = TokenShards(tmp_path / "out")
    assert shards.has_mask and report["documents"] == 60 and report["splits"][HOLDOUT]["documents"] > 2
    expected = {tokenizer.render_chat(row.messages): row for row in rows}
    seen = []
    for split in (TRAIN, HOLDOUT):
        for number in range(shards.rows(split)):
            tokens, mask, bounds = shards.row(split, number)
            for start, end in itertools.pairwise(bounds):
                ids, counted = tokens[start:end].tolist(), mask[start:end].tolist()
                if ids[0] == tokenizer.pad_id:
                    assert end == 128 and not any(counted)
                    continue
                text = tokenizer.decode(ids, skip_special=False)
                assert (ids, counted) == tuple(map(list, tokenizer.encode_chat(expected[text].messages)))
                answer = tokenizer.decode([id for id, counts in zip(ids, counted, strict=True) if counts])
                assert answer == "".join(m["content"] for m in expected[text].messages if m["role"] == "assistant")
                seen.append(text)
    assert sorted(seen) == sorted(expected)
    assert report["splits"][TRAIN]["fill"] > 0.9


def test_the_loader_and_the_index_count_the_same_tokens(tmp_path, tokenizer):
    write_chat_shards([chat(i) for i in range(40)], tokenizer, tmp_path / "out", seq_len=64, holdout=0.2)
    shards = TokenShards(tmp_path / "out")
    batches = list(eval_batches(shards, HOLDOUT, 4))
    labels = np.concatenate([batch.labels.numpy().ravel() for batch in batches])
    counted = labels[labels != IGNORED]
    facts = shards.index["splits"][HOLDOUT]
    assert len(counted) == facts["targets"] and len(tokenizer.decode_bytes(counted)) == facts["bytes"]
    batch = next(Loader(shards, TRAIN, 4, seed=0))
    assert set(batch.labels[batch.labels != IGNORED].tolist()) <= set(batch.input_ids.ravel().tolist())


def test_long_chats_lose_their_end_or_are_dropped(tmp_path, tokenizer):
    short, long = chat(1), chat(2, turns=30)
    question = {"role": "user", "content": "why? " * 60}
    no_answer_left = as_row({"messages": [question, {"role": "assistant", "content": "so"}]})
    text = as_row({"text": "no chat"})
    report = write_chat_shards([short, long, no_answer_left, text], tokenizer, tmp_path / "out", seq_len=64, holdout=0)
    assert report["dropped"] == {"no answer within 64 tokens": 1, "text row": 1}
    shards = TokenShards(tmp_path / "out")
    assert shards.row(TRAIN, 0)[0].tolist() == tokenizer.encode_chat(long.messages)[0][:64]
    assert report["splits"][TRAIN]["documents"] == 2 and report["splits"][TRAIN]["cut_longer_than_a_row"] == 1


def test_no_chat_at_all_is_an_error_and_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"no conversation to train on \(1 text row\)"):
        write_chat_shards([as_row({"text": "no chat"})], tokenizer, tmp_path / "out", 64)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_the_template_refuses_is_a_bad_row(tmp_path, tokenizer):
    refused = Row(kind="chat", messages=[{"role": "critic", "content": "x"}], source="a.jsonl", number=7)
    report = RowReport()
    result = write_chat_shards([chat(1), refused, chat(2)], tokenizer, tmp_path / "out", 64, 0, report=report)
    assert result["documents"] == 2
    assert result["skipped_rows"] == report.skipped == {"refused by the chat template": 1}
    (place,) = result["skipped_examples"]["refused by the chat template"]
    assert place.startswith("a.jsonl:7: chat: ") and "critic" in place
    index = TokenShards(tmp_path / "out").index
    assert (index["skipped_rows"], index["skipped_examples"]) == (report.skipped, report.examples)
    with pytest.raises(InputError, match=r"to train on \(1 refused by .*; first bad row: a\.jsonl:7: chat: .*critic"):
        write_chat_shards([refused], tokenizer, tmp_path / "none", 64)


def test_a_template_that_marks_no_answers_is_named(tmp_path, tokenizer):
    wordless = {"chat_template": "{% for m in messages %}{{ m.content }}{# {% generations %} #}{% endfor %}"}
    unmarked = Tokenizer(tokenizer._definition, tokenizer.config | wordless, "some/tokenizer")
    match = r"some/tokenizer: its chat template marks no answers with \{% generation %\}.*tokenizer_config.json"
    with pytest.raises(InputError, match=match):
        write_chat_shards([chat(1)], unmarked, tmp_path / "out", 64)
    with pytest.raises(InputError, match=match):
        list(preference_samples([pair("q", "yes", "no")], unmarked, 64))
    assert list(tmp_path.iterdir()) == []


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    return as_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def test_pairs_count_the_answers_after_the_shared_prompt(tokenizer):
    history = [
        {"role": "user", "content": "What is 1 plus 1?"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "And 2 plus 2?"},
    ]
    good, bad = ({"role": "assistant", "content": text} for text in ("It is 4.", "It is 5, I think."))
    row = as_row({"chosen": [*history, good], "rejected": [*history, bad]})
    (sample,) = preference_samples([row], tokenizer, 128)
    for side, answer in ((sample.chosen, good), (sample.rejected, bad)):
        assert side.tokens.tolist() == tokenizer.encode_chat([*history, answer])[0]
        assert tokenizer.decode(side.tokens[side.mask]) == answer["content"]
        assert side.tokens[side.mask][-1] == tokenizer.eos_id


def test_pairs_that_do_not_fit_are_counted(tokenizer):
    dropped: dict[str, int] = {}
    rows = [
        pair("why? " * 60, "so", "no"),
        pair("q", "the same start " * 30 + "good", "the same start " * 30 + "bad"),
        chat(1),
        pair("q", "yes " * 60, "no"),
    ]
    (sample,) = preference_samples(rows, tokenizer, 48, dropped)
    assert dropped == {"no answer within 48 tokens": 1, "same within 48 tokens": 1, "chat row": 1}
    assert len(sample.chosen.tokens) == 48 and len(sample.rejected.tokens) < 48


def test_pairs_the_template_refuses_are_bad_rows(tokenizer):
    nameless = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}
    refused = as_row({"prompt": "q", "chosen": [nameless], "rejected": "no"}, "a.jsonl", 7)
    report = RowReport()
    (sample,) = preference_samples([refused, pair("q", "yes", "no")], tokenizer, 48, report=report)
    assert tokenizer.decode(sample.chosen.tokens[sample.chosen.mask]) == "yes"
    assert report.skipped == {"refused by the chat template": 1}
    assert report.examples["refused by the chat template"][0].startswith("a.jsonl:7: chat: ")


def test_pairs_of_one_prompt_fall_on_one_side(tokenizer):
    rows = [pair(f"What is {i} plus {i}?", f"It is {2 * i}.", f"It is {wrong}.") for i in range(50) for wrong in "ab"]
    digests = [sample.digest for sample in preference_samples(rows, tokenizer, 64)]
    assert digests[::2] == digests[1::2] and len(set(digests)) == 50
    assert 2 < sum(in_holdout(digest, 0.2) for digest in digests[::2]) < 22
