"""RMSNorm: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, rms_norm

DTYPE = torch.bfloat16


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168, 32_768}
    if every:
        for kernel in ("rms_norm_fwd", "rms_norm_bwd", "rms_norm_wide_bwd"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("rms_norm", kernel, arch)}

    def both(width: int, fused: bool) -> None:
        x, residual = torch.empty(2, 256, width, dtype=DTYPE).requires_grad_()
        weight = torch.empty(width, dtype=DTYPE).requires_grad_()
        if fused:
            y, total = rms_norm(x, weight, residual=residual)
            torch.autograd.backward((y, total), (torch.empty_like(y), torch.empty_like(total)))
        else:
            rms_norm(x, weight).backward(torch.empty(256, width, dtype=DTYPE))

    return [
        (f"N={width}{' + residual' if fused else ''}", lambda width=width, fused=fused: both(width, fused))  # type: ignore[misc]
        for width in sorted(widths)
        for fused in (True, False)
    ]
