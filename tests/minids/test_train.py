"""Pretraining end to end on a tiny model: it learns, accumulates exactly, resumes bit for bit, refuses bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minids.config import to_toml
from minids.data.loader import eval_batches
from minids.data.store import TokenShards
from minids.errors import InputError, Interrupted
from minids.loading import load
from minids.train import loop
from minids.train.checkpoint import latest_checkpoint, load_model_config
from minids.train.loop import Trainer, pick_device
from minids.train.pretrain import LanguageModelTask, pretrain
from tests.minids import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizer, shards, and `whole`: a run of 10 steps never interrupted."""
    folder = tmp_path_factory.mktemp("train")
    tiny.write_shards(folder)
    with tiny.one_thread():
        pretrain(tiny.pretrain_config(folder, "whole"))
        yield folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than training does here; test_log.py draws."""
    monkeypatch.setattr(loop, "write_curves", lambda *_: False)


def interrupt(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """A signal that arrives in the middle of step `step`."""
    original = Trainer.optimizer_step

    def optimizer_step(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, "optimizer_step", optimizer_step)


def test_it_learns(folder, tmp_path):
    config = tiny.pretrain_config(folder, "learns", steps=40, every=0, eval_every=0, log_every=20)
    config.out = str(tmp_path / "run")
    result = pretrain(config)
    assert result["before"]["nll"] == pytest.approx(math.log(320), rel=0.1)  # knows nothing
    assert result["after"]["nll"] < 0.4 * result["before"]["nll"]
    assert result["after"]["bits_per_byte"] < 0.4 * result["before"]["bits_per_byte"]
    assert (result["steps"], result["tokens"], result["resumed_from"]) == (40, 40 * 2 * 32, None)
    assert "bits_per_byte (held out)" in Path(result["report"]).read_text()
    assert [path.name for path in Path(config.out).glob("step_*")] == ["step_000040"]


def test_bits_per_byte_is_the_held_out_texts(folder):
    """Against the logits of the saved model and the bytes of the text, row by row."""
    model, tokenizer = load(folder / "whole")
    shards = TokenShards(folder / "shards")
    nats, size = 0.0, 0
    for batch in eval_batches(shards, "holdout", 1, 4):  # 2 batches of 2 rows in the run
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits[0]
        labels = batch.labels[0]
        nats += F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100).item()
        size += len(tokenizer.decode_bytes(labels[labels >= 0].tolist()))
    last = [record for record in tiny.metrics(folder / "whole") if record["kind"] == "eval"][-1]
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_metrics_hold_the_schedule_and_come_at_the_set_steps(folder):
    records = tiny.metrics(folder / "whole")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("eval", 0), ("train", 3), ("eval", 4), ("train", 6), ("eval", 8), ("train", 9), ("train", 10), ("eval", 10),
    ]  # fmt: skip
    assert records[-2]["lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * (9 / 10 - 10 / 14.8) / (4.3 / 14.8)))
                                              * 0.9 + 1e-3)  # fmt: skip
    assert {"loss", "nll", "mtp_nll", "balance", "grad_norm", "expert_imbalance", "tokens"} <= records[1].keys()
    lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    assert {"seconds", "tokens_per_second"} <= json.loads(lines[1]).keys()


@pytest.mark.parametrize("depths", [0, 1])
def test_accumulation_equals_one_big_batch(folder, tmp_path, depths):
    """Same rows, same gradients, whatever the number of counted tokens in each part. (With MTP only the likelihoods: a
    row's last place, which predicts nothing, takes the next row's first token, and the balance loss sees it.)"""
    results = []
    for batch, parts in ((4, 1), (2, 2), (1, 4)):
        config = tiny.pretrain_config(folder, "", steps=3, every=0, batch_size=batch, log_every=1)
        config = tiny.with_steps(config, grad_accumulation_steps=parts, eval_every=0, eval_batches=99)
        config.model = dataclasses.replace(config.model, num_nextn_predict_layers=depths)
        config.out = str(tmp_path / f"parts{parts}")
        pretrain(config)
        results.append((tiny.weights(latest_checkpoint(config.out)), tiny.metrics(config.out)))
    (weights, records), *others = results
    for other_weights, other_records in others:
        for ours, theirs in zip(other_records, records, strict=True):
            names = ("nll", "mtp_nll", "bits_per_byte") if depths else [name for name in ours if name != "kind"]
            for name in theirs.keys() & set(names):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        for name in () if depths else weights:
            torch.testing.assert_close(other_weights[name], weights[name], rtol=1e-3, atol=2e-4, msg=name)


def test_the_loss_is_that_of_its_parts(folder, tmp_path):
    """nll + lambda mtp + alpha balance, recomputed from the metrics of one step."""
    config = tiny.with_steps(tiny.pretrain_config(folder, ""), steps=1, log_every=1, balance_loss_alpha=0.5)
    config.out = str(tmp_path / "run")
    pretrain(config)
    record = tiny.metrics(config.out)[1]
    assert record["loss"] == pytest.approx(record["nll"] + 0.3 * record["mtp_nll"] + 0.5 * record["balance"], rel=1e-6)


@pytest.mark.parametrize("step", [1, 5, 6])
def test_an_interrupted_run_ends_like_one_never_interrupted(folder, tmp_path, monkeypatch, step):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(Interrupted, match=f"SIGTERM: saved .*step_00000{step}.*step {step} of 10"):
            pretrain(config)
    assert latest_checkpoint(config.out).name == f"step_00000{step}"
    result = pretrain(config, resume=True)
    assert result["resumed_from"] == step
    tiny.assert_same_run(config.out, folder / "whole")


@pytest.mark.parametrize("error", [None, TypeError("of another Triton")])
def test_compiling_before_the_first_step_leaves_no_trace(folder, tmp_path, monkeypatch, capsys, error):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    calls, original = [], Trainer.evaluate

    def evaluate(self):
        if self.step == 0:
            self.precompile()
        return original(self)

    def precompile(call):
        calls.append(call())
        if error:
            raise error

    monkeypatch.setattr(loop, "precompile", precompile)
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    pretrain(config)
    assert len(calls) == 1
    assert ("compiled one after the other: TypeError: of another Triton" in capsys.readouterr().err) == bool(error)
    tiny.assert_same_run(config.out, folder / "whole")


def test_interrupted_before_the_first_step(folder, tmp_path, monkeypatch):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    original = Trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda self: (os.kill(os.getpid(), signal.SIGINT), original(self)))
        with pytest.raises(Interrupted, match="SIGINT"):
            pretrain(config)
    pretrain(config, resume=True)
    tiny.assert_same_run(config.out, folder / "whole")


def test_a_second_signal_stops_on_the_spot(folder, tmp_path, monkeypatch):
    config = tiny.pretrain_config(folder, "", every=1)
    config.out = str(tmp_path / "run")
    original = Trainer.optimizer_step

    def optimizer_step(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "optimizer_step", optimizer_step)
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="without saving"):
        pretrain(config)
    assert latest_checkpoint(config.out).name == "step_000002"
    assert signal.getsignal(signal.SIGINT) is former


def test_resuming_a_finished_run_says_so(folder, capsys):
    before = tiny.weights(latest_checkpoint(folder / "whole"))
    result = pretrain(tiny.pretrain_config(folder, "whole"), resume=True)
    assert result["already_finished"] and result["steps"] == 10
    assert "already finished at step 10" in capsys.readouterr().err
    after = tiny.weights(latest_checkpoint(folder / "whole"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_without_a_checkpoint_starts_fresh(folder, tmp_path):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "new" / "run")
    assert pretrain(config, resume=True)["resumed_from"] is None
    tiny.assert_same_run(config.out, folder / "whole")


def test_cross_document_attention_changes_what_is_learnt(folder, tmp_path):
    config = dataclasses.replace(tiny.pretrain_config(folder, ""), cross_document_attention=True)
    config.out = str(tmp_path / "run")
    pretrain(config)
    assert tiny.metrics(config.out)[-1]["nll"] != tiny.metrics(folder / "whole")[-1]["nll"]


def test_the_machine_may_change_but_is_told(folder, tmp_path, monkeypatch, capsys):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Interrupted):
            pretrain(config)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    pretrain(config, resume=True)
    assert "is 63 now" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------------------------------------------


def refused(config, match: str, resume: bool = False) -> None:
    with pytest.raises(InputError, match=match):
        pretrain(config, resume=resume)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": tiny.model_config(100)}, r"model.vocab_size: got 100, but the tokenizer .* has 320"),
        ({"data": "absent"}, "absent: no token shards"),
        ({"tokenizer": "absent"}, "absent: no tokenizer here"),
        ({"data": ""}, "--data: not given"),
        ({"out": ""}, "--out: not given"),
    ],
)
def test_bad_input_leaves_nothing(folder, tmp_path, change, match):
    config = dataclasses.replace(tiny.pretrain_config(folder, ""), out=str(tmp_path / "run"))
    refused(dataclasses.replace(config, **change), match)
    assert list(tmp_path.iterdir()) == []


def test_rows_longer_than_the_model_allows(folder, tmp_path):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    config.model = dataclasses.replace(config.model, max_position_embeddings=16)
    refused(config, "rows of 32 tokens, the model takes at most 16")


def test_data_of_another_tokenizer(folder, tmp_path):
    from minids.tokenizer import train_from_texts

    train_from_texts(tiny.TEXTS, vocab_size=300)[0].save(tmp_path / "tok")
    config = dataclasses.replace(tiny.pretrain_config(folder, ""), tokenizer=str(tmp_path / "tok"))
    config.out = str(tmp_path / "run")
    refused(config, "made with another tokenizer")


def test_a_folder_in_use_is_not_overwritten(folder, tmp_path):
    refused(tiny.pretrain_config(folder, "whole"), "not empty; add --resume")
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    refused(config, "no run to resume", resume=True)
    config.out = str(tmp_path / "thesis.txt")
    refused(config, "is a file")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_resume_with_other_settings_names_them(folder):
    config = tiny.pretrain_config(folder, "whole")
    refused(tiny.with_steps(config, lr=0.5), r"train\.lr: got 0\.5, but the run .* began with 0\.01", resume=True)
    refused(tiny.with_steps(config, steps=20), r"train\.steps: got 20", resume=True)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=64))
    refused(other, r"model\.hidden_size: got 64", resume=True)
    kept = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep=5))
    assert pretrain(kept, resume=True)["already_finished"]


def test_a_damaged_checkpoint_is_refused_by_name(folder, tmp_path, monkeypatch):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    interrupt(monkeypatch, 3)
    with pytest.raises(Interrupted):
        pretrain(config)
    file = latest_checkpoint(config.out) / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refused(config, str(file), resume=True)


def test_divergence_is_one_line(folder, tmp_path):
    config = tiny.with_steps(tiny.pretrain_config(folder, ""), lr=1e30, eval_every=0)
    config.out = str(tmp_path / "run")
    refused(config, r"training has diverged; lower train\.lr")


def test_held_out_values_that_are_not_finite_are_divergence(folder, tmp_path, monkeypatch):
    """After the last step they alone say it: its own loss was that of the weights before it."""
    values = iter([{"nll": 1.0}, {"nll": math.nan}])
    monkeypatch.setattr(LanguageModelTask, "evaluate", lambda task, model: next(values))
    config = tiny.with_steps(tiny.pretrain_config(folder, "", every=0), steps=2, eval_every=0)
    config.out = str(tmp_path / "run")
    refused(config, r"step 2: nll nan on held-out rows, so training has diverged")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    step = loop.Trainer.optimizer_step

    def ruins(trainer):
        values = step(trainer)
        if trainer.step == 6:
            trainer.model.lm_head.weight.data[0, 0] = torch.inf
        return values

    monkeypatch.setattr(loop.Trainer, "optimizer_step", ruins)
    config = tiny.with_steps(tiny.pretrain_config(folder, ""), eval_every=0)
    config.out = str(tmp_path / "run")
    refused(config, r"step 6: weights are no longer finite, so training has diverged")
    assert latest_checkpoint(config.out).name == "step_000004"


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks there")
def test_a_run_in_progress_is_left_alone(folder, tmp_path, monkeypatch):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    step = loop.Trainer.optimizer_step

    def meanwhile(trainer):
        if trainer.step == 5:
            refused(config, "another command is at work in this run", resume=True)
        return step(trainer)

    monkeypatch.setattr(loop.Trainer, "optimizer_step", meanwhile)
    pretrain(config)
    tiny.assert_same_run(config.out, folder / "whole")
    assert pretrain(config, resume=True)["already_finished"]  # and is free again


def test_a_run_that_breaks_leaves_nothing(folder, tmp_path, monkeypatch):
    def breaks(trainer):
        raise MemoryError

    monkeypatch.setattr(loop.Trainer, "optimizer_step", breaks)
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")
    with pytest.raises(MemoryError):
        pretrain(config)
    assert list(tmp_path.iterdir()) == []


def test_special_ids_are_the_tokenizers(folder, tmp_path):
    """Whatever the configuration says: they stop generation, here and where the model is exported to."""
    config = tiny.pretrain_config(folder, "", steps=1, every=0)
    config.out, config.model = str(tmp_path / "run"), dataclasses.replace(config.model, bos_token_id=7, eos_token_id=9)
    pretrain(config)
    found = load_model_config(latest_checkpoint(config.out))
    tokenizer = tiny.tokenizer()
    assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert pretrain(config, resume=True)["already_finished"]


def test_a_full_disk_while_logging_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch):
    config = tiny.pretrain_config(folder, "")
    config.out = str(tmp_path / "run")

    def write(self, kind, step, values):
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, kind, step, values)

    with monkeypatch.context() as patch:
        original = loop.MetricsLog.write
        patch.setattr(loop.MetricsLog, "write", write)
        refused(config, r"No space left on device; make room .* last good checkpoint is .*step_000004")
    pretrain(config, resume=True)
    tiny.assert_same_run(config.out, folder / "whole")


def test_a_device_this_machine_lacks():
    with pytest.raises(InputError, match=r"device: got 'cuda:77'"):
        pick_device("cuda:77")
    with pytest.raises(InputError, match=r"device: got 'abacus'"):
        pick_device("abacus")


# --- the command line ---------------------------------------------------------------------------------------------


def test_sigterm_exits_130_with_a_checkpoint_to_resume(folder, tmp_path):
    config = tiny.pretrain_config(folder, "", steps=400, every=0, eval_every=0, log_every=1)
    config.out = str(tmp_path / "run")
    (tmp_path / "run.toml").write_text(to_toml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minids", "pretrain", "--config", str(tmp_path / "run.toml")],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "SIGTERM: saved" in err
    step = json.loads((latest_checkpoint(config.out) / "state.json").read_text())["step"]
    assert 3 <= step < 400
    assert tiny.metrics(config.out)[-1]["step"] == step
