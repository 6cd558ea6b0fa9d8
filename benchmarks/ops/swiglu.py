"""SwiGLU: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, swiglu

DTYPE = torch.bfloat16


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
