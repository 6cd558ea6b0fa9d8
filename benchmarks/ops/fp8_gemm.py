"""fp8_gemm: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from minids_kernels import _launch, fp8_gemm, fp8_gemm_wgrad

K = 7168
E4M3 = torch.float8_e4m3fn


def _forward(m: int, n: int, out_dtype: torch.dtype) -> None:
    groups = K // 128
    a, b = torch.empty(m, K, dtype=E4M3), torch.empty(n, K, dtype=E4M3)
    fp8_gemm(a, torch.empty(m, groups), b, torch.empty(-(-n // 128), groups), out_dtype)


def _wgrad(m: int, n: int, add: bool) -> None:
    groups = K // 128
    a, b = torch.empty(m, K, dtype=E4M3), torch.empty(n, K, dtype=E4M3)
    fp8_gemm_wgrad(a, torch.empty(m, groups), b, torch.empty(n, groups), torch.empty(m, n) if add else None)


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot at DeepSeek-V3's width: the largest entry of each launch table, with
    `every` all of them, in two forms."""
    calls: list[tuple[str, Callable[[], Any]]] = []
    for table, run, forms in (
        ("fp8_gemm", _forward, {"bf16": torch.bfloat16, "fp32": torch.float32}),
        ("fp8_gemm_wgrad", _wgrad, {"added": True, "written": False}),
    ):
        for entry in reversed(_launch.entries("fp8_gemm", table, arch)):
            m, n = entry["shape"]["M"], entry["shape"].get("N", 4096)
            for name, form in forms.items() if every else [*forms.items()][:1]:
                calls.append((f"{table} M={m} N={n} {name}", partial(run, m, n, form)))
    return calls
