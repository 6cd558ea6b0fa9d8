"""The tuner without a GPU: it refuses; its choice, on a kernel that is a sleep; and the tables as it writes them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from minids_kernels import _launch

from benchmarks import aot, timing, tune
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

    def run() -> torch.Tensor:
        config = _launch.config("fake", "sleep", "sm_90", N=1)
        if config.get("broken"):
            raise RuntimeError("does not run")
        time.sleep(config["ms"] / 1e3)
        return torch.full((3,), 2.0 if config.get("wrong") else 1.0)

    tuning = Tuning(lambda shape: run, lambda shape: CONFIGS)
    entry = tune.Entry("fake", "sleep", {"N": 1}, tune.with_candidates(former, tuning, {"N": 1}))
    refused = ["4 spills" if config.get("spills") else "" for config in entry.configs]
    return tune.best(entry, tuning, refused, torch.device("cpu"), 5, margin)


def test_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = choose(monkeypatch, {"ms": 3})
    assert report["config"] == {"ms": 0.2} and report["changed"] and report["tried"] == 3
    assert report["us"] < report["former_us"]
    said = capsys.readouterr().err
    assert "does not run" in said and "relative error" in said and "4 spills" in said
    in_use, fastest, slow, *left_out = report["candidates"]
    assert (in_use["config"], fastest["config"], slow["config"]) == ({"ms": 3}, {"ms": 0.2}, {"ms": 5})
    assert fastest["us"] < in_use["us"] < slow["us"]
    assert all(c["us"] is None and c["reason"] for c in left_out)


def test_who_is_far_from_the_fastest_is_timed_no_more() -> None:
    called: list[str] = []

    def call(name: str, ms: float) -> timing.Prepared:
        run = lambda: (called.append(name), time.sleep(ms / 1e3))  # noqa: E731
        return timing.Prepared(run, run, lambda: None)

    prepared = {"0": call("0", 20), "1": call("1", 5), "2": call("2", 20)}
    timings = tune.measure(prepared, 7, torch.device("cpu"))
    assert {name: t.repeats for name, t in timings.items()} == {"0": 7, "1": 7, "2": tune.FIRST}
    assert [called.count(name) for name in "012"] == [tune.FIRST + 7, tune.FIRST + 7, tune.FIRST]


def test_refuses_what_spills_more_than_the_config_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_launch(launch: aot.Launch, room: str, chip: str) -> aot.Compiled:
        rows = launch.kwargs["ROWS"]
        if rows == 4:
            raise ValueError("too many rows\nof numbers")
        shared = 1_000_000 if rows == 3 else 0
        return aot.Compiled(room, "kernel", chip, "", launch.kwargs, 32, rows, shared, {}, "3.6.0")

    monkeypatch.setattr(aot, "compile_launch", compile_launch)
    configs = [{"ROWS": rows, "num_warps": 4} for rows in (1, 2, 3, 4)]
    entry = tune.Entry("rms_norm", "rms_norm_fwd", {"N": 64}, configs)
    assert tune.spills_in_use(entry, "sm_90") == 1
    reasons = [tune.refusal(entry, config, 1, "sm_90") for config in configs]
    assert reasons == ["", "2 spills", "1000000 bytes of shared memory", "ValueError: too many rows"]


@pytest.mark.parametrize("room", [op for op in tune.OPS if (tune.CONFIGS / f"{op}.json").is_file()])
def test_launches_are_recorded_without_a_gpu(room: str) -> None:
    for entry in tune.room_entries(room, None, "sm_90"):
        tuning = tune.tunings(room, tune.META)[entry.kernel]
        launches = aot.record([("", lambda e=entry, t=tuning: t.bind(e.shape)())], "sm_90")  # type: ignore[misc]
        assert launches, entry


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

    for kernel, tuned in tuning(tune.META).items():
        for entry in _launch.entries("rms_norm", kernel, "sm_90"):
            candidates = list(tuned.candidates(entry["shape"]))
            assert candidates and all(set(c) == set(entry["config"]) for c in candidates), (kernel, entry)
