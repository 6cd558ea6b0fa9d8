"""Fine-tuning on conversations: only the assistant's tokens count, packed ones stay apart, resume is exact."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minids.data.store import TokenShards
from minids.errors import InputError, Interrupted
from minids.loading import load
from minids.train import loop
from minids.train.checkpoint import latest_checkpoint, load_model_config
from minids.train.loop import Trainer, Window
from minids.train.pretrain import LanguageModelTask, pretrain
from minids.train.sft import sft
from tests.minids import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`: a pretrained run; chats.jsonl; `whole`: fine-tuned without interruption."""
    folder = tmp_path_factory.mktemp("sft")
    tiny.write_shards(folder)
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(40))
    with tiny.one_thread():
        pretrain(tiny.pretrain_config(folder, "base", steps=30, every=0, eval_every=0))
        sft(tiny.sft_config(folder, "whole", "base"))
        yield folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(loop, "write_curves", lambda *_: False)


def test_held_out_loss_falls(folder, tmp_path):
    config = tiny.sft_config(folder, "", "base", steps=30, every=0)
    config.out = str(tmp_path / "run")
    result = sft(config)
    assert result["stage"] == "sft"
    assert result["after"]["nll"] < 0.5 * result["before"]["nll"]
    assert "nll (held out)" in Path(result["report"]).read_text()
    assert load_model_config(config.out) == load_model_config(folder / "base")


def test_a_packed_batch_is_its_conversations_one_by_one(folder):
    """Against separate forward passes: nothing crosses conversations, and only what the assistant says counts."""
    model, tokenizer = load(folder / "whole")
    shards = TokenShards(folder / "whole" / "data")
    task = LanguageModelTask("sft", shards, tokenizer, tiny.settings(1, mtp_loss_weight=0.0))
    batch = task.next_batch()
    assert len(batch.cu_seqlens) > 1 + batch.input_ids.shape[0]  # rows do hold several conversations
    counted = task.count(batch)
    part = task.loss(model, batch, Window(1, torch.tensor(counted), False, torch.tensor(0.0)))

    nats, tokens, texts = 0.0, 0, []
    flat = batch.input_ids.flatten()
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        text = tokenizer.decode(flat[start:end].tolist(), skip_special=False)
        if "Assistant" not in text:
            continue  # padding
        question, answer = text.split("<｜Assistant｜>")
        prompt = len(tokenizer.encode(question + "<｜Assistant｜>", allow_special=True))
        logits = model(flat[None, start:end]).logits[0]
        nats += F.cross_entropy(logits[prompt - 1 : -1], flat[start + prompt : end], reduction="sum").item()
        tokens += end - start - prompt
        texts.append(answer)
    assert all(answer.startswith("It is") and answer.endswith("<｜end▁of▁sentence｜>") for answer in texts)
    assert counted == tokens
    assert part.metrics["nll"].item() == pytest.approx(nats / tokens, rel=1e-5)


def test_an_interrupted_run_ends_like_one_never_interrupted(folder, tmp_path, monkeypatch):
    """...even when the base run and the row files are gone by then."""
    copy = tmp_path / "base"
    shutil.copytree(folder / "base", copy)
    rows = shutil.copy(folder / "chats.jsonl", tmp_path)
    config = tiny.sft_config(folder, "", "base")
    config.base, config.data, config.out = str(copy), [str(rows)], str(tmp_path / "run")
    original = Trainer.optimizer_step

    def optimizer_step(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", optimizer_step)
        with pytest.raises(Interrupted, match="step 3 of 8"):
            sft(config)
    shutil.rmtree(copy)
    os.unlink(rows)
    assert sft(config, resume=True)["resumed_from"] == 3
    tiny.assert_same_run(config.out, folder / "whole")


def test_epochs_set_the_steps(folder, tmp_path):
    config = tiny.sft_config(folder, "", "base")
    config.epochs, config.out = 1.5, str(tmp_path / "run")
    result = sft(config)
    rows = TokenShards(tmp_path / "run" / "data").rows("train")
    assert result["steps"] == -(-3 * rows // 4)  # 1.5 epochs in batches of 2
    assert sft(config, resume=True)["already_finished"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base": "absent"}, "absent: no such folder"),
        ({"base": ""}, "--from: not given"),
        ({"data": []}, "--data: not given"),
        ({"data": ["absent.jsonl"]}, "absent.jsonl"),
        ({"seq_len": 1000}, "seq_len: got 1000, but the model in .* takes at most 128"),
        ({"epochs": -1.0}, "epochs: got -1.0"),
    ],
)
def test_bad_input_leaves_nothing(folder, tmp_path, changes, match):
    config = tiny.sft_config(folder, "", "base")
    config.out = str(tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=match):
        sft(config)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_conversations_are_refused(folder, tmp_path):
    config = tiny.sft_config(folder, "", "base")
    config.data, config.out = [str(folder / "text.jsonl")], str(tmp_path / "run")
    with pytest.raises(InputError, match="no conversation to train on"):
        sft(config)


def test_bad_rows_are_counted_and_named(folder, tmp_path, capsys):
    """...and a resumed run, which reads no rows, still tells of them."""
    file = tmp_path / "chats.jsonl"
    lines = [json.dumps(row) for row in [*tiny.chats(20), tiny.refused_chat(), {"text": "no chat"}]]
    file.write_text("\n".join([*lines[:4], '{"cut', *lines[4:]]) + "\n")
    config = tiny.sft_config(folder, "", "base", steps=1)
    config.data, config.out = [str(file)], str(tmp_path / "run")
    for result in (sft(config), sft(config, resume=True)):
        assert result["dropped"] == {"text row": 1}
        assert result["skipped_rows"] == {"not valid JSON": 1, "refused by the chat template": 1}
        places = {reason: found[0] for reason, found in result["skipped_examples"].items()}
        assert places["not valid JSON"].startswith(f"{file}:5: not valid JSON")
        assert places["refused by the chat template"].startswith(f"{file}:22: chat: the template refuses")
    left_out = "left out: 1 text row, 1 not valid JSON, 1 refused by the chat template; first bad row: "
    assert capsys.readouterr().err.count(f"{left_out}{file}:5: not valid JSON") == 1


def test_a_template_that_marks_no_answers_is_named(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    tiny.unmark_answers(tmp_path / "base")
    config = tiny.sft_config(folder, "", "base")
    config.base, config.out = str(tmp_path / "base"), str(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"base/tokenizer/tokenizer.json: its chat template marks no answers with \{% generation %\}"
    ):
        sft(config)
    assert not (tmp_path / "run").exists()


def test_changed_data_is_refused_by_name(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run)
    shutil.rmtree(latest_checkpoint(run))  # back to the one before
    config = tiny.sft_config(folder, "", "base")
    config.out = str(run)
    file = next((run / "data").glob("train-*.bin"))
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=file.name):
        sft(config, resume=True)


def test_only_weights_come_from_the_base(folder, tmp_path):
    """The first step starts from the base's weights, with an optimizer of its own."""
    config = tiny.with_steps(tiny.sft_config(folder, "", "base"), steps=1, lr=1e-12)
    config.out = str(tmp_path / "run")
    sft(config)
    ours, theirs = tiny.weights(latest_checkpoint(config.out)), tiny.weights(latest_checkpoint(folder / "base"))
    for name, tensor in theirs.items():
        if name.startswith("model:") and "e_score_correction_bias" not in name:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=name)
    steps = [tensor.item() for name, tensor in ours.items() if name.endswith(".step")]
    assert set(steps) == {1.0}
