"""SwiGLU: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import _launch, swiglu, swiglu_reference
from torch import Tensor

from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    compiled,
    exact,
    normal,
    precision,
    sizes,
)

DTYPE = torch.bfloat16

# tokens and inner width: V3's experts and dense layers, mini models
GPU_SHAPES, CPU_SHAPES = [(8192, 2048), (4096, 18_432), (128, 2048)], [(2048, 768), (4096, 128)]
SMALL_SHAPE = (256, 128)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a few roundings of the dtype


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def liger(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


def _case(rows: int, width: int, dtype: torch.dtype, mode: str, device: torch.device) -> Case:
    def make() -> Inputs:
        douts = () if mode == "fwd" else (normal(rows, width, device=device, dtype=dtype),)
        return Inputs((normal(rows, 2 * width, device=device, dtype=dtype),), douts)

    passes = {"fwd": 3, "bwd": 5, "fwd+bwd": 8}[mode]  # gate, up, y; dy, gate, up, dgate, dup
    return Case(
        name=mode,
        shape={"M": rows, "N": width},
        dtype=dtype,
        make=make,
        reference=exact(swiglu_reference, mode),
        contestants={
            OURS: Contestant(calls(swiglu, mode), package="minids"),
            "eager": Contestant(calls(eager, mode)),
            "compile": Contestant(compiled(eager, mode)),
            "liger": Contestant(calls(liger, mode), package="liger-kernel", on=("cuda",)),
        },
        tolerance=TOLERANCE[dtype],
        bytes=passes * rows * width * dtype.itemsize,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [_case(*shape, dtype, mode, device) for shape in shapes for mode in ("fwd", "bwd", "fwd+bwd")]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def bind(mode: str) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            width = shape["N"]
            rows = max(256, 2**24 // width)  # 64 MiB of gate_up, more than any L2 holds together with the output
            gate_up, dy = (normal(rows, n, device=device, dtype=DTYPE) for n in (2 * width, width))
            return calls(swiglu, mode)(Inputs((gate_up,), (dy,)))

        return run

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        grid = combinations(ROWS=(1, 2, 4, 8, 16), BLOCK_N=(64, 128, 256, 512, 1024, 2048, 4096), num_warps=(2, 4, 8))
        return [c for c in grid if c["BLOCK_N"] < 2 * shape["N"] and 512 <= c["ROWS"] * c["BLOCK_N"] <= 8192]

    return {"swiglu_fwd": Tuning(bind("fwd"), candidates), "swiglu_bwd": Tuning(bind("bwd"), candidates)}


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at the width of DeepSeek-V3's experts, with `every` at each width of the
    tables."""
    widths = {2048}
    if every:
        for kernel in ("swiglu_fwd", "swiglu_bwd"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("swiglu", kernel, arch)}

    def both(width: int) -> None:
        gate_up = torch.empty(256, 2 * width, dtype=DTYPE).requires_grad_()
        swiglu(gate_up).backward(torch.empty(256, width, dtype=DTYPE))

    return [(f"F={width}", lambda width=width: both(width)) for width in sorted(widths)]  # type: ignore[misc]
