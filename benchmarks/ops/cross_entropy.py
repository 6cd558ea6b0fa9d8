"""Cross-entropy of a linear head: what to time, what to tune, what to compile ahead of time, and the CPU's memory.

    python -m benchmarks.ops.cross_entropy [--shape 2048 6400 256] [--repeats 20]

times ours and eager PyTorch in turn on the CPU, forward and backward in fp32, and prints one JSON object with the peaks
of allocated memory and the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import _launch, linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.protocol import (
    OURS,
    Absent,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    compiled,
    exact,
    normal,
    precision,
    sizes,
)

DTYPE = torch.bfloat16

# tokens, vocabulary, width: V3's head, a 1B model's, a mini model's, ragged
GPU_SHAPES = [(8192, 129_280, 7168), (4096, 129_280, 2048), (16_384, 6400, 512), (4099, 32_003, 1024)]
CPU_SHAPES = [(2048, 6400, 256), (511, 32_003, 128)]
SMALL_SHAPE = (256, 1000, 64)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # a few roundings of the dtype, on logits and on gradients


def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), targets)


def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, reduction="mean")


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(x, weight, targets).mean()


def functional(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own in chunks, which 2.13 has."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)[0]


def fla(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return fused_linear_cross_entropy_loss(x, targets, weight)


def inputs(tokens: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device, mode: str) -> Inputs:
    """Logits are N(0, 1); the loss is a mean."""
    x = normal(tokens, width, device=device, dtype=dtype)
    weight = (torch.randn(vocab, width, device=device) / math.sqrt(width)).to(dtype)
    targets = torch.randint(vocab, (tokens,), device=device)
    return Inputs((x, weight, targets), () if mode == "fwd" else (torch.ones((), device=device),))


def _case(tokens: int, vocab: int, width: int, dtype: torch.dtype, mode: str, device: torch.device) -> Case:
    products, passes = (1, 1) if mode == "fwd" else (3, 2)  # of x and weight: read, and their gradients written
    return Case(
        name=mode,
        shape={"M": tokens, "N": vocab, "K": width},
        dtype=dtype,
        make=lambda: inputs(tokens, vocab, width, dtype, device, mode),
        reference=exact(reference, mode),
        contestants={
            OURS: Contestant(calls(ours, mode), package="minids"),
            "eager": Contestant(calls(eager, mode)),
            "compile": Contestant(compiled(eager, mode)),
            "F.linear_cross_entropy": Contestant(calls(functional, mode)),
            "liger": Contestant(calls(liger, mode), package="liger-kernel", on=("cuda",)),
            "fla": Contestant(calls(fla, mode), package="fla-core", on=("cuda",)),
        },
        tolerance=TOLERANCE[dtype],
        bytes=passes * (tokens + vocab) * width * dtype.itemsize,
        flops=products * 2 * tokens * vocab * width,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [_case(*shape, dtype, mode, device) for shape in shapes for mode in ("fwd", "fwd+bwd")]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """The kernels alone, on a chunk of C logits a token of a vocabulary twice as large."""
    room = importlib.import_module("minids_kernels.cross_entropy")

    def chunk(columns: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = max(256, 2**26 // columns)  # 128 MiB, more than any L2 holds
        logits = normal(rows, columns, device=device, dtype=DTYPE)
        return logits, torch.randint(columns, (rows,), device=device), logits.float().logsumexp(-1)

    def statistics_of(shape: Mapping[str, int]) -> Run:
        logits, targets, lse = chunk(shape["C"])
        loss, found = torch.zeros_like(lse), torch.zeros_like(lse)
        state = lse.new_zeros(lse.shape[0], 4)

        def run() -> Tensor:
            room._triton_statistics(logits, targets, state, loss, found, 0, shape["C"], -100, 0.0, 0.0)
            return loss

        return run

    def gradient_of(shape: Mapping[str, int]) -> Run:
        logits, targets, lse = chunk(shape["C"])
        dloss = torch.rand_like(lse)

        def run() -> Tensor:
            grad = logits.clone()
            room._triton_gradient(grad, targets, lse, dloss, 0, shape["C"], -100, 0.0, 0.0)
            return grad

        return run

    def both_of(shape: Mapping[str, int]) -> Run:
        """Beside the statistics the gradient, of rows that are made anew."""
        logits, targets, lse = chunk(shape["C"])
        loss = torch.empty_like(lse)

        def run() -> Tensor:
            grad = logits.clone()
            room._triton_losses(grad, targets, loss, lse, -100, 0.0, 0.0)
            return grad

        return run

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return [
            dict(BLOCK_V=block, num_warps=warps)
            for block in (512, 1024, 2048, 4096, 8192, 16_384)
            if block < 2 * shape["C"]
            for warps in (1, 2, 4, 8, 16)
            if 8 <= block // (32 * warps) <= 64
        ]

    return {
        "cross_entropy": Tuning(both_of, candidates),
        "cross_entropy_statistics": Tuning(statistics_of, candidates),
        "cross_entropy_gradient": Tuning(gradient_of, candidates),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: chunks as wide as DeepSeek-V3's, with `every` all widths of the tables,
    a vocabulary that ends in an odd column, and fp32."""
    columns = {7168}
    if every:
        for kernel in ("cross_entropy", "cross_entropy_statistics", "cross_entropy_gradient"):
            columns |= {entry["shape"]["C"] for entry in _launch.entries("cross_entropy", kernel, arch)}

    def both(vocab: int, dtype: torch.dtype, smoothing: float) -> None:
        """Each token's loss, in one chunk of the vocabulary, and their sum."""
        targets = torch.zeros(2, dtype=torch.int64)
        x, weight = (torch.empty(n, vocab, dtype=dtype).requires_grad_() for n in (2, vocab))
        linear_cross_entropy(x, weight, targets, label_smoothing=smoothing).sum().backward()
        x, weight = (torch.empty(n, 16, dtype=dtype).requires_grad_() for n in (2, vocab))
        linear_cross_entropy(x, weight, targets, label_smoothing=smoothing, reduction="sum")

    variants = [(DTYPE, 0.0, 0), *([(DTYPE, 0.1, 0), (DTYPE, 0.0, 1), (torch.float32, 0.0, 0)] if every else [])]
    return [
        (
            f"C={width + odd} {str(dtype).removeprefix('torch.')}{' smoothed' if smoothing else ''}",
            lambda width=width, odd=odd, dtype=dtype, smoothing=smoothing: both(width + odd, dtype, smoothing),  # type: ignore[misc]
        )
        for width in sorted(columns)
        for dtype, smoothing, odd in variants
    ]


def peak_bytes(run: Run) -> int:
    """The most memory that `run` holds at once on the CPU beyond what was there, results included, from the profiler's
    record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = run()
    del output
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=CPU_SHAPES[0], metavar=("T", "V", "D"))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens, vocab, width = options.shape
    given = inputs(tokens, vocab, width, torch.float32, torch.device("cpu"), "fwd+bwd")
    runs = {name: calls(fn, "fwd+bwd")(given) for name, fn in ((OURS, ours), ("eager", eager))}
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / own for own, theirs in zip(seconds[OURS], seconds["eager"], strict=True)]
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": options.shape,
        "peak_mb": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "median_ms": {name: round(statistics.median(values) * 1e3, 2) for name, values in seconds.items()},
        "fastest_ms": {name: round(min(values) * 1e3, 2) for name, values in seconds.items()},
        "share_of_eagers_peak": round(peaks[OURS] / peaks["eager"], 3),
        "times_as_fast_as_eager": round(statistics.median(ratios), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
