"""The command that runs all others: what it keeps, what it cuts off, and where it goes on."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import all as everything
from benchmarks import decode, peers, train
from benchmarks import run as kernels
from benchmarks.all import PARTS, Part, command, main
from minids.errors import InputError


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Part]:
    """Python's own modules in place of benchmarks."""
    found = [Part("first", 1, "this"), Part("second", 1, f"json.tool {tmp_path}/given.json --compact")]
    monkeypatch.setattr(everything, "PARTS", found)
    return found


def run(out: Path, *more: str) -> int:
    return main(["--out", str(out), "--minutes", "2", "--commit", "abc", *more])


def test_each_part_leaves_its_output_and_is_run_once(
    parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    (tmp_path / "given.json").write_text('{"left_out": 2}')
    assert run(out) == 0
    assert json.loads(capsys.readouterr().out) == {
        "dir": str(out), "exit_codes": {"first": 0, "second": 0}, "left": ["second"]
    }  # fmt: skip
    found = json.loads((out / "all.json").read_text())
    assert found["commit"] == "abc" and found["parts"]["second"]["result"] == {"left_out": 2}
    assert found["parts"]["first"]["result"].startswith("Namespaces are")
    assert "Beautiful" in (out / "first.out").read_text() and (out / "first.log").read_text() == ""

    (tmp_path / "given.json").write_text('{"left_out": 0}')
    assert run(out) == 0  # only the second, which had something left out
    after = json.loads((out / "all.json").read_text())["parts"]
    assert after["first"] == found["parts"]["first"] and after["second"]["result"] == {"left_out": 0}
    assert json.loads(capsys.readouterr().out)["left"] == []


def test_a_part_that_fails_is_told_and_costs_the_others_nothing(
    parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text("{")
    assert run(tmp_path / "results", "--only", "second") == 1
    assert "second: exit code 1" in capsys.readouterr().err
    assert "Expecting property name" in (tmp_path / "results" / "second.log").read_text()
    assert run(tmp_path / "results") == 1
    found = json.loads((tmp_path / "results" / "all.json").read_text())["parts"]
    assert found["first"]["exit_code"] == 0 and found["second"]["exit_code"] == 1


def test_a_part_is_cut_off_with_all_that_it_started(
    parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beats, script = tmp_path / "beats", tmp_path / "script.py"
    child = f"import time\nwhile True:\n  open({str(beats)!r}, 'a').write('.'), time.sleep(0.05)"
    script.write_text(
        f"import subprocess, sys\nprint('begun', flush=True)\nsubprocess.run([sys.executable, '-c', {child!r}])"
    )
    parts[0] = Part("first", 0.1, f"cProfile {script}")
    monkeypatch.setattr(everything, "LEAST", 1)
    (tmp_path / "given.json").write_text("1")
    start = time.monotonic()
    assert run(tmp_path / "results") == 0
    assert time.monotonic() - start < 30
    found = json.loads((tmp_path / "results" / "all.json").read_text())["parts"]
    assert found["first"]["exit_code"] is None and found["first"]["result"] == "begun"
    assert found["second"]["exit_code"] == 0
    count = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == count > 0
    assert json.loads(capsys.readouterr().out)["left"] == ["first"]


def test_no_part_is_begun_without_time(parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--minutes", "0.3", "--commit", "abc"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == ["first", "second"]


def test_results_of_two_states_do_not_mix(
    parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all.json").write_text('{"commit": "before", "parts": {}}')
    assert run(tmp_path) == 2
    assert "commit was before, now it is abc" in capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_commands_are_understood(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(parsed: argparse.Namespace, *_: object) -> None:
        raise InputError(f"{parsed.out} {parsed.minutes} {parsed.commit}")

    checkout = tmp_path / "a checkout"
    peers.minimind_file(checkout).parent.mkdir(parents=True)
    peers.minimind_file(checkout).touch()
    options = argparse.Namespace(out=tmp_path / "the results", minimind=checkout, commit="abc")
    _, _, module, *arguments = command(part, options, 75)
    match module:
        case "pytest":
            assert all((everything.ROOT / path).exists() for path in arguments if path.endswith(".py"))
        case "benchmarks.run":
            monkeypatch.setattr(kernels, "run_ops", refuse)
            assert kernels.main(arguments) == 2
            assert capsys.readouterr().err == f"{options.out}/kernels.json 1.0 abc\n"
        case "benchmarks.train" | "benchmarks.first_step":
            parsed = train.parse(arguments, torch.device("cuda"))
            assert all(file.parent == options.out for file in (parsed.out, parsed.profile) if file)
        case "benchmarks.decode":
            assert decode.parse(arguments).contexts == [128, 2048]
        case _:
            raise AssertionError(module)
