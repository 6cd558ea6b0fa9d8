"""metrics.jsonl survives being cut off, means survive checkpoints, and the report says what happened."""

from __future__ import annotations

import json
import random

import pytest

from minids.config import PretrainConfig
from minids.errors import InputError
from minids.train.log import Means, MetricsLog, read_metrics, write_curves, write_report


def test_records_are_appended_and_read_back(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.write("eval", 0, {"nll": 1.5})
    log.write("train", 3, {"loss": 0.1 + 0.2})
    log.close()
    expected = [{"step": 0, "kind": "eval", "nll": 1.5}, {"step": 3, "kind": "train", "loss": 0.1 + 0.2}]
    assert read_metrics(tmp_path) == expected == log.records


@pytest.mark.parametrize("tail", ["", '{"step": 4, "kind": "tra', "\n"])
def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path, tail):
    lines = [json.dumps({"step": step, "kind": "train", "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + ("\n" if tail != "\n" else "") + tail)
    log = MetricsLog(tmp_path, 2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]


@pytest.mark.parametrize("line", ["{", "[]", "null", '{"loss": 1.0}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kind": "eval"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: damaged"):
        read_metrics(tmp_path)


def test_a_fresh_start_drops_everything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kind": "eval"}\n')
    MetricsLog(tmp_path, -1).close()
    assert read_metrics(tmp_path) == []


def test_means_go_on_bit_for_bit_through_json():
    generator = random.Random(0)
    values = [{"loss": generator.random() / 3, "lr": generator.random()} for _ in range(20)]
    straight, halves = Means(), Means()
    for value in values:
        straight.add(value)
    for value in values[:9]:
        halves.add(value)
    halves = Means(json.loads(json.dumps(halves.state())))
    for value in values[9:]:
        halves.add(value)
    means = straight.take()
    assert halves.take() == means
    assert means["loss"] == pytest.approx(sum(value["loss"] for value in values) / 20)
    assert straight.state() == {"count": 0, "sums": {}}


def test_report_and_curves(tmp_path):
    records = [
        {"step": 0, "kind": "eval", "nll": 4.0},
        {"step": 5, "kind": "train", "nll": 3.5, "lr": 0.1, "seconds": 1.0},
        {"step": 5, "kind": "eval", "nll": 2.0},
        {"step": 9, "kind": "eval", "nll": 2.5},
    ]
    assert write_curves(tmp_path, records, (("loss", ("nll",)), ("rate", ("lr",)), ("none", ("absent",))))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    write_report(tmp_path, "a run", ["9 steps"], records, ("nll",), PretrainConfig(), True, ["minids chat RUN"])
    report = (tmp_path / "report.md").read_text()
    assert "| nll (held out) | 4 | 2 | 2.5 |" in report
    assert "| model.hidden_size | 192 |" in report
    assert "![curves](curves.png)" in report and "minids chat RUN" in report and "- 9 steps" in report


def test_without_matplotlib_the_report_says_how_to_get_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)  # makes `import matplotlib` an ImportError
    assert not write_curves(tmp_path, [], (("loss", ("nll",)),))
    write_report(tmp_path, "a run", [], [], (), PretrainConfig(), False, [])
    assert "pip install minids[plot]" in (tmp_path / "report.md").read_text()
