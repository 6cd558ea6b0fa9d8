"""write_latent_cache: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from minids_kernels import (
    _launch,
    quantize_latent_cache,
    rms_norm,
    rope,
    write_latent_cache,
    write_latent_cache_reference,
)
from minids_kernels.mla_cache import row_bytes
from torch import Tensor

from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, Tuning, calls, combinations, normal, sizes

DTYPE = torch.bfloat16
PAGE, HEADS = 64, 128
# tokens, latent and rotated widths: V3's, a decoding step and a prefill; a mini model's
GPU_SHAPES = [(128, 512, 64), (8192, 512, 64)]
CPU_SHAPES = [(256, 64, 16)]
SMALL_SHAPE = (64, 128, 16)


def steps(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, q_pe: Tensor
) -> Tensor:
    """An op for each step."""
    width = weight.shape[0]
    latent, key = rms_norm(kv[:, :width], weight), rope(kv[:, None, width:], cos, sin).squeeze(1)
    rows = quantize_latent_cache(latent, key) if kv_cache.dtype == torch.uint8 else torch.cat((latent, key), -1)
    kv_cache.flatten(0, 1).index_copy_(0, slots, rows)
    return rope(q_pe, cos, sin)


def ours(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, q_pe: Tensor
) -> Tensor | None:
    return write_latent_cache(kv, weight, cos, sin, kv_cache, slots, q_pe=q_pe)


def reference(inputs: Inputs) -> Tensor | None:
    *args, q_pe = inputs.args
    return write_latent_cache_reference(*args, q_pe=q_pe)[1]


def _case(tokens: int, latent: int, rotary: int, fp8: bool, device: torch.device) -> Case:
    def make() -> Inputs:
        kv, angle = (
            normal(tokens, latent + rotary, device=device, dtype=DTYPE),
            normal(tokens, rotary // 2, device=device, dtype=torch.float32),
        )
        pages = -(-tokens // PAGE)
        if fp8:
            cache = torch.zeros(pages, PAGE, row_bytes(latent, rotary), dtype=torch.uint8, device=device)
        else:
            cache = torch.zeros(pages, PAGE, latent + rotary, dtype=DTYPE, device=device)
        slots = torch.randperm(pages * PAGE, device=device)[:tokens]
        q = normal(tokens, HEADS, rotary, device=device, dtype=DTYPE)
        weight = torch.ones(latent, dtype=DTYPE, device=device)
        return Inputs((kv, weight, angle.cos(), angle.sin(), cache, slots, q))

    row = row_bytes(latent, rotary) if fp8 else 2 * (latent + rotary)
    return Case(
        name="fp8 fwd" if fp8 else "fwd",
        shape={"T": tokens, "C": latent, "R": rotary},
        dtype=DTYPE,
        make=make,
        reference=reference,
        contestants={OURS: Contestant(calls(ours), package="minids"), "eager": Contestant(calls(steps))},
        tolerance=1e-2,
        bytes=tokens * (2 * (latent + rotary) + row + 4 * HEADS * rotary),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)
    return [_case(*shape, fp8, device) for shape in shapes for fp8 in (False, True) if not fp8 or shape[1] % 128 == 0]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def run(shape: Mapping[str, int]) -> Run:
        case = _case(128, shape["C"], max(2, shape["C"] // 8), False, device)
        return case.contestants[OURS].bind(case.make())

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return combinations(HEADS=(4, 8, 16, 32), num_warps=(1, 2, 4, 8))

    return {"write_latent_cache": Tuning(run, candidates)}


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: DeepSeek-V3's rows in fp8, with `every` those of each entry of the tables
    and in bf16."""
    widths = {512}
    if every:
        widths |= {entry["shape"]["C"] for entry in _launch.entries("mla_cache", "write_latent_cache", arch)}

    def write(latent: int, fp8: bool) -> None:
        rotary = max(2, latent // 8)
        width, dtype = (row_bytes(latent, rotary), torch.uint8) if fp8 else (latent + rotary, DTYPE)
        write_latent_cache(
            torch.empty(4, latent + rotary, dtype=DTYPE), torch.empty(latent, dtype=DTYPE), torch.empty(4, rotary // 2),
            torch.empty(4, rotary // 2), torch.empty(2, PAGE, width, dtype=dtype), torch.empty(4, dtype=torch.int64),
            q_pe=torch.empty(4, HEADS, rotary, dtype=DTYPE),
        )  # fmt: skip

    return [
        (f"C={latent} {'fp8' if fp8 else 'bf16'}", partial(write, latent, fp8))
        for latent in sorted(widths, reverse=True)
        for fp8 in ((True, False) if every else (True,))
        if not fp8 or latent % 128 == 0
    ]
