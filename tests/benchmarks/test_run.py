"""The harness on a CPU: who may be timed, what a row and a result file hold, and the whole command on RMSNorm."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contest, run, timing
from benchmarks.contest import run_case
from benchmarks.protocol import OURS, Absent, Case, Contestant, Inputs, calls, exact, judge

CPU = torch.device("cpu")
CEILINGS = {"copy_gbps": 10.0, "fp32_tflops": 0.1}


def square(x: Tensor) -> Tensor:
    return x * x


def fake_case(contestants: Mapping[str, Contestant], mode: str = "fwd") -> Case:
    def make() -> Inputs:
        x, dy = torch.randn(2, 8, 4)
        return Inputs((x,), () if mode == "fwd" else (dy,))

    return Case(
        mode,
        {"M": 8, "N": 4},
        torch.float32,
        make,
        exact(square, mode),
        contestants,
        tolerance=1e-6,
        bytes=256,
        flops=32,
    )


def timed(fn: Callable[..., Any], mode: str = "fwd", **settings: Any) -> Contestant:
    return Contestant(calls(fn, mode), **settings)


def rows_of(
    contestants: Mapping[str, Contestant],
    peers: list[str] | None = None,
    limit: float = 60,
    slow: set[str] | None = None,
) -> dict[str, dict[str, Any]]:
    case = fake_case({OURS: timed(square), **contestants})
    options = argparse.Namespace(repeats=5, peers=peers, limit=limit)
    rows = run_case("fake", case, CPU, options, set() if slow is None else slow, CEILINGS)
    return {row["contestant"]: row for row in rows}


def test_right_ones_are_timed_and_rates_follow_from_the_case() -> None:
    rows = rows_of({"eager": timed(lambda x: x.pow(2))})
    for row in rows.values():
        assert row["status"] == "timed" and row["error"] <= 1e-6 and row["first_s"] >= 0
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["repeats"] == 5
        assert row["gbps"] == pytest.approx(256 / row["median_us"] / 1e3, abs=0.006)
        assert row["of_copy"] == pytest.approx(row["gbps"] / 10, abs=0.001)
    ratio = run.ratios(rows.values())["fake fwd M=8 N=4 float32"]["eager"]
    assert ratio == pytest.approx(rows["eager"]["median_us"] / rows[OURS]["median_us"], abs=1e-3)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: x * x * (1 + 1e-5), "relative error"),
        (lambda x: x * x * float("nan"), "relative error inf"),
        (lambda x: (x * x)[:4], "shapes"),
        (lambda x: (x * x, x), "shapes"),
    ],
)
def test_wrong_ones_are_caught_and_not_timed(wrong: Callable[..., Any], reason: str) -> None:
    rows = rows_of({"peer": timed(wrong)})
    assert rows["peer"]["status"] == "wrong" and reason in rows["peer"]["reason"]
    assert rows["peer"]["median_us"] is None and rows[OURS]["status"] == "timed"


def test_a_limit_need_not_do_the_same() -> None:
    """Its time is a ratio like the others'; a peer that does other work has none."""
    rows = rows_of({"dense": timed(lambda x: x[:1], limit=True), "peer": timed(lambda x: x[:1])})
    assert {name: row["status"] for name, row in rows.items()} == {OURS: "timed", "dense": "timed", "peer": "wrong"}
    assert rows["dense"]["error"] is None
    assert set(*run.ratios(rows.values()).values()) == {"dense"}


def test_one_that_goes_wrong_while_it_is_timed_is_caught() -> None:
    count = []

    def decays(x: Tensor) -> Tensor:
        count.append(1)
        return x * x if len(count) < 6 else x

    row = rows_of({"peer": timed(decays)})["peer"]
    assert row["status"] == "wrong" and row["reason"].endswith("after timing") and row["median_us"] is None


def test_one_that_raises_fails_alone() -> None:
    def breaks(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nmore")

    rows = rows_of({"peer": timed(breaks)})
    assert rows["peer"]["status"] == "failed" and rows["peer"]["reason"] == "RuntimeError: no kernel image"
    assert rows[OURS]["status"] == "timed"


def sleeps(x: Tensor) -> Tensor:
    """As a tuner does that tries one candidate after the other and forgives each."""
    for _ in range(2000):
        try:
            time.sleep(0.01)
        except Exception:
            continue
    return x * x


def test_one_that_takes_too_long_is_cut_off_and_not_tried_again(capfd: pytest.CaptureFixture[str]) -> None:
    slow: set[str] = set()
    first, second = (rows_of({"tuner": timed(sleeps), "eager": timed(square)}, None, 1, slow) for _ in range(2))
    assert [rows["tuner"]["status"] for rows in (first, second)] == ["failed", "failed"]
    assert first["tuner"]["reason"] == "first call took longer than 1 s"
    assert second["tuner"]["reason"] == "took too long in an earlier case"
    assert all(rows[name]["status"] == "timed" for rows in (first, second) for name in (OURS, "eager"))
    begun = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fake fwd M=8 N=4 float32 | ref")]
    assert [bool(re.search(r"\| tuner 1\.\d s \| eager 0\.\d s \| timing", x)) for x in begun] == [True, False]


def test_ours_is_cut_off_too_and_tried_again() -> None:
    slow: set[str] = set()
    for _ in range(2):
        rows = rows_of({OURS: timed(sleeps), "eager": timed(square)}, None, 1, slow)
        assert rows[OURS]["reason"] == "first call took longer than 1 s" and rows["eager"]["status"] == "timed"


def test_warm_up_counts() -> None:
    count = []

    def stalls(x: Tensor) -> Tensor:
        count.append(1)
        return x * x if len(count) == 1 else sleeps(x)

    row = rows_of({"peer": timed(stalls)}, limit=1)["peer"]
    assert (row["status"], row["reason"]) == ("failed", "warm-up took longer than 1 s") and row["first_s"] < 1


def test_a_compiler_is_cut_off() -> None:
    def backend(module: Any, inputs: Any) -> Any:
        return sleeps(torch.ones(1))

    rows = rows_of({"compile": timed(torch.compile(square, backend=backend)), "eager": timed(square)}, limit=1)
    assert rows["compile"]["reason"] == "first call took longer than 1 s" and rows["eager"]["status"] == "timed"


def test_without_a_reference_all_fail() -> None:
    def breaks(inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    case = dataclasses.replace(fake_case({OURS: timed(square), "eager": timed(square)}), reference=breaks)
    rows = run_case("fake", case, CPU, argparse.Namespace(repeats=5, peers=None, limit=60), set(), CEILINGS)
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["reason"] == "no reference: OutOfMemoryError: no memory"


def test_absent_ones_say_why() -> None:
    def bind(inputs: Inputs) -> Callable[[], Any]:
        raise Absent("columns must be a multiple of 128")

    rows = rows_of({
        "gpu": timed(square, on=("cuda",)),
        "hopper": timed(square, on=("sm_90", "sm_100")),
        "package": timed(square, package="no-such-package"),
        "shape": Contestant(bind),
    })  # fmt: skip
    assert {name: row["status"] for name, row in rows.items() if name != OURS} == dict.fromkeys(
        ("gpu", "hopper", "package", "shape"), "absent"
    )
    assert rows["gpu"]["reason"] == "needs cuda, this is cpu"
    assert rows["hopper"]["reason"] == "needs sm_90 or sm_100, this is cpu"
    assert rows["package"]["reason"] == "no-such-package is not installed"
    assert rows["shape"]["reason"] == "columns must be a multiple of 128"


def test_ours_needs_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkout that is only on Python's path it must not take the peers' time and be missing itself."""
    monkeypatch.setattr(contest, "version", lambda package: None if package == OURS else "1")
    assert contest.absence(timed(square, package=OURS), CPU) == ""


def test_peers_are_chosen_by_name_and_ours_always_runs() -> None:
    peers = {"a": timed(square), "b": timed(square)}
    assert list(rows_of(peers, peers=["b"])) == [OURS, "b"]


def test_read_is_applied_before_comparing() -> None:
    halves = timed(lambda x: x * x / 2)
    assert rows_of({"peer": halves})["peer"]["status"] == "wrong"
    doubled = Contestant(halves.bind, read=lambda y: 2 * y)
    assert rows_of({"peer": doubled})["peer"]["status"] == "timed"


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_modes_run_what_they_say(mode: str) -> None:
    x, dy = torch.randn(2, 8, 4)
    call = calls(square, mode)(Inputs((x,), () if mode == "fwd" else (dy,)))
    want = {"fwd": [x * x], "bwd": [2 * x * dy], "fwd+bwd": [x * x, 2 * x * dy]}[mode]
    for _ in range(2):  # again, as timing does
        got = call()
        assert judge(got, want[0] if mode == "fwd" else want, 1e-6).reason == ""
    assert not x.requires_grad


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="got 'forward', allowed are"):
        calls(square, "forward")


def test_ceilings_are_positive() -> None:
    found = timing.ceilings(CPU, repeats=2)
    assert set(found) == {"copy_gbps", "fp32_tflops"} and all(value > 0 for value in found.values())


def test_summary_orders_its_percentiles() -> None:
    t = timing.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (t.median, t.p20, t.p80, t.repeats) == (3.5, 2.0, 5.0, 6)


ROW = {
    "op": str, "label": str, "case": str, "shape": dict, "dtype": str, "bytes": int, "flops": int, "math": str,
    "tolerance": float, "contestant": str, "package": str, "version": str, "status": str,
}  # fmt: skip


def test_the_command_on_rms_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    command = f"--op rms_norm --quick --cold --repeats 3 --peers eager F.rms_norm liger --out {out}"
    assert run.main(command.split()) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["file"] == str(out) and last["ours_wrong_or_failed"] == []
    assert set(last["ratios"]["rms_norm fwd+bwd M=256 N=512 float32"]) == {"eager", "F.rms_norm"}
    result = json.loads(out.read_text())
    assert result["kind"] == "kernels" and result["repeats"] == 3 and result["command"].endswith(command)
    assert result["device"]["arch"] == "cpu" and result["versions"]["torch"] == torch.__version__
    assert set(result) == set(
        "kind date device commit command versions repeats cold ceilings rows goals left_out".split()
    )
    assert {row["contestant"] for row in result["rows"]} == {OURS, "eager", "F.rms_norm", "liger"}
    for row in result["rows"]:
        assert all(isinstance(row[name], kind) for name, kind in ROW.items() if name != "version"), row
        assert row["status"] == ("absent" if row["contestant"] == "liger" else "timed")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # nothing temporary is left


@pytest.fixture
def three_cases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """rms_norm's, in place of its own; the last one judges a goal of the CPU."""
    import benchmarks.ops.rms_norm as op

    contestants = {OURS: timed(square), "eager": timed(square)}
    shapes: list[tuple[str, dict[str, int]]] = [
        ("fwd", {"M": 8, "N": 4}), ("bwd", {"M": 8, "N": 4}), ("fwd+bwd", {"M": 4096, "N": 1024}),
    ]  # fmt: skip
    cases = [dataclasses.replace(fake_case(contestants), name=name, shape=shape) for name, shape in shapes]
    monkeypatch.setattr(op, "cases", lambda device, quick: cases)
    return [case.label for case in cases]


def command(out: Path, *more: str) -> list[str]:
    return ["--op", "rms_norm", "--repeats", "2", "--out", str(out), *more]


def test_what_judges_a_goal_comes_first_and_rows_stay_as_listed(
    three_cases: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command(tmp_path / "r.json")) == 0
    begun = [line.split(" | ")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("rms_norm")]
    assert begun == [f"rms_norm {three_cases[i]}" for i in (2, 0, 1)]
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [label for label in three_cases for _ in range(2)]


def test_after_its_minutes_no_case_is_begun(
    three_cases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    assert run.main(command(tmp_path / "r.json", "--minutes", "1e-9")) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rows"] == [] and result["left_out"] == [f"rms_norm {three_cases[i]}" for i in (2, 0, 1)]
    assert result["command"].startswith("LIGER_FUSED_MOE_AUTOTUNE=0 python -m benchmarks.run --op")
    captured = capfd.readouterr()
    assert json.loads(captured.out)["left_out"] == 3 and "left out" in captured.err and "rms_norm 3" in captured.err


def test_a_run_that_was_cut_off_is_gone_on_with(
    three_cases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "r.json", []

    def dies_at_the_second(op: str, case: Case, *rest: Any) -> Any:
        seen.append(case.label)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return run_case(op, case, *rest)

    monkeypatch.setattr(run, "run_case", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.main(command(out, "--resume"))
    first = json.loads(out.read_text())
    assert {row["label"] for row in first["rows"]} == {three_cases[2]}
    assert first["left_out"] == [f"rms_norm {label}" for label in three_cases[:2]]
    assert run.main(command(out, "--resume")) == 0
    result = json.loads(out.read_text())
    assert seen == [three_cases[i] for i in (2, 0, 0, 1)] and result["left_out"] == []
    assert result["rows"][4:] == first["rows"] and len(result["rows"]) == 6
    assert result["ceilings"] == first["ceilings"] and result["command"].count("benchmarks.run") == 2


def test_only_a_result_of_the_same_conditions_is_gone_on_with(
    three_cases: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert run.main(command(out, "--minutes", "1e-9")) == 0
    before = out.read_text()
    assert run.main([*command(out, "--resume"), "--repeats", "3"]) == 2
    assert "repeats was 2, now it is 3" in capfd.readouterr().err
    assert run.main(command(out, "--resume", "--commit", "another")) == 2
    assert "now it is another" in capfd.readouterr().err and out.read_text() == before
    out.write_text("{}")
    assert run.main(command(out, "--resume")) == 2
    assert "not a result of benchmarks.run" in capfd.readouterr().err


def test_exit_code_says_that_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.ops.rms_norm as op

    monkeypatch.setattr(op, "cases", lambda device, quick: [fake_case({OURS: timed(lambda x: x)})])
    assert run.main(["--op", "rms_norm", "--quick", "--repeats", "2", "--out", str(tmp_path / "r.json")]) == 1
