"""Plans of rows sorted by expert: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import _launch, moe_plan, moe_plan_reference
from torch import Tensor

from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, Tuning, calls, combinations, compiled, exact, sizes

# tokens, experts, experts a token: V3's layer in training and in decoding, mini models
GPU_SHAPES = [(8192, 256, 8), (32, 256, 8), (16_384, 32, 4)]
CPU_SHAPES, SMALL_SHAPE = [(2048, 8, 2), (2048, 64, 6), (8192, 256, 8)], (128, 16, 2)


def _bound(plan: Callable[..., Any], experts: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda ids: tuple(plan(ids, experts))


def _case(tokens: int, experts: int, top_k: int, device: torch.device) -> Case:
    def make() -> Inputs:
        return Inputs((torch.rand(tokens, experts, device=device).topk(top_k).indices,), ())

    ours, plain = (_bound(plan, experts) for plan in (moe_plan, moe_plan_reference))
    return Case(
        name="plan",
        shape={"M": tokens, "E": experts, "top_k": top_k},
        dtype=torch.int64,
        make=make,
        reference=exact(plain, "fwd"),
        contestants={
            OURS: Contestant(calls(ours, "fwd"), package="minids"),
            "eager": Contestant(calls(plain, "fwd")),
            "compile": Contestant(compiled(plain, "fwd")),
        },
        tolerance=0.0,
        bytes=5 * tokens * top_k * 8,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [_case(*shape, device) for shape in sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def run(shape: Mapping[str, int]) -> Run:
        case = _case(8192, shape["E"], min(8, shape["E"]), device)
        return case.contestants[OURS].bind(case.make())

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return combinations(BLOCK=(64, 128, 256, 512), STEP=(16, 32, 64), num_warps=(2, 4, 8))

    return {"moe_plan": Tuning(run, candidates)}


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: DeepSeek-V3's experts, with `every` at each entry of the table; in one
    block of pairs and in many."""
    experts = {256}
    if every:
        experts |= {entry["shape"]["E"] for entry in _launch.entries("moe_plan", "moe_plan", arch)}
    return [
        (f"E={e} pairs={8 * tokens}", lambda tokens=tokens, e=e: moe_plan(torch.zeros(tokens, 8).long(), e))  # type: ignore[misc]
        for e in sorted(experts, reverse=True)
        for tokens in (1024, 16)
    ]
