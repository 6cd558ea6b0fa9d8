"""Grouped matrix products: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import _launch, grouped_gemm, grouped_gemm_reference
from minids_kernels.grouped_gemm import grouped_mm, grouped_outer
from torch import Tensor

from benchmarks import unsloth_moe
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
    precision,
    sizes,
)

DTYPE = torch.bfloat16
EXPERTS, WIDTH, INNER = 8, 7168, 2048  # DeepSeek-V3's, on one of 32 devices


# rows in all, output columns, K, experts: V3's two products on one of 32 and one of 8 devices, decoding, mini models
GPU_SHAPES = [
    (8192, 4096, 7168, 8), (8192, 7168, 2048, 8), (8192, 4096, 7168, 32), (8192, 7168, 2048, 32), (256, 4096, 7168, 32),
]  # fmt: skip
# launches of the kernels by hand, which no table has before they were measured
BY_HAND = [
    dict(BLOCK_N=columns, DEPTH=depth, PIECES=pieces, STAGES=8, STRIPE=8)
    for columns, depth, pieces in ((256, 64, 2), (256, 64, 1), (256, 64, 4), (256, 32, 2), (128, 64, 1))
]
CPU_SHAPES = [(4096, 256, 256, 8), (4096, 256, 128, 8), (4096, 256, 256, 64)]
SMALL_SHAPE = (256, 64, 64, 8)


def loop(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    return torch.cat([x[bounds[e] : bounds[e + 1]] @ w[e].T for e in range(w.shape[0])])


def functional(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])


def routed(rows: int, experts: int, device: torch.device) -> Tensor:
    """Offsets int32 [E + 1] of `rows` rows whose experts were drawn independently."""
    drawn = torch.randint(experts, (rows,), device=device)
    counts = drawn.new_zeros(experts).scatter_add_(0, drawn, torch.ones_like(drawn))
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _case(rows: int, n: int, k: int, experts: int, dtype: torch.dtype, mode: str, device: torch.device) -> Case:
    """Experts' loads as of routing by independent draws."""

    def make() -> Inputs:
        x, w = normal(rows, k, device=device, dtype=dtype), normal(experts, n, k, device=device, dtype=dtype)
        return Inputs(
            (x, w, routed(rows, experts, device)),
            () if mode == "fwd" else (normal(rows, n, device=device, dtype=dtype),),
        )

    elements = rows * k + experts * n * k + rows * n
    return Case(
        name=mode,
        shape={"M": rows, "N": n, "K": k, "E": experts},
        dtype=dtype,
        make=make,
        reference=exact(grouped_gemm_reference, mode),
        contestants={
            OURS: Contestant(calls(grouped_gemm, mode), package="minids"),
            "eager": Contestant(calls(loop, mode)),
            "F.grouped_mm": Contestant(calls(functional, mode)),
            "unsloth": Contestant(partial(unsloth_moe.bind, mode=mode), package="unsloth", on=("cuda",)),
        },
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,  # of the root mean square: roundings of the dtype
        bytes=(1 if mode == "fwd" else 3) * elements * dtype.itemsize,
        flops=(1 if mode == "fwd" else 3) * 2 * rows * n * k,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [_case(*shape, dtype, mode, device) for shape in shapes for mode in ("fwd", "fwd+bwd")]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """Of the tables for half precision: V3's gate_up product, or as wide as the entry says; the other tables are for
    what nobody should be using. Tensor descriptors are tried everywhere; for chips that have none the compiler makes
    pointers of them."""

    def bind(mode: str) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            rows = EXPERTS * shape.get("rows", 1 if mode == "fwd" else 1024)
            # an entry names one width, K of a product or M of a gradient: the other follows where it is less than V3's
            n = shape.get("M", min(2 * INNER, 2 * shape.get("K", WIDTH)))
            k = shape.get("K", WIDTH if n == 2 * INNER else n)
            case = _case(rows, n, k, EXPERTS, DTYPE, mode, device)
            inputs = case.make()
            return calls(grouped_gemm, mode)(inputs)

        return run

    by_hand = BY_HAND if _launch.arch(torch.empty(0, device=device)) == "sm_90" else []

    def many(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        heights = (64, 128) if shape["rows"] > 64 else (16, 32, 64)
        return by_hand + combinations(
            TMA=(True, False), BLOCK_M=heights, BLOCK_N=(128, 256), BLOCK_K=(64, 128), GROUP=(8,), num_warps=(4, 8),
            num_stages=(3, 4, 5),
        )  # fmt: skip

    def small(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return combinations(BLOCK_N=(64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8), num_stages=(3, 4, 5))

    def outer(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        # of fewer tiles than multiprocessors the rows are shared out, by the kernel of any chip
        return (by_hand if shape["M"] >= 2048 else []) + combinations(
            TMA=(True, False), BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_T=(32, 64, 128), GROUP=(8,),
            num_warps=(4, 8), num_stages=(3, 4, 5),
        )  # fmt: skip

    return {
        "many": Tuning(bind("fwd"), many),
        "small": Tuning(bind("fwd"), small),
        "outer": Tuning(bind("bwd"), outer),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: forward and both gradients, of tokens' rows as well, of DeepSeek-V3's
    gate_up product with many rows and with decoding's few; for sm_90 those by hand, too; with `every` at each entry of
    the tables and by hand each that may become one, also those for widths that are no multiples of 16."""
    sizes = {(512, WIDTH)}  # rows an expert, and K
    if every:
        shapes = [entry["shape"] for entry in _launch.entries("grouped_gemm", "many", arch)]
        sizes |= {(shape["rows"], shape.get("K", WIDTH)) for shape in shapes}

    def both(tokens: int, width: int) -> None:
        x = torch.empty(tokens, width, dtype=DTYPE).requires_grad_()
        w = torch.empty(EXPERTS, 2 * INNER, width, dtype=DTYPE).requires_grad_()
        offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
        y = grouped_gemm(x, w, offsets)
        y.backward(torch.empty_like(y))
        x, w, y, token = x.detach(), w.detach(), y.detach(), torch.zeros(tokens, dtype=torch.int64)
        grouped_mm(x, w, offsets, token)
        narrow = y[:, :512]  # tokens' rows that meet more columns are copied
        grouped_outer(x, narrow, offsets, a_token=token)
        grouped_outer(narrow, x, offsets, b_token=token)
        many = torch.empty(8192, 256, dtype=DTYPE)  # rows of few tiles, which are summed in parts
        grouped_outer(many, many, offsets)

    def by_hand(config: Mapping[str, int]) -> None:
        from minids_kernels._grouped_gemm_hopper import grouped, outer

        tokens, inner = 512 * EXPERTS, 2 * INNER
        x, y = torch.empty(tokens, WIDTH, dtype=DTYPE), torch.empty(tokens, inner, dtype=DTYPE)
        w, offsets = torch.empty(EXPERTS, inner, WIDTH, dtype=DTYPE), torch.zeros(EXPERTS + 1, dtype=torch.int32)
        token, out, weight = torch.zeros(tokens, dtype=torch.int64), y[:, :INNER].contiguous(), torch.empty(tokens)
        for rows in (None, token):
            grouped(x, rows, w, offsets, y, None, **config)
            grouped(y, rows, w.transpose(1, 2), offsets, x, None, **config)
        for kept in (y, y[:0]):
            grouped(x, token, w, offsets, kept, (weight, token, out), **config)
        for dtype in (DTYPE, torch.float32):
            outer(y, x, offsets, torch.empty_like(w, dtype=dtype), **config)

    cases = [(count * EXPERTS, width) for count, width in sorted(sizes, reverse=True)] + [(8, WIDTH)]
    if every:
        cases += [(512 * EXPERTS, WIDTH - 8), (8, WIDTH - 8)]
    hand = [] if arch != "sm_90" else BY_HAND if every else BY_HAND[:1]
    return [
        (f"T={tokens} K={width}", lambda tokens=tokens, width=width: both(tokens, width))  # type: ignore[misc]
        for tokens, width in cases
    ] + [("by hand", lambda config=config: by_hand(config)) for config in hand]  # type: ignore[misc]
