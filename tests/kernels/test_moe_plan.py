"""Plans against plain Python lists: pairs sorted by expert, earlier pairs first."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import _launch, moe_plan, moe_plan_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks.aot import record
from tests.kernels.numerics import poisoned_memory

room = importlib.import_module("minids_kernels.moe_plan")


def by_hand(ids: list[list[int]], experts: int) -> tuple[list[int], ...]:
    """offsets, place, pair, token."""
    flat = [expert for row in ids for expert in row]
    pair = sorted(range(len(flat)), key=lambda i: flat[i])
    offsets = [sum(expert < e for expert in flat) for e in range(experts + 1)]
    return offsets, [pair.index(i) for i in range(len(flat))], pair, [i // len(ids[0]) for i in pair]


def check(ids: Tensor, experts: int) -> None:
    with poisoned_memory():
        got = moe_plan(ids, experts)
    assert [x.dtype for x in got] == [torch.int32, torch.int64, torch.int64, torch.int64]
    assert [x.tolist() for x in got] == [list(x) for x in by_hand(ids.tolist(), experts)]


SHAPES = [(0, 2), (1, 1), (3, 2), (128, 2), (129, 2), (40, 8), (300, 3)]


@pytest.mark.parametrize(
    ("shape", "experts"), [*itertools.product(SHAPES, (1, 2, 7, 64)), ((128, 2), 512), ((129, 2), 512)], ids=str
)
def test_one_block_of_pairs_and_many(
    shape: tuple[int, int], experts: int, backend: str, device: torch.device
) -> None:  # fmt: skip
    """Blocks hold 256 pairs."""
    torch.manual_seed(0)
    check(torch.randint(experts, shape, device=device), experts)
    check(torch.full(shape, experts // 2, device=device), experts)
    check(torch.randint(experts, shape[::-1], device=device).t(), experts)


def test_more_blocks_than_are_summed_at_once(backend: str, device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(room, "SCAN", 2)
    torch.manual_seed(0)
    check(torch.randint(5, (400, 3), device=device), 5)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 90), top_k=st.integers(1, 8), experts=st.integers(1, 40), used=st.integers(1, 40),
    seed=st.integers(0, 2**16), kernels=st.booleans(),
)  # fmt: skip
def test_any_routing(tokens: int, top_k: int, experts: int, used: int, seed: int, kernels: bool) -> None:
    torch.manual_seed(seed)
    ids = torch.randperm(experts)[:used][torch.randint(min(used, experts), (tokens, top_k))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "BACKEND", "triton" if kernels else "torch")
        check(ids.to(device), experts)
    for got, want in zip(moe_plan_reference(ids, experts), by_hand(ids.tolist(), experts), strict=True):
        assert got.tolist() == list(want)


def test_pairs_of_experts_that_do_not_exist(device: torch.device, monkeypatch) -> None:
    """Kernels put them behind all segments, as rows that no expert owns: nothing is written where it may not be."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    ids = torch.tensor([[1, -1], [4, 0], [2**40, 1]], device=device).repeat(100, 1)  # three blocks
    plan = moe_plan(ids, 4)
    assert plan.offsets.tolist() == [0, 100, 300, 300, 300]
    assert plan.place.sort().values.tolist() == list(range(600))
    assert set(ids.flatten()[plan.pair[300:]].tolist()) == {-1, 4, 2**40}
    assert plan.pair[300:].tolist() == sorted(plan.pair[300:].tolist())


def test_an_id_that_does_not_exist_raises_in_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(_launch, "BACKEND", "torch")
    for ids, found in (([[0, 3]], "0 to 3"), ([[-1, 2]], "-1 to 2"), ([[0, 2**17]], "0 to 131072")):
        with pytest.raises(ValueError, match=f"topk_ids: got {found}, allowed is 0 to 2"):
            moe_plan(torch.tensor(ids), 3)


@pytest.mark.parametrize("tokens", [4, 500])
def test_launches(tokens: int) -> None:
    """Without values: whatever asked for one would raise."""
    with FakeTensorMode():
        ids = torch.empty(tokens, 4, dtype=torch.int64)
        names = [launch.kernel.__name__ for launch in record([("", lambda: room.plan_pairs(ids, 6))], "sm_90")]
    assert names == ["_moe_count_kernel", "_moe_scan_kernel"] * (tokens > 64) + ["_moe_plan_kernel"]


def test_operator_is_registered_well(device: torch.device) -> None:
    ids = torch.randint(6, (5, 2), device=device)
    opcheck(ops.moe_plan.default, (ids, 6))
    compiled = torch.compile(lambda ids: moe_plan(ids, 6), fullgraph=True)(ids)
    for a, b in zip(compiled, moe_plan(ids, 6), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"topk_ids: got torch.int32, allowed is torch.int64"):
        moe_plan(torch.zeros(3, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"topk_ids: got shape \(3,\), allowed is \(any, any\)"):
        moe_plan(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"topk_ids: got shape \(3, 0\), allowed is one expert a token or more"):
        moe_plan(torch.zeros(3, 0, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="n_experts: got 0, allowed is 1 or more"):
        moe_plan(torch.zeros(3, 2, dtype=torch.int64), 0)
