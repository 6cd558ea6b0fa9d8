"""RMSNorm with quantisation: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, rms_norm_quant

DTYPE = torch.bfloat16


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168, 32_768}
    if every:
        for kernel in ("rms_norm_quant", "rms_norm_quant_transposed"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("rms_norm_quant", kernel, arch)}

    def call(width: int, fused: bool, scale_format: Any) -> None:
        x, residual = torch.empty(2, 256, width, dtype=DTYPE)
        weight = torch.empty(width, dtype=DTYPE)
        rms_norm_quant(x, weight, 1e-6, residual if fused else None, scale_format, transposed=True)

    return [
        (
            f"N={width}{' + residual' if fused else ''} {scale_format}",
            lambda width=width, fused=fused, scale_format=scale_format: call(width, fused, scale_format),  # type: ignore[misc]
        )
        for width in sorted(widths)
        for fused, scale_format in ((True, "fp32"), (False, "ue8m0"))
    ]
