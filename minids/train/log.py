"""What a run leaves for reading: metrics.jsonl, curves.png, report.md, and the progress bar on stderr.

metrics.jsonl has one object a line. `kind` "train": means over the steps since the line before; `kind` "eval": held-out
values after `step` steps (0: before training). TIMING keys differ from run to run; everything else is deterministic, so
that a resumed run's file equals that of a run never interrupted but for those keys.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minids.config import to_dict
from minids.errors import InputError
from minids.files import atomic_write

TIMING = ("seconds", "tokens_per_second")
METRICS, CURVES, REPORT = "metrics.jsonl", "curves.png", "report.md"
Record = dict[str, Any]
Panels = Sequence[tuple[str, Sequence[str]]]  # title, names of metrics


def note(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def progress(total: int, done: int, unit: str, title: str) -> tqdm:
    """A bar with ETA on stderr; silent when stderr is no terminal."""
    return tqdm(total=total, initial=done, unit=unit, desc=title, file=sys.stderr, disable=None, dynamic_ncols=True)


def read_metrics(run_dir: str | os.PathLike[str]) -> list[Record]:
    """The records of a run; a last line cut off by a kill is left out. InputError for a line that is no record."""
    path = Path(run_dir) / METRICS
    records: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                records.append({"step": record["step"], "kind": record["kind"], **record})
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{path}, line {number}: damaged; remove the line, and what it says is lost") from None
    return records


class MetricsLog:
    """Appends to a run's metrics.jsonl, after dropping what lies beyond `step` (-1: everything)."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.records = [record for record in read_metrics(run_dir) if record["step"] <= step]
        path = run_dir / METRICS
        atomic_write(path, "".join(map(self._line, self.records)))
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    @staticmethod
    def _line(record: Record) -> str:
        return json.dumps(record, ensure_ascii=False) + "\n"

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        record = {"step": step, "kind": kind, **values}
        self._file.write(self._line(record).encode())
        self._file.flush()
        self.records.append(record)

    def sync(self) -> None:
        """Flushes to disk: before a checkpoint, which counts on the lines up to its step."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Means:
    """Running means of named values; its state survives in checkpoints, as JSON keeps every bit of a float."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.count: int = state["count"] if state else 0
        self.sums: dict[str, float] = dict(state["sums"]) if state else {}

    def add(self, values: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means, starting over."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.count, self.sums = 0, {}
        return means

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "sums": dict(self.sums)}


def write_curves(run_dir: Path, records: Sequence[Record], panels: Panels) -> bool:
    """curves.png: for each title a panel with its metrics of train and eval records. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
    for number, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1, title=title, xlabel="step")
        for key in keys:
            for kind, style in (("train", "-"), ("eval", "o--")):
                points = [(r["step"], r[key]) for r in records if r["kind"] == kind and key in r]
                if points:
                    label = f"{key} (held out)" if kind == "eval" else key
                    axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(run_dir / CURVES, picture.getvalue())
    return True


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_number(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _results(records: Sequence[Record], lower_is_better: Sequence[str]) -> list[list[Any]]:
    """[metric, first, best, last] for each train and eval metric; "best" only where the direction is known."""
    rows = []
    for kind in ("eval", "train"):
        found = [record for record in records if record["kind"] == kind]
        keys = dict.fromkeys(
            key for record in found for key in record if key not in ("step", "kind", "tokens", *TIMING)
        )
        for key in keys:
            values = [record[key] for record in found if key in record]
            best = min(values) if key in lower_is_better else ""
            name = f"{key} (held out)" if kind == "eval" else key
            rows.append([name, float(values[0]), best, float(values[-1])])
    return rows


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in section.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def write_report(
    run_dir: Path,
    title: str,
    summary: Sequence[str],
    records: Sequence[Record],
    lower_is_better: Sequence[str],
    config: Any,
    has_curves: bool,
    next_commands: Sequence[str],
) -> None:
    """report.md: what ran, the results, the curves, the settings, and what to type next."""
    curves = f"![curves]({CURVES})" if has_curves else "No curves: `pip install minids[plot]` and run with `--resume`."
    lines = [
        f"# {title}", "", *[f"- {line}" for line in summary], "",
        "## Results", "", *_table(["metric", "first", "best", "last"], _results(records, lower_is_better)), "",
        curves, "",
        "## Next", "", "```", *next_commands, "```", "",
        "## Settings", "", *_table(["setting", "value"], _flat(to_dict(config))),
    ]  # fmt: skip
    atomic_write(run_dir / REPORT, "\n".join(lines) + "\n")
