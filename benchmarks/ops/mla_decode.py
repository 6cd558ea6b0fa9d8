"""Absorbed decoding over a paged latent cache: what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import _launch, mla_decode

DTYPE = torch.bfloat16


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: DeepSeek-V3's 128 heads on pages of 64, with `every` all entries of the
    tables, pages smaller than a block, and fp32. dtype is the cache's, uint8 for fp8 rows."""

    def call(rows: int, v_dim: int, page: int, batch: int, dtype: torch.dtype) -> None:
        width = v_dim + (64 if v_dim > 128 else 16)  # DeepSeek-V3's rotated part, and that of small models
        q = torch.empty(batch, 1, rows, width, dtype=DTYPE if dtype == torch.uint8 else dtype)
        cache = torch.empty(8, page, 2 * width - v_dim * 31 // 32 if dtype == torch.uint8 else width, dtype=dtype)
        table = torch.zeros(batch, 4096 // page, dtype=torch.int32)
        mla_decode(q, cache, table, torch.zeros(batch, dtype=torch.int32), v_dim, 0.1)

    shapes = [(128, 512, 64, 128, DTYPE), (128, 512, 64, 128, torch.uint8)]
    if every:
        for kernel, dtype in (("mla_decode", DTYPE), ("mla_decode_fp8", torch.uint8)):
            for entry in _launch.entries("mla_decode", kernel, arch):
                rows, v_dim = entry["shape"]["rows"], entry["shape"]["v_dim"]
                shapes += [(rows, v_dim, page, 1, dtype) for page in ((64, 16) if v_dim == 512 else (64,))]
        for entry in _launch.entries("mla_decode", "mla_decode_fp32", arch):
            shapes.append((entry["shape"]["rows"], entry["shape"]["v_dim"], 64, 1, torch.float32))
    return [
        (
            f"rows={rows} v_dim={v_dim} page={page} batch={batch} {str(dtype).removeprefix('torch.')}",
            lambda shape=(rows, v_dim, page, batch, dtype): call(*shape),  # type: ignore[misc]
        )
        for rows, v_dim, page, batch, dtype in shapes
    ]
