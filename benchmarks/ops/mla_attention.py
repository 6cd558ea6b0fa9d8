"""Attention over packed documents: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, mla_attention

DTYPE = torch.bfloat16
KERNELS = ("mla_attention_fwd", "mla_attention_dq", "mla_attention_dkdv")


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot, in bf16: at DeepSeek-V3's widths, with `every` at all widths of the
    tables, with keys that heads share, and with rows that see the whole document."""
    sizes = {320}
    if every:
        for kernel in KERNELS:
            entries = (entry["shape"] for entry in _launch.entries("mla_attention", kernel, arch))
            sizes |= {shape["WIDTH"] for shape in entries if shape["BITS"] == 16}
    cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32)

    def both(width: int, value: int, key_heads: int, causal: bool) -> None:
        q, k, v = (
            torch.empty(256, heads, last, dtype=DTYPE).requires_grad_()
            for heads, last in ((16, width), (key_heads, width), (key_heads, value))
        )
        mla_attention(q, k, v, cu_seqlens, causal).backward(torch.empty(256, 16, value, dtype=DTYPE))

    cases = [(size, 16, True) for size in sorted(sizes, reverse=True)]
    if every:
        cases += [(320, 1, True), (320, 16, False)]
    return [
        (
            f"{3 * size // 5}/{2 * size // 5}{', shared' * (heads == 1)}{', both ways' * (not causal)}",
            lambda size=size, heads=heads, causal=causal: both(3 * size // 5, 2 * size // 5, heads, causal),  # type: ignore[misc]
        )
        for size, heads, causal in cases
    ]
