"""DeepSeek-V3's gate: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import _launch, moe_gate, moe_gate_reference
from torch import Tensor

from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, Tuning, calls, combinations, compiled, exact, sizes

# tokens, experts, experts a token, groups, groups a token: V3's layer, one group, mini models
GPU_SHAPES = [(8192, 256, 8, 8, 4), (128, 256, 8, 8, 4), (8192, 64, 6, 1, 1)]
CPU_SHAPES, SMALL_SHAPE = [(2048, 8, 2, 1, 1), (2048, 64, 6, 1, 1), (2048, 256, 8, 8, 4)], (128, 16, 2, 4, 2)
SCALE = 2.5  # V3's routed_scaling_factor


def _bound(
    gate: Callable[..., Any], top_k: int, groups: int, topk_group: int, bias: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, scores = gate(logits, bias, top_k, groups, topk_group, True, SCALE)
        return weight, scores

    return run


def _case(tokens: int, experts: int, top_k: int, groups: int, topk_group: int, mode: str, device: torch.device) -> Case:
    def make() -> Inputs:
        logits, dscores = torch.randn(2, tokens, experts, device=device)
        return Inputs((logits,), () if mode == "fwd" else (torch.randn(tokens, top_k, device=device), dscores))

    bias = torch.linspace(-0.1, 0.1, experts, device=device)
    ours, plain = (_bound(gate, top_k, groups, topk_group, bias) for gate in (moe_gate, moe_gate_reference))
    return Case(
        name=mode,
        shape={"M": tokens, "E": experts, "top_k": top_k, "groups": groups},
        dtype=torch.float32,
        make=make,
        reference=exact(plain, mode),
        contestants={
            OURS: Contestant(calls(ours, mode), package="minids"),
            "eager": Contestant(calls(plain, mode)),
            "compile": Contestant(compiled(plain, mode)),
        },
        tolerance=1e-5,
        bytes=(2 if mode == "fwd" else 5) * tokens * experts * 4,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)
    return [_case(*shape, mode, device) for shape in shapes for mode in ("fwd", "fwd+bwd")]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def bind(mode: str) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            experts = shape["E"]
            groups, topk_group = (8, 4) if experts >= 64 else (1, 1)
            case = _case(8192, experts, min(8, experts // 2), groups, topk_group, mode, device)
            return case.contestants[OURS].bind(case.make())

        return run

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        grid = combinations(ROWS=(1, 2, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8))
        return [c for c in grid if 128 <= c["ROWS"] * shape["E"] <= 4096]

    return {"moe_gate": Tuning(bind("fwd"), candidates), "moe_gate_bwd": Tuning(bind("bwd"), candidates)}


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: DeepSeek-V3's gate, with `every` at each entry of the tables."""
    shapes = {(256, 8, 8, 4)}
    if every:
        for entry in _launch.entries("moe_gate", "moe_gate", arch):
            experts = entry["shape"]["E"]
            shapes |= {(experts, min(8, experts // 2), 1, 1), (experts, 2, 4, 2)}

    def both(experts: int, top_k: int, groups: int, topk_group: int) -> None:
        logits = torch.empty(64, experts).requires_grad_()
        _, weight, scores = moe_gate(logits, torch.zeros(experts), top_k, groups, topk_group)
        torch.autograd.backward((weight, scores), (torch.empty_like(weight), torch.empty_like(scores)))

    return [
        (f"E={shape[0]} top_k={shape[1]} groups={shape[2]}", lambda shape=shape: both(*shape))  # type: ignore[misc]
        for shape in sorted(shapes, reverse=True)
    ]
