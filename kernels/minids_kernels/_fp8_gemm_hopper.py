"""`fp8_gemm`'s and `fp8_gemm_wgrad`'s products for Hopper (sm_90) with the warps' work laid out by hand, in Gluon: one
warp fetches codes, GROUPS of four warps multiply them. While one group sums its product in fp32 registers, the tensor
cores work for another. The larger a tile, the less its codes cost: a group has PIECES of 64 rows, one after the other.

Codes pass through a ring of STAGES buffers, each with two barriers. `full` has one arrival, the fetching warp's, and
the bytes it announced; `empty` has one arrival of each group. A barrier's phase flips when all have arrived: the n-th
use of a buffer, from 0, waits for phase n % 2 of `full`, its filling for phase (n + 1) % 2 of `empty`, which a fresh
barrier grants. Programs are persistent: the ring keeps turning from one tile to the next, so codes of the next tile
arrive while the last one is stored.

A multiplying thread of the forward fetches its scales itself, two steps ahead: two of a's rows a piece, one of b's
block. In the weight gradient it needs those of 32 of b's rows, too. Scales come there with the codes, in rings beside
theirs, a step's in one piece each: of one group of 128 they lie side by side. A piece reads them while its product is
made.
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

__all__ = ["gemm", "gemm_wgrad"]

ROWS = gl.constexpr(64)  # of a tensor-core instruction
COLUMNS = gl.constexpr(128)  # of a tile, which one scale of the forward's b covers
DEPTH = gl.constexpr(128)  # of a step: numbers along K that share a scale
FETCH_REGISTERS = gl.constexpr(40)  # of a thread of the fetching warps


@gluon.jit
def _origin(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STRIPE: gl.constexpr):
    """First row and column of a tile. Neighbours in time share rows and columns, so that L2 serves them: STRIPE tiles
    down, then one to the right."""
    down, right = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    first = tile // (STRIPE * right) * STRIPE
    height = gl.minimum(down - first, STRIPE)
    inside = tile % (STRIPE * right)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's next buffer and the phase of its barriers."""
    stage += 1
    last = stage == STAGES
    return gl.where(last, 0, stage), phase ^ last.to(gl.int32)


@gluon.jit
def _barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A ring's barriers `full`, of so many ARRIVALS, and `empty`."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    return full, empty


@gluon.jit
def _rings(a, b, STRIPS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Buffers of a's codes, STRIPS of 64 rows a stage, and of b's, and their barriers."""
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * STRIPS, ROWS, DEPTH], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, DEPTH], b.layout)
    full, empty = _barriers(STAGES, GROUPS, 1)
    return a_ring, b_ring, full, empty


@gluon.jit
def _fetch(a, b, rings, shape, STRIPS: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: codes of all tiles of this program, in order, into the ring."""
    a_ring, b_ring, full, empty = rings
    M, N, K = shape
    BLOCK_M: gl.constexpr = STRIPS * ROWS
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, COLUMNS, STRIPE)
        for k in range(0, K, DEPTH):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + COLUMNS) * DEPTH)
            tma.async_copy_global_to_shared(b, [n, k], full.index(stage), b_ring.index(stage))
            for strip in gl.static_range(STRIPS):
                part = a_ring.index(stage * STRIPS + strip)
                tma.async_copy_global_to_shared(a, [m + strip * ROWS, k], full.index(stage), part)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _promote(product, factors, acc, PIECES: gl.constexpr):
    """acc + product * factors [64, 1] in fp32."""
    acc = gl.fma(product, factors.broadcast_to(product.shape), acc)
    if PIECES > 1:  # in front of the next product, so that both products share registers
        acc = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc], dtype=gl.float32, is_pure=False, pack=1
        )  # fmt: skip
    return acc


# --- forward and data gradient ----------------------------------------------------------------------------------------


@gluon.jit
def _scales(a_scale, b_scale, rows, k, a_k_stride, b_k_stride):
    """Scales of step `k`: a's at the offsets `rows` of each piece, [64] each, and that of b's block."""
    found: gl.tuple = ()
    for piece in gl.static_range(len(rows)):
        found += (gl.load(a_scale + k * a_k_stride + rows[piece]),)
    return found, gl.load(b_scale + k * b_k_stride)


@gluon.jit
def _multiply(
    out, out_buffer, rings, scales, shape, GROUP: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr,
    STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * PIECES * 64, (GROUP + 1) * PIECES * 64) of all tiles of this program, 64 at a time."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    BLOCK_M: gl.constexpr = GROUPS * PIECES * ROWS
    a_ring, b_ring, full, empty = rings
    a_scale, a_stride, a_k_stride, b_scale, b_stride, b_k_stride = scales
    M, N, K = shape
    steps = gl.cdiv(K, DEPTH)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, COLUMNS, STRIPE)
        m += GROUP * PIECES * ROWS
        strip = a_scale + m.to(gl.int64) * a_stride
        block = b_scale + n // COLUMNS * b_stride
        rows: gl.tuple = ()
        accs: gl.tuple = ()
        for piece in gl.static_range(PIECES):
            rows += (gl.minimum(row + piece * ROWS, M - 1 - m) * a_stride,)  # below the last there are no scales
            accs += (zeros,)
        now = _scales(strip, block, rows, 0, a_k_stride, b_k_stride)
        soon = _scales(strip, block, rows, gl.minimum(1, steps - 1), a_k_stride, b_k_stride)
        for k in range(steps):
            a_factors, b_factor = now
            sums: gl.tuple = ()
            for piece in gl.static_range(PIECES):
                # granted already to the second piece: a branch, across which ptxas moves no promotion
                mbarrier.wait(full.index(stage), phase)
                left = a_ring.index((stage * GROUPS + GROUP) * PIECES + piece)
                product = warpgroup_mma(left, b_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                if piece == 0:
                    later = _scales(strip, block, rows, gl.minimum(k + 2, steps - 1), a_k_stride, b_k_stride)
                product = warpgroup_mma_wait(0, deps=(product,))
                if piece == PIECES - 1:
                    mbarrier.arrive(empty.index(stage), count=1)  # by one thread, after a barrier of the four warps
                sums += (_promote(product, (a_factors[piece] * b_factor).expand_dims(1), accs[piece], PIECES),)
            accs = sums
            now, soon = soon, later
            stage, phase = _next(stage, phase, STAGES)
        for piece in gl.static_range(PIECES):
            tma.store_wait(0)
            out_buffer.store(accs[piece].to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [m + piece * ROWS, n], out_buffer)
    tma.store_wait(0)


@gluon.jit
def _fp8_gemm_hopper_kernel(
    a, a_scale, b, b_scale, out, M, N, K, a_stride, a_k_stride, b_stride, b_k_stride,
    STRIPE: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] @ b [N, K].T, descriptors of [64, 128], [64, 128] and [128, 128] numbers. REGISTERS: of a
    multiplying thread."""
    rings = _rings(a, b, GROUPS * PIECES, STAGES, GROUPS)
    out_buffers = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, COLUMNS], out.layout)
    scales = (a_scale, a_stride, a_k_stride, b_scale, b_stride, b_k_stride)
    shape = (M, N, K)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out, out_buffers.index(0), rings, scales, shape, 0, GROUPS, PIECES, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(1), rings, scales, shape, 1, GROUPS, PIECES, STRIPE, STAGES)),
                (_fetch, (a, b, rings, shape, GROUPS * PIECES, STRIPE, STAGES)),
            ],
            [4, 1],
            [REGISTERS, FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, out_buffers.index(0), rings, scales, shape, 0, GROUPS, PIECES, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(1), rings, scales, shape, 1, GROUPS, PIECES, STRIPE, STAGES)),
                (_multiply, (out, out_buffers.index(2), rings, scales, shape, 2, GROUPS, PIECES, STRIPE, STAGES)),
                (_fetch, (a, b, rings, shape, GROUPS * PIECES, STRIPE, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, FETCH_REGISTERS],
        )


# --- weight gradient --------------------------------------------------------------------------------------------------


@gluon.jit
def _scale_rings(a_scale, b_scale, STRIPS: gl.constexpr, STAGES: gl.constexpr):
    """Buffers for scales of a step: of a tile's STRIPS of 64 rows of a, and of b's rows."""
    a_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, STRIPS * ROWS], a_scale.layout)
    b_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, COLUMNS], b_scale.layout)
    return a_scales, b_scales


@gluon.jit
def _scales_in(buffer, strip, layout: gl.constexpr, STRIPS: gl.constexpr, SIZE: gl.constexpr):
    """Scales of one of the STRIPS of SIZE rows of a tile."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    return buffer._reinterpret(gl.float32, [STRIPS, SIZE], FLAT).index(strip).load(layout)


@gluon.jit
def _fetch_group(operands, rings, m, n, group, stage, phase, STRIPS: gl.constexpr):
    """Codes and scales of a step of the weight gradient: STRIPS of 64 rows of a from m on, 128 of b from n on."""
    a, a_scale, b, b_scale = operands
    a_ring, b_ring, a_scales, b_scales, full, empty = rings
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(bar, (STRIPS * ROWS + COLUMNS) * (DEPTH + 4))
    tma.async_copy_global_to_shared(b, [n, group * DEPTH], bar, b_ring.index(stage))
    tma.async_copy_global_to_shared(b_scale, [group, n], bar, b_scales.index(stage))
    tma.async_copy_global_to_shared(a_scale, [group, m], bar, a_scales.index(stage))
    for strip in gl.static_range(STRIPS):
        part = a_ring.index(stage * STRIPS + strip)
        tma.async_copy_global_to_shared(a, [m + strip * ROWS, group * DEPTH], bar, part)


@gluon.jit
def _fetch_wgrad(operands, rings, shape, STRIPS: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: codes and scales of all tiles of this program, in order, into the rings."""
    M, N, K = shape
    BLOCK_M: gl.constexpr = STRIPS * ROWS
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, COLUMNS, STRIPE)
        for group in range(gl.cdiv(K, DEPTH)):
            _fetch_group(operands, rings, m, n, group, stage, phase, STRIPS)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _multiply_wgrad(
    target, rings, shape, GROUP: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr, ADD: gl.constexpr,
    STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * PIECES * 64, (GROUP + 1) * PIECES * 64) of all tiles of this program, 64 at a time,
    stored from their registers."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    BLOCK_M: gl.constexpr = GROUPS * PIECES * ROWS
    out, m_stride, n_stride = target
    a_ring, b_ring, a_scales, b_scales, full, empty = rings
    M, N, K = shape
    row = gl.arange(0, ROWS, BY_ROW).expand_dims(1)
    column = gl.arange(0, COLUMNS, BY_COLUMN).expand_dims(0)
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, COLUMNS), gl.num_programs(0)):
        m, n = _origin(tile, M, N, BLOCK_M, COLUMNS, STRIPE)
        m += GROUP * PIECES * ROWS
        accs: gl.tuple = ()
        for _piece in gl.static_range(PIECES):
            accs += (zeros,)
        for _ in range(gl.cdiv(K, DEPTH)):
            sums: gl.tuple = ()
            for piece in gl.static_range(PIECES):
                mbarrier.wait(full.index(stage), phase)
                strip = (stage * GROUPS + GROUP) * PIECES + piece
                right = b_ring.index(stage).permute((1, 0))
                product = warpgroup_mma(a_ring.index(strip), right, zeros, use_acc=False, is_async=True)
                own = GROUP * PIECES + piece
                a_factors = _scales_in(a_scales.index(stage), own, BY_ROW, GROUPS * PIECES, ROWS).expand_dims(1)
                b_factors = _scales_in(b_scales.index(stage), 0, BY_COLUMN, 1, COLUMNS).expand_dims(0)
                product = warpgroup_mma_wait(0, deps=(product,))
                if piece == PIECES - 1:
                    mbarrier.arrive(empty.index(stage), count=1)
                product *= b_factors.broadcast_to(product.shape)
                sums += (_promote(product, a_factors, accs[piece], PIECES),)
            accs = sums
            stage, phase = _next(stage, phase, STAGES)
        for piece in gl.static_range(PIECES):
            acc = accs[piece]
            down = m + piece * ROWS
            place = out + (down + row).to(gl.int64) * m_stride + (n + column).to(gl.int64) * n_stride
            mask = (row < M - down) & (column < N - n)
            if ADD:
                acc += gl.load(place, mask=mask)
            gl.store(place, acc, mask=mask)


@gluon.jit
def _fp8_gemm_wgrad_hopper_kernel(
    a, a_scale, b, b_scale, out, M, N, K, m_stride, n_stride,
    ADD: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = a [M, K] @ b [N, K].T, with ADD added to it. a and b are descriptors as the forward's, scales those
    of [K / 128, M] and [K / 128, N], of a tile's in one row."""
    a_ring, b_ring, full, empty = _rings(a, b, GROUPS * PIECES, STAGES, GROUPS)
    a_scales, b_scales = _scale_rings(a_scale, b_scale, GROUPS * PIECES, STAGES)
    rings = (a_ring, b_ring, a_scales, b_scales, full, empty)
    shape = (M, N, K)
    target = (out, m_stride, n_stride)
    gl.static_assert(GROUPS == 2)  # three groups' threads have too few registers for b's scales
    gl.warp_specialize(
        [
            (_multiply_wgrad, (target, rings, shape, 0, GROUPS, PIECES, ADD, STRIPE, STAGES)),
            (_multiply_wgrad, (target, rings, shape, 1, GROUPS, PIECES, ADD, STRIPE, STAGES)),
            (_fetch_wgrad, ((a, a_scale, b, b_scale), rings, shape, GROUPS * PIECES, STRIPE, STAGES)),
        ],
        [4, 1],
        [REGISTERS, FETCH_REGISTERS],
    )


# --- launchers --------------------------------------------------------------------------------------------------------

DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32,
}  # fmt: skip
REGISTERS = {2: 232, 3: 152}  # of a multiplying thread, by GROUPS; with the fetching warps' 65,536 at most
SHARED = 232_448 - 1024  # bytes of shared memory for rings and out; the rest for barriers and Triton's own


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """x, in blocks of that shape."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def _of_groups(scale: Tensor, rows: int) -> TensorDescriptor:
    """Scales [R, G] as [G, R], in blocks of so many rows' of one group: of where they lie, if neighbours are side by
    side and groups start at multiples of 16 bytes, else of a copy."""
    scale = scale.T
    if scale.stride(1) != 1 or scale.stride(0) < 1 or scale.stride(0) % 4 or scale.data_ptr() % 16:
        groups, width = scale.shape
        scale = scale.new_empty(groups, triton.cdiv(width, 4) * 4)[:, :width].copy_(scale)
    return _descriptor(scale, 1, rows)


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, *,
    GROUPS: int, PIECES: int, STAGES: int, STRIPE: int,
) -> None:  # fmt: skip
    """out [M, N] = a [M, K] @ b [N, K].T; a_scale [M, ceil(K / 128)], b_scale [ceil(N / 128), ceil(K / 128)]. Rows of
    a, b and out start at multiples of 16 bytes, their columns are contiguous. GROUPS: 2 or 3; PIECES: 1, with 2
    groups also 2; STAGES: fewer are taken where out's buffers leave no room."""
    (M, K), N = a.shape, b.shape[0]
    rows = 64 * GROUPS * PIECES
    stages = (SHARED - GROUPS * 64 * 128 * out.element_size()) // ((rows + 128) * 128)
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, 128)
    _launch.launch(
        _fp8_gemm_hopper_kernel, (min(tiles, _launch.multiprocessors(a)),),
        _descriptor(a, 64, 128), a_scale, _descriptor(b, 128, 128), b_scale, _descriptor(out, 64, 128),
        M, N, K, *a_scale.stride(), *b_scale.stride(),
        STRIPE=STRIPE, STAGES=min(STAGES, stages), GROUPS=GROUPS, PIECES=PIECES, REGISTERS=REGISTERS[GROUPS],
        num_warps=4,
    )  # fmt: skip


def gemm_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, add: bool, *,
    GROUPS: int, PIECES: int, STAGES: int, STRIPE: int,
) -> None:  # fmt: skip
    """out [M, N] fp32 = a [M, K] @ b [N, K].T, or with `add` added to it; a_scale [M, ceil(K / 128)], b_scale
    [N, ceil(K / 128)], copied unless neighbours along the first dimension are side by side. Rows of a and b start at
    multiples of 16 bytes, their columns are contiguous; any strides of out. GROUPS: 2; PIECES: 1 or 2; STAGES: fewer
    are taken where there is no room."""
    (M, K), N = a.shape, b.shape[0]
    rows = 64 * GROUPS * PIECES
    stages = SHARED // ((rows + 128) * (128 + 4))
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, 128)
    _launch.launch(
        _fp8_gemm_wgrad_hopper_kernel, (min(tiles, _launch.multiprocessors(a)),),
        _descriptor(a, 64, 128), _of_groups(a_scale, rows), _descriptor(b, 128, 128), _of_groups(b_scale, 128), out,
        M, N, K, *out.stride(),
        ADD=add, STRIPE=STRIPE, STAGES=min(STAGES, stages), GROUPS=GROUPS, PIECES=PIECES,
        REGISTERS=REGISTERS[GROUPS], num_warps=4,
    )  # fmt: skip
