"""Tables and plots from what benchmarks.run wrote.

    python -m benchmarks.report FILE.json ... [--out benchmarks/results]

Writes <stem>.md with the goals and a table an op, and <stem>_<op>.png with the ratios to every peer; prints one JSON
object that names the files. The plots need matplotlib (`pip install -e '.[plot]'`).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.protocol import OURS
from benchmarks.run import RESULTS, ratios, read_result
from minids.errors import InputError
from minids.files import atomic_write

Row = Mapping[str, Any]


def _cell(row: Row) -> str:
    if row["status"] != "timed":
        return str(row["status"])
    return f"{row['median_us']:.1f} ({row['p20_us']:.1f}..{row['p80_us']:.1f})"


def _names(rows: Sequence[Row]) -> list[str]:
    """Contestants that were there, in order of appearance, ours first."""
    return list(dict.fromkeys([OURS, *(row["contestant"] for row in rows if row["status"] != "absent")]))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def op_table(rows: Sequence[Row]) -> str:
    """Microseconds of every contestant, our rates and shares of the measured ceilings, and the ratios."""
    names = _names(rows)
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["label"], {})[row["contestant"]] = row
    ratio = ratios(rows)
    head = ["case", *names, "GB/s", "of copy", "TFLOP/s", "of matmul", *(f"over {name}" for name in names[1:])]
    text = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for label, by_name in cases.items():
        ours = by_name[OURS]
        peers = ratio.get(f"{ours['op']} {label}", {})
        cells = [label, *(_cell(by_name[name]) if name in by_name else "" for name in names)]
        cells += [f"{ours[key]:.4g}" if key in ("gbps", "tflops") and ours[key] is not None else _share(ours[key])
                  for key in ("gbps", "of_copy", "tflops", "of_math")]  # fmt: skip
        cells += [f"{peers[name]:.2f}" if name in peers else "" for name in names[1:]]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def reasons(rows: Sequence[Row]) -> list[str]:
    """Who did not take part and why, and who was not timed as a CUDA graph; each said once."""
    said = {f"{r['contestant']}: {r['status']}, {r['reason']}" for r in rows if r["status"] != "timed"}
    said |= {f"{r['contestant']}: timed by events, {r['events']}" for r in rows if r["events"]}
    return sorted(said)


def markdown(result: Mapping[str, Any]) -> str:
    device, rows = result["device"], result["rows"]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in result["ceilings"].items())
    text = [
        f"# {device['name']}, {result['date']}, commit {result['commit']}", "",
        f"`{result['command']}`. {versions}.", f"Ceilings of the same run: {ceilings}.",
        f"Microseconds: median of {result['repeats']} (20th..80th percentile); ratios: a peer's median over ours.", "",
        goals.table(result["goals"]),
    ]  # fmt: skip
    if left_out := result.get("left_out"):
        text += [f"Not measured for want of time: {', '.join(left_out)}.", ""]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        text += [f"## {op}", "", op_table(of_op), *(f"- {line}" for line in reasons(of_op)), ""]
    return "\n".join(text)


def plot(rows: Sequence[Row], title: str) -> bytes | None:
    """A PNG: one group of bars a case, one bar a peer, ours being 1; None where no peer was timed."""
    from matplotlib.figure import Figure

    ratio = ratios(rows)
    names = [name for name in _names(rows) if any(name in peers for peers in ratio.values())]
    if not names:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(ratio) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 1 / (len(names) + 1)
    for index, name in enumerate(names):
        bars = [(place + index * height, peers[name]) for place, peers in enumerate(ratio.values()) if name in peers]
        axes.barh([y for y, _ in bars], [x for _, x in bars], height, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place + (len(names) - 1) * height / 2 for place in range(len(ratio))], list(ratio), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("the peer's median time over ours (right of the line: ours is faster)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def write(file: Path, folder: Path) -> list[Path]:
    """The report on one result file; raises InputError if it is none."""
    result = read_result(file)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{file.stem}.md"]
    atomic_write(written[0], markdown(result))
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        picture = plot([row for row in result["rows"] if row["op"] == op], f"{op} on {result['device']['name']}")
        if picture is not None:
            written.append(folder / f"{file.stem}_{op}.png")
            atomic_write(written[-1], picture)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args(arguments)
    try:
        written = [path for file in options.files for path in write(file, options.out)]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"written": [str(path) for path in written]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
