"""How long a call takes: on a GPU as a CUDA graph's replay with a cold L2, on a CPU by the clock, contestants in turn;
and what the machine can do at best, measured by the same means.

On a GPU the whole measurement belongs on one side stream (`side_stream`): autograd runs a backward on its forward's
stream, and a graph must be captured on the stream it depends on. Before each replay the L2 is filled by reading a large
buffer: reading, since lines left dirty by writing would be written back at the contestant's expense.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.protocol import Run

WARMUP = 3
HEAD_START = 4  # sums over the flush buffer that keep the GPU busy while the host queues a round's first call
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Seconds: median, 20th and 80th percentile of `repeats` calls; peak_bytes that a call allocates on a GPU."""

    median: float
    p20: float
    p80: float
    repeats: int
    peak_bytes: int | None = None


def summary(seconds: list[float], peak_bytes: int | None = None) -> Timing:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered), peak_bytes
    )


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


@dataclass(frozen=True)
class Prepared:
    """A warmed-up call: `replay()` is what is timed, `output()` what the last replay gave. `run` owns the tensors that
    a graph reads where they lay at its capture. `events`: why it is no graph, "" if it is one or runs on a CPU."""

    run: Run
    replay: Callable[[], Any]
    output: Callable[[], Any]
    events: str = ""
    peak_bytes: int | None = None


def _called(run: Run, events: str = "", peak_bytes: int | None = None) -> Prepared:
    last: list[Any] = [None]

    def replay() -> None:
        last[0] = run()

    return Prepared(run, replay, lambda: last[0], events, peak_bytes)


def prepare(run: Run, device: torch.device, pool: Any = None) -> Prepared:
    """Warms `run` up and, on a GPU, captures it: not where it waits for the GPU, which a graph cannot hold. Graphs of
    one `pool` (torch.cuda.graph_pool_handle) share the memory of what their runs let go."""
    for _ in range(WARMUP):
        run()
    if device.type != "cuda":
        return _called(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _called(run, f"waits for the GPU: {first_line(error)}")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        peak = torch.cuda.max_memory_allocated() - before
    del output
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool, stream=torch.cuda.current_stream()):
            output = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _called(run, f"cannot be captured: {first_line(error)}", peak)
    return Prepared(run, graph.replay, lambda: output, "", peak)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def measure(
    prepared: Mapping[str, Prepared], repeats: int, device: torch.device, limit: float = math.inf
) -> dict[str, Timing]:
    """Times all of them in turn, `repeats` rounds, or as many as begin within `limit` seconds."""
    measured = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    seconds = measured({name: p.replay for name, p in prepared.items()}, rounds(repeats, limit))
    return {name: summary(values, prepared[name].peak_bytes) for name, values in seconds.items()}


def rounds(repeats: int, limit: float) -> Iterator[int]:
    """Counts to `repeats`, but not beyond the first number that `limit` seconds have passed at."""
    end = time.monotonic() + limit
    for index in range(repeats):
        yield index
        if time.monotonic() >= end:
            return


def _cpu_rounds(replays: Mapping[str, Callable[[], Any]], rounds: Iterable[int]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in rounds:
        for name, replay in replays.items():
            start = time.perf_counter()
            replay()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _cuda_rounds(replays: Mapping[str, Callable[[], Any]], rounds: Iterable[int]) -> dict[str, list[float]]:
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.zeros(max(2**28, 4 * l2) // 4, device="cuda")
    seen = torch.empty((), device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in rounds:
        pairs = {}
        for _ in range(HEAD_START):
            torch.sum(flush, dim=0, out=seen)
        for name, replay in replays.items():
            torch.sum(flush, dim=0, out=seen)  # takes long enough for the next three to be queued before it ends
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            pairs[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in pairs.items():
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """copy_gbps: reading and writing a large buffer (1 GiB on a GPU, by a kernel: a graph makes a memcpy of a copy, and
    kernels are quicker than that); <dtype>_tflops: square matmuls (8192 on a GPU); launch_us, on a GPU: the replay of a
    kernel that does next to nothing, which is in every figure."""
    gpu = device.type == "cuda"
    size = GIB if gpu else GIB // 8
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: torch.bitwise_not(source, out=target) if gpu else target.copy_(source)}
    n = 8192 if gpu else 768
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    precision = "bf16" if gpu else "fp32"
    runs[precision] = lambda: a @ b
    if gpu and torch.cuda.get_device_capability() >= (8, 9):
        codes = [x.to(torch.float8_e4m3fn) for x in (a, b)]
        one = torch.ones((), device=device)
        runs["fp8"] = lambda: torch._scaled_mm(
            codes[0], codes[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    if gpu:
        scalar = torch.zeros((), device=device)
        runs["launch"] = lambda: scalar.add_(1)
    timings = measure({name: prepare(run, device) for name, run in runs.items()}, repeats, device)
    found = {f"{name}_tflops": 2 * n**3 / timings[name].median / 1e12 for name in runs if name in (precision, "fp8")}
    found["copy_gbps"] = 2 * size / timings["copy"].median / 1e9
    if gpu:
        found["launch_us"] = timings["launch"].median * 1e6
    return found
