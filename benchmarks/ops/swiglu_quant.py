"""SwiGLU with quantisation: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, swiglu_backward_quant, swiglu_quant

DTYPE = torch.bfloat16


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at the width of DeepSeek-V3's experts, with `every` at each width of the
    tables."""
    widths = {2048}
    if every:
        for kernel in ("swiglu_quant", "swiglu_backward_quant"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("swiglu_quant", kernel, arch)}

    def both(width: int, scale_format: Any) -> None:
        gate_up, dy = torch.empty(256, 2 * width, dtype=DTYPE), torch.empty(256, width, dtype=DTYPE)
        swiglu_quant(gate_up, scale_format)
        swiglu_backward_quant(dy, gate_up, scale_format)

    return [
        (f"F={width} {scale_format}", lambda width=width, scale_format=scale_format: both(width, scale_format))  # type: ignore[misc]
        for width in sorted(widths)
        for scale_format in ("fp32", "ue8m0")
    ]
