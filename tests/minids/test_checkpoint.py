"""Checkpoints come back bit for bit, are refused when touched, and survive a full disk."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from torch import nn

from minids.config import ModelConfig
from minids.errors import InputError
from minids.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_model_config,
    remove_leftovers,
    resolve,
    save_checkpoint,
)


class Small(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = ModelConfig(hidden_size=8, rope_theta=5000.0, q_lora_rank=None)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.unused = nn.Parameter(torch.ones(3))  # never has a gradient, so never has optimizer state
        self.register_buffer("bias", torch.randn(4))

    def step(self, optimizer):
        optimizer.zero_grad()
        self.norm(self.linear(torch.ones(2, 8))).square().sum().backward()
        optimizer.step()


def trained(seed: int = 0, steps: int = 3):
    model = Small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        model.step(optimizer)
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path / "run", 7, model, optimizer, {"loader": {"position": 3}}, keep=2)
    return path, model, optimizer


def test_training_continues_bit_for_bit(saved):
    path, model, optimizer = saved
    other, other_optimizer = trained(seed=1, steps=1)
    state = load_checkpoint(path, other, other_optimizer)
    assert (state["step"], state["loader"]) == (7, {"position": 3})
    shutil.rmtree(path)  # nothing may lean on the files any more
    for _ in range(3):
        model.step(optimizer)
        other.step(other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_architecture_comes_back(saved):
    path, model, _ = saved
    assert load_model_config(path) == model.config
    assert json.loads((path / "config.json").read_text())["model_type"] == "deepseek_v3"


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained(steps=1)
    for step in (5, 10, 1_000_000, 20):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000020", "step_1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_touched_file_is_refused_by_name(saved, name, damage):
    path, _, _ = saved
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-5])
    else:
        file.unlink()
    model, optimizer = trained(seed=1, steps=1)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_checkpoint(path, model, optimizer)


def test_a_changed_architecture_is_refused_by_name(saved):
    path, _, _ = saved
    config = path / "config.json"
    config.write_text(config.read_text().replace("5000.0", "6000.0"))
    with pytest.raises(InputError, match=r"config\.json.*checksum"):
        load_model_config(path)


def test_a_changed_step_number_is_refused(saved):
    path, model, _ = saved
    state = path / "state.json"
    state.write_text(state.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(InputError, match=r"state\.json"):
        load_checkpoint(path, model)


def test_another_models_weights_are_refused(saved):
    path, _, _ = saved
    other = nn.Linear(8, 8)
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit the model"):
        load_checkpoint(path, other)


def test_weights_without_optimizer_load_but_do_not_resume(tmp_path):
    model, _ = trained()
    path = save_checkpoint(tmp_path, 0, model, None, {}, keep=1)
    other, optimizer = trained(seed=1)
    load_checkpoint(path, other)
    assert torch.equal(other.linear.weight, model.linear.weight)
    with pytest.raises(InputError, match=r"without optimizer\.safetensors"):
        load_checkpoint(path, other, optimizer)


def test_resolve(saved, tmp_path):
    path, _, _ = saved
    assert resolve(path) == path
    assert resolve(path.parent) == path
    (tmp_path / "link").symlink_to(path)
    assert resolve(tmp_path / "link") == path.resolve()  # where its tokenizer is
    with pytest.raises(InputError, match="no such folder"):
        resolve(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a checkpoint"):
        resolve(tmp_path / "empty")


def test_leftovers_of_a_killed_process_are_removed(saved):
    path, _, _ = saved
    run = path.parent
    shutil.copytree(path, run / ".step_000009.123.tmp")
    shutil.copytree(path, run / ".step_000001.123.old")
    (run / ".metrics.jsonl.77.tmp").write_text("half")
    (run / ".notes").write_text("the user's")
    assert latest_checkpoint(run) == path
    remove_leftovers(run)
    assert sorted(file.name for file in run.iterdir()) == [".notes", "step_000007"]


def test_a_full_disk_keeps_the_last_checkpoint(saved):
    path, model, optimizer = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # every write beyond 200 bytes fails, as on a full disk
    try:
        with pytest.raises(InputError, match=f"cannot be written.*last good checkpoint is {path}"):
            save_checkpoint(path.parent, 8, model, optimizer, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in path.parent.iterdir()] == ["step_000007"]
    other, other_optimizer = trained(seed=1)
    load_checkpoint(path, other, other_optimizer)
