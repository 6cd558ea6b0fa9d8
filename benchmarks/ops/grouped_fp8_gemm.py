"""Grouped products of fp8 codes: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from minids_kernels import (
    _launch,
    dequantize_blocks,
    dequantize_tiles,
    grouped_fp8_gemm,
    grouped_fp8_gemm_masked,
    grouped_fp8_gemm_reference,
    grouped_fp8_gemm_wgrad,
    grouped_fp8_gemm_wgrad_reference,
    quantize_blocks,
    quantize_segments_transposed,
    quantize_tiles,
)
from torch import Tensor

from benchmarks.ops.grouped_gemm import CPU_SHAPES, EXPERTS, GPU_SHAPES, INNER, SMALL_SHAPE, WIDTH, functional, routed
from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    exact,
    normal,
    sizes,
)

E4M3 = torch.float8_e4m3fn
TOLERANCE = 1e-2  # of the root mean square: bf16 results, and promotions on Hopper's 14-bit partial sums


def _bind_bf16(inputs: Inputs) -> Run:
    """The product of operands widened beforehand."""
    a, a_scale, b, b_scale, offsets = inputs.args
    x = dequantize_tiles(a, a_scale, torch.bfloat16)
    w = torch.stack([dequantize_blocks(*pair, torch.bfloat16) for pair in zip(b, b_scale, strict=True)])
    return lambda: functional(x, w, offsets)


def _bind_deepgemm(inputs: Inputs) -> Run:
    """Its rows of an expert begin at multiples of 128: where ours do not, filling rows in and taking them out again is
    part of what is timed."""
    import deep_gemm

    a, a_scale, b, b_scale, offsets = inputs.args
    a_scale = a_scale.contiguous()
    counts = offsets.diff()
    padded = (counts + 127) // 128 * 128
    groups = torch.arange(len(counts), dtype=torch.int32, device=a.device).repeat_interleave(padded)
    starts = padded.cumsum(0) - padded
    place = torch.arange(len(a), device=a.device) + (starts - offsets[:-1]).repeat_interleave(counts)
    aligned = len(groups) == len(a)
    codes, scales = (x if aligned else x.new_zeros(len(groups), x.shape[1]) for x in (a.view(torch.uint8), a_scale))
    turned = deep_gemm.get_mn_major_tma_aligned_tensor(scales)
    out = torch.empty(len(groups), b.shape[1], dtype=torch.bfloat16, device=a.device)

    def run() -> Tensor:
        rows = turned
        if not aligned:
            codes.index_copy_(0, place, a.view(torch.uint8))
            rows = deep_gemm.get_mn_major_tma_aligned_tensor(scales.index_copy_(0, place, a_scale))
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((codes.view(E4M3), rows), (b, b_scale), out, groups)
        return out if aligned else out.index_select(0, place)

    return run


def _offsets(rows: int, experts: int, ragged: bool, device: torch.device) -> Tensor:
    """Equal loads, or those of routing by independent draws."""
    if not ragged:
        return torch.arange(0, rows + 1, rows // experts, dtype=torch.int32, device=device)
    return routed(rows, experts, device)


def _forward_case(rows: int, n: int, k: int, experts: int, ragged: bool, device: torch.device) -> Case:
    def make() -> Inputs:
        a, a_scale = quantize_tiles(normal(rows, k, device=device, dtype=torch.bfloat16))
        w = [quantize_blocks(normal(n, k, device=device, dtype=torch.bfloat16)) for _ in range(experts)]
        b, b_scale = (torch.stack(parts) for parts in zip(*w, strict=True))
        return Inputs((a, a_scale, b, b_scale, _offsets(rows, experts, ragged, device)))

    return Case(
        name="ragged fwd" if ragged else "fwd",
        shape={"M": rows, "N": n, "K": k, "E": experts},
        dtype=E4M3,
        make=make,
        reference=exact(grouped_fp8_gemm_reference),
        contestants={
            OURS: Contestant(calls(grouped_fp8_gemm), package="minids"),
            "bf16": Contestant(_bind_bf16),
            "deepgemm": Contestant(_bind_deepgemm, package="sgl-deep-gemm", on=("sm_90",)),
        },
        tolerance=TOLERANCE,
        bytes=rows * k + experts * n * k + rows * n * 2,
        flops=2 * rows * n * k,
        math="fp8",
    )


def _wgrad_case(rows: int, n: int, k: int, experts: int, device: torch.device) -> Case:
    def make() -> Inputs:
        offsets = _offsets(rows, experts, True, device)
        dy, x = (normal(rows, width, device=device, dtype=torch.bfloat16) for width in (n, k))
        return Inputs((*quantize_segments_transposed(dy, offsets), *quantize_segments_transposed(x, offsets), offsets))

    return Case(
        name="wgrad",
        shape={"M": rows, "N": n, "K": k, "E": experts},
        dtype=E4M3,
        make=make,
        reference=exact(grouped_fp8_gemm_wgrad_reference),
        contestants={OURS: Contestant(calls(grouped_fp8_gemm_wgrad), package="minids")},
        tolerance=TOLERANCE,
        bytes=rows * (n + k) + experts * n * k * 4,
        flops=2 * rows * n * k,
        math="fp8",
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)
    return [
        *(_forward_case(*shape, ragged, device) for shape in shapes for ragged in (False, True)),
        *(_wgrad_case(*shape, device) for shape in shapes),
    ]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """At V3's gate_up product. Tensor descriptors are tried everywhere; for chips that have none the compiler makes
    pointers of them, and refuses what Hopper's warps do by hand."""

    def forward(shape: Mapping[str, int]) -> Run:
        case = _forward_case(EXPERTS * shape.get("rows", 1), 2 * INNER, WIDTH, EXPERTS, True, device)
        return case.contestants[OURS].bind(case.make())

    def wgrad(shape: Mapping[str, int]) -> Run:
        case = _wgrad_case(EXPERTS * 1024, 2 * INNER, WIDTH, EXPERTS, device)
        return case.contestants[OURS].bind(case.make())

    def quantise(shape: Mapping[str, int]) -> Run:
        x = normal(EXPERTS * 1024, WIDTH, device=device, dtype=torch.bfloat16)
        offsets = _offsets(len(x), EXPERTS, True, device)
        return lambda: quantize_segments_transposed(x, offsets)

    def tiles(by_hand: Sequence[dict[str, int]], shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return [form | dict(STAGES=4, STRIPE=8) for form in by_hand] + combinations(
            TMA=(True, False), BLOCK_P=(64, 128), BLOCK_Q=(64, 128), BLOCK_K=(128,), STRIPE=(8,), STAGES=(3, 4),
            num_warps=(4, 8),
        )  # fmt: skip

    def small(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return combinations(
            TMA=(True, False), BLOCK_P=(64, 128), BLOCK_Q=(16,), BLOCK_K=(128,), STAGES=(3, 4, 5, 6), num_warps=(4, 8)
        )

    return {
        "many": Tuning(forward, partial(tiles, [dict(GROUPS=g, PIECES=p) for g, p in ((2, 1), (2, 2), (3, 1))])),
        "small": Tuning(forward, small),
        "wgrad": Tuning(wgrad, partial(tiles, [dict(GROUPS=2)])),
        "quantize_segments_transposed": Tuning(
            quantise, lambda shape: combinations(COLS=(16, 32, 64, 128), num_warps=(4, 8, 16))
        ),
    }


def _operand(*shape: int, rows: int) -> tuple[Tensor, Tensor]:
    """Codes of `shape` and scales of blocks of `rows` x 128, where rows is 1 as `quantize_tiles` has them."""
    *outer, height, width = shape
    scales = torch.empty(*outer, -(-height // rows), -(-width // 128))
    if rows == 1:
        scales = scales.flatten(0, -2).T.contiguous().T.view(scales.shape)
    return torch.empty(shape, dtype=E4M3), scales


def _forward(tokens: int, out_dtype: torch.dtype) -> None:
    offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    a, b = _operand(tokens, WIDTH, rows=1), _operand(EXPERTS, 2 * INNER, WIDTH, rows=128)
    grouped_fp8_gemm(*a, *b, offsets, out_dtype)


def _masked(rows: int) -> None:
    a, b = _operand(EXPERTS, rows, WIDTH, rows=1), _operand(EXPERTS, 2 * INNER, WIDTH, rows=128)
    out = torch.empty(EXPERTS, rows, 2 * INNER, dtype=torch.bfloat16)
    grouped_fp8_gemm_masked(*a, *b, torch.zeros(EXPERTS, dtype=torch.int32), out, rows)


def _wgrad(tokens: int, add: bool) -> None:
    groups = tokens // 128 + EXPERTS
    a, b = ((torch.empty(n, groups * 128, dtype=E4M3), torch.empty(groups, n).T) for n in (2 * INNER, WIDTH))
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
    calls += [(f"masked M={count}", partial(_masked, count)) for count in (rows if every else rows[-1:])]
    x, offsets = torch.empty(4096, WIDTH, dtype=torch.bfloat16), torch.zeros(EXPERTS + 1, dtype=torch.int32)
    token = torch.zeros(8192, dtype=torch.int64)
    calls.append(("quantise", lambda: quantize_segments_transposed(x, offsets)))
    return [*calls, ("quantise tokens", lambda: quantize_segments_transposed(x, offsets, token))]
