"""The interpreter of Gluon's kernels finds what goes wrong on a GPU only now and then: a kernel without a fault, then
the same with one."""

from __future__ import annotations

import pytest
import torch
from minids_kernels import _launch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.gluon_interpreter import interpreted

STAGES, BLOCK = gl.constexpr(2), gl.constexpr(64)
FAULTS = {  # and what must be said of it; where nothing is, wrong numbers will do
    "does not wait for codes": "",
    "does not wait for an empty buffer": "",
    "releases before the product is done": "",
    "never releases": "all wait",
    "releases twice": "1 arrivals too many",
    "announces too few bytes": "all wait",
    "adds before the wait": "'Product'",
    "reads without a wait": "'Product'",
    "stores without a fence": "without a fence",
    "leaves before its store": "nobody waited",
    "reads a number too many": "outside the tensor",
    "does not wait for its own copies": "without a fence",  # that was put before they were there
    "does not fence its own copies": "without a fence",
    "waits for all but two copies": "without a fence",
}


@gluon.jit
def _fetch(a, a_ptr, b, a_ring, b_ring, full, empty, steps, FAULT: gl.constexpr):
    """a by descriptors, or where the fault is of that kind by the threads themselves."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    BY_THREADS: gl.constexpr = "copies" in FAULT
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT)).expand_dims(1)
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES & 1
        if FAULT != "does not wait for an empty buffer":
            mbarrier.wait(empty.index(stage), phase ^ 1)
        if BY_THREADS:
            column = (gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT)) + step * BLOCK).expand_dims(0)
            async_copy.async_copy_global_to_shared(a_ring.index(stage), a_ptr + row * (steps * BLOCK) + column)
            async_copy.commit_group()
            if FAULT != "does not wait for its own copies":
                async_copy.wait_group(2 if FAULT == "waits for all but two copies" else 0)
            if FAULT != "does not fence its own copies":
                fence_async_shared()
        mbarrier.expect(
            full.index(stage), BLOCK * BLOCK * (2 if FAULT == "announces too few bytes" or BY_THREADS else 4)
        )
        if not BY_THREADS:
            tma.async_copy_global_to_shared(a, [0, step * BLOCK], full.index(stage), a_ring.index(stage))
        tma.async_copy_global_to_shared(b, [0, step * BLOCK], full.index(stage), b_ring.index(stage))
    async_copy.wait_group(0)


@gluon.jit
def _multiply(out, buffer, a_ring, b_ring, full, empty, steps, FAULT: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, LAYOUT)
    for step in range(steps):
        stage, phase = step % STAGES, step // STAGES & 1
        if FAULT != "does not wait for codes":
            mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(a_ring.index(stage), b_ring.index(stage).permute((1, 0)), acc, is_async=True)
        if FAULT == "releases before the product is done":
            mbarrier.arrive(empty.index(stage), count=1)
        if FAULT == "adds before the wait":
            acc += 0.0
        if FAULT != "reads without a wait":
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if FAULT != "releases before the product is done" and FAULT != "never releases":
            mbarrier.arrive(empty.index(stage), count=1)
        if FAULT == "releases twice":
            mbarrier.arrive(empty.index(stage), count=1)
    buffer.store(acc.to(gl.bfloat16))
    if FAULT != "stores without a fence":
        fence_async_shared()
    tma.async_copy_shared_to_global(out, [0, 0], buffer)
    if FAULT != "leaves before its store":
        tma.store_wait(0)


@gluon.jit
def _kernel(a, a_ptr, b, out, counts, FAULT: gl.constexpr):
    """out [64, 64] = a [64, 64 * steps] @ b [64, 64 * steps].T, steps = counts[0]."""
    steps = gl.load(counts + (1 if FAULT == "reads a number too many" else 0))
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, BLOCK], a.layout)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, BLOCK], b.layout)
    buffer = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out, buffer, a_ring, b_ring, full, empty, steps, FAULT)),
            (_fetch, (a, a_ptr, b, a_ring, b_ring, full, empty, steps, FAULT)),
        ],
        [1],
        [40],
    )


def described(x: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 64], layout)


def run(seed: int, fault: str) -> bool:
    """Whether the numbers are right."""
    counts = torch.tensor([5])
    a, b = torch.randn(2, 64, 64 * 5).bfloat16()
    out = torch.full((64, 64), torch.nan, dtype=torch.bfloat16)
    with interpreted(seed):
        _launch.launch(_kernel, (1,), described(a), a, described(b), described(out), counts, FAULT=fault)
    return torch.allclose(out.float(), a.float() @ b.float().T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("copies", ["", "its own copies are right"])
def test_right_in_any_order(copies: str) -> None:
    assert all(run(seed, copies) for seed in range(50))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_found(fault: str) -> None:
    """Within so many orders."""
    wrong, said = False, set()
    for seed in range(50):
        try:
            wrong |= not run(seed, fault)
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            said.add(str(error))
    assert any(FAULTS[fault] in words for words in said) if FAULTS[fault] else wrong
