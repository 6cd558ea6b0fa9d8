"""kill -9 at random instants of training and saving: the run always continues and ends bit for bit the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minids.train import loop
from minids.train.pretrain import pretrain
from tests.minids import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    tiny.write_shards(folder)
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(40))
    tiny.write_rows(folder / "pairs.jsonl", tiny.preferences(24))
    with tiny.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_curves", lambda *_: False)
        pretrain(tiny.pretrain_config(folder, "base", every=0, eval_every=0))
    return folder


def kill(folder: Path, stage: str, kills: int, seed: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    server = ROOT / "tests" / "minids" / "kill_server.py"
    command = [sys.executable, str(server), stage, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == kills and result["runs"]
    for run in result["runs"]:
        tiny.assert_same_run(folder / run, folder / "whole")
    return result


def test_four_kills(folder):
    kill(folder, "pretrain", 4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_many_kills(folder, tmp_path, stage):
    """24 kills a stage; some must have hit a save half-way, or the test would not show what it is for."""
    for name in ("tok", "shards", "base", "chats.jsonl", "pairs.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    result = kill(tmp_path, stage, 24, seed=7)
    assert result["half_written"] >= 1
