"""Times the kernels beside their peers: every contestant is proven right first, then all are timed in turn.

    python -m benchmarks.run [--op rms_norm ...] [--peers eager liger ...] [--quick] [--cold] [--repeats 50]
                             [--limit 60] [--minutes 9] [--out FILE.json] [--resume]

On a GPU where there is one (CUDA-graph replay, cold L2), else on the CPU. Writes
benchmarks/results/<device>_<date>_<commit>.json, again after each case, so that a crash costs one case. First comes one
case of each goal, over all ops, then another of each; those that no goal asks for come last. Progress and the table of
goals go to stderr; the last line of stdout is one JSON object with the ratios (a peer's median time over ours: above 1,
ours is faster). Exit code 1 where ours was wrong or failed, 2 where there is nothing to go on with.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
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
import torch._dynamo
import torch._functorch.config
from minids_kernels import _launch

from benchmarks import goals, timing
from benchmarks.protocol import OURS, Absent, Case, Contestant, dtype_name, judge
from benchmarks.watch import TookTooLong, limit, say, shown
from minids.errors import InputError
from minids.files import read_json, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPS = tuple(sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("[a-z]*.py")))
SMI = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"  # what a figure depends on beside the chip
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "DG_JIT_CACHE_DIR")  # where compilers keep what they made
UNTUNED = ("UNSLOTH_MOE_DISABLE_AUTOTUNE", "LIGER_FUSED_MOE_AUTOTUNE")  # peers' own switches: named with the command
PACKAGES = ("torch", "triton", "minids", "sgl-deep-gemm", "apache-tvm-ffi", "torchao", "liger-kernel", "fla-core")


def version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # says which build it is, which wheels' metadata may not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def arch(device: torch.device) -> str:
    return _launch.arch(torch.empty(0, device=device)) if device.type == "cuda" else "cpu"


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


def absence(contestant: Contestant, device: torch.device) -> str:
    """Why it cannot take part here; "" if it can."""
    chip = arch(device)
    if contestant.on and chip not in contestant.on and not ("cuda" in contestant.on and device.type == "cuda"):
        return f"needs {' or '.join(contestant.on)}, this is {chip}"
    if version(contestant.package) is None:
        return f"{contestant.package} is not installed"
    return ""


class Contest:
    """One case: its inputs and reference are made, every contestant is bound, checked and warmed up, then timed. Who
    was cut off is added to `slow`; those in it are not tried, but for ours."""

    def __init__(self, op: str, case: Case, device: torch.device, options: argparse.Namespace, slow: set[str]) -> None:
        self.op, self.case, self.device, self.options, self.slow = op, case, device, options, slow
        chosen = {n: c for n, c in case.contestants.items() if n == OURS or options.peers is None or n in options.peers}
        self.rows = {name: self._row(name, contestant) for name, contestant in chosen.items()}
        self.prepared: dict[str, timing.Prepared] = {}
        torch._dynamo.reset()  # compiled contestants of earlier cases share code objects with this one's
        torch.manual_seed(0)
        try:
            with shown("reference"), limit(options.limit):
                self.inputs = case.make()
                self.want = case.reference(self.inputs)
                self._wait()
        except (Exception, TookTooLong) as error:
            for row in self.rows.values():
                row.update(status="failed", reason=f"no reference: {timing.first_line(error)}")
            return
        for name, contestant in chosen.items():
            self._enter(name, contestant)

    def _row(self, name: str, contestant: Contestant) -> dict[str, Any]:
        case = self.case
        columns = dict.fromkeys(
            "reason error events first_s median_us p20_us p80_us repeats peak_mb gbps tflops of_copy of_math".split()
        )
        return {
            "op": self.op, "label": case.label, "case": case.name, "shape": dict(case.shape),
            "dtype": dtype_name(case.dtype), "bytes": case.bytes, "flops": case.flops, "math": case.math,
            "tolerance": case.tolerance, "contestant": name, "package": contestant.package,
            "version": version(contestant.package), "status": "", **columns,
        }  # fmt: skip

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _enter(self, name: str, contestant: Contestant) -> None:
        row = self.rows[name]
        reason = absence(contestant, self.device)
        if reason:
            row.update(status="absent", reason=reason)
            return
        if name in self.slow and name != OURS:
            row.update(status="failed", reason="took too long in an earlier case")
            return
        try:
            with shown(name), limit(self.options.limit):
                self._warm_up(name, contestant)
        except Absent as absent:
            row.update(status="absent", reason=str(absent))
        except TookTooLong as late:
            self.slow.add(name)
            row.update(status="failed", reason=f"{'first call' if row['first_s'] is None else 'warm-up'} {late}")
        except Exception as error:  # a peer that breaks must not cost the others their measurement
            row.update(status="failed", reason=timing.first_line(error))

    def _warm_up(self, name: str, contestant: Contestant) -> None:
        row = self.rows[name]
        self._wait()
        start = time.perf_counter()
        run = contestant.bind(self.inputs)
        output = run()
        self._wait()
        row["first_s"] = round(time.perf_counter() - start, 4)
        self._check(row, contestant, output)
        if row["status"] != "wrong":
            self.prepared[name] = timing.prepare(run, self.device)
            row["events"] = self.prepared[name].events

    def _check(self, row: dict[str, Any], contestant: Contestant, output: Any) -> None:
        verdict = judge(contestant.read(output), self.want, self.case.tolerance)
        row["error"] = verdict.error if verdict.error < float("inf") else None
        if verdict.reason:
            row.update(status="wrong", reason=verdict.reason)

    def measure(self, ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
        """Times those that are right, and looks once more at what the last timed call gave."""
        with shown("timing"):
            timings = timing.measure(self.prepared, self.options.repeats, self.device, self.options.limit)
        for name, t in timings.items():
            row = self.rows[name]
            self._check(row, self.case.contestants[name], self.prepared[name].output())
            if row["status"] == "wrong":
                row["reason"] += " after timing"
                continue
            gbps, tflops = self.case.bytes / t.median / 1e9, self.case.flops / t.median / 1e12
            best = ceilings.get(f"{self.case.math}_tflops") if self.device.type == "cuda" else ceilings["fp32_tflops"]
            row.update(
                status="timed", repeats=t.repeats, gbps=round(gbps, 2), of_copy=round(gbps / ceilings["copy_gbps"], 4),
                median_us=t.median * 1e6, p20_us=t.p20 * 1e6, p80_us=t.p80 * 1e6,
            )  # fmt: skip
            if t.peak_bytes is not None:
                row["peak_mb"] = round(t.peak_bytes / 2**20, 2)
            if self.case.flops:
                row["tflops"] = round(tflops, 4)
                row["of_math"] = round(tflops / best, 4) if best else None
        return list(self.rows.values())


def run_case(
    op: str, case: Case, device: torch.device, options: argparse.Namespace, slow: set[str], best: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a contestant: its status is "timed", "wrong", "absent" or "failed"."""
    say(f"{op} {case.label}", end="")
    # a compiled forward may not give its buffers to the backward, which "bwd" runs many times
    with timing.side_stream(device), torch._functorch.config.patch(donated_buffer=False):
        rows = Contest(op, case, device, options, slow).measure(best)
    say(lines(rows))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


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


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A case's rows for reading along, below the line it was begun with."""
    text = [""]
    for row in rows:
        if row["status"] == "timed":
            rate = f"{row['tflops']:.1f} TFLOP/s" if row["tflops"] else f"{row['gbps']:.0f} GB/s"
            spread = f"({row['p20_us']:.1f}..{row['p80_us']:.1f})"
            events = f"  [events: {row['events']}]" if row["events"] else ""
            text.append(f"  {row['contestant']:12} {row['median_us']:10.1f} us {spread}  {rate}{events}")
        else:
            text.append(f"  {row['contestant']:12} {row['status']}: {row['reason']}")
    return "\n".join(text)


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
        "kind": "kernels", "date": datetime.date.today().isoformat(), "device": describe(device), "commit": commit(),
        "command": shlex.join(command), "repeats": options.repeats, "cold": options.cold,
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
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (10 if options.quick else 50)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stem = f"{slug(device.type + ' ' + describe(device)['name'])}_{datetime.date.today().isoformat()}_{commit()}"
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
