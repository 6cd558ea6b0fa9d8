"""One case among its contestants: who may be timed, and a row for each."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from minids_kernels import _launch

from benchmarks import timing
from benchmarks.protocol import OURS, Absent, Case, Contestant, dtype_name, judge
from benchmarks.watch import TookTooLong, limit, say, shown


def version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # says which build it is, which wheels' metadata may not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def arch(device: torch.device) -> str:
    return _launch.arch(torch.empty(0, device=device)) if device.type == "cuda" else "cpu"


def absence(contestant: Contestant, device: torch.device) -> str:
    """Why it cannot take part here; "" if it can."""
    chip = arch(device)
    if contestant.on and chip not in contestant.on and not ("cuda" in contestant.on and device.type == "cuda"):
        return f"needs {' or '.join(contestant.on)}, this is {chip}"
    if contestant.package != OURS and version(contestant.package) is None:  # ours lies beside this file
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
        if contestant.limit:
            return
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
