"""`mla_decode`'s attention for Hopper (sm_90) with the warps' work laid out by hand, in Gluon: four warps fetch queries
and blocks of 64 cached rows, two groups of four warps take turns at the blocks.

A tile of 64 query rows has an output of 64 x 512 fp32, half the registers of a multiprocessor: each group holds half of
its columns. Group g computes scores and weights of every second block, leaves the weights in shared memory, and both
groups multiply them with their half of the block's values. So one group's softmax runs beside the other's products.

Blocks are counted through all sequences of a program: block n lies in stage n % 2 and is scored by group n % 2. A
barrier's phase flips when all have arrived: the n-th use of a stage, from 0, waits for phase n % 2 of `full` and
`ready`, its filling for phase (n + 1) % 2 of `empty`, which a fresh barrier grants.
    full[2 * stage + i]     a part of the block is there: i = 0, the half of its values that its scorer multiplies;
                            i = 1, the other half and the rotated numbers
    ready[stage]            its scorer has left weights (where the rotated numbers were), row maxima and row sums
    empty[2 * stage + g]    group g has multiplied its half of the values
    q_full, q_empty         the query of a sequence is there; both groups have done with it
Weights, maxima and sums need no barrier that frees them: their places are written again when the stage has been filled
again, for which both groups have released it.

fp8 rows are widened to bf16 by the fetching warps, in registers; the multiplying groups see no difference. A half's
codes come to registers when the half before has left them, from L2, into which pages are fetched two blocks ahead: the
registers alone could not ask memory for enough at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
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
from ._launch import tl
from .mla_cache import row_fields

__all__ = ["BLOCK_M", "BLOCK_N", "attend", "fits"]

BLOCK_M, BLOCK_N, V_DIM, REST = 64, 64, 512, 64  # query rows of a tile, cached rows of a block, columns of either
ROWS = gl.constexpr(64)  # of a tile, of a block, of a page
HALF = gl.constexpr(256)  # columns of a group's half of the values
ROTATED = gl.constexpr(64)  # columns that are key alone
WIDTH = gl.constexpr(512)  # of values
STAGES = gl.constexpr(2)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of the group's warps; renamed in Triton 3.7
REGISTERS, FP8_REGISTERS = gl.constexpr(232), gl.constexpr(200)  # of a multiplying thread; fetching ones have the rest


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _stretch(
    seq_lens, batch, room, BLOCK_B: gl.constexpr, LEAST: gl.constexpr, SEQUENCE_COST: gl.constexpr,
):  # fmt: skip
    """The sequences of which this program has blocks, first..last - 1, where the first begins, seen from the program's
    stretch, and how many units of work the stretch is. Shares as `mla_decode._shares` gives them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    sequence = gl.arange(0, BLOCK_B, LAYOUT)
    length = gl.load(seq_lens + sequence, mask=sequence < batch, other=0)
    length = gl.minimum(gl.maximum(length, 0), room).to(gl.int32)
    units = gl.where(sequence < batch, gl.cdiv(length, ROWS) + SEQUENCE_COST, 0)
    share = gl.maximum(gl.cdiv(gl.sum(units, 0), gl.num_programs(1)), LEAST)
    start = gl.program_id(1) * share
    ends = gl.associative_scan(units, 0, _add)
    first = gl.sum((ends <= start).to(gl.int32), 0)
    last = gl.minimum(gl.sum((ends - units < start + share).to(gl.int32), 0), batch)
    unit = gl.sum(gl.where(ends <= start, units, 0), 0) - start
    return first, last, unit, share


@gluon.jit
def _blocks(seq_lens, sequence, room, unit, share, SEQUENCE_COST: gl.constexpr):
    """A sequence's length, its blocks begin..end - 1 that the stretch has, and all its units of work."""
    length = gl.minimum(gl.maximum(gl.load(seq_lens + sequence), 0), room).to(gl.int32)
    blocks = gl.cdiv(length, ROWS)
    begin = gl.maximum(-unit - SEQUENCE_COST, 0)
    end = gl.minimum(share - unit - SEQUENCE_COST, blocks)
    return length, begin, end, SEQUENCE_COST + blocks


@gluon.jit
def _fetch_query(sources, buffers, barriers, before, q_phase):
    """This program's rows of the query that lies behind `before` rows, once the last one's place is free."""
    q, q_rest, _cache, _cache_rest = sources
    q_buffer, q_rest_buffer, _values, _rotated, _sums = buffers
    _full, _ready, _empty, q_full, q_empty = barriers
    row = before + gl.program_id(0) * ROWS
    mbarrier.wait(q_empty, q_phase ^ 1)
    mbarrier.expect(q_full, ROWS * (2 * HALF + ROTATED) * 2)
    tma.async_copy_global_to_shared(q, [row, 0], q_full, q_buffer.index(0))
    tma.async_copy_global_to_shared(q, [row, HALF], q_full, q_buffer.index(1))
    tma.async_copy_global_to_shared(q_rest, [row, 2 * HALF], q_full, q_rest_buffer)


@gluon.jit
def _fetch(sources, buffers, barriers, where, SEQUENCE_COST: gl.constexpr):
    """The fetching warps: the query of each sequence, its blocks in order."""
    _q, _q_rest, cache, cache_rest = sources
    table, table_stride, seq_lens, rows, room, stretch = where
    _q_buffer, _q_rest_buffer, values, rotated, _sums = buffers
    full, _ready, empty, _q_full, _q_empty = barriers
    first, last, unit, share = stretch
    turn, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    for sequence in range(first, last):
        _length, begin, end, units = _blocks(seq_lens, sequence, room, unit, share, SEQUENCE_COST)
        unit += units
        pages = table + sequence.to(gl.int64) * table_stride  # type: ignore[attr-defined]
        page = gl.load(pages + begin, mask=begin < end, other=0)
        for block in range(begin, end):
            row = page.to(gl.int32) * ROWS
            page = gl.load(pages + gl.minimum(block + 1, end - 1))
            stage, phase = turn & 1, turn >> 1 & 1
            mine, theirs = stage, stage ^ 1
            mbarrier.wait(empty.index(2 * stage + mine), phase ^ 1)
            mbarrier.expect(full.index(2 * stage), ROWS * HALF * 2)
            tma.async_copy_global_to_shared(
                cache, [row, mine * HALF], full.index(2 * stage), values.index(2 * stage + mine)
            )
            if block == begin:
                _fetch_query(sources, buffers, barriers, sequence * rows, q_phase)
                q_phase ^= 1
            mbarrier.wait(empty.index(2 * stage + theirs), phase ^ 1)
            mbarrier.expect(full.index(2 * stage + 1), ROWS * (HALF + ROTATED) * 2)
            tma.async_copy_global_to_shared(
                cache, [row, theirs * HALF], full.index(2 * stage + 1), values.index(2 * stage + theirs)
            )
            tma.async_copy_global_to_shared(
                cache_rest, [row, 2 * HALF], full.index(2 * stage + 1), rotated.index(stage)
            )
            turn += 1


# --- fetching fp8 rows ------------------------------------------------------------------------------------------------

# four codes and their scale -> two pairs in bf16, each code times the scale in fp32
WIDEN = gl.constexpr("""{
    .reg .b16 codes<2>, half<4>;
    .reg .b32 pair<2>;
    .reg .f32 x<4>;
    mov.b32 {codes0, codes1}, $2;
    cvt.rn.f16x2.e4m3x2 pair0, codes0;
    cvt.rn.f16x2.e4m3x2 pair1, codes1;
    mov.b32 {half0, half1}, pair0;
    mov.b32 {half2, half3}, pair1;
    cvt.f32.f16 x0, half0;
    cvt.f32.f16 x1, half1;
    cvt.f32.f16 x2, half2;
    cvt.f32.f16 x3, half3;
    mul.f32 x0, x0, $3;
    mul.f32 x1, x1, $3;
    mul.f32 x2, x2, $3;
    mul.f32 x3, x3, $3;
    cvt.rn.bf16x2.f32 $0, x1, x0;
    cvt.rn.bf16x2.f32 $1, x3, x2;
}""")
# $2 bytes from $1 on, by the first of a group's threads
INTO_L2 = gl.constexpr("""{
    .reg .u32 thread;
    .reg .pred first;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.b32 $0, 0;
}""")


@gluon.jit
def _half(cache, page, half, ROW_WORDS: gl.constexpr):
    """Half the columns of a page's values: codes, four to a word [64, 64], and the scales of its two tiles [64] each.
    Words, since Triton keeps a byte that a loop carries on in a register of its own."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) * ROW_WORDS
    column = gl.arange(0, HALF // 4, gl.SliceLayout(0, LAYOUT))
    start = cache + page.to(gl.int64) * (ROWS * ROW_WORDS)
    codes = gl.load(start + half * (HALF // 4) + (row.expand_dims(1) + column.expand_dims(0)))
    scales = start + WIDTH // 4 + half * 2 + row
    return codes, gl.load(scales), gl.load(scales + 1)


@gluon.jit
def _widen(now, values, cache, page, half, ROW_WORDS: gl.constexpr):
    """Writes `now`, which `_half` gave, to values [64, 256], and gives what it gives of another half."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words, one, other = now
    column = gl.arange(0, HALF // 4, gl.SliceLayout(0, LAYOUT)).expand_dims(0)
    scale = gl.where(column < HALF // 8, one.expand_dims(1), other.expand_dims(1)).to(gl.float32, bitcast=True)
    pairs = gl.inline_asm_elementwise(
        WIDEN, "=r,=r,r,f", [words, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    soon = _half(cache, page, half, ROW_WORDS)
    to = values._reinterpret(gl.int32, [ROWS, HALF // 2], PAIRS)
    to.store(gl.join(pairs[0], pairs[1]).reshape([ROWS, HALF // 2]))
    return soon


@gluon.jit
def _into_l2(cache, page, ROW_WORDS: gl.constexpr):
    """A page, from its first row to the end of its last, by one thread."""
    start = cache + page.to(gl.int64) * (ROWS * ROW_WORDS)
    size = gl.to_tensor(((ROWS - 1) * ROW_WORDS + WIDTH // 4 + 4 + ROTATED // 2) * 4)
    gl.inline_asm_elementwise(
        INTO_L2, "=r,l,r", [start.to(gl.int64), size], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _fetch_fp8(sources, buffers, barriers, where, SEQUENCE_COST: gl.constexpr, ROW_WORDS: gl.constexpr):
    """As `_fetch`, from rows of ROW_WORDS words."""
    _q, _q_rest, cache, cache_rest = sources
    table, table_stride, seq_lens, rows, room, stretch = where
    _q_buffer, _q_rest_buffer, values, rotated, _sums = buffers
    full, _ready, empty, _q_full, _q_empty = barriers
    first, last, unit, share = stretch
    turn, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    for sequence in range(first, last):
        _length, begin, end, units = _blocks(seq_lens, sequence, room, unit, share, SEQUENCE_COST)
        unit += units
        pages = table + sequence.to(gl.int64) * table_stride  # type: ignore[attr-defined]
        page = gl.load(pages + begin, mask=begin < end, other=0)
        soon = gl.load(pages + gl.minimum(begin + 1, end - 1), mask=begin < end, other=0)
        if begin < end:
            _into_l2(cache, page, ROW_WORDS)
            _into_l2(cache, soon, ROW_WORDS)
        now = _half(cache, page, turn & 1, ROW_WORDS)
        for block in range(begin, end):
            stage, phase = turn & 1, turn >> 1 & 1
            mine, theirs = stage, stage ^ 1
            mbarrier.wait(empty.index(2 * stage + mine), phase ^ 1)
            now = _widen(now, values.index(2 * stage + mine), cache, page, theirs, ROW_WORDS)
            fence_async_shared()
            mbarrier.arrive(full.index(2 * stage), count=1)
            later = gl.load(pages + gl.minimum(block + 2, end - 1))
            if block == begin:
                _fetch_query(sources, buffers, barriers, sequence * rows, q_phase)
                q_phase ^= 1
            mbarrier.wait(empty.index(2 * stage + theirs), phase ^ 1)
            mbarrier.expect(full.index(2 * stage + 1), ROWS * ROTATED * 2)
            tma.async_copy_global_to_shared(
                cache_rest, [page.to(gl.int32) * ROWS, 0], full.index(2 * stage + 1), rotated.index(stage)
            )
            # the other half is the one that the next block begins with
            now = _widen(now, values.index(2 * stage + theirs), cache, soon, theirs, ROW_WORDS)
            fence_async_shared()
            mbarrier.arrive(full.index(2 * stage + 1), count=1)
            _into_l2(cache, later, ROW_WORDS)
            page, soon = soon, later
            turn += 1


# --- multiplying ------------------------------------------------------------------------------------------------------


@gluon.jit
def _again(x):
    """x, by a way round that no compiler sees through: ptxas (CUDA 12.8) takes descriptors which one branch makes
    of x for made in the other branch, too, where they hold anything."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _clear(values, kept):
    """Zeros over rows kept.. of values [64, 256], which may hold NaN: weights of 0 do not hide it. Rows of 64 columns
    lie as they come, whatever the order of their 16 bytes."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    words = values._reinterpret(gl.int32, [HALF // 64, ROWS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    is_kept = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < kept
    for part in range(HALF // 64):
        x = words.index(part).load(LAYOUT)
        words.index(part).store(gl.where(is_kept.expand_dims(1), x, 0))


@gluon.jit
def _multiply(
    work, GROUP: gl.constexpr, CAUSAL: gl.constexpr, SEQUENCE_COST: gl.constexpr,
):  # fmt: skip
    """Four warps: scores and weights of every second block, columns [GROUP * 256, GROUP * 256 + 256) of the output."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_BY_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    results, buffers, barriers, seq_lens, rows, heads, new, room, stretch, score_scale = work
    out, lse, partial, partial_lse = results
    q_buffer, q_rest_buffer, values, rotated, sums = buffers
    full, ready, empty, q_full, q_empty = barriers
    first, last, unit, share = stretch
    part, parts = gl.program_id(1), gl.num_programs(1)
    tile = gl.program_id(0) * ROWS
    in_tile = gl.arange(0, ROWS, BY_ROW)
    in_block = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
    turn, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    # disable_licm: descriptors of the query's places must not be kept in registers, which acc needs
    for sequence in tl.range(first, last, disable_licm=True):
        length, begin, end, units = _blocks(seq_lens, sequence, room, unit, share, SEQUENCE_COST)
        began = unit < 0  # in an earlier part
        goes_on = unit + units > share
        unit += units
        seen = gl.full([ROWS], 0, gl.int32, BY_ROW) + length
        all_seen = length  # blocks that end before it need no mask
        if CAUSAL:
            seen = gl.minimum(length - new + (tile + in_tile) // heads + 1, length)
            all_seen = length - new + 1
        largest = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        total = gl.zeros([ROWS], gl.float32, BY_ROW)
        acc = gl.zeros([ROWS, HALF], gl.float32, OUT)
        mbarrier.wait(q_full, q_phase, pred=begin < end)
        for block in tl.range(begin, end, disable_licm=True):
            stage, phase = turn & 1, turn >> 1 & 1
            weights = rotated.index(stage)
            if stage == GROUP:
                scores = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
                mbarrier.wait(full.index(2 * stage), phase)
                keys = values.index(2 * stage + GROUP).permute((1, 0))
                scores = warpgroup_mma(q_buffer.index(GROUP), keys, scores, use_acc=False, is_async=True)
                mbarrier.wait(full.index(2 * stage + 1), phase)
                keys = values.index(2 * stage + 1 - GROUP).permute((1, 0))
                scores = warpgroup_mma(q_buffer.index(1 - GROUP), keys, scores, is_async=True)
                scores = warpgroup_mma(q_rest_buffer, weights.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                if (block + 1) * ROWS > all_seen:
                    is_seen = (block * ROWS + in_block).expand_dims(0) < seen.expand_dims(1)
                    scores = gl.where(is_seen, scores, float("-inf"))
                larger = gl.maximum(largest, gl.max(scores, 1) * score_scale)
                shift = gl.where(larger == float("-inf"), 0.0, larger)  # nothing seen: -inf - -inf would be NaN
                p = gl.exp2(gl.fma(scores, score_scale, -shift.expand_dims(1).broadcast_to(scores.shape)))
                added = gl.sum(p, 1)
                _barrier()  # all four warps' products have read the rotated numbers
                weights.store(p.to(weights.dtype))
                sums.index(2 * stage).store(larger)
                sums.index(2 * stage + 1).store(added)
                fence_async_shared()
                mbarrier.arrive(ready.index(stage), count=1)  # by one thread, after a barrier of the four warps
            else:
                mbarrier.wait(ready.index(stage), phase)
                larger = sums.index(2 * stage).load(BY_ROW)
                added = sums.index(2 * stage + 1).load(BY_ROW)
                mbarrier.wait(full.index(2 * stage + 1), phase)
            kept = gl.exp2(largest - gl.where(larger == float("-inf"), 0.0, larger))
            total = total * kept + added
            largest = larger
            acc = acc * gl.convert_layout(kept, OUT_BY_ROW, assert_trivial=True).expand_dims(1)
            stage = _again(stage)
            weights, half = rotated.index(stage), values.index(2 * stage + GROUP)
            if (block + 1) * ROWS > length:
                _clear(half, length - block * ROWS)
                fence_async_shared()
                _barrier()
            acc = warpgroup_mma(weights, half, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(2 * stage + GROUP), count=1)
            turn += 1
        mbarrier.arrive(q_empty, count=1, pred=begin < end)
        q_phase ^= (begin < end).to(gl.int32)

        acc = acc * gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), OUT_BY_ROW).expand_dims(1)
        logs = largest + gl.log2(total)
        row = gl.arange(0, ROWS, OUT_BY_ROW)
        cols = GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(0, OUT))
        place = row.expand_dims(1) * WIDTH + cols.expand_dims(0)
        is_row = (row < rows - tile).expand_dims(1)
        lse_mask = in_tile < rows - tile
        if began | goes_on:
            slot = gl.where(began, part, parts + part).to(gl.int64) * rows + tile
            gl.store(partial + slot * WIDTH + place, acc, mask=is_row)
            if GROUP == 0:
                gl.store(partial_lse + slot + in_tile, logs, mask=lse_mask)
        else:
            before = sequence.to(gl.int64) * rows + tile
            gl.store(out + before * WIDTH + place, acc.to(out.dtype.element_ty), mask=is_row)
            if GROUP == 0:
                logs = gl.where(total == 0.0, float("inf"), logs * 0.6931471805599453)
                gl.store(lse + before + in_tile, logs, mask=lse_mask)


@gluon.jit(do_not_specialize=["batch", "rows", "heads", "new", "room", "table_stride"])
def _mla_decode_hopper_kernel(
    q, q_rest, cache, cache_rest, table, seq_lens, out, lse, partial, partial_lse,
    batch, rows, heads, new, room, table_stride, score_scale,
    CAUSAL: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr, SEQUENCE_COST: gl.constexpr,
    ROW_WORDS: gl.constexpr,
):  # fmt: skip
    """Program (m, p) as `mla_decode._mla_decode_kernel`'s. q and cache: rows of 576 numbers, described in boxes of
    [64, 256], q_rest and cache_rest in boxes of [64, 64]. With ROW_WORDS `cache` is rows of so many words, of fp8, and
    cache_rest describes their rotated numbers."""
    dtype: gl.constexpr = q.dtype
    q_buffer = gl.allocate_shared_memory(dtype, [2, ROWS, HALF], q.layout)
    q_rest_buffer = gl.allocate_shared_memory(dtype, [ROWS, ROTATED], q_rest.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES * 2, ROWS, HALF], q.layout)
    rotated = gl.allocate_shared_memory(dtype, [STAGES, ROWS, ROTATED], cache_rest.layout)
    sums = gl.allocate_shared_memory(gl.float32, [STAGES * 2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES * 2):
        mbarrier.init(full.index(i), count=1 + i % 2 if ROW_WORDS else 1)  # who widens arrives, and who announces bytes
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    fence_async_shared()
    results = (out, lse, partial, partial_lse)
    buffers = (q_buffer, q_rest_buffer, values, rotated, sums)
    barriers = (full, ready, empty, q_full, q_empty)
    stretch = _stretch(seq_lens, batch, room, BLOCK_B, LEAST, SEQUENCE_COST)
    work = (results, buffers, barriers, seq_lens, rows, heads, new, room, stretch, score_scale)
    where = (table, table_stride, seq_lens, rows, room, stretch)
    zero, one = (work, 0, CAUSAL, SEQUENCE_COST), (work, 1, CAUSAL, SEQUENCE_COST)
    sources = (q, q_rest, cache, cache_rest)
    if ROW_WORDS:
        widen = (sources, buffers, barriers, where, SEQUENCE_COST, ROW_WORDS)
        gl.warp_specialize(
            [(_fetch_fp8, widen), (_multiply, zero), (_multiply, one)], [4, 4], [FP8_REGISTERS, FP8_REGISTERS]
        )
    else:
        fetch = (sources, buffers, barriers, where, SEQUENCE_COST)
        gl.warp_specialize([(_fetch, fetch), (_multiply, zero), (_multiply, one)], [4, 4], [REGISTERS, REGISTERS])


# --- launcher ---------------------------------------------------------------------------------------------------------

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits(q: Tensor, kv_cache: Tensor, v_dim: int, scale: float) -> bool:
    """Whether `attend` takes these: rows of 512 + 64 numbers in bf16 or fp16, or fp8 rows of them beside q in bf16, on
    pages of 64 rows that lie evenly."""
    page, row_stride = kv_cache.shape[1], kv_cache.stride(1)
    fp8 = kv_cache.dtype == torch.uint8
    return (
        (q.dtype == torch.bfloat16 if fp8 else q.dtype in DTYPES)
        and (v_dim, q.shape[3] - v_dim, page) == (V_DIM, REST, BLOCK_N)
        and kv_cache.stride() == (BLOCK_N * row_stride, row_stride, 1)
        and row_stride * kv_cache.element_size() % 16 == 0
        and kv_cache.numel() > 0
        and kv_cache.data_ptr() % 16 == 0
        and scale > 0
    )


def _boxes(x: Tensor, columns: int) -> TensorDescriptor:
    """x [R, C], in boxes of [64, columns]."""
    shape = [BLOCK_N, columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def attend(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, out: Tensor, lse: Tensor, partial: Tensor,
    partial_lse: Tensor, scale: float, causal: bool, least: int, sequence_cost: int,
) -> None:  # fmt: skip
    """What `mla_decode._mla_decode_kernel` does of q [B, S, H, 576], in tiles of BLOCK_M query rows and blocks of
    BLOCK_N cached rows. partial [2 * parts, S * H, 512], partial_lse [2 * parts, S * H]: for the combining kernel. q,
    seq_lens and rows of block_table are contiguous."""
    batch, new, heads, width = q.shape
    rows, parts = new * heads, len(partial) // 2
    queries = q.view(-1, width)
    fp8 = kv_cache.dtype == torch.uint8
    rotary = row_fields(kv_cache, V_DIM)[2] if fp8 else kv_cache
    words = kv_cache.view(torch.int32) if fp8 else kv_cache
    _launch.launch(
        _mla_decode_hopper_kernel, (cdiv(rows, BLOCK_M), parts if batch else 0),
        _boxes(queries, V_DIM // 2), _boxes(queries, REST),
        words if fp8 else _boxes(kv_cache.flatten(0, 1), V_DIM // 2), _boxes(rotary.flatten(0, 1), REST),
        block_table, seq_lens, out, lse, partial, partial_lse,
        batch, rows, heads, new, block_table.shape[1] * BLOCK_N, block_table.stride(0), scale * math.log2(math.e),
        CAUSAL=causal, BLOCK_B=max(128, next_power_of_2(batch)), LEAST=least, SEQUENCE_COST=sequence_cost,
        ROW_WORDS=words.stride(1) if fp8 else 0, num_warps=4,
    )  # fmt: skip
