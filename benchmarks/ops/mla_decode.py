"""Absorbed decoding over a paged latent cache: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import _launch, mla_decode, quantize_latent_cache
from torch import Tensor

from benchmarks import flash, triton_decode
from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    compiled,
    normal,
    precision,
    sizes,
)

DTYPE = torch.bfloat16
PAGE = 64

# sequences, new tokens, heads, rows of each sequence, Dc, Dr: V3's heads on one of 8 devices and on one, short and long
# sequences, several new tokens; mini models
GPU_SHAPES = [
    (128, 1, 16, 4096, 512, 64), (128, 1, 128, 4096, 512, 64), (128, 1, 64, 1024, 512, 64),
    (1, 1, 128, 32_768, 512, 64), (1, 1, 128, 131_072, 512, 64), (128, 2, 16, 4096, 512, 64),
    (32, 4, 64, 8192, 512, 64),
]  # fmt: skip
CPU_SHAPES, SMALL_SHAPE = [(1, 1, 8, 2048, 64, 16), (8, 1, 8, 2048, 64, 16)], (2, 2, 4, 128, 128, 8)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the root mean square: roundings of the dtype


def attend(q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int) -> Tensor:
    """As model code writes it: pages gathered, every sequence as long as its table, masked."""
    batch, new, _, width = q.shape
    rows = kv_cache[block_table.long()].view(batch, -1, width)
    scores = torch.einsum("bshd,btd->bsht", q, rows) * width**-0.5
    last = seq_lens.unsqueeze(1) - new + torch.arange(new, device=q.device)
    hidden = torch.arange(rows.shape[1], device=q.device) > last.unsqueeze(-1)
    share = scores.float().masked_fill(hidden.unsqueeze(2), -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bsht,btd->bshd", share, rows[..., :v_dim])


def _others(new: int, v_dim: int, rest: int) -> dict[str, Contestant]:
    """Other projects': Hopper's know V3's widths alone, Triton's one new token."""
    options: dict[str, Any] = {"v_dim": v_dim, "scale": (v_dim + rest) ** -0.5}
    found = {}
    if (v_dim, rest) == (512, 64):
        for name, bind in (("flashmla", flash.flash_mla_decode), ("fa3", flash.fa3_decode)):
            found[name] = Contestant(functools.partial(bind, **options), package="vllm", on=("sm_90",))
    if new == 1:
        for package, bind in (("vllm", triton_decode.vllm_decode), ("sglang", triton_decode.sglang_decode)):
            found[f"{package} triton"] = Contestant(functools.partial(bind, **options), package=package, on=("cuda",))
    return found


def _case(
    batch: int, new: int, heads: int, length: int, v_dim: int, rest: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Sequences of equal length whose pages lie scattered."""
    width, pages = v_dim + rest, -(-length // PAGE)

    def make() -> Inputs:
        q = normal(batch, new, heads, width, device=device, dtype=dtype)
        cache = normal(batch * pages, PAGE, width, device=device, dtype=dtype)
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        return Inputs((q, cache, table, torch.full((batch,), length, dtype=torch.int32, device=device)))

    def ours(*args: Tensor) -> Tensor:
        return mla_decode(*args, v_dim=v_dim, scale=width**-0.5)[0]

    def eager(*args: Tensor) -> Tensor:
        return attend(*args, v_dim=v_dim)

    def reference(inputs: Inputs) -> Tensor:
        q, cache, *rest = inputs.args
        return torch.cat(
            [attend(q[b : b + 1].float(), cache.float(), *(x[b : b + 1] for x in rest), v_dim) for b in range(batch)]
        )

    return Case(
        name="fwd",
        shape={"B": batch, "S": new, "H": heads, "T": length, "Dv": v_dim, "Dr": rest},
        dtype=dtype,
        make=make,
        reference=reference,
        contestants={
            OURS: Contestant(calls(ours), package="minids"),
            "eager": Contestant(calls(eager)),
            "compile": Contestant(compiled(eager)),
            **_others(new, v_dim, rest),
        },
        tolerance=TOLERANCE[dtype],
        bytes=batch * (length * width + new * heads * (width + v_dim)) * dtype.itemsize,
        flops=2 * batch * new * heads * length * (width + v_dim),
    )


def _fp8_case(case: Case) -> Case:
    """The same requests on a cache of fp8 rows, with the cache in the case's dtype as a peer. A code errs by 2^-4 /
    sqrt(3) of its number in the root mean square, and scores and values are sums of such."""
    value, rest = case.shape["Dv"], case.shape["Dr"]

    def bind(inputs: Inputs) -> Run:
        q, cache, *others = inputs.args
        rows = quantize_latent_cache(cache[..., :value], cache[..., value:])
        q = q.to(DTYPE)
        return lambda: mla_decode(q, rows, *others, v_dim=value, scale=(value + rest) ** -0.5)[0]

    return dataclasses.replace(
        case,
        name="fp8 fwd",
        contestants={OURS: Contestant(bind, package="minids"), "without fp8": case.contestants[OURS]},
        tolerance=1e-1,
        bytes=case.bytes * (value + value // 32 + 2 * rest) // ((value + rest) * case.dtype.itemsize),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    found = [_case(*shape, dtype, device) for shape in shapes]
    return found + [_fp8_case(case) for case in found if case.shape["Dv"] % 128 == 0]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """On sequences of 4,096 rows; the table for fp32, which no product of V3's uses, stays as it is."""

    def bind(shape: Mapping[str, int], fp8: bool) -> Run:
        v_dim = shape["v_dim"]
        case = _case(64, 1, shape["rows"], 4096, v_dim, 64 if v_dim > 128 else 16, DTYPE, device)
        return (_fp8_case(case) if fp8 else case).contestants[OURS].bind(case.make())

    def combine(shape: Mapping[str, int]) -> Run:
        case = _case(shape["batch"], 1, 16, 4096, 512, 64, DTYPE, device)
        return case.contestants[OURS].bind(case.make())

    def decode(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        found = combinations(
            BLOCK_M=[m for m in (16, 32, 64) if m <= max(16, shape["rows"])], BLOCK_N=(16, 32, 64, 128), LEAST=(4,),
            PROGRAMS_PER_SM=(1, 2, 4), KEYS_FIRST=(False, True), num_warps=(4, 8), num_stages=(1, 2, 3),
        )  # fmt: skip
        found = [x for x in found if not x["KEYS_FIRST"] or (x["BLOCK_M"] < 64 and x["BLOCK_N"] >= 64)]
        return found + [found[0] | dict(BY_HAND=True, LEAST=least) for least in (2, 4, 8)]

    return {
        "mla_decode": Tuning(lambda shape: bind(shape, fp8=False), decode),
        "mla_decode_fp8": Tuning(lambda shape: bind(shape, fp8=True), decode),
        "mla_decode_combine": Tuning(
            combine,
            lambda shape: combinations(SLOTS=(2, 4, 8, 16), NUMBERS=(128, 512, 1024, 4096), num_warps=(4, 8)),
        ),
    }


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
