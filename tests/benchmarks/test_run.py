"""The harness on a CPU: who may be timed, what a row and a result file hold, and the whole command on RMSNorm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run, timing
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


def rows_of(contestants: Mapping[str, Contestant], peers: list[str] | None = None) -> dict[str, dict[str, Any]]:
    case = fake_case({OURS: timed(square), **contestants})
    rows = run.run_case("fake", case, CPU, 5, CEILINGS, peers)
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
    assert set(result) == set("kind date device commit command versions repeats cold ceilings rows goals".split())
    assert {row["contestant"] for row in result["rows"]} == {OURS, "eager", "F.rms_norm", "liger"}
    for row in result["rows"]:
        assert all(isinstance(row[name], kind) for name, kind in ROW.items() if name != "version"), row
        assert row["status"] == ("absent" if row["contestant"] == "liger" else "timed")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # nothing temporary is left


def test_exit_code_says_that_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.ops.rms_norm as op

    monkeypatch.setattr(op, "cases", lambda device, quick: [fake_case({OURS: timed(lambda x: x)})])
    assert run.main(["--op", "rms_norm", "--quick", "--repeats", "2", "--out", str(tmp_path / "r.json")]) == 1
