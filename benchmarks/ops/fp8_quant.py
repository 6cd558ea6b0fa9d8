"""Quantisation to fp8: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch
from minids_kernels.fp8_quant import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
)

DTYPE = torch.bfloat16


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168}
    if every:
        for kernel in ("quantize_tiles", "quantize_tiles_transposed", "quantize_tiles_both", "dequantize"):
            widths |= {entry["shape"]["K"] for entry in _launch.entries("fp8_quant", kernel, arch)}
    calls: list[tuple[str, Callable[[], Any]]] = []
    for width in sorted(widths, reverse=True):
        x = torch.empty(256, width, dtype=DTYPE)
        codes, rows, blocks = x.to(torch.float8_e4m3fn), torch.empty(256, width // 128), torch.empty(2, width // 128)
        calls += [
            (f"K={width} both", lambda x=x: quantize_tiles_both(x)),  # type: ignore[misc]
            (f"K={width} transposed", lambda x=x: quantize_tiles_transposed(x)),  # type: ignore[misc]
            (f"K={width} blocks", lambda x=x: quantize_blocks(x)),  # type: ignore[misc]
            (f"K={width} dequantize tiles", lambda c=codes, s=rows: dequantize_tiles(c, s, DTYPE)),  # type: ignore[misc]
            (f"K={width} dequantize blocks", lambda c=codes, s=blocks: dequantize_blocks(c, s, DTYPE)),  # type: ignore[misc]
        ]
        for scale_format in ("fp32", "ue8m0"):
            calls.append((f"K={width} {scale_format}", lambda x=x, f=scale_format: quantize_tiles(x, f)))  # type: ignore[misc]
    return calls
