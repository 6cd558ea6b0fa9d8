"""Measures the launch tables on the GPU of this machine and writes them: never done at run time.

    python -m benchmarks.tune [--op rms_norm ...] [--kernels rms_norm_bwd ...] [--repeats 20] [--margin 0.02]
                              [--sizes WIDTH=320 ...] [--workers 16] [--log FILE.json]

For every entry's shape in kernels/minids_kernels/configs/<room>.json it tries the candidates that the room's module in
benchmarks/ops lists, beside the config in use, by the timer of benchmarks.run. First all are compiled, by processes
that need no GPU, into Triton's cache, where the launches that follow find them; then they run one after the other. A
candidate that does not compile, spills more registers than the config in use, asks for too much shared memory or gives
another result is left out; one that is far from the fastest in its first rounds gets no more. The fastest replaces the
config in use if it is faster by `margin`. The table is written under this GPU's architecture, whole, after each kernel,
and so is the log, which has every candidate's time or why it has none. Progress goes to stderr; the last line of stdout
is one JSON object with what changed. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from minids_kernels import _launch

from benchmarks import aot, timing
from benchmarks.contest import arch
from benchmarks.protocol import Run, Tuning, judge
from benchmarks.run import OPS
from benchmarks.watch import say
from minids.files import atomic_write, read_json, write_json

CONFIGS = Path(_launch.__file__).parent / "configs"
SAME = 1e-2  # two configs of a kernel differ by the order of sums in fp32 and one rounding of bf16 at most
META = torch.device("meta")  # no memory, no GPU; Triton specialises kernels for such tensors as for real ones
FIRST = 3  # rounds that every candidate gets
FAR = 1.3  # times the fastest of the first rounds: who took longer gets no more
Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is tried at the shape of one entry of a launch table: the config in use, then the candidates."""

    room: str
    kernel: str
    shape: Mapping[str, int]
    configs: Sequence[Config]


def tunings(room: str, device: torch.device) -> dict[str, Tuning]:
    found: dict[str, Tuning] = importlib.import_module(f"benchmarks.ops.{room}").tuning(device)
    return found


def room_entries(
    room: str, kernels: Sequence[str] | None, chip: str, sizes: Mapping[str, int] | None = None
) -> list[Entry]:
    """Those whose shapes have these sizes."""
    return [
        Entry(room, kernel, entry["shape"], with_candidates(entry["config"], tuning, entry["shape"]))
        for kernel, tuning in tunings(room, META).items()
        if kernels is None or kernel in kernels
        for entry in _launch.entries(room, kernel, chip)
        if (sizes or {}).items() <= entry["shape"].items()
    ]


def with_candidates(former: Mapping[str, Any], tuning: Tuning, shape: Mapping[str, int]) -> list[Config]:
    return [dict(former), *(config for config in tuning.candidates(shape) if config != former)]


@contextlib.contextmanager
def forced(room: str, kernel: str, config: Mapping[str, Any]) -> Iterator[None]:
    """_launch.config gives `config` for this kernel, whatever the shape."""
    table = _launch.config

    def forced_config(asked_room: str, asked: str, arch: str, **shape: int) -> Config:
        return dict(config) if (asked_room, asked) == (room, kernel) else table(asked_room, asked, arch, **shape)

    with mock.patch.object(_launch, "config", forced_config):
        yield


def compiled(room: str, run: Run, chip: str) -> list[aot.Compiled]:
    """What `run` launches, by the key of Triton's cache that a launch on this chip looks up."""
    return [aot.compile_launch(launch, room, chip) for launch in aot.record([("", run)], chip)]


def with_config(run: Run, room: str, kernel: str, config: Mapping[str, Any]) -> Run:
    def call() -> Any:
        with forced(room, kernel, config):
            return run()

    return call


def spills_in_use(entry: Entry, chip: str) -> int:
    """Spills of the config in use; what is launched for the inputs is compiled with it."""
    bound: list[Run] = []
    tuning = tunings(entry.room, META)[entry.kernel]
    compiled(entry.room, lambda: bound.append(tuning.bind(entry.shape)), chip)
    call = with_config(bound[0], entry.room, entry.kernel, entry.configs[0])
    return sum(launch.spills for launch in compiled(entry.room, call, chip))


def refusal(entry: Entry, config: Config, spills: int, chip: str) -> str:
    """Why the config does not do on this chip; "" if it does. So many spills are allowed."""
    bound: list[Run] = []
    tuning = tunings(entry.room, META)[entry.kernel]
    aot.record([("", lambda: bound.append(tuning.bind(entry.shape)))], chip)
    try:
        launches = compiled(entry.room, with_config(bound[0], entry.room, entry.kernel, config), chip)
    except Exception as error:  # a config that the compiler cannot take is no candidate
        return timing.first_line(error)
    for launch in launches:
        if not launch.fits:
            return f"{launch.shared} bytes of shared memory"
    found = sum(launch.spills for launch in launches)
    return f"{found} spills" if found > spills else ""


def compile_entries(entries: Sequence[Entry], chip: str, workers: int) -> list[list[str]]:
    """For each entry why its configs are left out, "" where they are not: those that spill more than the one in use
    are, too."""
    count = sum(len(entry.configs) for entry in entries)
    say(f"compiling {count} configs of {len(entries)} entries")
    with aot.workers(workers) as pool:
        spills = list(pool.map(spills_in_use, entries, itertools.repeat(chip)))
        jobs = [(e, config, allowed, chip) for e, allowed in zip(entries, spills, strict=True) for config in e.configs]
        found = pool.map(refusal, *zip(*jobs, strict=True))
        reasons = []
        for entry in entries:
            reasons.append(list(itertools.islice(found, len(entry.configs))))
            count -= len(entry.configs)
            fit = f"{reasons[-1].count('')} of {len(entry.configs)} do"
            say(f"compiled {entry.room} {entry.kernel} {dict(entry.shape)}: {fit}; {count} configs left")
    return reasons


def prepare(
    entry: Entry, tuning: Tuning, refused: Sequence[str], device: torch.device
) -> tuple[dict[str, timing.Prepared], list[str]]:
    """The calls to time, by their config's place, and for each config why it is not among them."""
    run = tuning.bind(entry.shape)
    want = with_config(run, entry.room, entry.kernel, entry.configs[0])()
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    prepared: dict[str, timing.Prepared] = {}
    reasons = list(refused)
    for index, config in enumerate(entry.configs):
        call = with_config(run, entry.room, entry.kernel, config)
        try:
            reasons[index] = reasons[index] or judge(call(), want, SAME).reason
            if not reasons[index]:
                prepared[str(index)] = timing.prepare(without_output(call), device, pool)
        except Exception as error:  # nor is one that the GPU cannot
            reasons[index] = timing.first_line(error)
        if reasons[index]:
            say(f"  {config}: {reasons[index]}")
    return prepared, reasons


def without_output(run: Run) -> Run:
    """Its graph keeps no memory: outputs of a hundred candidates may be more than a GPU holds."""

    def call() -> None:
        run()

    return call


def measure(prepared: Mapping[str, timing.Prepared], repeats: int, device: torch.device) -> dict[str, timing.Timing]:
    """A few rounds of all; then `repeats` of those that may be the fastest, and of the config in use."""
    first = timing.measure(prepared, FIRST, device)
    limit = FAR * min((t.median for t in first.values()), default=0.0)
    near = {index: call for index, call in prepared.items() if index == "0" or first[index].median <= limit}
    return first | timing.measure(near, repeats, device)


def best(
    entry: Entry, tuning: Tuning, refused: Sequence[str], device: torch.device, repeats: int, margin: float
) -> dict[str, Any]:
    """A report with the config to use at the entry's shape, and what became of each candidate."""
    with timing.side_stream(device):
        torch.manual_seed(0)
        prepared, reasons = prepare(entry, tuning, refused, device)
        timings = measure(prepared, repeats, device)
    if "0" not in timings:
        raise RuntimeError(f"{entry}: the config in use does not run: {reasons[0]}")
    fastest = min(timings, key=lambda index: timings[index].median)
    chosen = fastest if timings[fastest].median < timings["0"].median * (1 - margin) else "0"
    us = {index: round(t.median * 1e6, 2) for index, t in timings.items()}
    return {
        "room": entry.room, "kernel": entry.kernel, "arch": arch(device), "shape": dict(entry.shape),
        "tried": len(timings), "former": entry.configs[0], "former_us": us["0"], "config": entry.configs[int(chosen)],
        "us": us[chosen], "changed": chosen != "0",
        "candidates": [
            {"config": config, "us": us.get(str(index)), "reason": reason}
            for index, (config, reason) in enumerate(zip(entry.configs, reasons, strict=True))
        ],
    }  # fmt: skip


def table_text(table: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """The launch table as json, an entry a line."""
    kernels = []
    for kernel, by_arch in table.items():
        chips = []
        for chip, entries in by_arch.items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            chips.append(f'    "{chip}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(chips) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write_table(room: str, kernel: str, chip: str, reports: Sequence[Mapping[str, Any]]) -> None:
    """Gives the entries of a kernel on `chip` the reports' configs; those without a report keep theirs."""
    file = CONFIGS / f"{room}.json"
    table = read_json(file)
    found = {tuple(report["shape"].items()): report["config"] for report in reports}
    table[kernel][chip] = [
        {**entry, "config": found.get(tuple(entry["shape"].items()), entry["config"])}
        for entry in _launch.entries(room, kernel, chip)
    ]
    atomic_write(file, table_text(table))


def size(text: str) -> tuple[str, int]:
    """ "WIDTH=320" -> ("WIDTH", 320)."""
    name, _, value = text.partition("=")
    return name, int(value)


def tune(
    entries: Sequence[Entry], refused: Sequence[Sequence[str]], device: torch.device, repeats: int, margin: float
) -> Iterator[list[dict[str, Any]]]:
    """Times what compiled and writes the tables; the reports of a kernel's entries, kernel after kernel."""
    pairs = zip(entries, refused, strict=True)
    for (room, kernel), group in itertools.groupby(pairs, key=lambda pair: (pair[0].room, pair[0].kernel)):
        tuning = tunings(room, device)[kernel]
        reports = []
        for entry, reasons in group:
            say(f"{room} {kernel} {dict(entry.shape)}")
            report = best(entry, tuning, reasons, device, repeats, margin)
            say(f"  {report['former_us']} us -> {report['us']} us: {report['config']}")
            reports.append(report)
            torch.cuda.empty_cache()
        write_table(room, kernel, arch(device), reports)
        yield reports


def main(arguments: Sequence[str] | None = None) -> int:
    rooms = tuple(op for op in OPS if (CONFIGS / f"{op}.json").is_file())  # others launch nothing that has a choice
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=rooms, choices=rooms, help="default: all")
    parser.add_argument("--kernels", nargs="+", help="default: all of the op's table")
    parser.add_argument("--sizes", nargs="+", type=size, default=[], help="only entries that have these: WIDTH=320")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--margin", type=float, default=0.02, help="gain below which the config in use stays")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that compile (default: all CPUs)"
    )
    parser.add_argument("--log", type=Path, help="write every candidate's time to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say("benchmarks.tune: no GPU here; launch tables can only be measured on one")
        return 2
    device = torch.device("cuda")
    entries = [
        entry for room in options.op for entry in room_entries(room, options.kernels, arch(device), dict(options.sizes))
    ]
    refused = compile_entries(entries, arch(device), options.workers)
    reports: list[dict[str, Any]] = []
    for some in tune(entries, refused, device, options.repeats, options.margin):
        reports += some
        if options.log:
            write_json(options.log, reports)
    changed = [{key: r[key] for key in r if key != "candidates"} for r in reports if r["changed"]]
    print(json.dumps({"entries": len(reports), "changed": changed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
