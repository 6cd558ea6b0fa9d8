"""Grouped matrix products: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, grouped_gemm

DTYPE = torch.bfloat16
EXPERTS, WIDTH, INNER = 8, 7168, 2048  # DeepSeek-V3's, on one of 32 devices


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: forward and both gradients of DeepSeek-V3's gate_up product with many
    rows and with decoding's few; with `every` at each entry of the tables, also those for widths that are no
    multiples of 16."""
    rows = {512}
    if every:
        rows |= {entry["shape"]["rows"] for entry in _launch.entries("grouped_gemm", "many", arch)}

    def both(tokens: int, width: int) -> None:
        x = torch.empty(tokens, width, dtype=DTYPE).requires_grad_()
        w = torch.empty(EXPERTS, 2 * INNER, width, dtype=DTYPE).requires_grad_()
        y = grouped_gemm(x, w, torch.zeros(EXPERTS + 1, dtype=torch.int32))
        y.backward(torch.empty_like(y))

    cases = [(count * EXPERTS, WIDTH) for count in sorted(rows, reverse=True)] + [(8, WIDTH)]
    if every:
        cases += [(512 * EXPERTS, WIDTH - 8), (8, WIDTH - 8)]
    return [
        (f"T={tokens} K={width}", lambda tokens=tokens, width=width: both(tokens, width))  # type: ignore[misc]
        for tokens, width in cases
    ]
