"""The commands that print ratios run, and what each side computes agrees before it is timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import decode, train
from benchmarks.ops import moe


@pytest.mark.parametrize(
    ("module", "options", "ratio"),
    [
        (moe, ["--rounds", "1"], lambda report: report["times_as_fast_as_transformers"]),
        (train, ["--rounds", "1", "--warmup", "1"], lambda report: report["ratio"]),
        (
            decode,
            ["--contexts", "16", "--tokens", "4", "--repeats", "1"],
            lambda report: report["same_greedy_ids"] and report["cases"][0]["ratio"],
        ),
    ],
    ids=["moe layer", "training", "decoding"],
)
def test_command(
    module: ModuleType,
    options: list[str],
    ratio: Callable[[Any], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    module.main()
    assert ratio(json.loads(capsys.readouterr().out)) > 0


def test_who_counts_steps_never_ends_them() -> None:
    """The answer lies where the ids do: transformers ors it with its own."""
    ticks: list[None] = []
    criterion = decode.Ticks(lambda: ticks.append(None))
    answer = criterion(torch.zeros(2, 3, device="meta"), None)
    assert answer.is_meta and answer.shape == (2,) and answer.dtype == torch.bool and len(ticks) == 1
    assert not criterion(torch.zeros(2, 3), None).any()
