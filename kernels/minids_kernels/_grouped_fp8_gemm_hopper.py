"""`grouped_fp8_gemm`'s products for Hopper (sm_90) with the warps' work laid out by hand: `_fp8_gemm_hopper` for
segments of rows, and for the weight gradient.

Tiles of all segments are numbered without a gap: each expert's as `_fp8_gemm_hopper` does, behind those of the experts
before; rows of no expert come last, as a segment without anything to multiply. How many tiles there are is known on the
device alone. So each warp walks through as many numbers as T rows may have tiles, finds a number's segment from the
last one's on, and leaves numbers past the last tile out: all warps see the same tiles in the same order, which keeps
them in step at the ring. Strips of 64 rows behind the segment's end are not fetched: a group multiplies those of its
PIECES that are there, and lets go of the buffers where none is, which leaves the tensor cores to the others.

The weight gradient's operands have scales of each row and each column of a tile: these pass through rings, too.
"""

from __future__ import annotations

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

from . import _launch
from ._fp8_gemm_hopper import (
    COLUMNS,
    DEPTH,
    FETCH_REGISTERS,
    REGISTERS,
    ROWS,
    SHARED,
    _descriptor,
    _fetch_group,
    _next,
    _of_groups,
    _origin,
    _promote,
    _rings,
    _scale_rings,
    _scales_in,
)
from ._launch import triton

__all__ = ["grouped", "wgrad"]


@gluon.jit
def _factors(a_scale, b_scale, rows, k, a_k_stride, b_k_stride):
    """What to multiply the products of step `k` by, [64] each: scales at the offsets `rows` of each piece times that of
    b's block."""
    block = gl.load(b_scale + k * b_k_stride)
    found: gl.tuple = ()
    for piece in gl.static_range(len(rows)):
        found += (gl.load(a_scale + k * a_k_stride + rows[piece]) * block,)
    return found


@gluon.jit
def _segment(tile, expert, start, end, first, segments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The segment of a tile: its expert (E: no one's), its first row, where it ends, and the number of its first tile;
    from those of an earlier tile's segment, at first of none (-1, 0, 0, 0). And whether there is such a tile."""
    offsets, T, E, N = segments
    tiles = gl.cdiv(end - start, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    while (tile >= first + tiles) & (expert < E):
        expert += 1
        first += tiles
        start = end
        end = gl.load(offsets + expert + 1, mask=expert < E, other=T)
        tiles = gl.cdiv(end - start, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    return expert, start, end, first, tile < first + tiles


@gluon.jit
def _most(segments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """There are no more tiles than this, whatever the segments' lengths."""
    _, T, E, N = segments
    return (T // BLOCK_M + E + 1) * gl.cdiv(N, BLOCK_N)


@gluon.jit
def _fetch(a, b, rings, segments, K, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: codes of all tiles of this program, in order, into the ring."""
    a_ring, b_ring, full, empty = rings
    _, _, E, N = segments
    STRIPS: gl.constexpr = BLOCK_M // ROWS
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    expert, start, end, first = gl.to_tensor(-1), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), _most(segments, BLOCK_M, COLUMNS), gl.num_programs(0)):
        expert, start, end, first, real = _segment(tile, expert, start, end, first, segments, BLOCK_M, COLUMNS)
        if real & (expert < E):
            m, n = _origin(tile - first, end - start, N, BLOCK_M, COLUMNS, STRIPE)
            m += start
            strips = gl.minimum(gl.cdiv(end - m, ROWS), STRIPS)  # with rows in this segment
            for k in range(0, K, DEPTH):
                mbarrier.wait(empty.index(stage), phase ^ 1)
                for count in gl.static_range(1, STRIPS + 1):
                    mbarrier.expect(full.index(stage), (count * ROWS + COLUMNS) * DEPTH, pred=strips == count)
                tma.async_copy_global_to_shared(b, [expert * N + n, k], full.index(stage), b_ring.index(stage))
                for strip in gl.static_range(STRIPS):
                    part = a_ring.index(stage * STRIPS + strip)
                    row = m + strip * ROWS
                    tma.async_copy_global_to_shared(a, [row, k], full.index(stage), part, pred=strip < strips)
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _store_some(out_ptr, out_buffer, m, n, end, N, BLOCK_N: gl.constexpr):
    """Rows from m up to `end` of a tile in shared memory to out [T, N], 16 bytes a thread."""
    WIDTH: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = min(32, BLOCK_N // WIDTH)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    row = (m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))).expand_dims(1)
    column = (n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))).expand_dims(0)
    gl.store(out_ptr + row.to(gl.int64) * N + column, out_buffer.load(LAYOUT), mask=(row < end) & (column < N))


@gluon.jit
def _multiply_strips(
    outs, out_buffer, rings, scales, place, steps, N, stage, phase,
    FIRST: gl.constexpr, PIECES: gl.constexpr, STRIPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """PIECES times 64 rows of a tile, from strip FIRST of its STRIPS on; place: their first row, the tile's first
    column, and where the segment ends. -> the ring's next buffer and phase."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    a_ring, b_ring, full, empty = rings
    a_scale, a_stride, a_k_stride, b_scale, b_k_stride = scales
    out, out_ptr = outs
    m, n, end = place
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    rows: gl.tuple = ()
    accs: gl.tuple = ()
    for piece in gl.static_range(PIECES):
        rows += (gl.minimum(row + piece * ROWS, end - 1 - m) * a_stride,)
        accs += (zeros,)
    factors = _factors(a_scale, b_scale, rows, 0, a_k_stride, b_k_stride)
    for k in range(steps):
        sums: gl.tuple = ()
        for piece in gl.static_range(PIECES):
            mbarrier.wait(full.index(stage), phase)  # granted to the second piece: see `_fp8_gemm_hopper`
            left = a_ring.index(stage * STRIPS + FIRST + piece)
            product = warpgroup_mma(left, b_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if piece == 0:
                following = _factors(a_scale, b_scale, rows, gl.minimum(k + 1, steps - 1), a_k_stride, b_k_stride)
            product = warpgroup_mma_wait(0, deps=(product,))
            if piece == PIECES - 1:
                mbarrier.arrive(empty.index(stage), count=1)  # by one thread, after a barrier of the four warps
            sums += (_promote(product, factors[piece].expand_dims(1), accs[piece], PIECES),)
        accs = sums
        factors = following
        stage, phase = _next(stage, phase, STAGES)
    for piece in gl.static_range(PIECES):
        top = m + piece * ROWS
        tma.store_wait(0)
        out_buffer.store(accs[piece].to(out.dtype))
        if top + ROWS <= end:
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [top, n], out_buffer)
        else:  # the next rows are another's
            _store_some(out_ptr, out_buffer, top, n, end, N, COLUMNS)
    return stage, phase


@gluon.jit
def _multiply(
    outs, out_buffer, rings, scales, segments, K,
    GROUP: gl.constexpr, PIECES: gl.constexpr, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * PIECES * 64, (GROUP + 1) * PIECES * 64) of all tiles of this program."""
    FIRST: gl.constexpr = GROUP * PIECES
    STRIPS: gl.constexpr = BLOCK_M // ROWS
    a_scale, a_stride, a_k_stride, b_scale, b_expert, b_stride, b_k_stride = scales
    _, _, full, empty = rings
    _, _, E, N = segments
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    expert, start, end, first = gl.to_tensor(-1), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), _most(segments, BLOCK_M, COLUMNS), gl.num_programs(0)):
        expert, start, end, first, real = _segment(tile, expert, start, end, first, segments, BLOCK_M, COLUMNS)
        if real:
            m, n = _origin(tile - first, end - start, N, BLOCK_M, COLUMNS, STRIPE)
            m += start + FIRST * ROWS
            steps = gl.where(expert < E, gl.cdiv(K, DEPTH), 0)
            strip = a_scale + m.to(gl.int64) * a_stride
            block = b_scale + gl.minimum(expert, E - 1).to(gl.int64) * b_expert + n // COLUMNS * b_stride
            own = (strip, a_stride, a_k_stride, block, b_k_stride)
            here = gl.minimum(gl.cdiv(end - m, ROWS), PIECES)  # pieces with rows in this segment
            for pieces in gl.static_range(1, PIECES + 1):
                if here == pieces:
                    stage, phase = _multiply_strips(
                        outs, out_buffer, rings, own, (m, n, end), steps, N, stage, phase,
                        FIRST, pieces, STRIPS, STAGES,
                    )  # fmt: skip
            if here <= 0:
                for _ in range(steps):
                    mbarrier.wait(full.index(stage), phase)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit
def _grouped_fp8_gemm_hopper_kernel(
    a, a_scale, b, b_scale, offsets, out, out_ptr, T, E, N, K, a_stride, a_k_stride, b_expert, b_stride, b_k_stride,
    STRIPE: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [T, N] = a [T, K] @ b [E * N, K].T of each row's expert, descriptors of [64, 128], [64, 128] and [128, 128]
    numbers; out_ptr: out, contiguous. REGISTERS: of a multiplying thread."""
    BLOCK_M: gl.constexpr = ROWS * GROUPS * PIECES
    rings = _rings(a, b, GROUPS * PIECES, STAGES, GROUPS)
    buffers = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, COLUMNS], out.layout)
    scales = (a_scale, a_stride, a_k_stride, b_scale, b_expert, b_stride, b_k_stride)
    segments = (offsets, T, E, N)
    outs = (out, out_ptr)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (outs, buffers.index(0), rings, scales, segments, K, 0, PIECES, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (outs, buffers.index(1), rings, scales, segments, K, 1, PIECES, BLOCK_M, STRIPE, STAGES)),
                (_fetch, (a, b, rings, segments, K, BLOCK_M, STRIPE, STAGES)),
            ],
            [4, 1],
            [REGISTERS, FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (outs, buffers.index(0), rings, scales, segments, K, 0, PIECES, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (outs, buffers.index(1), rings, scales, segments, K, 1, PIECES, BLOCK_M, STRIPE, STAGES)),
                (_multiply, (outs, buffers.index(2), rings, scales, segments, K, 2, PIECES, BLOCK_M, STRIPE, STAGES)),
                (_fetch, (a, b, rings, segments, K, BLOCK_M, STRIPE, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, FETCH_REGISTERS],
        )


# --- weight gradient --------------------------------------------------------------------------------------------------


@gluon.jit
def _tile_tokens(tile, offsets, N, K, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr):
    """Expert, first row and column of a tile of out [E, N, K]; the first of its expert's tiles of tokens, and how many
    there are."""
    tiles = gl.cdiv(N, BLOCK_M) * gl.cdiv(K, COLUMNS)
    expert = tile // tiles
    n, k = _origin(tile % tiles, N, K, BLOCK_M, COLUMNS, STRIPE)
    start = gl.load(offsets + expert)
    return expert, n, k, start // DEPTH + expert, gl.cdiv(gl.load(offsets + expert + 1) - start, DEPTH)


@gluon.jit
def _fetch_tokens(operands, offsets, rings, shape, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: codes and scales of all tiles of this program, in order, into the rings."""
    E, N, K = shape
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * gl.cdiv(N, BLOCK_M) * gl.cdiv(K, COLUMNS), gl.num_programs(0)):
        _, n, k, first, steps = _tile_tokens(tile, offsets, N, K, BLOCK_M, STRIPE)
        for group in range(first, first + steps):
            _fetch_group(operands, rings, n, k, group, stage, phase, BLOCK_M // ROWS)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _multiply_tokens(
    outs, out_buffer, old, offsets, rings, shape,
    GROUP: gl.constexpr, ADD: gl.constexpr, BLOCK_M: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * 64, GROUP * 64 + 64) of all tiles of this program. ADD: what is in `out` is fetched
    into the buffer for results while the tile is multiplied, barrier `old`."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    STRIPS: gl.constexpr = BLOCK_M // ROWS
    a_ring, b_ring, a_scales, b_scales, full, empty = rings
    out, out_ptr = outs
    E, N, K = shape
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    stage, phase, old_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * gl.cdiv(N, BLOCK_M) * gl.cdiv(K, COLUMNS), gl.num_programs(0)):
        expert, n, k, _, steps = _tile_tokens(tile, offsets, N, K, BLOCK_M, STRIPE)
        top, end = expert * N + n + GROUP * ROWS, expert * N + N
        if ADD:
            tma.store_wait(0)
            mbarrier.expect(old, ROWS * COLUMNS * 4)
            tma.async_copy_global_to_shared(out, [top, k], old, out_buffer)
        acc = zeros
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            place = stage * STRIPS + GROUP
            right = b_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(a_ring.index(place), right, zeros, use_acc=False, is_async=True)
            a_factors = _scales_in(a_scales.index(stage), GROUP, BY_ROW, STRIPS, ROWS).expand_dims(1)
            b_factors = _scales_in(b_scales.index(stage), 0, BY_COLUMN, 1, COLUMNS).expand_dims(0)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            product *= b_factors.broadcast_to(product.shape)
            acc = gl.fma(product, a_factors.broadcast_to(product.shape), acc)
            stage, phase = _next(stage, phase, STAGES)
        if ADD:
            mbarrier.wait(old, old_phase)
            old_phase ^= 1
            acc += out_buffer.load(LAYOUT)
        else:
            tma.store_wait(0)
        out_buffer.store(acc)
        fence_async_shared()
        if top + ROWS <= end:
            tma.async_copy_shared_to_global(out, [top, k], out_buffer)
        else:  # the next rows are another expert's
            _store_some(out_ptr, out_buffer, top, k, end, K, COLUMNS)
    tma.store_wait(0)


@gluon.jit
def _grouped_fp8_gemm_wgrad_hopper_kernel(
    a, a_scale, b, b_scale, offsets, out, out_ptr, E, N, K,
    ADD: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [E * N, K] = a @ b.T over each expert's columns of a [N, 128 G] and b [K, 128 G], descriptors of [64, 128],
    [64, 128] and [128, 128] numbers, scales of [G, N] and [G, K], of 128 in one row; out_ptr: out, contiguous. ADD:
    added to it. REGISTERS: of a multiplying thread."""
    BLOCK_M: gl.constexpr = 2 * ROWS
    a_ring, b_ring, full, empty = _rings(a, b, 2, STAGES, 2)
    a_scales, b_scales = _scale_rings(a_scale, b_scale, 2, STAGES)
    buffers = gl.allocate_shared_memory(out.dtype, [2, ROWS, COLUMNS], out.layout)
    old = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(old.index(group), count=1)
    fence_async_shared()
    rings = (a_ring, b_ring, a_scales, b_scales, full, empty)
    shape = (E, N, K)
    outs = (out, out_ptr)
    gl.warp_specialize(
        [
            (
                _multiply_tokens,
                (outs, buffers.index(0), old.index(0), offsets, rings, shape, 0, ADD, BLOCK_M, STRIPE, STAGES),
            ),
            (
                _multiply_tokens,
                (outs, buffers.index(1), old.index(1), offsets, rings, shape, 1, ADD, BLOCK_M, STRIPE, STAGES),
            ),
            (_fetch_tokens, ((a, a_scale, b, b_scale), offsets, rings, shape, BLOCK_M, STRIPE, STAGES)),
        ],
        [4, 1],
        [REGISTERS, FETCH_REGISTERS],
    )


# --- launchers --------------------------------------------------------------------------------------------------------


def grouped(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor, out: Tensor, *,
    GROUPS: int, PIECES: int, STAGES: int, STRIPE: int,
) -> None:  # fmt: skip
    """out [T, N] contiguous = x [T, K] @ w [E * N, K].T, E >= 1, rows offsets[e] to offsets[e + 1] (int32 [E + 1]) by
    expert e, zeros behind; x_scale [T, ceil(K / 128)], w_scale [E, ceil(N / 128), ceil(K / 128)]. Rows of x, w and out
    start at multiples of 16 bytes, their columns are contiguous. GROUPS: 2 or 3; PIECES: 1, with 2 groups also 2;
    STAGES: fewer are taken where out's buffers leave no room."""
    (T, K), N, E, rows = x.shape, out.shape[1], w_scale.shape[0], 64 * GROUPS * PIECES
    stages = (SHARED - GROUPS * 64 * 128 * out.element_size()) // ((rows + 128) * 128)
    most = (T // rows + E + 1) * triton.cdiv(N, 128)
    _launch.launch(
        _grouped_fp8_gemm_hopper_kernel, (min(most, _launch.multiprocessors(x)),),
        _descriptor(x, 64, 128), x_scale, _descriptor(w, 128, 128), w_scale, offsets, _descriptor(out, 64, 128), out,
        T, E, N, K, *x_scale.stride(), *w_scale.stride(),
        STRIPE=STRIPE, STAGES=min(STAGES, stages), GROUPS=GROUPS, PIECES=PIECES, REGISTERS=REGISTERS[GROUPS],
        num_warps=4,
    )  # fmt: skip


def wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor, add: bool,
    STAGES: int, STRIPE: int,
) -> None:  # fmt: skip
    """out [E, N, K] contiguous fp32 = a [N, 128 G] @ b [K, 128 G].T over each expert's columns, or that added to it;
    scales [N, G] and [K, G], copied unless neighbours along the first dimension are side by side. Rows of a, b and out
    start at multiples of 16 bytes, their columns are contiguous."""
    E, N, K = out.shape
    tiles = E * triton.cdiv(N, 128) * triton.cdiv(K, 128)
    _launch.launch(
        _grouped_fp8_gemm_wgrad_hopper_kernel, (min(tiles, _launch.multiprocessors(a)),),
        _descriptor(a, 64, 128), _of_groups(a_scale, 128), _descriptor(b, 128, 128), _of_groups(b_scale, 128), offsets,
        _descriptor(out.view(E * N, K), 64, 128), out, E, N, K,
        ADD=add, STRIPE=STRIPE, STAGES=STAGES, REGISTERS=REGISTERS[2], num_warps=4,
    )  # fmt: skip
