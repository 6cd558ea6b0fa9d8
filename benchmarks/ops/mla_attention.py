"""Attention over packed documents: what to time and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, mla_attention

DTYPES = {16: torch.bfloat16, 32: torch.float32}
KERNELS = ("mla_attention_fwd", "mla_attention_dq", "mla_attention_dkdv")


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's widths, with `every` at all widths and dtypes of the
    tables, with keys that heads share, and with rows that see the whole document."""
    sizes = {(320, 16)}
    if every:
        for kernel in KERNELS:
            entries = (entry["shape"] for entry in _launch.entries("mla_attention", kernel, arch))
            sizes |= {(shape["WIDTH"], shape["BITS"]) for shape in entries}
    cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32)

    def both(width: int, value: int, bits: int, key_heads: int, causal: bool) -> None:
        q, k, v = (
            torch.empty(256, heads, last, dtype=DTYPES[bits]).requires_grad_()
            for heads, last in ((16, width), (key_heads, width), (key_heads, value))
        )
        mla_attention(q, k, v, cu_seqlens, causal).backward(torch.empty(256, 16, value, dtype=DTYPES[bits]))

    cases = [(size, 16, True) for size in sorted(sizes, reverse=True)]
    if every:
        cases += [((320, 16), 1, True), ((320, 16), 16, False)]
    return [
        (
            f"{3 * width // 5}/{2 * width // 5} {bits} bits{', shared' * (heads == 1)}{', both ways' * (not causal)}",
            lambda a=3 * width // 5, b=2 * width // 5, bits=bits, heads=heads, causal=causal: both(  # type: ignore[misc]
                a, b, bits, heads, causal
            ),
        )
        for (width, bits), heads, causal in cases
    ]
