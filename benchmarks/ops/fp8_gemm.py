"""fp8_gemm: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import (
    _launch,
    dequantize_blocks,
    dequantize_tiles,
    fp8_gemm,
    fp8_gemm_reference,
    fp8_gemm_wgrad,
    fp8_gemm_wgrad_reference,
    fp8_linear,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_transposed,
)
from torch import Tensor

from benchmarks.protocol import (
    OURS,
    Absent,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    exact,
    normal,
)

K = 7168
E4M3 = torch.float8_e4m3fn


# M, N, K of DeepSeek-V3's layers, for many tokens and for a decoding step's; wgrad's K are tokens
LAYERS = [(2112, 7168), (24_576, 1536), (32_768, 512), (7168, 16_384), (4096, 7168), (7168, 2048)]
GPU_SHAPES = [(m, n, k) for m in (4096, 64, 128) for n, k in LAYERS]
WGRAD_SHAPES = [(4096, 7168, 8192), (7168, 2048, 8192)]
LINEAR_SHAPES = [(8192, 4096, 7168)]
CPU_SHAPES = [(256, 512, 512)]
TOLERANCE = 1e-2  # of the root mean square: bf16 results, and promotions on Hopper's 14-bit partial sums
FP8_TOLERANCE = 0.1  # where contestants quantise themselves, or not at all


def _bf16(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, blocks: bool) -> tuple[Tensor, Tensor]:
    other = dequantize_blocks if blocks else dequantize_tiles
    return dequantize_tiles(a, a_scale, torch.bfloat16), other(b, b_scale, torch.bfloat16)


def _bind_bf16(blocks: bool, out_dtype: torch.dtype) -> Callable[[Inputs], Run]:
    """The product of operands widened beforehand."""

    def bind(inputs: Inputs) -> Run:
        a, b = _bf16(*inputs.args, blocks=blocks)
        if out_dtype == torch.float32 and a.is_cuda:
            return lambda: torch.mm(a, b.T, out_dtype=out_dtype)
        return lambda: torch.mm(a, b.T)

    return bind


def _bind_eager(blocks: bool) -> Callable[[Inputs], Run]:
    def run(inputs: Inputs) -> Tensor:
        a, b = _bf16(*inputs.args, blocks=blocks)
        return torch.mm(a, b.T)

    return lambda inputs: lambda: run(inputs)


def _bind_cublas(blocks: bool, out_dtype: torch.dtype) -> Callable[[Inputs], Run]:
    def bind(inputs: Inputs) -> Run:
        from torch.nn.functional import ScalingType, scaled_mm

        a, a_scale, b, b_scale = inputs.args
        tiles = ScalingType.BlockWise1x128
        left = a_scale.T.contiguous().T  # cuBLAS wants tiles' scales with the long side first
        right = b_scale.T if blocks else b_scale.T.contiguous().T
        recipe = ScalingType.BlockWise128x128 if blocks else tiles
        return lambda: scaled_mm(a, b.T, left, tiles, right, recipe, output_dtype=out_dtype)

    return bind


def _bind_deepgemm(inputs: Inputs) -> Run:
    import deep_gemm

    a, a_scale, b, b_scale = inputs.args
    left = deep_gemm.get_mn_major_tma_aligned_tensor(a_scale.contiguous())
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)

    def run() -> Tensor:
        deep_gemm.fp8_gemm_nt((a, left), (b, b_scale), out)
        return out

    return run


def _bind_torchao(inputs: Inputs) -> Run:
    from torchao.prototype.blockwise_fp8_training.kernels import triton_fp8_gemm_1x128_128x128

    a, a_scale, b, b_scale = inputs.args
    if a.shape[1] % 128 or b.shape[0] % 128:
        raise Absent("takes multiples of 128 only")
    left = a_scale.T.contiguous().T
    return lambda: triton_fp8_gemm_1x128_128x128(a, b.T, left, b_scale.T)


def _bind_deepseek(inputs: Inputs) -> Run:
    from benchmarks.deepseek import fp8_gemm as theirs

    a, a_scale, b, b_scale = inputs.args
    a_scale = a_scale.contiguous()
    return lambda: theirs(a, a_scale, b, b_scale)


def _product(m: int, n: int, k: int, wgrad: bool, device: torch.device) -> Case:
    blocks, out_dtype = not wgrad, torch.float32 if wgrad else torch.bfloat16

    def make() -> Inputs:
        if wgrad:  # of k tokens, as a layer has them
            dy, x = (normal(k, width, device=device, dtype=torch.bfloat16) for width in (m, n))
            return Inputs((*quantize_tiles_transposed(dy), *quantize_tiles_transposed(x)))
        a, b = (normal(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        return Inputs((*quantize_tiles(a), *quantize_blocks(b)))

    ours, reference = (fp8_gemm_wgrad, fp8_gemm_wgrad_reference) if wgrad else (fp8_gemm, fp8_gemm_reference)
    peers = {
        "eager": Contestant(_bind_eager(blocks)),
        "bf16": Contestant(_bind_bf16(blocks, out_dtype)),
        "cublas": Contestant(_bind_cublas(blocks, out_dtype), on=("sm_90",)),
    }
    if not wgrad:
        peers["deepgemm"] = Contestant(_bind_deepgemm, package="sgl-deep-gemm", on=("sm_90",))
        peers["torchao"] = Contestant(_bind_torchao, package="torchao", on=("cuda",))
        peers["deepseek"] = Contestant(_bind_deepseek, package="triton", on=("cuda",))
    return Case(
        name="wgrad" if wgrad else "fwd",
        shape={"M": m, "N": n, "K": k},
        dtype=E4M3,
        make=make,
        reference=exact(reference),
        contestants={OURS: Contestant(calls(ours), package="minids"), **peers},
        tolerance=TOLERANCE,
        bytes=m * k + n * k + m * n * out_dtype.itemsize,
        flops=2 * m * n * k,
        math="fp8",
    )


def _linear(m: int, n: int, k: int, device: torch.device) -> Case:
    def make() -> Inputs:
        x, w, dy = (normal(*s, device=device, dtype=torch.bfloat16) for s in ((m, k), (n, k), (m, n)))
        return Inputs((x, w), (dy,))

    mode = "fwd+bwd"
    return Case(
        name=f"linear {mode}",
        shape={"M": m, "N": n, "K": k},
        dtype=torch.bfloat16,
        make=make,
        reference=exact(F.linear, mode),
        contestants={
            OURS: Contestant(calls(fp8_linear, mode), package="minids"),
            "bf16": Contestant(calls(F.linear, mode)),
        },
        tolerance=FP8_TOLERANCE,
        bytes=3 * 2 * (m * k + n * k + m * n),
        flops=3 * 2 * m * n * k,
        math="fp8",
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cpu":
        forward = wgrad = linear = CPU_SHAPES
    else:
        forward, wgrad, linear = GPU_SHAPES, WGRAD_SHAPES, LINEAR_SHAPES
    if quick:
        forward, wgrad, linear = ([shapes[0]] for shapes in (forward, wgrad, linear))
    return [
        *(_product(*shape, wgrad=False, device=device) for shape in forward),
        *(_product(*shape, wgrad=True, device=device) for shape in wgrad),
        *(_linear(*shape, device=device) for shape in linear),
    ]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """At V3's width. Tensor descriptors are tried everywhere: chips that have none refuse."""

    def bind(wgrad: bool) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            case = _product(shape["M"], shape["N"], shape.get("K", K), wgrad, device)
            return case.contestants[OURS].bind(case.make())

        return run

    def candidates(wgrad: bool, shape: Mapping[str, int]) -> list[dict[str, Any]]:
        common: dict[str, Any] = dict(BLOCK_K=(128,), STRIPE=(8,))
        if shape["M"] <= 128:
            common |= dict(BLOCK_P=(64,), STAGES=(4, 6), num_warps=(4,))
            parts: dict[str, Any] = dict(TMA=(True,), PARTS=(1, 2, 4), **common)  # pointers know none
            swapped: dict[str, Any] = dict(SWAP=(True,), BLOCK_Q=(max(16, min(64, shape["M"])),))
            pointers = combinations(TMA=(False,), **swapped, **common)
            return pointers + combinations(**swapped, **parts) + combinations(BLOCK_Q=(32, 64, 128), **parts)
        by_hand = [
            dict(GROUPS=groups, PIECES=pieces, STAGES=6 if wgrad else 4, STRIPE=8)
            for groups, pieces in ((2, 1), (2, 2), *(() if wgrad else ((3, 1),)))
        ]
        return by_hand + combinations(
            TMA=(True, False), BLOCK_P=(64, 128), BLOCK_Q=(64, 128), STAGES=(3, 4), num_warps=(4, 8), **common
        )

    return {
        table: Tuning(bind(wgrad), partial(candidates, wgrad))
        for table, wgrad in (("fp8_gemm", False), ("fp8_gemm_wgrad", True))
    }


def _forward(m: int, n: int, out_dtype: torch.dtype) -> None:
    groups = K // 128
    a, b = torch.empty(m, K, dtype=E4M3), torch.empty(n, K, dtype=E4M3)
    fp8_gemm(a, torch.empty(groups, m).T, b, torch.empty(-(-n // 128), groups), out_dtype)


def _wgrad(m: int, n: int, add: bool) -> None:
    groups = K // 128
    a, b = torch.empty(m, K, dtype=E4M3), torch.empty(n, K, dtype=E4M3)
    fp8_gemm_wgrad(a, torch.empty(groups, m).T, b, torch.empty(groups, n).T, torch.empty(m, n) if add else None)


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot at DeepSeek-V3's width: the largest entry of each launch table, with
    `every` all of them, in two forms."""
    calls: list[tuple[str, Callable[[], Any]]] = []
    for table, run, forms in (
        ("fp8_gemm", _forward, {"bf16": torch.bfloat16, "fp32": torch.float32}),
        ("fp8_gemm_wgrad", _wgrad, {"added": True, "written": False}),
    ):
        for entry in reversed(_launch.entries("fp8_gemm", table, arch)):
            m, n = entry["shape"]["M"], entry["shape"].get("N", 4096)
            for name, form in forms.items() if every else [*forms.items()][:1]:
                calls.append((f"{table} M={m} N={n} {name}", partial(run, m, n, form)))
    return calls
