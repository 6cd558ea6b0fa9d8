"""RMSNorm with quantisation: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import _launch, dequantize_tiles, rms_norm_quant, rms_norm_quant_reference
from torch import Tensor

from benchmarks.ops import fp8_quant, rms_norm
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
    normal,
    sizes,
)

DTYPE = torch.bfloat16
TOLERANCE = 3e-2  # peers round to bf16 before they quantise: some 3 codes in 100 are neighbours, 1/16 to 1/8 away

# rows and columns: V3's hidden size and a latent's, mini models; torchao wants 128s
GPU_SHAPES, CPU_SHAPES = [(4096, 7168), (16_384, 7168), (128, 7168), (4096, 1536)], [(4096, 1024), (2048, 256)]
SMALL_SHAPE = (256, 512)


def ours(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return rms_norm_quant(x, weight, rms_norm.EPS, residual)


def in_turn(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """The sum, its norm and the norm's quantisation, one after the other."""

    def run(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        return *quantise(rms_norm.eager(total, weight)), total

    return run


def read(output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    codes, scales, total = output
    return dequantize_tiles(codes, scales, torch.float32), total


def _case(rows: int, columns: int, device: torch.device) -> Case:
    def make() -> Inputs:
        x, residual = (normal(rows, columns, device=device, dtype=DTYPE) for _ in range(2))
        return Inputs((x, normal(columns, device=device, dtype=DTYPE), residual))

    def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, weight, residual = inputs.args
        return read(rms_norm_quant_reference(x, weight, rms_norm.EPS, residual))

    plain = in_turn(fp8_quant.eager(1, 128))
    return Case(
        name="residual fwd",
        shape={"M": rows, "N": columns},
        dtype=DTYPE,
        make=make,
        reference=reference,
        contestants={
            OURS: Contestant(calls(ours), package="minids", read=read),
            "eager": Contestant(calls(plain), read=read),
            "compile": Contestant(compiled(plain), read=read),
            "torchao": Contestant(
                calls(in_turn(fp8_quant.torchao("act_quant_lhs"))), package="torchao", on=("cuda",), read=read
            ),
        },
        tolerance=TOLERANCE,
        bytes=rows * columns * (3 * DTYPE.itemsize + 1),  # x, residual, their sum, codes
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [_case(*shape, device) for shape in sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def bind(transposed: bool) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            columns = shape["N"]
            rows = max(256, 2**25 // columns)  # 64 MiB, more than any L2 holds together with the output
            x, weight = (normal(*size, device=device, dtype=DTYPE) for size in ((rows, columns), (columns,)))
            return lambda: rms_norm_quant(x, weight, transposed=transposed)

        return run

    def rows(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        grid = combinations(ROWS=(1, 2, 4, 8, 16, 32), num_warps=(2, 4, 8, 16))
        return [c for c in grid if 512 <= c["ROWS"] * shape["N"] <= 32_768]

    return {
        "rms_norm_quant": Tuning(bind(False), rows),
        "rms_norm_quant_transposed": Tuning(
            bind(True), lambda shape: combinations(COLS=(16, 32, 64, 128), num_warps=(4, 8, 16))
        ),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168, 32_768}
    if every:
        for kernel in ("rms_norm_quant", "rms_norm_quant_transposed"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("rms_norm_quant", kernel, arch)}

    def call(width: int, fused: bool, scale_format: Any) -> None:
        x, residual = torch.empty(2, 256, width, dtype=DTYPE)
        weight = torch.empty(width, dtype=DTYPE)
        rms_norm_quant(x, weight, 1e-6, residual if fused else None, scale_format, transposed=True)

    return [
        (
            f"N={width}{' + residual' if fused else ''} {scale_format}",
            lambda width=width, fused=fused, scale_format=scale_format: call(width, fused, scale_format),  # type: ignore[misc]
        )
        for width in sorted(widths)
        for fused, scale_format in ((True, "fp32"), (False, "ue8m0"))
    ]
