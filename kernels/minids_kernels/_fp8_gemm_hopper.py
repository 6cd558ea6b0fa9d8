"""`fp8_gemm`'s product for Hopper (sm_90) with the warps' work laid out by hand, in Gluon: one warp fetches codes,
GROUPS of four warps multiply them. While one group sums its product in fp32 registers, the tensor cores work for
another.

Codes pass through a ring of STAGES buffers, each with two barriers. `full` has one arrival, the fetching warp's, and
the bytes it announced; `empty` has one arrival of each group. A barrier's phase flips when all have arrived: the n-th
use of a buffer, from 0, waits for phase n % 2 of `full`, its filling for phase (n + 1) % 2 of `empty`, which a fresh
barrier grants. Programs are persistent: the ring keeps turning from one tile to the next, so codes of the next tile
arrive while the last one is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import _launch
from ._launch import triton

__all__ = ["gemm"]

ROWS = gl.constexpr(64)  # of a tensor-core instruction
COLUMNS = gl.constexpr(128)  # of a tile, which one scale of b covers
DEPTH = gl.constexpr(128)  # of a step: numbers along K that share a scale
FETCH_REGISTERS = gl.constexpr(40)  # of a thread of the fetching warps


@gluon.jit
def _origin(tile, M, N, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr):
    """First row and column of a tile. Neighbours in time share rows and columns, so that L2 serves them: STRIPE tiles
    down, then one to the right."""
    down, right = gl.cdiv(M, BLOCK_M), gl.cdiv(N, COLUMNS)
    first = tile // (STRIPE * right) * STRIPE
    height = gl.minimum(down - first, STRIPE)
    inside = tile % (STRIPE * right)
    return (first + inside % height) * BLOCK_M, inside // height * COLUMNS


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's next buffer and the phase of its barriers."""
    stage += 1
    last = stage == STAGES
    return gl.where(last, 0, stage), phase ^ last.to(gl.int32)


@gluon.jit
def _fetch(a, b, rings, shape, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: codes of all tiles of this program, in order, into the ring."""
    a_ring, b_ring, full, empty = rings
    M, N, K = shape
    GROUPS: gl.constexpr = BLOCK_M // ROWS
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, STRIPE)
        for k in range(0, K, DEPTH):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + COLUMNS) * DEPTH)
            tma.async_copy_global_to_shared(b, [n, k], full.index(stage), b_ring.index(stage))
            for group in gl.static_range(GROUPS):
                part = a_ring.index(stage * GROUPS + group)
                tma.async_copy_global_to_shared(a, [m + group * ROWS, k], full.index(stage), part)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _factors(a_scale, b_scale, rows, k, a_k_stride, b_k_stride):
    """What to multiply the product of step `k` by, [64]: scales at the offsets `rows` times that of b's block."""
    return gl.load(a_scale + k * a_k_stride + rows) * gl.load(b_scale + k * b_k_stride)


@gluon.jit
def _multiply(
    out, out_buffer, rings, scales, shape,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * 64, GROUP * 64 + 64) of all tiles of this program."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    a_ring, b_ring, full, empty = rings
    a_scale, a_stride, a_k_stride, b_scale, b_stride, b_k_stride = scales
    M, N, K = shape
    steps = gl.cdiv(K, DEPTH)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, STRIPE)
        m += GROUP * ROWS
        strip = a_scale + m.to(gl.int64) * a_stride
        block = b_scale + n // COLUMNS * b_stride
        rows = gl.minimum(row, M - 1 - m) * a_stride  # rows of the tile below the last one have no scales
        factors = _factors(strip, block, rows, 0, a_k_stride, b_k_stride)
        acc = zeros
        for k in range(steps):
            mbarrier.wait(full.index(stage), phase)
            left = a_ring.index(stage * (BLOCK_M // ROWS) + GROUP)
            product = warpgroup_mma(left, b_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            following = _factors(strip, block, rows, gl.minimum(k + 1, steps - 1), a_k_stride, b_k_stride)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)  # by one thread, after a barrier of the four warps
            acc = gl.fma(product, factors.expand_dims(1).broadcast_to(product.shape), acc)  # the promotion to fp32
            factors = following
            stage, phase = _next(stage, phase, STAGES)
        tma.store_wait(0)
        out_buffer.store(acc.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [m, n], out_buffer)
    tma.store_wait(0)


@gluon.jit
def _fp8_gemm_hopper_kernel(
    a, a_scale, b, b_scale, out, M, N, K, a_stride, a_k_stride, b_stride, b_k_stride,
    STRIPE: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] @ b [N, K].T, descriptors of [64, 128], [64, 128] and [128, 128] numbers. REGISTERS: of a
    multiplying thread."""
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * GROUPS, ROWS, DEPTH], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, DEPTH], b.layout)
    out_buffers = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, COLUMNS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    rings = (a_ring, b_ring, full, empty)
    scales = (a_scale, a_stride, a_k_stride, b_scale, b_stride, b_k_stride)
    shape = (M, N, K)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out, out_buffers.index(0), rings, scales, shape, 0, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(1), rings, scales, shape, 1, BLOCK_M, STRIPE, STAGES)),
                (_fetch, (a, b, rings, shape, BLOCK_M, STRIPE, STAGES)),
            ],
            [4, 1],
            [REGISTERS, FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, out_buffers.index(0), rings, scales, shape, 0, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(1), rings, scales, shape, 1, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(2), rings, scales, shape, 2, BLOCK_M, STRIPE, STAGES)),
                (_fetch, (a, b, rings, shape, BLOCK_M, STRIPE, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, FETCH_REGISTERS],
        )


# --- launcher ---------------------------------------------------------------------------------------------------------

DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32,
}  # fmt: skip
REGISTERS = {2: 232, 3: 152}  # of a multiplying thread, by GROUPS; with the fetching warps' 65,536 at most


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [R, C], in blocks of [rows, columns]."""
    shape = [rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, GROUPS: int, STAGES: int, STRIPE: int
) -> None:  # fmt: skip
    """out [M, N] = a [M, K] @ b [N, K].T; a_scale [M, ceil(K / 128)], b_scale [ceil(N / 128), ceil(K / 128)]. Rows of
    a, b and out start at multiples of 16 bytes, their columns are contiguous."""
    (M, K), N = a.shape, b.shape[0]
    tiles = triton.cdiv(M, 64 * GROUPS) * triton.cdiv(N, 128)
    _launch.launch(
        _fp8_gemm_hopper_kernel, (min(tiles, _launch.multiprocessors(a)),),
        _descriptor(a, 64, 128), a_scale, _descriptor(b, 128, 128), b_scale, _descriptor(out, 64, 128),
        M, N, K, *a_scale.stride(), *b_scale.stride(),
        STRIPE=STRIPE, STAGES=STAGES, GROUPS=GROUPS, REGISTERS=REGISTERS[GROUPS], num_warps=4,
    )  # fmt: skip
