"""Times the kernels beside their peers: every contestant is proven right first, then all are timed in turn.

    python -m benchmarks.run [--op rms_norm ...] [--peers eager liger ...] [--quick] [--cold] [--repeats 50]
                             [--limit 60] [--minutes 9] [--out FILE.json] [--resume] [--commit NAME]

On a GPU where there is one (CUDA-graph replay, cold L2), else on the CPU. Writes
benchmarks/results/<device>_<date>_<commit>.json, again after each case, so that a crash costs one case. First comes one
case of each goal, over all ops, then another of each; those that no goal asks for come last. Progress and the table of
goals go to stderr; the last line of stdout is one JSON object with the ratios (a peer's median time over ours: above 1,
ours is faster). Exit code 1 where ours was wrong or failed, 2 where --resume finds what it cannot go on with.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import goals, timing
from benchmarks.contest import arch, run_case, version
from benchmarks.protocol import OURS
from benchmarks.watch import say
from minids.errors import InputError
from minids.files import read_json, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPS = tuple(sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("[a-z]*.py")))
SMI = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"  # what a figure depends on beside the chip
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "DG_JIT_CACHE_DIR")  # where compilers keep what they made
UNTUNED = ("UNSLOTH_MOE_DISABLE_AUTOTUNE", "LIGER_FUSED_MOE_AUTOTUNE")  # peers' own switches: named with the command
PACKAGES = ("torch", "triton", "minids", "sgl-deep-gemm", "apache-tvm-ffi", "torchao", "liger-kernel", "fla-core")


def _output(*command: str) -> str:
    """A command's output; "" where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": _cpu_name(), "arch": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name, "arch": arch(device), "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda or torch.version.hip,
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={SMI}", "--format=csv"),
    }  # fmt: skip


def commit() -> str:
    """Short hash, with "-dirty" where tracked files differ from it."""
    return _output("git", "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """ "op label" -> peer -> its median time over ours."""
    medians: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "timed":
            medians[f"{row['op']} {row['label']}"][row["contestant"]] = row["median_us"]
    return {
        case: {name: round(time / times[OURS], 3) for name, time in times.items() if name != OURS}
        for case, times in medians.items()
        if OURS in times
    }


def slug(name: str) -> str:
    """For file names: "cuda NVIDIA H200" -> "cuda-nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_result(file: Path) -> dict[str, Any]:
    """What an earlier run wrote; raises InputError if it is none."""
    result = read_json(file)
    if not isinstance(result, dict) or result.get("kind") != "kernels":
        raise InputError(f"{file}: not a result of benchmarks.run")
    return result


def begin(options: argparse.Namespace, device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """A result without rows; or, to go on with, that in `options.out`, whose ceilings stay. Raises InputError where it
    was measured under other conditions."""
    result: dict[str, Any] = {
        "kind": "kernels", "date": datetime.date.today().isoformat(), "device": describe(device),
        "commit": options.commit, "command": shlex.join(command), "repeats": options.repeats, "cold": options.cold,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "ceilings": {}, "rows": [], "goals": [], "left_out": [],
    }  # fmt: skip
    if options.resume and options.out.exists():
        earlier = read_result(options.out)
        for name in ("device", "commit", "repeats", "cold", "versions"):
            if earlier[name] != result[name]:
                raise InputError(f"{options.out}: {name} was {earlier[name]}, now it is {result[name]}")
        return {**earlier, "command": f"{earlier['command']}; {result['command']}"}
    with timing.side_stream(device):
        result["ceilings"] = timing.ceilings(device, options.repeats)
    return result


def run_ops(options: argparse.Namespace, device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Runs the cases of all ops that are not in the result yet, writes it to `options.out` after each, and returns it.
    Its rows are in the order in which ops list their cases; `left_out` names those that time did not suffice for."""
    end = time.monotonic() + 60 * options.minutes
    result = begin(options, device, command)
    rows, ceilings = result["rows"], result["ceilings"]
    say(f"{result['device']['name']}: " + ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()))
    modules = {op: importlib.import_module(f"benchmarks.ops.{op}") for op in options.op}
    cases = [(op, case) for op, module in modules.items() for case in module.cases(device, options.quick)]
    place = {(op, case.label): index for index, (op, case) in enumerate(cases)}
    there = {(row["op"], row["label"]) for row in rows}
    ordered = goals.in_order(cases, device.type, options.cold)
    left = [(op, case) for op, case in ordered if (op, case.label) not in there]
    slow: dict[str, set[str]] = defaultdict(set)

    def save() -> None:
        rows.sort(key=lambda row: place.get((row["op"], row["label"]), -1))
        result["goals"] = goals.judge(rows, device.type, options.cold)
        result["left_out"] = [f"{op} {case.label}" for op, case in left]
        write_json(options.out, result)

    save()
    while left and time.monotonic() < end:
        op, case = left.pop(0)
        rows += run_case(op, case, device, options, slow[op], ceilings)
        save()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS, help="default: all")
    parser.add_argument("--peers", nargs="+", help="only these contestants beside ours")
    parser.add_argument("--quick", action="store_true", help="one small set of cases an op, 10 repeats")
    parser.add_argument("--cold", action="store_true", help="compile everything anew, for the column first_s")
    parser.add_argument("--repeats", type=int, help="timed calls of each contestant (default: 50)")
    parser.add_argument(
        "--limit", type=float, default=60, metavar="SECONDS",
        help="for a contestant's binding, first call and warm-up, and for a case's timed rounds (default: 60)",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further case after them")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>_<date>_<commit>.json")
    parser.add_argument("--resume", action="store_true", help="go on with the cases that are not in that file yet")
    parser.add_argument("--commit", default=commit(), help="the name of this state, where git is not there to tell")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (10 if options.quick else 50)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stem = f"{slug(device.type + ' ' + describe(device)['name'])}_{datetime.date.today().isoformat()}_{options.commit}"
    options.out = options.out or RESULTS / f"{stem}.json"
    switches = [f"{name}={os.environ[name]}" for name in UNTUNED if name in os.environ]
    command = [*switches, "python", "-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)]
    with tempfile.TemporaryDirectory() as empty:
        caches = dict.fromkeys(CACHES, empty) if options.cold else {}
        with mock.patch.dict(os.environ, caches):
            try:
                result = run_ops(options, device, command)
            except InputError as error:
                say(str(error))
                return 2
    say(goals.table(result["goals"]))
    bad = [
        f"{row['op']} {row['label']}: {row['reason']}"
        for row in result["rows"]
        if row["contestant"] == OURS and row["status"] != "timed"
    ]
    if result["left_out"]:
        count = Counter(name.split()[0] for name in result["left_out"])
        say(f"cases left out, by name in {options.out}: " + ", ".join(f"{op} {n}" for op, n in count.items()))
    summary = {
        "file": str(options.out),
        "ratios": ratios(result["rows"]),
        "goals": [goal for goal in result["goals"] if goal["cases"]],
        "ours_wrong_or_failed": bad,
        "left_out": len(result["left_out"]),
    }
    print(json.dumps(summary))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
