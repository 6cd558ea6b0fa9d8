"""Bits per byte of row files, against logits of one document at a time."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3ForCausalLM

from minids.convert.hf import export_hf
from minids.data.pack import Sample
from minids.errors import InputError
from minids.evaluate.perplexity import _windows, bits_per_byte
from minids.loading import load
from minids.train import loop
from minids.train.measure import join, token_bytes
from minids.train.pretrain import pretrain
from tests.minids import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    tiny.write_shards(folder)
    with tiny.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_curves", lambda *_: False)
        pretrain(tiny.pretrain_config(folder, "run", every=0, eval_every=0))
        yield folder


def nats(model, ids: list[int], mask: list[bool]) -> float:
    tokens = torch.tensor([ids])
    labels = tokens[0].where(torch.tensor(mask), -100)
    return F.cross_entropy(model(tokens).logits[0, :-1], labels[1:], reduction="sum", ignore_index=-100).item()


def test_texts_are_measured_by_their_bytes(folder, tmp_path):
    texts = ["The red fox sees 2 stones.", "一只熊在山上看两个东西。", "🦊"]
    file = tiny.write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    model, tokenizer = load(folder / "run")
    expected = sum(nats(model, ids, [True] * len(ids)) for ids in (tokenizer.encode(t, True, True) for t in texts))
    result = bits_per_byte(folder / "run", [file], dtype="fp32", device="cpu")
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / result["bytes"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected / result["tokens"]), rel=1e-5)
    assert (result["rows"], result["dropped"]) == (3, {})


def test_batches_do_not_matter(folder):
    file = str(folder / "text.jsonl")
    results = [
        bits_per_byte(folder / "run", [file], seq_len=128, batch_size=size, dtype="fp32", device="cpu")
        for size in (1, 7)
    ]
    one, seven = ({key: value for key, value in result.items() if value != {}} for result in results)
    assert one == pytest.approx(seven, rel=1e-5)
    assert results[0]["bytes"] == sum(len(text.encode()) for text in tiny.TEXTS)


def test_conversations_are_measured_by_the_answers(folder, tmp_path):
    row = tiny.chats(3)[2]
    file = tiny.write_rows(tmp_path / "chat.jsonl", [row, tiny.preferences(1)[0]])
    model, tokenizer = load(folder / "run")
    ids, mask = tokenizer.encode_chat(row["messages"])
    result = bits_per_byte(folder / "run", [file], dtype="fp32", device="cpu")
    assert result["bytes"] == len("It is 3.")
    assert result["nll"] == pytest.approx(nats(model, ids, mask) / sum(mask), rel=1e-5)
    assert (result["rows"], result["dropped"]) == (1, {"preference row": 1})


def test_bad_rows_are_counted_and_named(folder, tmp_path, capsys):
    lines = [json.dumps(row) for row in [{"text": "The red fox."}, tiny.refused_chat(), *tiny.preferences(1)]]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([lines[0], '{"cut', *lines[1:]]) + "\n")
    result = bits_per_byte(folder / "run", [str(file)], dtype="fp32", device="cpu")
    assert (result["rows"], result["dropped"]) == (1, {"preference row": 1})
    assert result["skipped_rows"] == {"not valid JSON": 1, "refused by the chat template": 1}
    assert result["skipped_examples"]["not valid JSON"][0].startswith(f"{file}:2: not valid JSON")
    assert result["skipped_examples"]["refused by the chat template"][0].startswith(f"{file}:3: chat: ")
    assert f"refused by the chat template; first bad row: {file}:2: not valid JSON" in capsys.readouterr().err
    alone = tiny.write_rows(tmp_path / "refused.jsonl", [tiny.refused_chat()])
    with pytest.raises(
        InputError, match=r"answer to measure \(left out: 1 refused by the chat template; first bad row: "
    ):
        bits_per_byte(folder / "run", [alone])


def test_a_template_that_marks_no_answers_is_named(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    tiny.unmark_answers(tmp_path / "run")
    file = tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(2))
    with pytest.raises(
        InputError, match=r"run/tokenizer/tokenizer.json: its chat template marks no answers with \{% generation %\}"
    ):
        bits_per_byte(tmp_path / "run", [file])
    assert bits_per_byte(tmp_path / "run", [str(folder / "text.jsonl")], dtype="fp32")["rows"] == len(tiny.TEXTS)


@given(st.integers(1, 60), st.integers(2, 20))
def test_long_texts_are_predicted_exactly_once(length, seq_len):
    """Each token but the first is predicted in one window, from the token before it."""
    windows = list(_windows(list(range(length)), [True] * length, seq_len))
    assert all(len(window.tokens) <= seq_len for window in windows)
    predicted = [(a, b) for w in windows for a, b in zip(w.tokens[:-1].tolist(), w.tokens[1:].tolist(), strict=True)]
    assert predicted == [(n, n + 1) for n in range(length - 1)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(12, 20))
def test_joined_documents_stay_apart(lengths, seq_len):
    documents, counter = [], 10
    for length in lengths:
        documents.append(Sample(torch.arange(counter, counter + length).numpy()))
        counter += length
    batch = join(documents, seq_len, 0)
    assert batch.input_ids.shape[1] <= seq_len
    flat, labels, bounds = batch.input_ids.flatten(), batch.labels.flatten(), batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == flat.numel()
    for document, start in zip(documents, bounds[:-1], strict=False):
        end = start + len(document.tokens)
        assert flat[start:end].tolist() == document.tokens.tolist()
        assert labels[start:end].tolist() == [-100, *document.tokens[1:].tolist()]
    assert (labels[sum(lengths) :] == -100).all() and (flat[sum(lengths) :] == 0).all()


def test_bytes_of_tokens():
    table = token_bytes(tiny.tokenizer())
    ids = tiny.tokenizer().encode("fox 狐狸🦊", add_bos=True, add_eos=True)
    assert table[ids].sum() == len("fox 狐狸🦊".encode())
    assert table[[tiny.tokenizer().bos_id, tiny.tokenizer().eos_id]].tolist() == [0, 0]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_precision_is_what_was_asked_for(folder, tmp_path, stored):
    """Of products, whatever the weights are stored in."""
    file = str(folder / "text.jsonl")
    export_hf(folder / "run", tmp_path / "fp32")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp32").to(stored).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "fp32" / name, tmp_path / "half" / name)
    load_half = load(tmp_path / "half")[0]
    assert load_half.lm_head.weight.dtype == stored
    nll = {dtype: bits_per_byte(tmp_path / "half", [file], dtype=dtype)["nll"] for dtype in ("fp32", "bf16")}
    exact = bits_per_byte(folder / "run", [file], dtype="fp32")["nll"]
    assert nll["fp32"] == pytest.approx(exact, rel=1e-3) and nll["fp32"] != nll["bf16"]


def test_bad_input(folder, tmp_path):
    file = str(folder / "text.jsonl")
    with pytest.raises(InputError, match="--seq-len: got 4096, wanted 2 to 128"):
        bits_per_byte(folder / "run", [file], seq_len=4096)
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        bits_per_byte(folder / "run", ["absent.jsonl"])
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(2))
    with pytest.raises(InputError, match="no text and no assistant's answer"):
        bits_per_byte(folder / "run", [pairs])
