"""Mixture of experts: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, moe_experts

DTYPE = torch.bfloat16
EXPERTS, TOP_K = 8, 2


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at the widths of DeepSeek-V3's layer, with `every` at each width of the
    tables."""
    widths = {(7168, 2048)}
    if every:
        for kernel in ("activate", "activate_backward", "combine"):
            widths |= {(w, w) for w in (entry["shape"]["N"] for entry in _launch.entries("moe", kernel, arch))}

    def both(width: int, inner: int) -> None:
        x = torch.empty(128, width, dtype=DTYPE).requires_grad_()
        ids = torch.zeros(128, TOP_K, dtype=torch.int64)
        weight = torch.empty(128, TOP_K).requires_grad_()
        w_gate_up = torch.empty(EXPERTS, 2 * inner, width, dtype=DTYPE).requires_grad_()
        w_down = torch.empty(EXPERTS, width, inner, dtype=DTYPE).requires_grad_()
        moe_experts(x, ids, weight, w_gate_up, w_down).backward(torch.empty(128, width, dtype=DTYPE))

    return [
        (f"D={width} F={inner}", lambda width=width, inner=inner: both(width, inner))  # type: ignore[misc]
        for width, inner in sorted(widths, reverse=True)
    ]
