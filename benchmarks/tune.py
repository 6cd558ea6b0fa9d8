"""Measures the launch tables on the GPU of this machine and writes them: never done at run time.

    python -m benchmarks.tune [--op rms_norm ...] [--kernels rms_norm_bwd ...] [--repeats 20] [--margin 0.02]

For every entry's shape in kernels/minids_kernels/configs/<room>.json it tries the candidates that the room's module in
benchmarks/ops lists, beside the config in use, by the timer of benchmarks.run. A candidate that does not compile,
spills registers, asks for too much shared memory or gives another result is left out; the fastest replaces the config
in use if it is faster by `margin`. The table is written under this GPU's architecture, whole, after each kernel.
Progress goes to stderr; the last line of stdout is one JSON object with what changed. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from minids_kernels import _launch

from benchmarks import aot, timing
from benchmarks.protocol import Run, Tuning, judge
from benchmarks.run import OPS, arch, say
from minids.files import atomic_write, read_json

CONFIGS = Path(_launch.__file__).parent / "configs"
SAME = 1e-2  # two configs of a kernel differ by the order of sums in fp32 and one rounding of bf16 at most
Config = dict[str, Any]


@contextlib.contextmanager
def forced(room: str, kernel: str, config: Mapping[str, Any]) -> Iterator[None]:
    """_launch.config gives `config` for this kernel, whatever the shape."""
    table = _launch.config

    def forced_config(asked_room: str, asked: str, arch: str, **shape: int) -> Config:
        return dict(config) if (asked_room, asked) == (room, kernel) else table(asked_room, asked, arch, **shape)

    with mock.patch.object(_launch, "config", forced_config):
        yield


def refusal(room: str, run: Run, chip: str) -> str:
    """Why what `run` launches does not do on this chip; "" if it does."""
    for launch in aot.record([("", run)], chip):
        compiled = aot.compile_launch(launch, room, chip)
        if compiled.spills:
            return f"{compiled.spills} spills"
        if not compiled.fits:
            return f"{compiled.shared} bytes of shared memory"
    return ""


def with_config(run: Run, room: str, kernel: str, config: Mapping[str, Any]) -> Run:
    def call() -> Any:
        with forced(room, kernel, config):
            return run()

    return call


def best(
    room: str,
    kernel: str,
    tuning: Tuning,
    shape: Mapping[str, int],
    former: Config,
    device: torch.device,
    repeats: int,
    margin: float,
) -> dict[str, Any]:
    """A report with the config to use at `shape`."""
    chip = arch(device)
    configs = [former, *(c for c in tuning.candidates(shape) if c != former)]
    prepared: dict[str, timing.Prepared] = {}
    with timing.side_stream(device):
        torch.manual_seed(0)
        run = tuning.bind(shape)
        want = with_config(run, room, kernel, former)()
        for index, config in enumerate(configs):
            call = with_config(run, room, kernel, config)
            try:
                reason = refusal(room, call, chip) or judge(call(), want, SAME).reason
                if not reason:
                    prepared[str(index)] = timing.prepare(call, device)
            except Exception as error:  # a config that the compiler cannot take is no candidate
                reason = timing.first_line(error)
            if reason:
                say(f"  {config}: {reason}")
        timings = timing.measure(prepared, repeats, device)
    if "0" not in timings:
        raise RuntimeError(f"{room} {kernel} {dict(shape)}: the config in use, {former}, does not run on {chip}")
    fastest = min(timings, key=lambda index: timings[index].median)
    chosen = fastest if timings[fastest].median < timings["0"].median * (1 - margin) else "0"
    return {
        "room": room, "kernel": kernel, "arch": chip, "shape": dict(shape), "tried": len(timings), "former": former,
        "former_us": round(timings["0"].median * 1e6, 2), "config": configs[int(chosen)],
        "us": round(timings[chosen].median * 1e6, 2), "changed": chosen != "0",
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


def tune(room: str, kernels: Sequence[str] | None, repeats: int, margin: float) -> list[dict[str, Any]]:
    """Tunes a room's kernels and writes its table; one report an entry."""
    device = torch.device("cuda")
    chip, file = arch(device), CONFIGS / f"{room}.json"
    reports = []
    for kernel, tuning in importlib.import_module(f"benchmarks.ops.{room}").tuning().items():
        if kernels is not None and kernel not in kernels:
            continue
        entries = []
        for entry in _launch.entries(room, kernel, chip):
            say(f"{room} {kernel} {entry['shape']}")
            report = best(room, kernel, tuning, entry["shape"], dict(entry["config"]), device, repeats, margin)
            say(f"  {report['former_us']} us -> {report['us']} us: {report['config']}")
            entries.append({**entry, "config": report["config"]})
            reports.append(report)
            torch.cuda.empty_cache()
        table = read_json(file)
        table[kernel][chip] = entries
        atomic_write(file, table_text(table))
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    rooms = tuple(op for op in OPS if (CONFIGS / f"{op}.json").is_file())  # others launch nothing that has a choice
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=rooms, choices=rooms, help="default: all")
    parser.add_argument("--kernels", nargs="+", help="default: all of the op's table")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--margin", type=float, default=0.02, help="gain below which the config in use stays")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say("benchmarks.tune: no GPU here; launch tables can only be measured on one")
        return 2
    reports = [r for room in options.op for r in tune(room, options.kernels, options.repeats, options.margin)]
    print(json.dumps({"entries": len(reports), "changed": [r for r in reports if r["changed"]]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
