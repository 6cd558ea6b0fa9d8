"""Tables and plots from a result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.protocol import OURS


def row(contestant: str, status: str, us: float | None, reason: str | None = None) -> dict[str, Any]:
    return {
        "op": "rms_norm", "label": "fwd M=8 N=4 float32", "case": "fwd", "shape": {"M": 8, "N": 4},
        "contestant": contestant, "status": status, "reason": reason, "events": "", "median_us": us, "p20_us": us,
        "p80_us": us, "gbps": us and 3.25, "of_copy": us and 0.5, "tflops": None, "of_math": None,
    }  # fmt: skip


RESULT: dict[str, Any] = {
    "kind": "kernels", "date": "2026-01-02", "device": {"name": "Chip"}, "commit": "abc", "command": "python -m it",
    "versions": {"torch": "2.13.0", "torchao": None}, "repeats": 50, "ceilings": {"copy_gbps": 6.5}, "goals": [],
    "rows": [row(OURS, "timed", 10.0), row("eager", "timed", 25.0), row("liger", "absent", None, "not installed"),
             row("fla", "wrong", None, "relative error 1")],
}  # fmt: skip


def test_writes_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chip.json"
    file.write_text(json.dumps(RESULT))
    assert report.main([str(file), "--out", str(tmp_path / "out")]) == 0
    written = [Path(name) for name in json.loads(capsys.readouterr().out)["written"]]
    assert [path.name for path in written] == ["chip.md", "chip_rms_norm.png"]
    text = written[0].read_text()
    assert "# Chip, 2026-01-02, commit abc" in text and "torch 2.13.0" in text and "torchao" not in text
    assert "| case | minids | eager | fla | GB/s | of copy | TFLOP/s | of matmul | over eager | over fla |" in text
    line = next(line for line in text.splitlines() if line.startswith("| fwd M=8"))
    assert line.split("|")[2:] == [
        " 10.0 (10.0..10.0) ", " 25.0 (25.0..25.0) ", " wrong ", " 3.25 ", " 50% ", "  ", "  ", " 2.50 ", "  ", "",
    ]  # fmt: skip
    assert "- liger: absent, not installed" in text and "- fla: wrong, relative error 1" in text
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_names_what_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    file.write_text(json.dumps({**RESULT, "rows": [], "left_out": ["rms_norm fwd M=9", "moe fwd M=9"]}))
    (written,) = report.write(file, tmp_path)
    assert "Not measured for want of time: rms_norm fwd M=9, moe fwd M=9." in written.read_text()


def test_no_plot_without_a_peer(tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    file.write_text(json.dumps({**RESULT, "rows": RESULT["rows"][:1]}))
    assert [path.name for path in report.write(file, tmp_path)] == ["chip.md"]


@pytest.mark.parametrize("text", ["[]", '{"kind": "other"}', "no json"])
def test_other_files_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chip.json"
    file.write_text(text)
    assert report.main([str(file)]) == 2
    assert str(file) in capsys.readouterr().err
