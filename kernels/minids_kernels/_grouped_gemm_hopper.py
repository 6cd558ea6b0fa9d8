"""`grouped_gemm`'s products in half precision for Hopper (sm_90) with the warps' work laid out by hand, in Gluon: some
warps fetch, two groups of four multiply 64 rows of a tile each. A group has the next step's product under way before
it lets go of the last one's buffers, so that the tensor cores never wait for it.

Ring, barriers and the walk through tiles of all segments are `_grouped_fp8_gemm_hopper`'s. A step is DEPTH numbers of
the contraction: columns of x and w in the forward, tokens in the weight gradient, where ragged descriptors
(`triton.tools.ragged_tma`) give zeros behind a segment's end. Operands lie in the ring as they do in memory: tensor
cores take numbers of two bytes along either dimension.

Rows of tokens in any order are fetched by four warps, 16 bytes a thread. Tensor cores do not see what such copies have
written before a fence (PTX ISA, asynchronous proxy): who fetches waits for them, some steps behind, and fences.

No launch table names these kernels before they were measured; `benchmarks.tune` tries them on sm_90.
"""

from __future__ import annotations

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
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices

from . import _launch
from ._fp8_gemm_hopper import DTYPES, ROWS, SHARED, _barriers, _descriptor, _next, _origin
from ._grouped_fp8_gemm_hopper import _most, _segment, _store_some
from ._launch import triton
from .swiglu import swiglu_values

__all__ = ["grouped", "outer"]

GROUPS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # GROUPS times 64 rows
REGISTERS, FETCH_REGISTERS = gl.constexpr(232), gl.constexpr(40)  # of a thread, where one warp fetches


@gluon.jit
def _operand(buffer, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, TURNED: gl.constexpr):
    """A buffer's [HEIGHT, WIDTH] numbers as a product takes them, or their transpose."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * WIDTH), 16, 2)
    found = buffer._reinterpret(buffer.dtype, [HEIGHT, WIDTH], LAYOUT)
    return found.permute((1, 0)) if TURNED else found


@gluon.jit
def _multiply(
    rings, steps, stage, phase, GROUP: gl.constexpr, A_TURNED: gl.constexpr, B_TURNED: gl.constexpr,
    BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sum [64, BLOCK_N] fp32 of the products of a tile's `steps`, and the ring's next buffer and phase. A lies in the
    ring as [64, DEPTH], b as [DEPTH, BLOCK_N], or where TURNED as their transposes."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    a_ring, b_ring, full, empty = rings
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    before = stage
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        strip, block = a_ring.index(stage * GROUPS + GROUP), b_ring.index(stage)
        left = _operand(strip, DEPTH, ROWS, True) if A_TURNED else _operand(strip, ROWS, DEPTH, False)
        right = _operand(block, BLOCK_N, DEPTH, True) if B_TURNED else _operand(block, DEPTH, BLOCK_N, False)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)  # by one thread, after a barrier of the four warps
        before = stage
        stage, phase = _next(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1, pred=steps > 0)
    return acc, stage, phase


@gluon.jit
def _halves(x):
    """The left and the right half of x's columns, which stay in their threads."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.shape[1] // 2, 16])
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, LAYOUT, assert_trivial=True), gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _store(target, buffer, x, m, n, end, N, PIECES: gl.constexpr):
    """x [64, C] to the rows from m up to `end` of out [., N], columns from n on, in PIECES, through a buffer of one."""
    out, out_ptr = target
    if PIECES > 1:
        left, right = _halves(x)
        _store(target, buffer, left, m, n, end, N, PIECES // 2)
        _store(target, buffer, right, m, n + x.shape[1] // 2, end, N, PIECES // 2)
    else:
        tma.store_wait(0)
        buffer.store(x.to(out.dtype))
        if m + ROWS <= end:
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [m, n], buffer)
        else:  # the next rows are another's
            _store_some(out_ptr, buffer, m, n, end, N, x.shape[1])


# --- forward and data gradient ----------------------------------------------------------------------------------------


@gluon.jit
def _fetch_weights(w, place, bar, buffer, TURNED: gl.constexpr, SWIGLU: gl.constexpr):
    """A block of w's descriptor; place: its expert, column of the product, and k."""
    expert, n, k = place
    if SWIGLU:
        tma.async_copy_global_to_shared(w, [expert, 0, n, k], bar, buffer)
    elif TURNED:
        tma.async_copy_global_to_shared(w, [expert, k, n], bar, buffer)
    else:
        tma.async_copy_global_to_shared(w, [expert, n, k], bar, buffer)


@gluon.jit
def _fetch(
    x, w, rings, segments, K, TURNED: gl.constexpr, SWIGLU: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr,
    DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: rows in order, and weights, of all tiles of this program. A strip behind the segment's end is
    left out."""
    a_ring, b_ring, full, empty = rings
    _, _, E, N = segments
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    expert, start, end, first = gl.to_tensor(-1), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), _most(segments, BLOCK_M, COLUMNS), gl.num_programs(0)):
        expert, start, end, first, real = _segment(tile, expert, start, end, first, segments, BLOCK_M, COLUMNS)
        if real & (expert < E):
            m, n = _origin(tile - first, end - start, N, BLOCK_M, COLUMNS, STRIPE)
            m += start
            strips = gl.minimum(gl.cdiv(end - m, ROWS), GROUPS)
            for k in range(0, K, DEPTH):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                for count in gl.static_range(1, GROUPS + 1):
                    mbarrier.expect(bar, (count * ROWS + BLOCK_N) * DEPTH * 2, pred=strips == count)
                _fetch_weights(w, (expert, n, k), bar, b_ring.index(stage), TURNED, SWIGLU)
                for strip in gl.static_range(GROUPS):
                    part = a_ring.index(stage * GROUPS + strip)
                    tma.async_copy_global_to_shared(x, [m + strip * ROWS, k], bar, part, pred=strip < strips)
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _fetch_gathered(
    x, token, w, rings, segments, K, x_stride, TURNED: gl.constexpr, SWIGLU: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four fetching warps: rows token[t] of x, and weights, of all tiles of this program. These are one arrival on
    `full`, rows the other, LAG steps later."""
    gl.static_assert(STAGES > 2)
    LAG: gl.constexpr = STAGES - 2  # more, and who multiplies would wait for rows, who fetches for its buffer
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DEPTH, DEPTH // 8], [4, 1], [1, 0])
    a_ring, b_ring, full, empty = rings
    _, _, E, N = segments
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, DEPTH, gl.SliceLayout(0, LAYOUT)).expand_dims(0)
    stage, phase, late, steps = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(STAGES - LAG), gl.to_tensor(0)
    expert, start, end, first = gl.to_tensor(-1), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), _most(segments, BLOCK_M, COLUMNS), gl.num_programs(0)):
        expert, start, end, first, real = _segment(tile, expert, start, end, first, segments, BLOCK_M, COLUMNS)
        if real & (expert < E):
            m, n = _origin(tile - first, end - start, N, BLOCK_M, COLUMNS, STRIPE)
            m += start
            rows: gl.tuple = ()
            for strip in gl.static_range(GROUPS):
                source = gl.load(token + gl.minimum(m + strip * ROWS + row, end - 1))
                rows += (x + (source * x_stride).expand_dims(1) + column,)
            for k in range(0, K, DEPTH):
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), BLOCK_N * DEPTH * 2)
                _fetch_weights(w, (expert, n, k), full.index(stage), b_ring.index(stage), TURNED, SWIGLU)
                for strip in gl.static_range(GROUPS):
                    part = a_ring.index(stage * GROUPS + strip)
                    async_copy.async_copy_global_to_shared(part, rows[strip] + k, mask=column < K - k)
                async_copy.commit_group()
                async_copy.wait_group(LAG)
                fence_async_shared()
                mbarrier.arrive(full.index(late), count=1, pred=steps >= LAG)
                steps += 1
                late = gl.where(late + 1 == STAGES, 0, late + 1)
                stage, phase = _next(stage, phase, STAGES)
    async_copy.wait_group(0)
    fence_async_shared()
    for done in gl.static_range(LAG):
        mbarrier.arrive(full.index(late), count=1, pred=steps >= LAG - done)
        late = gl.where(late + 1 == STAGES, 0, late + 1)


@gluon.jit
def _fetch_rows(
    x, token, w, rings, segments, K, x_stride, GATHERED: gl.constexpr, TURNED: gl.constexpr, SWIGLU: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warps: four if GATHERED, else one."""
    if GATHERED:
        _fetch_gathered(
            x, token, w, rings, segments, K, x_stride, TURNED, SWIGLU, COLUMNS, BLOCK_N, DEPTH, STRIPE, STAGES
        )
    else:
        _fetch(x, w, rings, segments, K, TURNED, SWIGLU, COLUMNS, BLOCK_N, DEPTH, STRIPE, STAGES)


@gluon.jit
def _activate(y, out, buffer, acc, place, activation, KEEP: gl.constexpr, PIECES: gl.constexpr):
    """Stores silu(gate) * up * weight[pair] of gate and up, the halves of acc, and where KEEP these."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1] // 2, 16])
    m, n, end, N = place
    weight, pair = activation
    gate, up = _halves(acc)
    if KEEP:
        _store(y, buffer, gate, m, n, end, 2 * N, PIECES)
        _store(y, buffer, up, m, N + n, end, 2 * N, PIECES)
    row = gl.minimum(m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), end - 1)
    factor = gl.load(weight + gl.load(pair + row)).to(gl.float32).expand_dims(1)
    _store(out, buffer, swiglu_values(gate, up) * factor, m, n, end, N, PIECES)


@gluon.jit
def _multiply_rows(
    y, out, buffer, activation, rings, segments, K, GROUP: gl.constexpr, TURNED: gl.constexpr, SWIGLU: gl.constexpr,
    KEEP: gl.constexpr, PIECES: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * 64, GROUP * 64 + 64) of all tiles of this program."""
    _, _, full, empty = rings
    _, _, E, N = segments
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    expert, start, end, first = gl.to_tensor(-1), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), _most(segments, BLOCK_M, COLUMNS), gl.num_programs(0)):
        expert, start, end, first, real = _segment(tile, expert, start, end, first, segments, BLOCK_M, COLUMNS)
        if real:
            m, n = _origin(tile - first, end - start, N, BLOCK_M, COLUMNS, STRIPE)
            m += start + GROUP * ROWS
            steps = gl.where(expert < E, gl.cdiv(K, DEPTH), 0)
            if m < end:
                acc, stage, phase = _multiply(
                    rings, steps, stage, phase, GROUP, False, not TURNED, BLOCK_N, DEPTH, STAGES
                )
                if SWIGLU:
                    _activate(y, out, buffer, acc, (m, n, end, N), activation, KEEP, PIECES // 2)
                else:
                    _store(y, buffer, acc, m, n, end, N, PIECES)
            else:
                for _ in range(steps):
                    mbarrier.wait(full.index(stage), phase)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit
def _grouped_gemm_hopper_kernel(
    x, token, w, offsets, y, y_ptr, out, out_ptr, weight, pair, T, E, N, K, x_stride,
    GATHERED: gl.constexpr, TURNED: gl.constexpr, SWIGLU: gl.constexpr, KEEP: gl.constexpr, PIECES: gl.constexpr,
    BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] @ w[e].T of each row's expert; x is a descriptor of [64, DEPTH] numbers, or where GATHERED a
    pointer, and row t is x[token[t]]. w: a descriptor of [1, BLOCK_N, DEPTH], where TURNED of [1, DEPTH, BLOCK_N]. For
    SWIGLU w is [E, 2, N, K], of [1, 2, BLOCK_N / 2, DEPTH], y [T, 2 N], written if KEEP, and out [T, N] =
    silu(gate) * up * weight[pair]. y, out: of [64, BLOCK_N / PIECES]; y_ptr, out_ptr: the same, contiguous."""
    COLUMNS: gl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * DEPTH), 16, 2)
    a_ring = gl.allocate_shared_memory(w.dtype, [STAGES * GROUPS, ROWS, DEPTH], LAYOUT)
    b_ring = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)  # noqa: RUF005 Gluon knows no stars
    buffers = gl.allocate_shared_memory(y.dtype, [GROUPS, ROWS, BLOCK_N // PIECES], y.layout)
    full, empty = _barriers(STAGES, GROUPS, 2 if GATHERED else 1)
    rings = (a_ring, b_ring, full, empty)
    segments = (offsets, T, E, N)
    to_y, to_out, activation = (y, y_ptr), (out, out_ptr), (weight, pair)
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (
                    to_y, to_out, buffers.index(0), activation, rings, segments, K, 0, TURNED, SWIGLU, KEEP, PIECES,
                    COLUMNS, BLOCK_N, DEPTH, STRIPE, STAGES,
                ),
            ),
            (
                _multiply_rows,
                (
                    to_y, to_out, buffers.index(1), activation, rings, segments, K, 1, TURNED, SWIGLU, KEEP, PIECES,
                    COLUMNS, BLOCK_N, DEPTH, STRIPE, STAGES,
                ),
            ),
            (
                _fetch_rows,
                (
                    x, token, w, rings, segments, K, x_stride, GATHERED, TURNED, SWIGLU, COLUMNS, BLOCK_N, DEPTH,
                    STRIPE, STAGES,
                ),
            ),
        ],
        [4, 4 if GATHERED else 1],
        [208 if GATHERED else REGISTERS, 88 if GATHERED else FETCH_REGISTERS],
    )  # fmt: skip


# --- weight gradient --------------------------------------------------------------------------------------------------


@gluon.jit
def _tile(number, offsets, shape, BLOCK_N: gl.constexpr, STRIPE: gl.constexpr):
    """Expert, first row and column of a tile of out [E, M, N]; its expert's first row and how many it has."""
    _, M, N = shape
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    expert = number // tiles
    m, n = _origin(number % tiles, M, N, BLOCK_M, BLOCK_N, STRIPE)
    start = gl.load(offsets + expert)
    return expert, m, n, start, gl.load(offsets + expert + 1) - start


@gluon.jit
def _fetch_tokens(
    a, b, offsets, rings, shape, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr
):
    """The fetching warp: the rows of all tiles of this program, DEPTH at a time."""
    a_ring, b_ring, full, empty = rings
    E, M, N = shape
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        _, m, n, start, count = _tile(tile, offsets, shape, BLOCK_N, STRIPE)
        for row in range(0, count, DEPTH):
            wrap, last, place = to_ragged_indices(start, count, row)
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * DEPTH * 2)
            tma.async_copy_global_to_shared(b, [wrap, last, place, n], bar, b_ring.index(stage))
            for strip in gl.static_range(GROUPS):
                part = a_ring.index(stage * GROUPS + strip)
                tma.async_copy_global_to_shared(a, [wrap, last, place, m + strip * ROWS], bar, part)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _multiply_tokens(
    target, buffer, offsets, rings, shape, GROUP: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr,
    DEPTH: gl.constexpr, STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: rows [GROUP * 64, GROUP * 64 + 64) of all tiles of this program."""
    E, M, N = shape
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        expert, m, n, _, count = _tile(tile, offsets, shape, BLOCK_N, STRIPE)
        steps = gl.cdiv(count, DEPTH)
        acc, stage, phase = _multiply(rings, steps, stage, phase, GROUP, True, False, BLOCK_N, DEPTH, STAGES)
        _store(target, buffer, acc, expert * M + m + GROUP * ROWS, n, expert * M + M, N, PIECES)
    tma.store_wait(0)


@gluon.jit
def _grouped_outer_hopper_kernel(
    a, b, offsets, out, out_ptr, E, M, N, PIECES: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    STRIPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [E * M, N] = a.T @ b over each expert's rows of a [T, M] and b [T, N], ragged descriptors of [DEPTH, 64] and
    [DEPTH, BLOCK_N] numbers. out: of [64, BLOCK_N / PIECES]; out_ptr: the same, contiguous."""
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * GROUPS, 1, 1, DEPTH, ROWS], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 1, 1, DEPTH, BLOCK_N], b.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, BLOCK_N // PIECES], out.layout)
    full, empty = _barriers(STAGES, GROUPS, 1)
    rings = (a_ring, b_ring, full, empty)
    shape = (E, M, N)
    target = (out, out_ptr)
    gl.warp_specialize(
        [
            (
                _multiply_tokens,
                (target, buffers.index(0), offsets, rings, shape, 0, PIECES, BLOCK_N, DEPTH, STRIPE, STAGES),
            ),
            (
                _multiply_tokens,
                (target, buffers.index(1), offsets, rings, shape, 1, PIECES, BLOCK_N, DEPTH, STRIPE, STAGES),
            ),
            (_fetch_tokens, (a, b, offsets, rings, shape, BLOCK_N, DEPTH, STRIPE, STAGES)),
        ],
        [4, 1],
        [REGISTERS, FETCH_REGISTERS],
    )


# --- launchers --------------------------------------------------------------------------------------------------------


def _ragged(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [T, C], in blocks of [rows, columns] that have zeros behind a segment's end."""
    ragged = create_ragged_descriptor(x, [rows, columns])
    layout = gl.NVMMASharedLayout.get_default_for(ragged.block_shape, DTYPES[x.dtype])
    return TensorDescriptor(x, ragged.shape, ragged.strides, ragged.block_shape, layout)


def _stages(STAGES: int, out: Tensor, columns: int, BLOCK_N: int, DEPTH: int) -> int:
    """As many as there is room for beside both groups' `columns` of results."""
    return min(STAGES, (SHARED - 128 * columns * out.element_size()) // ((128 + BLOCK_N) * DEPTH * 2))


def grouped(
    x: Tensor, token: Tensor | None, w: Tensor, offsets: Tensor, y: Tensor,
    swiglu: tuple[Tensor, Tensor, Tensor] | None, *, BLOCK_N: int, DEPTH: int, PIECES: int, STAGES: int, STRIPE: int,
) -> None:  # fmt: skip
    """`grouped_gemm._triton_mm` in bf16 or fp16; K, E and T are 1 or more. Rows of x, w, y and `swiglu`'s rows start at
    multiples of 16 bytes, one dimension of w is contiguous: the last for `swiglu`, where N is a multiple of BLOCK_N.
    STAGES: fewer are taken where results leave no room; 3 or more for tokens' rows."""
    rows, (E, _, K) = len(x if token is None else token), w.shape
    PIECES = max(2, PIECES) if swiglu else PIECES  # gate's and up's columns apart
    columns = BLOCK_N // PIECES
    turned, keep = w.stride(2) != 1, len(y) == rows
    weight, pair, out = swiglu or (y, y, y)
    if swiglu:
        weights = _descriptor(w.unflatten(1, (2, -1)), 1, 2, BLOCK_N // 2, DEPTH)
    elif turned:
        weights = _descriptor(w.transpose(1, 2), 1, DEPTH, BLOCK_N)
    else:
        weights = _descriptor(w, 1, BLOCK_N, DEPTH)
    N = out.shape[1]
    most = (rows // 128 + E + 1) * triton.cdiv(N, BLOCK_N // 2 if swiglu else BLOCK_N)
    _launch.launch(
        _grouped_gemm_hopper_kernel, (min(most, _launch.multiprocessors(x)),),
        _descriptor(x, 64, DEPTH) if token is None else x, offsets if token is None else token, weights, offsets,
        _descriptor(y if keep else out, 64, columns), y, _descriptor(out, 64, columns), out, weight, pair,
        rows, E, N, K, x.stride(0), GATHERED=token is not None, TURNED=turned, SWIGLU=swiglu is not None, KEEP=keep,
        PIECES=PIECES, BLOCK_N=BLOCK_N, DEPTH=DEPTH, STRIPE=STRIPE,
        STAGES=_stages(STAGES, out, columns, BLOCK_N, DEPTH), num_warps=4,
    )  # fmt: skip


def outer(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, *, BLOCK_N: int, DEPTH: int, PIECES: int, STAGES: int,
    STRIPE: int,
) -> None:  # fmt: skip
    """out [E, M, N] contiguous, fp32 or as a and b = a.T @ b over each expert's rows of a [T, M] and b [T, N], bf16 or
    fp16, E and T 1 or more. Rows of a, b and out start at multiples of 16 bytes, their columns are contiguous."""
    E, M, N = out.shape
    tiles, columns = E * triton.cdiv(M, 128) * triton.cdiv(N, BLOCK_N), BLOCK_N // PIECES
    _launch.launch(
        _grouped_outer_hopper_kernel, (min(tiles, _launch.multiprocessors(a)),),
        _ragged(a, DEPTH, 64), _ragged(b, DEPTH, BLOCK_N), offsets, _descriptor(out.view(E * M, N), 64, columns), out,
        E, M, N, PIECES=PIECES, BLOCK_N=BLOCK_N, DEPTH=DEPTH, STRIPE=STRIPE,
        STAGES=_stages(STAGES, out, columns, BLOCK_N, DEPTH), num_warps=4,
    )  # fmt: skip
