"""DPO against its formula on unpacked pairs, what it reports, the term against collapse, and exact resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minids.config import to_toml
from minids.data.rows import read_rows
from minids.errors import InputError, Interrupted
from minids.loading import load
from minids.train import loop
from minids.train.checkpoint import latest_checkpoint
from minids.train.dpo import Pairs, PreferenceTask, answer_log_probs, dpo, dpo_metrics, pair_batch, write_pairs
from minids.train.loop import Trainer, Window
from minids.train.pretrain import pretrain
from minids.train.run import absolute
from minids.train.sft import sft
from tests.minids import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`: fine-tuned to answer; pairs.jsonl; `whole`: a DPO run never interrupted."""
    folder = tmp_path_factory.mktemp("dpo")
    tiny.write_shards(folder)
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(40))
    tiny.write_rows(folder / "pairs.jsonl", tiny.preferences(24))
    with tiny.one_thread():
        pretrain(tiny.pretrain_config(folder, "pretrained", steps=10, every=0, eval_every=0))
        sft(tiny.sft_config(folder, "base", "pretrained", steps=10, every=0, eval_every=0))
        dpo(tiny.dpo_config(folder, "whole", "base"))
        yield folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(loop, "write_curves", lambda *_: False)


def by_hand(model, tokenizer, prompt: str, answer: str) -> tuple[torch.Tensor, int]:
    """Summed log-probability of one answer in a forward pass of its own, and its tokens, closing eos included."""
    before = tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)[0]
    whole = tokenizer.encode_chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])[0]
    assert whole[: len(before)] == before and whole[-1] == tokenizer.eos_id
    ids = torch.tensor([whole])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return log_probs[len(before) - 1 :].sum(), len(whole) - len(before)


def test_packed_log_probs_are_those_of_each_answer_alone(folder):
    model, tokenizer = load(folder / "base")
    pairs = Pairs(folder / "whole" / "data")
    numbers = pairs.train[:5]
    batch = pair_batch(pairs, numbers, 32, tokenizer.pad_id)
    assert batch.batch.input_ids.shape[0] > 1 and batch.batch.input_ids.shape[1] <= 32
    log_probs = answer_log_probs(model, batch)
    rows = tiny.preferences(24)
    for place, number in enumerate(numbers):
        for side, answer in enumerate((rows[number]["chosen"], rows[number]["rejected"])):
            expected, tokens = by_hand(model, tokenizer, rows[number]["prompt"], answer)
            assert log_probs[place, side].item() == pytest.approx(expected.item(), rel=1e-4)
            assert batch.answers[2 * place + side] == tokens


def test_the_loss_is_the_papers_plus_the_chosen_answers(folder):
    model, tokenizer = load(folder / "whole")
    reference, _ = load(folder / "base")
    config = tiny.dpo_config(folder, "", "base")
    config.beta, config.sft_loss_weight = 0.3, 0.7
    task = PreferenceTask(Pairs(folder / "whole" / "data"), config.train, config, 32, tokenizer.pad_id)
    task.load_reference(folder / "whole" / "data" / "reference.safetensors")
    batch = task.next_batch()
    part = task.loss(model, batch, Window(2, torch.tensor(4), False, torch.tensor(0.0)))  # half of a window of 4 pairs

    expected, margins = torch.zeros(()), []
    rows = tiny.preferences(24)
    for number in batch.numbers:
        row = rows[number]
        (chosen, length), (rejected, _) = (
            by_hand(model, tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")
        )
        (old_chosen, _), (old_rejected, _) = (
            by_hand(reference, tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")
        )
        margin = 0.3 * ((chosen - rejected) - (old_chosen - old_rejected))
        expected = expected - margin.sigmoid().log() / 4 + 0.7 * -chosen / length / 4
        margins.append(margin.item())
    assert part.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert part.metrics["margin"].item() == pytest.approx(sum(margins) / 4, rel=1e-3)

    part.loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert gradient and not any(name.startswith("model.layers.2") for name in gradient)  # the MTP module


def test_metrics_of_a_pair():
    values = dpo_metrics(
        torch.tensor([[-2.0, -9.0], [-3.0, -3.0], [-5.0, -4.0]]), torch.tensor([-4.0]).expand(3, 2), 0.5
    )
    assert values["rewards_chosen"].tolist() == [1.0, 0.5, -0.5]
    assert values["rewards_rejected"].tolist() == [-2.5, 0.5, 0.0]
    assert values["margin"].tolist() == [3.5, 0.0, -0.5]
    assert values["accuracy"].tolist() == [1.0, 0.5, 0.0]


def test_before_training_nothing_is_preferred(folder):
    first = tiny.metrics(folder / "whole")[0]
    assert (first["step"], first["margin"], first["accuracy"], first["rewards_chosen"]) == (0, 0.0, 0.5, 0.0)
    assert first["preference_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_it_learns_held_out_preferences(folder, tmp_path):
    """Preferring what the base model finds improbable, so that preference_accuracy has somewhere to go."""
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in tiny.preferences(24)]
    config = tiny.dpo_config(folder, "", "base", steps=40, every=0, eval_every=0, lr=5e-3)
    config.data, config.out = [tiny.write_rows(tmp_path / "pairs.jsonl", rows)], str(tmp_path / "run")
    result = dpo(config)
    before, after = result["before"], result["after"]
    assert before["preference_accuracy"] < 0.3 and after["preference_accuracy"] > 0.8
    assert after["preference_accuracy_per_token"] > 0.8
    assert after["accuracy"] > 0.9 and after["margin"] > 0.5
    assert after["rewards_chosen"] > after["rewards_rejected"]
    assert "preference_accuracy (held out)" in Path(result["report"]).read_text()


def test_the_sft_term_holds_on_to_the_chosen_answers(folder, tmp_path):
    """Answers that differ in one word: without the term both lose probability, with it the chosen one keeps it."""
    rows = [{"prompt": f"{n} and 1?", "chosen": f"It is {n + 1}.", "rejected": f"It is {n + 2}."} for n in range(24)]
    nll = {}
    for weight in (0.0, 1.0):
        config = tiny.dpo_config(folder, "", "base", steps=25, every=0, eval_every=0, lr=3e-3)
        config.data = [tiny.write_rows(tmp_path / "pairs.jsonl", rows)]
        config.sft_loss_weight, config.out = weight, str(tmp_path / f"run{weight}")
        result = dpo(config)
        nll[weight] = result["after"]["chosen_nll"]
    assert nll[1.0] < result["before"]["chosen_nll"]
    assert nll[1.0] < 0.8 * nll[0.0]


def test_an_interrupted_run_ends_like_one_never_interrupted(folder, tmp_path, monkeypatch):
    copy = tmp_path / "base"
    shutil.copytree(folder / "base", copy)
    config = tiny.dpo_config(folder, "", "base")
    config.base, config.out = str(copy), str(tmp_path / "run")
    original = Trainer.optimizer_step

    def optimizer_step(self):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", optimizer_step)
        with pytest.raises(Interrupted, match="step 5 of 8"):
            dpo(config)
    shutil.rmtree(copy)
    assert dpo(config, resume=True)["resumed_from"] == 5
    tiny.assert_same_run(config.out, folder / "whole")


def test_the_reference_is_computed_once(folder, tmp_path, monkeypatch):
    """A start that was killed after the reference and before the first checkpoint goes on with it; another model's is
    not taken."""
    config = tiny.dpo_config(folder, "", "base")
    config.out = str(tmp_path / "run")
    shutil.copytree(folder / "whole", config.out)
    for checkpoint in Path(config.out).glob("step_*"):
        shutil.rmtree(checkpoint)
    (Path(config.out) / "config.toml").unlink()
    file = Path(config.out) / "data" / "reference.safetensors"
    computed = []
    original = PreferenceTask.compute_reference
    monkeypatch.setattr(PreferenceTask, "compute_reference", lambda *a: (computed.append(1), original(*a)))
    (Path(config.out) / "config.toml").write_text(to_toml(absolute(config)))
    before = load_file(file)["log_probs"]
    dpo(config, resume=True)
    assert not computed
    tiny.assert_same_run(config.out, folder / "whole")

    for checkpoint in Path(config.out).glob("step_*"):
        shutil.rmtree(checkpoint)
    config.base = str(folder / "pretrained")
    (Path(config.out) / "config.toml").write_text(to_toml(absolute(config)))
    dpo(config, resume=True)
    assert computed == [1]
    assert not torch.equal(load_file(file)["log_probs"], before)


@pytest.mark.parametrize("name", ["pairs.safetensors", "reference.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_touched_data_is_refused_by_name(folder, tmp_path, name, damage):
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run)
    shutil.rmtree(latest_checkpoint(run))
    file = run / "data" / name
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    config = tiny.dpo_config(folder, "", "base")
    config.out = str(run)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        dpo(config, resume=True)


def test_pairs_of_one_prompt_stay_on_one_side(folder, tmp_path):
    rows = [{"prompt": f"{n % 10}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(30)]
    rows.append({"text": "a row of another kind"})
    file = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    dropped = write_pairs(read_rows([file]), tiny.tokenizer(), tmp_path, 64, 0.3)
    pairs = Pairs(tmp_path)
    held_out = {number % 10 for number in pairs.held_out}
    assert len(held_out) == 3 and len(pairs.held_out) == 9 and len(pairs) == 30
    assert not held_out & {number % 10 for number in pairs.train}
    assert sum(dropped.values()) == 1


def test_bad_rows_are_counted_and_named(folder, tmp_path, capsys):
    """...and a resumed run, which reads no rows, still tells of them."""
    refused = {"prompt": "q", "chosen": tiny.refused_chat()["messages"][1:], "rejected": "no"}
    lines = [json.dumps(row) for row in [*tiny.preferences(8), refused, *tiny.chats(1)]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([*lines[:4], '{"cut', *lines[4:]]) + "\n")
    config = tiny.dpo_config(folder, "", "base", steps=1)
    config.data, config.out = [str(file)], str(tmp_path / "run")
    for result in (dpo(config), dpo(config, resume=True)):
        assert result["dropped"] == {"chat row": 1}
        assert result["skipped_rows"] == {"not valid JSON": 1, "refused by the chat template": 1}
        places = {reason: found[0] for reason, found in result["skipped_examples"].items()}
        assert places["not valid JSON"].startswith(f"{file}:5: not valid JSON")
        assert places["refused by the chat template"].startswith(f"{file}:10: chat: the template refuses")
    left_out = "left out: 1 chat row, 1 not valid JSON, 1 refused by the chat template"
    assert capsys.readouterr().err.count(f"{left_out}; first bad row: {file}:5: not valid JSON") == 1
    assert left_out in Path(result["report"]).read_text()


def test_a_template_that_marks_no_answers_is_named(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    tiny.unmark_answers(tmp_path / "base")
    config = tiny.dpo_config(folder, "", "base")
    config.base, config.out = str(tmp_path / "base"), str(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"base/tokenizer/tokenizer.json: its chat template marks no answers with \{% generation %\}"
    ):
        dpo(config)
    assert not (tmp_path / "run").exists()


def test_every_pair_is_seen_once_an_epoch(folder):
    config = tiny.dpo_config(folder, "", "base")
    pairs = Pairs(folder / "whole" / "data")
    task = PreferenceTask(pairs, tiny.settings(1, batch_size=1), config, 32, 2)
    epochs = [[task.next_batch().numbers[0] for _ in pairs.train] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == pairs.train
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": []}, "--data: not given"),
        ({"base": "absent"}, "absent: no such folder"),
        ({"seq_len": 1000}, "seq_len: got 1000"),
        ({"seq_len": 4}, "usable preference pairs of 0 prompts"),
        ({"train": tiny.settings(3, bias_update_speed=0.0)}, "train.mtp_loss_weight: got 0.3, but dpo"),
    ],
)
def test_bad_input_leaves_nothing(folder, tmp_path, changes, match):
    config = tiny.dpo_config(folder, "", "base")
    config.out = str(tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=match):
        dpo(config)
    assert list(tmp_path.iterdir()) == []
