"""Absorbed attention of new tokens over a paged cache of latents: multi-head latent attention as multi-query attention.

The up-projections of keys and values are folded into the query and the output (DeepSeek-V2 report, arXiv 2405.04434,
section 2.1.2; FlashMLA's calling convention), so a cached token is one row of Dc + Dr numbers shared by all heads: its
latent, which is key and value at once, and its rotated key. With L = seq_lens[b] and row j of sequence b at
kv_cache[block_table[b, j // page], j % page]:
    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . row_j) row_j[:v_dim],  j < L, and j <= L - S + i when causal.
A query that sees no row (L = 0, or causal and L < S - i) gives out 0 and lse +inf.

Triton: a tile's rows are (token, head) pairs of one sequence, so few heads fill it with several tokens; a block of
cached rows is loaded once and serves as key and as value. Work is shared out as FlashMLA does it
(github.com/deepseek-ai/FlashMLA, docs/20250422-new-kernel-deep-dive.md): the sequences' blocks lie end to end, every
program takes an equal stretch of them, and sequences that a border cuts are put together by a second kernel from fp32
partial results (flash decoding). Each program works its stretch out from seq_lens, so the grid depends on no length:
nothing waits for the host, and a CUDA graph stays right when lengths change. No atomics: the same bits every time.
Rows behind a sequence's length are never loaded. bf16 and fp16 with v_dim to 512, fp32 with v_dim to 128, Dr to 64;
wider rows, and fp64, take the PyTorch path.

KEYS_FIRST (launch table): scores and output are computed transposed, cached rows times queries. Hopper's tensor cores
want 64 rows of their left factor: a block of cached rows has them where 16 or 32 query rows do not, and both products
then read the block from shared memory as it came. BY_HAND: rows of 512 + 64 numbers on pages of 64 go to
`_mla_decode_hopper`, whose groups of warps take turns at softmax and products.

A cache of bytes holds FlashMLA's fp8 rows (mla_cache.py writes either kind). A block of rows is widened to q's dtype in
registers, code * scale, and multiplied as any other; by hand, beside q in bf16, by warps that do nothing else. On the
Triton path with q in bf16 or fp16 and v_dim = Dc = 128, 256 or 512; other rows take the PyTorch path.

The PyTorch path reads pages that follow each other in place, without a copy (fp8 rows are widened to one), and treats
sequences of one length as one batch. Test: tests/kernels/test_mla_decode.py. Benchmark: benchmarks/ops/mla_decode.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _launch
from ._checks import check_float, check_shape
from ._launch import tl, triton
from ._operator import operator
from .fp8_quant import E4M3, TILE, decode_e4m3, native_e4m3
from .mla_cache import aligned_rows, row_bytes, row_fields, widened_rows

__all__ = ["mla_decode", "mla_decode_reference"]

MAX_V_DIM, MAX_V_DIM_FP32, MAX_REST = 512, 128, 64  # what a kernel's tile holds of a row
FP8_V_DIMS = (128, 256, 512)
SEQUENCE_COST = 2  # blocks that beginning a sequence counts as (its query, its output) when work is shared out


def mla_decode_reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """fp32, one sequence and one query token after the other; shapes as `mla_decode`."""
    batch, new, heads, _ = q.shape
    page = kv_cache.shape[1]
    if kv_cache.dtype in (torch.uint8, E4M3):
        codes, scales, rotary = row_fields(kv_cache, v_dim)
        kv_cache = torch.cat((codes.view(E4M3).float() * scales.repeat_interleave(TILE, -1), rotary.float()), -1)
    out = q.new_zeros(batch, new, heads, v_dim, dtype=torch.float32)
    lse = torch.full_like(out[..., 0], torch.inf)
    for b, length in enumerate(seq_lens.tolist()):
        for i in range(new):
            seen = length - new + i + 1 if causal else length
            if seen > 0:
                rows = torch.stack([kv_cache[block_table[b, j // page], j % page] for j in range(seen)]).float()
                scores = scale * (q[b, i].float() @ rows.T)
                lse[b, i] = scores.logsumexp(-1)
                out[b, i] = scores.softmax(-1) @ rows[:, :v_dim]
    return out.to(q.dtype), lse


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _shares(
    seq_lens_ptr, batch, room, parts,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, SEQUENCE_COST: tl.constexpr,
):  # fmt: skip
    """Units of work of each sequence [BLOCK_B], and of each part. Lengths outside 0..room count as the nearer end."""
    sequence = tl.arange(0, BLOCK_B)
    length = tl.load(seq_lens_ptr + sequence, mask=sequence < batch, other=0)
    blocks = tl.cdiv(tl.minimum(tl.maximum(length, 0), room).to(tl.int32), BLOCK_N)
    units = tl.where(sequence < batch, blocks + SEQUENCE_COST, 0)
    return units, tl.maximum(tl.cdiv(tl.sum(units, axis=0), parts), LEAST)


@triton.jit
def _places(
    pages, base, block, limit, page, page_stride,
    BLOCK_N: tl.constexpr, ROW_STRIDE: tl.constexpr, SMALL_PAGE: tl.constexpr,
):  # fmt: skip
    """Block `block` of the sequence whose page numbers are at `pages`: its rows' numbers [BLOCK_N], whether they lie
    before `limit`, and base + where they begin; no page number is read for rows that do not."""
    in_block = tl.arange(0, BLOCK_N)
    token = block * BLOCK_N + in_block
    valid = token < limit
    if SMALL_PAGE > 0:
        number = tl.load(pages + token // SMALL_PAGE, mask=valid, other=0).to(tl.int64)
        place = base + number * page_stride + (token % SMALL_PAGE) * ROW_STRIDE
    else:
        number = tl.load(pages + block * BLOCK_N // page, mask=block * BLOCK_N < limit, other=0).to(tl.int64)
        place = base + number * page_stride + (block * BLOCK_N % page).to(tl.int64) * ROW_STRIDE
        place += in_block * ROW_STRIDE
    return token, valid, place


@triton.jit
def _widened(
    codes_ptr, scales_ptr, place, valid,
    V_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """fp8 rows at bytes `place` [BLOCK_N] -> code * scale [BLOCK_N, V_DIM] fp32, zeros where not valid."""
    tiles: tl.constexpr = V_DIM // TILE
    scale_place = place[:, None] // 4 + tl.arange(0, tiles)[None, :]
    scale = tl.load(scales_ptr + scale_place, mask=valid[:, None], other=0.0)
    codes = tl.load(codes_ptr + place[:, None] + tl.arange(0, V_DIM)[None, :], mask=valid[:, None], other=0)
    x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) if NATIVE else decode_e4m3(codes)
    x = tl.reshape(x, (BLOCK_N, tiles, TILE)) * scale[:, :, None]
    return tl.reshape(x, (BLOCK_N, V_DIM))


@triton.jit
def _scores(q, k, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Products of queries [M, C] and keys [N, C]: [M, N], or [N, M] with KEYS_FIRST."""
    if KEYS_FIRST:
        return tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def _add_values(p, v, acc, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p v for values [N, C] and weights p laid out as _scores': [M, C], or [C, M] with KEYS_FIRST."""
    if KEYS_FIRST:
        return tl.dot(tl.trans(v), p, acc, input_precision=PRECISION)
    else:
        return tl.dot(p, v, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["batch"])
def _mla_decode_kernel(
    q_ptr, cache_ptr, scales_ptr, rotary_ptr, table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    batch, rows, heads, new, room, page, page_stride, table_stride, score_scale,
    CAUSAL: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr,
    V_DIM: tl.constexpr, REST: tl.constexpr, ROW_STRIDE: tl.constexpr, SMALL_PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    LEAST: tl.constexpr, SEQUENCE_COST: tl.constexpr, KEYS_FIRST: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (m, p): query rows m * BLOCK_M.. of every sequence of which part p has blocks. q [batch, rows, V_DIM +
    REST] and out [batch, rows, V_DIM] contiguous, rows = new * heads; score_scale includes log2(e). A sequence that
    began in an earlier part leaves its partial result at [p], one that goes on in the next at [parts + p]; with
    partial_lse in units of log2. SMALL_PAGE: the page's rows where a block crosses pages, else 0.
    KEYS_FIRST: the products are transposed, acc is [V_DIM, rows].
    FP8: cache, scales and rotary are the three fields of rows, strides are bytes, NATIVE: the chip converts e4m3."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    units, share = _shares(seq_lens_ptr, batch, room, parts, BLOCK_B, BLOCK_N, LEAST, SEQUENCE_COST)
    ends = tl.cumsum(units, axis=0)
    start = part * share
    first = tl.sum((ends <= start).to(tl.int32), axis=0)
    last = tl.minimum(tl.sum((ends - units < start + share).to(tl.int32), axis=0), batch)
    unit = tl.sum(tl.where(ends <= start, units, 0), axis=0) - start  # where a sequence begins, seen from the part

    cols = tl.arange(0, BLOCK_C)
    rest_cols = V_DIM + tl.arange(0, BLOCK_R)
    in_tile = tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) * BLOCK_M
    is_row = in_tile < rows - tile
    is_latent = is_row[:, None]
    if BLOCK_C > V_DIM:
        is_latent = is_latent & (cols < V_DIM)[None, :]
    width: tl.constexpr = V_DIM + REST
    key_axis: tl.constexpr = 0 if KEYS_FIRST else 1  # of scores; their other axis are query rows
    # A block of fp8 rows widened in the step before goes to shared memory once, for both products. If it were widened
    # and multiplied in one step, Triton would convert it for each, and load its codes only then. Of 64 query rows,
    # whose acc leaves no registers for a block, Triton does neither.
    ahead: tl.constexpr = FP8 and BLOCK_M < 64
    base = 0 if FP8 else cache_ptr  # of places: bytes that three pointers share, or addresses

    # disable_licm: the query's addresses in shared memory must not be kept in registers, all of which acc needs
    for step in tl.range(last - first, disable_licm=True):
        sequence = first + step
        length = tl.minimum(tl.maximum(tl.load(seq_lens_ptr + sequence), 0), room).to(tl.int32)
        blocks = tl.cdiv(length, BLOCK_N)
        begin = tl.maximum(-unit - SEQUENCE_COST, 0)
        end = tl.minimum(share - unit - SEQUENCE_COST, blocks)
        began = unit < 0  # in an earlier part
        goes_on = unit + SEQUENCE_COST + blocks > share
        unit += SEQUENCE_COST + blocks

        seen = tl.full((BLOCK_M,), 0, tl.int32) + length
        all_seen = length  # blocks that end before it need no mask
        if CAUSAL:
            seen = tl.minimum(length - new + (tile + in_tile) // heads + 1, length)
            all_seen = length - new + 1
        before = sequence.to(tl.int64) * rows + tile  # rows before this tile
        q_tile = q_ptr + before * width + in_tile[:, None] * width
        q = tl.load(q_tile + cols[None, :], mask=is_latent, other=0.0)
        if REST > 0:
            q_rest_mask = is_row[:, None] & (rest_cols < width)[None, :]
            q_rest = tl.load(q_tile + rest_cols[None, :], mask=q_rest_mask, other=0.0)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N, BLOCK_M) if KEYS_FIRST else (BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_C, BLOCK_M) if KEYS_FIRST else (BLOCK_M, BLOCK_C), tl.float32)
        pages = table_ptr + sequence.to(tl.int64) * table_stride
        limit = tl.minimum(length, end * BLOCK_N)
        if ahead:
            _, valid, place = _places(pages, base, begin, limit, page, page_stride, BLOCK_N, ROW_STRIDE, SMALL_PAGE)
            kv = _widened(cache_ptr, scales_ptr, place, valid, V_DIM, TILE, BLOCK_N, NATIVE).to(q.dtype)
        for block in tl.range(begin, end, disable_licm=True, num_stages=STAGES):
            token, valid, place = _places(pages, base, block, limit, page, page_stride, BLOCK_N, ROW_STRIDE, SMALL_PAGE)
            if FP8 and not ahead:
                kv = _widened(cache_ptr, scales_ptr, place, valid, V_DIM, TILE, BLOCK_N, NATIVE).to(q.dtype)
            elif not FP8:
                kv_mask = valid[:, None]
                if BLOCK_C > V_DIM:
                    kv_mask = kv_mask & (cols < V_DIM)[None, :]
                kv = tl.load(place[:, None] + cols[None, :], mask=kv_mask, other=0.0)
            # Two products that are not summed into one, and a mask behind a branch: otherwise Triton takes them for
            # links of a chain that ends in acc, and has both halves of the warps compute the same scores.
            scores = _scores(q, kv, KEYS_FIRST, PRECISION) * score_scale
            if REST > 0:
                rest_mask = valid[:, None] & (rest_cols < width)[None, :]
                if FP8:
                    rest_place = place[:, None] // 2 + (rest_cols - V_DIM)[None, :]
                    k_rest = tl.load(rotary_ptr + rest_place, mask=rest_mask, other=0.0).to(q.dtype)
                else:
                    k_rest = tl.load(place[:, None] + rest_cols[None, :], mask=rest_mask, other=0.0)
                scores += _scores(q_rest, k_rest, KEYS_FIRST, PRECISION) * score_scale
            if (block + 1) * BLOCK_N > all_seen:
                is_seen = tl.expand_dims(token, 1 - key_axis) < tl.expand_dims(seen, key_axis)
                scores = tl.where(is_seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=key_axis))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: -inf - -inf would be NaN
            p = tl.exp2(scores - tl.expand_dims(shift, key_axis))
            kept = tl.exp2(largest - shift)
            if KEYS_FIRST:  # summed up behind the loop, which saves a reduction between warps here
                total = total * kept[None, :] + p
            else:
                total = total * kept + tl.sum(p, axis=1)
            acc = _add_values(p.to(kv.dtype), kv, acc * tl.expand_dims(kept, key_axis), KEYS_FIRST, PRECISION)
            largest = larger
            if ahead:
                _, valid, place = _places(
                    pages, base, block + 1, limit, page, page_stride, BLOCK_N, ROW_STRIDE, SMALL_PAGE
                )
                kv = _widened(cache_ptr, scales_ptr, place, valid, V_DIM, TILE, BLOCK_N, NATIVE).to(q.dtype)

        if KEYS_FIRST:
            total = tl.sum(total, axis=0)
            acc = tl.trans(acc)
        acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        lse = largest + tl.log2(total)
        place_out = in_tile[:, None] * V_DIM + cols[None, :]
        if began | goes_on:
            slot = tl.where(began, part, parts + part).to(tl.int64) * rows + tile
            tl.store(partial_ptr + slot * V_DIM + place_out, acc, mask=is_latent)
            tl.store(partial_lse_ptr + slot + in_tile, lse, mask=is_row)
        else:
            tl.store(out_ptr + before * V_DIM + place_out, acc.to(out_ptr.dtype.element_ty), mask=is_latent)
            lse = tl.where(total == 0.0, float("inf"), lse * 0.6931471805599453)
            tl.store(lse_ptr + before + in_tile, lse, mask=is_row)


@triton.jit
def _mla_decode_combine_kernel(
    partial_ptr, partial_lse_ptr, seq_lens_ptr, out_ptr, lse_ptr, batch, rows, room, parts,
    V_DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    SEQUENCE_COST: tl.constexpr, SLOTS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Program (i, b): numbers i * NUMBERS.. of the [rows, V_DIM] outputs of sequence b, if several parts had blocks of
    it: their partial results weighted by exp2(lse), SLOTS parts at a time."""
    sequence = tl.program_id(1)
    units, share = _shares(seq_lens_ptr, batch, room, parts, BLOCK_B, BLOCK_N, LEAST, SEQUENCE_COST)
    index = tl.arange(0, BLOCK_B)
    begin = tl.sum(tl.where(index < sequence, units, 0), axis=0)
    end = tl.sum(tl.where(index <= sequence, units, 0), axis=0)
    first = begin // share
    last = (end - 1) // share
    if first < last:
        number = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
        row = number // V_DIM
        is_number = row < rows
        largest = tl.full((NUMBERS,), float("-inf"), tl.float32)
        total = tl.zeros((NUMBERS,), tl.float32)
        acc = tl.zeros((NUMBERS,), tl.float32)
        for part in tl.range(first, last + 1, SLOTS):
            parts_here = part + tl.arange(0, SLOTS)
            slot = tl.where(parts_here == first, parts + first, parts_here).to(tl.int64)[:, None]
            mask = (parts_here <= last)[:, None] & is_number[None, :]
            lse = tl.load(partial_lse_ptr + slot * rows + row[None, :], mask=mask, other=float("-inf"))
            values = tl.load(partial_ptr + slot * rows * V_DIM + number[None, :], mask=mask, other=0.0)
            larger = tl.maximum(largest, tl.max(lse, axis=0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(lse - shift[None, :])
            kept = tl.exp2(largest - shift)
            total = total * kept + tl.sum(weight, axis=0)
            acc = acc * kept + tl.sum(weight * values, axis=0)
            largest = larger
        acc = acc / tl.where(total == 0.0, 1.0, total)
        place = sequence.to(tl.int64) * rows * V_DIM + number
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=is_number)
        lse = tl.where(total == 0.0, float("inf"), (largest + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse_ptr + sequence.to(tl.int64) * rows + row, lse, mask=is_number & (number % V_DIM == 0))


# --- launchers --------------------------------------------------------------------------------------------------------


def _triton_decode(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, new, heads, width = q.shape
    rows, page = new * heads, kv_cache.shape[1]
    q, seq_lens = q.contiguous(), seq_lens.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    fp8 = kv_cache.dtype == torch.uint8
    kv_cache = aligned_rows(kv_cache) if fp8 else kv_cache if kv_cache.stride(2) == 1 else kv_cache.contiguous()
    cache, scales, rotary = row_fields(kv_cache, v_dim) if fp8 else (kv_cache,) * 3
    out = q.new_empty(batch, new, heads, v_dim)
    lse = q.new_empty(batch, new, heads, dtype=torch.float32)
    kernel = "mla_decode_fp8" if fp8 else "mla_decode_fp32" if q.dtype == torch.float32 else "mla_decode"
    arch = _launch.arch(q)
    config = {"KEYS_FIRST": False, **_launch.config("mla_decode", kernel, arch, rows=rows, v_dim=v_dim)}
    by_hand = False
    if config.pop("BY_HAND", False) and _launch.runs_gluon(q):
        from . import _mla_decode_hopper  # Gluon, which is experimental: imported where it serves

        by_hand = _mla_decode_hopper.fits(q, kv_cache, v_dim, scale)
    if by_hand:
        config |= dict(BLOCK_M=_mla_decode_hopper.BLOCK_M, BLOCK_N=_mla_decode_hopper.BLOCK_N, PROGRAMS_PER_SM=1)
    block_n, least = config["BLOCK_N"], config["LEAST"]
    tiles = triton.cdiv(rows, config["BLOCK_M"])
    room = block_table.shape[1] * page
    most = batch * (triton.cdiv(room, block_n) + SEQUENCE_COST)  # units of work if all pages were full
    programs = config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(q)
    parts = max(1, min(programs // max(tiles, 1), triton.cdiv(most, least)))
    partial = q.new_empty(2 * parts, rows, v_dim, dtype=torch.float32)
    partial_lse = q.new_empty(2 * parts, rows, dtype=torch.float32)
    shares = dict(V_DIM=v_dim, BLOCK_B=max(128, triton.next_power_of_2(batch)), SEQUENCE_COST=SEQUENCE_COST)
    if by_hand:
        results = (out, lse, partial, partial_lse)
        _mla_decode_hopper.attend(q, kv_cache, block_table, seq_lens, *results, scale, causal, least, SEQUENCE_COST)
    else:
        _launch.launch(
            _mla_decode_kernel, (tiles, parts if batch else 0),
            q, cache, scales, rotary, block_table, seq_lens, out, lse, partial, partial_lse,
            batch, rows, heads, new, room, page, kv_cache.stride(0), block_table.stride(0),
            scale * math.log2(math.e),
            CAUSAL=causal, FP8=fp8, NATIVE=fp8 and native_e4m3(q), TILE=TILE, REST=width - v_dim,
            ROW_STRIDE=kv_cache.stride(1), SMALL_PAGE=page if page % block_n else 0,
            BLOCK_C=max(16, triton.next_power_of_2(v_dim)), BLOCK_R=max(16, triton.next_power_of_2(width - v_dim)),
            PRECISION="ieee" if torch.version.hip else "tf32x3", STAGES=config["num_stages"], **shares, **config,
        )  # fmt: skip
    if parts > 1:
        combine = _launch.config("mla_decode", "mla_decode_combine", arch, batch=batch)
        _launch.launch(
            _mla_decode_combine_kernel, (triton.cdiv(rows * v_dim, combine["NUMBERS"]), batch),
            partial, partial_lse, seq_lens, out, lse, batch, rows, room, parts,
            BLOCK_N=block_n, LEAST=least, **shares, **combine,
        )  # fmt: skip
    return out, lse


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _rows(kv_cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """[B, length, Dc + Dr]: the first `length` rows of each sequence, in place where the pages follow each other."""
    table = block_table[:, : -(-length // kv_cache.shape[1])]
    pages = table.flatten().tolist()
    if not pages:
        return kv_cache.new_empty(len(table), 0, kv_cache.shape[2])
    if wrong := [page for page in pages if not 0 <= page < kv_cache.shape[0]]:
        raise ValueError(f"block_table: got page {wrong[0]}, allowed is 0 to {kv_cache.shape[0] - 1}")
    if pages == list(range(pages[0], pages[0] + len(pages))):
        rows = kv_cache[pages[0] : pages[0] + len(pages)]
    else:
        rows = kv_cache[table.flatten()]
    return rows.reshape(table.shape[0], -1, kv_cache.shape[2])[:, :length]


def _attend(q: Tensor, rows: Tensor, v_dim: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [B, S, H, W] over rows [B, L, W] -> out [B, S, H, v_dim], lse [B, S, H] fp32 (fp64 for fp64)."""
    batch, new, heads, width = q.shape
    length = rows.shape[1]
    scores = torch.bmm(q.reshape(batch, new * heads, width), rows.transpose(1, 2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    if causal and new > 1:
        hidden = torch.ones(new, length, dtype=torch.bool, device=q.device).triu_(length - new + 1)
        scores.view(batch, new, heads, length).masked_fill_(hidden.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    if length < new or length == 0:
        lse.masked_fill_(lse == -torch.inf, torch.inf)  # weights of what sees nothing: exp(-inf - inf) = 0
    out = torch.bmm(scores.sub_(lse).exp_().to(rows.dtype), rows[..., :v_dim])
    return out.view(batch, new, heads, v_dim), lse.view(batch, new, heads)


def _torch_decode(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(q.device.type):  # which kernels do not know either
        with torch.autocast(q.device.type, enabled=False):
            return _torch_decode(q, kv_cache, block_table, seq_lens, v_dim, scale, causal)
    lengths = seq_lens.tolist()
    room = block_table.shape[1] * kv_cache.shape[1]
    if any(not 0 <= length <= room for length in lengths):
        raise ValueError(f"seq_lens: got {lengths[:8]}, allowed is 0 to {room} (rows of the pages)")

    def attend(sequences: slice, length: int) -> tuple[Tensor, Tensor]:
        rows = widened_rows(_rows(kv_cache, block_table[sequences], length), v_dim, q.dtype)
        return _attend(q[sequences], rows, v_dim, scale, causal)

    if len(set(lengths)) < 2:
        return attend(slice(None), max(lengths, default=0))
    parts = [attend(slice(b, b + 1), length) for b, length in enumerate(lengths)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


# --- registration -----------------------------------------------------------------------------------------------------


@operator("mla_decode")
def _mla_decode(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    most = MAX_V_DIM_FP32 if q.dtype == torch.float32 else MAX_V_DIM
    fits = v_dim <= most and q.shape[3] - v_dim <= MAX_REST
    if kv_cache.dtype == torch.uint8:
        fits = fits and v_dim in FP8_V_DIMS and q.dtype != torch.float32
    decode = _triton_decode if fits and _launch.use_triton(q) else _torch_decode
    return decode(q, kv_cache, block_table, seq_lens, v_dim, scale, causal)


@_mla_decode.register_fake
def _(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = q.shape
    lse = q.new_empty(batch, new, heads, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, new, heads, v_dim), lse


# --- public op --------------------------------------------------------------------------------------------------------


def mla_decode(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, Dc + Dr] (S new tokens each), kv_cache [pages, page, Dc + Dr] in q's dtype (or uint8 or e4m3, of rows
    as `quantize_latent_cache` writes them: then v_dim = Dc, a multiple of 128), block_table [B, P] page numbers and
    seq_lens [B] rows of each sequence, the S new ones among them (both int32 or int64) -> out [B, S, H, v_dim] in q's
    dtype, lse [B, S, H] fp32 (natural log of the softmax's denominator; fp64 for fp64).
    Sequences may be empty or shorter than S; queries that see no row give out 0 and lse +inf. Entries of block_table
    behind a sequence's last page may be any number, and rows behind its length may hold NaN.

    For inference: has no gradient. Raises TypeError for dtypes that differ or are not those above, ValueError when
    shapes disagree or v_dim exceeds the row. The PyTorch path raises ValueError for a length outside 0 to P * page; the
    Triton path, which never waits to read lengths, takes the nearer end instead (-1 marks idle places of a CUDA graph).
    """
    check_float("q", q)
    if q.dim() != 4:
        check_shape("q", q, (None, None, None, None))
    batch, _, _, width = q.shape
    if not 0 < v_dim <= width:
        raise ValueError(f"v_dim: got {v_dim}, allowed is 1 to the row's {width}")
    fp8 = kv_cache.dtype in (torch.uint8, E4M3)
    check_shape("kv_cache", kv_cache, (None, None, row_bytes(v_dim, width - v_dim) if fp8 else width))
    check_shape("block_table", block_table, (batch, None))
    check_shape("seq_lens", seq_lens, (batch,))
    if kv_cache.dtype != q.dtype and not fp8:
        raise TypeError(f"kv_cache: got {kv_cache.dtype}, allowed is q's {q.dtype}, torch.uint8 or {E4M3}")
    for name, x in (("block_table", block_table), ("seq_lens", seq_lens)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got {x.dtype}, allowed are torch.int32, torch.int64")
    return _mla_decode(q, kv_cache.view(torch.uint8) if fp8 else kv_cache, block_table, seq_lens, v_dim, scale, causal)
