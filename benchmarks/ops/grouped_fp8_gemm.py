"""Grouped products of fp8 codes: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from minids_kernels import (
    _launch,
    dequantize_blocks,
    dequantize_tiles,
    grouped_fp8_gemm,
    grouped_fp8_gemm_reference,
    grouped_fp8_gemm_wgrad,
    quantize_blocks,
    quantize_segments_transposed,
    quantize_tiles,
)
from torch import Tensor

from benchmarks.ops.grouped_gemm import CPU_SHAPES, EXPERTS, GPU_SHAPES, INNER, WIDTH, functional
from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, calls, exact, normal

E4M3 = torch.float8_e4m3fn
TOLERANCE = 1e-2  # of the root mean square: bf16 results, and promotions on Hopper's 14-bit partial sums


def _bind_bf16(inputs: Inputs) -> Run:
    """The product of operands widened beforehand."""
    a, a_scale, b, b_scale, offsets = inputs.args
    x = dequantize_tiles(a, a_scale, torch.bfloat16)
    w = torch.stack([dequantize_blocks(*pair, torch.bfloat16) for pair in zip(b, b_scale, strict=True)])
    return lambda: functional(x, w, offsets)


def _case(rows: int, n: int, k: int, experts: int, device: torch.device) -> Case:
    """Experts' loads as of routing by independent draws."""

    def make() -> Inputs:
        a, a_scale = quantize_tiles(normal(rows, k, device=device, dtype=torch.bfloat16))
        w = [quantize_blocks(normal(n, k, device=device, dtype=torch.bfloat16)) for _ in range(experts)]
        b, b_scale = (torch.stack(parts) for parts in zip(*w, strict=True))
        counts = torch.bincount(torch.randint(experts, (rows,), device=device), minlength=experts)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return Inputs((a, a_scale, b, b_scale, offsets))

    return Case(
        name="fwd",
        shape={"M": rows, "N": n, "K": k, "E": experts},
        dtype=E4M3,
        make=make,
        reference=exact(grouped_fp8_gemm_reference),
        contestants={
            OURS: Contestant(calls(grouped_fp8_gemm), package="minids"),
            "bf16": Contestant(_bind_bf16),
        },
        tolerance=TOLERANCE,
        bytes=rows * k + experts * n * k + rows * n * 2,
        flops=2 * rows * n * k,
        math="fp8",
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [_case(*shape, device) for shape in (shapes[:1] if quick else shapes)]


def _operand(*shape: int, rows: int) -> tuple[Tensor, Tensor]:
    """Codes of `shape` and scales of blocks of `rows` x 128."""
    *outer, height, width = shape
    return torch.empty(shape, dtype=E4M3), torch.empty(*outer, -(-height // rows), -(-width // 128))


def _forward(tokens: int, out_dtype: torch.dtype) -> None:
    offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    a, b = _operand(tokens, WIDTH, rows=1), _operand(EXPERTS, 2 * INNER, WIDTH, rows=128)
    grouped_fp8_gemm(*a, *b, offsets, out_dtype)


def _wgrad(tokens: int, add: bool) -> None:
    columns = (tokens // 128 + EXPERTS) * 128
    a, b = _operand(2 * INNER, columns, rows=1), _operand(WIDTH, columns, rows=1)
    out = torch.empty(EXPERTS, 2 * INNER, WIDTH) if add else None
    grouped_fp8_gemm_wgrad(*a, *b, torch.zeros(EXPERTS + 1, dtype=torch.int32), out)


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: DeepSeek-V3's gate_up product with many rows, few, and decoding's, its
    weight gradient and the quantisation before it; with `every` at each entry of the tables, in two forms."""
    rows = [entry["shape"]["rows"] for entry in _launch.entries("grouped_fp8_gemm", "many", arch)]
    counts = [*(count * EXPERTS for count in reversed(rows)), *((8, 32) if every else (8,))]
    calls: list[tuple[str, Callable[[], Any]]] = []
    for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
        calls += [(f"T={tokens} {dtype}", partial(_forward, tokens, dtype)) for tokens in counts]
    for add in (True, False) if every else (True,):
        calls.append((f"wgrad {'added' if add else 'written'}", partial(_wgrad, 4096, add)))
    x, offsets = torch.empty(4096, WIDTH, dtype=torch.bfloat16), torch.zeros(EXPERTS + 1, dtype=torch.int32)
    return [*calls, ("quantise", lambda: quantize_segments_transposed(x, offsets))]
