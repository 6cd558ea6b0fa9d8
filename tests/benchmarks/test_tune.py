"""The tuner without a GPU: it refuses; its choice, on a kernel that is a sleep; and the tables as it writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from minids_kernels import _launch

from benchmarks import tune
from benchmarks.protocol import Tuning

CONFIGS: list[dict[str, Any]] = [
    {"ms": 0.2},
    {"ms": 5},
    {"ms": 1, "wrong": True},
    {"ms": 1, "broken": True},
    {"ms": 0, "spills": 4},
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--op", "rms_norm"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "benchmarks.tune: no GPU here; launch tables can only be measured on one"
    ]


def choose(monkeypatch: pytest.MonkeyPatch, former: dict[str, Any], margin: float = 0.02) -> dict[str, Any]:
    monkeypatch.setattr(_launch, "_table", lambda room: {"sleep": {"sm_80": [{"shape": {"N": 1}, "config": former}]}})
    launched: list[dict[str, Any]] = []

    def run() -> torch.Tensor:
        launched.append(_launch.config("fake", "sleep", "sm_90", N=1))
        if launched[-1].get("broken"):
            raise RuntimeError("does not compile")
        time.sleep(launched[-1]["ms"] / 1e3)
        return torch.full((3,), 2.0 if launched[-1].get("wrong") else 1.0)

    def refusal(room: str, call: Callable[[], Any], chip: str) -> str:
        call()
        return "4 spills" if launched[-1].get("spills") else ""

    monkeypatch.setattr(tune, "refusal", refusal)
    tuning = Tuning(lambda shape: run, lambda shape: CONFIGS)
    return tune.best("fake", "sleep", tuning, {"N": 1}, former, torch.device("cpu"), 5, margin)


def test_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = choose(monkeypatch, {"ms": 3})
    assert report["config"] == {"ms": 0.2} and report["changed"] and report["tried"] == 3
    assert report["us"] < report["former_us"]
    said = capsys.readouterr().err
    assert "does not compile" in said and "relative error" in said and "4 spills" in said


def test_small_gains_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    report = choose(monkeypatch, {"ms": 3}, margin=0.999)
    assert report["config"] == {"ms": 3} and not report["changed"]


def test_forced_config_is_for_one_kernel_only() -> None:
    table = _launch.config("rms_norm", "rms_norm_fwd", "sm_90", N=64)
    with tune.forced("rms_norm", "rms_norm_bwd", {"ROWS": 7}):
        assert _launch.config("rms_norm", "rms_norm_bwd", "sm_90", N=64) == {"ROWS": 7}
        assert _launch.config("rms_norm", "rms_norm_fwd", "sm_90", N=64) == table
    assert _launch.config("rms_norm", "rms_norm_bwd", "sm_90", N=64) != {"ROWS": 7}


def test_tables_are_written_as_they_are_kept() -> None:
    text = (tune.CONFIGS / "rms_norm.json").read_text()
    assert tune.table_text(json.loads(text)) == text


def test_candidates_hold_the_arguments_that_the_tables_hold() -> None:
    from benchmarks.ops.rms_norm import tuning

    for kernel, tuned in tuning().items():
        for entry in _launch.entries("rms_norm", kernel, "sm_90"):
            candidates = list(tuned.candidates(entry["shape"]))
            assert candidates and all(set(c) == set(entry["config"]) for c in candidates), (kernel, entry)
