"""Which row each (token, expert) pair takes when rows are sorted by expert: a stable counting sort on the device.

topk_ids int64 [T, k] below E -> offsets of the experts' segments, each pair's row, each row's pair and token. Nothing
waits for a count. One launch for up to BLOCK pairs, as in decoding; else three, whatever T and E: experts counted in
blocks of pairs, counts summed over the blocks before, rows numbered. A pair's number among its block's pairs of the
same expert comes from comparing it with all before it. No atomics: the same bits every time.
Test: tests/kernels/test_moe_plan.py. Benchmark: benchmarks/ops/moe_plan.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._checks import check_shape
from ._launch import tl, triton
from ._operator import operator

__all__ = ["MoePlan", "moe_plan", "moe_plan_reference"]

SCAN = 1024  # blocks of pairs whose counts a program sums at once


class MoePlan(NamedTuple):
    """Rows of (token, slot) pairs sorted by expert, a token's pairs in the order of tokens within an expert.

    offsets int32 [E + 1]: starts of the experts' segments; place int64 [T * k]: row of each pair; pair int64 [T * k]:
    pair of each row; token int64 [T * k]: token of each row.
    """

    offsets: Tensor
    place: Tensor
    pair: Tensor
    token: Tensor


def moe_plan_reference(topk_ids: Tensor, n_experts: int) -> MoePlan:
    """By PyTorch's sort; arguments and results as `moe_plan`."""
    pair = topk_ids.flatten().sort(stable=True).indices
    counts = topk_ids.flatten().bincount(minlength=n_experts)
    return MoePlan(F.pad(counts.cumsum(0), (1, 0)).int(), pair.argsort(), pair, pair // topk_ids.shape[1])


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _experts_of(ids_ptr, pairs, P, E):
    """int32; E for what is no pair or has no expert of these."""
    experts = tl.load(ids_ptr + pairs, mask=pairs < P, other=-1)
    return tl.where((experts >= 0) & (experts < E), experts, E).to(tl.int32)


@triton.jit
def _moe_count_kernel(ids_ptr, counts_ptr, P, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Column program_id of counts [E + 1, blocks]: how many of a block's pairs each expert has."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(_experts_of(ids_ptr, pairs, P, E), EXPERTS)
    experts = tl.arange(0, EXPERTS).to(tl.int64)
    tl.store(counts_ptr + experts * tl.num_programs(0) + tl.program_id(0), found, mask=experts <= E)


@triton.jit
def _moe_scan_kernel(counts_ptr, totals_ptr, blocks, SCAN: tl.constexpr):
    """Row program_id of counts becomes the sums over the blocks before each, and their total goes to totals."""
    row = counts_ptr + tl.program_id(0).to(tl.int64) * blocks
    total = tl.zeros((), tl.int32)
    for start in tl.range(0, blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        counts = tl.load(row + block, mask=block < blocks, other=0)
        tl.store(row + block, total + tl.cumsum(counts, axis=0) - counts, mask=block < blocks)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + tl.program_id(0), total)


@triton.jit
def _moe_plan_kernel(
    ids_ptr, counts_ptr, totals_ptr, offsets_ptr, place_ptr, pair_ptr, token_ptr, P, E, top_k,
    ONE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Rows of one block's pairs; where this is the only block (ONE) it counts them itself."""
    program = tl.program_id(0)
    pairs = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(ids_ptr, pairs, P, E)
    experts = tl.arange(0, EXPERTS)
    totals = tl.histogram(expert, EXPERTS) if ONE else tl.load(totals_ptr + experts, mask=experts <= E, other=0)
    starts = tl.cumsum(totals, axis=0) - totals
    tl.store(offsets_ptr + experts, starts, mask=(experts <= E) & (program == 0))
    row = tl.gather(starts, expert, axis=0)
    if not ONE:
        row += tl.load(counts_ptr + expert.to(tl.int64) * tl.num_programs(0) + program)
    for step in tl.range(0, tl.minimum(BLOCK, P - program * BLOCK), STEP):
        others = program.to(tl.int64) * BLOCK + step + tl.arange(0, STEP)
        same = _experts_of(ids_ptr, others, P, E)[None, :] == expert[:, None]
        row += tl.sum((same & (others[None, :] < pairs[:, None])).to(tl.int32), axis=1)
    tl.store(place_ptr + pairs, row.to(tl.int64), mask=pairs < P)
    tl.store(pair_ptr + row, pairs, mask=pairs < P)
    tl.store(token_ptr + row, pairs // top_k, mask=pairs < P)


# --- launchers --------------------------------------------------------------------------------------------------------


def _triton_plan(topk_ids: Tensor, n_experts: int) -> MoePlan:
    ids = topk_ids.contiguous()
    pairs, experts = ids.numel(), triton.next_power_of_2(n_experts + 1)
    config = _launch.config("moe_plan", "moe_plan", _launch.arch(ids), E=n_experts)
    block, warps = config["BLOCK"], config["num_warps"]
    blocks = max(1, triton.cdiv(pairs, block))
    offsets = ids.new_empty(n_experts + 1, dtype=torch.int32)
    place, pair, token = (ids.new_empty(pairs) for _ in range(3))
    counts = totals = offsets
    if blocks > 1:
        counts, totals = (ids.new_empty(n_experts + 1, n, dtype=torch.int32) for n in (blocks, 1))
        _launch.launch(
            _moe_count_kernel, (blocks,), ids, counts, pairs, n_experts, BLOCK=block, EXPERTS=experts, num_warps=warps
        )  # fmt: skip
        _launch.launch(_moe_scan_kernel, (n_experts + 1,), counts, totals, blocks, SCAN=SCAN, num_warps=warps)
    _launch.launch(
        _moe_plan_kernel, (blocks,), ids, counts, totals, offsets, place, pair, token, pairs, n_experts, ids.shape[1],
        ONE=blocks == 1, EXPERTS=experts, **config,
    )  # fmt: skip
    return MoePlan(offsets, place, pair, token)


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _order(ids: Tensor, experts: int) -> Tensor:
    """The stable order that sorts ids. On the CPU numpy's, which is four times as quick: 16 bits go by radix."""
    if ids.device.type == "cpu" and experts <= 1 << 15:
        return torch.from_numpy(ids.to(torch.int16).numpy().argsort(kind="stable"))
    return ids.argsort(stable=True)


def _torch_plan(topk_ids: Tensor, n_experts: int) -> MoePlan:
    ids = topk_ids.flatten()
    if ids.numel():
        low, high = torch.aminmax(ids)
        if low < 0 or high >= n_experts:
            raise ValueError(f"topk_ids: got {low} to {high}, allowed is 0 to {n_experts - 1}")
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    pair = _order(ids, n_experts)
    place = torch.empty_like(pair).scatter_(0, pair, torch.arange(ids.shape[0], device=ids.device))
    return MoePlan(offsets, place, pair, pair // topk_ids.shape[1])


# --- registration -----------------------------------------------------------------------------------------------------


def plan_pairs(topk_ids: Tensor, n_experts: int) -> MoePlan:
    """For the inside of other ops: no graph sees it."""
    return (_triton_plan if _launch.use_triton(topk_ids) else _torch_plan)(topk_ids, n_experts)


@operator("moe_plan")
def _moe_plan(topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets, place, pair, token = plan_pairs(topk_ids, n_experts)
    return offsets, place, pair, token


@_moe_plan.register_fake
def _(topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets = topk_ids.new_empty(n_experts + 1, dtype=torch.int32)
    place, pair, token = (topk_ids.new_empty(topk_ids.numel()) for _ in range(3))
    return offsets, place, pair, token


# --- public op --------------------------------------------------------------------------------------------------------


def check_ids(topk_ids: Tensor, tokens: int | None) -> None:
    check_shape("topk_ids", topk_ids, (tokens, None))
    if topk_ids.dtype != torch.int64:
        raise TypeError(f"topk_ids: got {topk_ids.dtype}, allowed is torch.int64")
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, allowed is one expert a token or more")


def check_experts(n_experts: int) -> None:
    if n_experts < 1:
        raise ValueError(f"n_experts: got {n_experts}, allowed is 1 or more")


def moe_plan(topk_ids: Tensor, n_experts: int) -> MoePlan:
    """topk_ids [T, k] int64 from 0 to n_experts - 1 -> the plan of T * k rows sorted by expert, whose offsets are what
    `grouped_gemm` takes. Kernels do not wait to look at ids: they put the pair of an id outside behind all segments,
    where rows are no one's. The PyTorch path raises ValueError.

    Raises TypeError for ids that are not int64, ValueError for no experts or ids of another shape.
    """
    check_ids(topk_ids, None)
    check_experts(n_experts)
    return MoePlan(*_moe_plan(topk_ids, n_experts))
