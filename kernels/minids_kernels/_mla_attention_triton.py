"""Kernels of mla_attention and their launches, for the inside of that room.

FlashAttention-2 (arXiv 2307.08691) with exponentials of two in fp32, a program for each tile of rows of a document and
head. Which document a tile lies in is searched on the device: the grid knows T and the number of documents and no
length. A row's width that is no power of two is two products, 192 = 128 + 64. The backward computes the probabilities
again from the log-sum-exp, once for dq and once for dk and dv: no atomics, the same bits every time, and 8 bytes a row
and head of workspace. A tile's warps split the rows of its scores, 16 each: 8 on 64 rows would do everything twice.
Keys or values that heads share get their gradient as a sum of fp32 parts in one order: a program takes several heads
where all are shared, else each head writes its own part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._launch import tl, triton

MAX_WIDTH, MAX_V_WIDTH = 192, 128


# --- kernels ----------------------------------------------------------------------------------------------------------
# Rows of q and k come in two parts, `*_ptr` of WIDTH columns padded to MAIN and `*_rest_ptr` of REST_WIDTH padded to
# REST (0: there is none). Strides are (token, head); a head's stride is 0 where heads share.


@triton.jit
def _tile(cu_ptr, documents, tile, BLOCK: tl.constexpr):
    """Tile number -> its document, that one's first token and length, the tile's first row in it. Document i's tiles
    are numbered from cu[i] // BLOCK + i on, which leaves room for all of them; what lies between starts beyond the
    length."""
    low = 0
    high = documents
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(cu_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    start, length = _document(cu_ptr, low)
    return low, start, length, (tile - start // BLOCK - low).to(tl.int32) * BLOCK


@triton.jit
def _document(cu_ptr, document):
    """Its first token and its length."""
    start = tl.load(cu_ptr + document)
    return start.to(tl.int64), tl.load(cu_ptr + document + 1) - start


@triton.jit
def _load(ptr, first, length, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Rows first.. of a [length, WIDTH] matrix with zeros around it: [ROWS, COLS]."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = rows < length - first
    if WIDTH < COLS:
        mask = mask & (cols < WIDTH)
    return tl.load(ptr + tl.cast(first, tl.int64) * stride + rows * stride + cols, mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, first, length, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The opposite of `_load`."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows < length - first) & (cols < WIDTH)
    ptr += tl.cast(first, tl.int64) * stride
    tl.store(ptr + rows * stride + cols, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    acc, total, top, q, q_rest, k_ptr, k_rest_ptr, v_ptr, rows, begin, end, keys, k_stride, k_rest_stride, v_stride,
    scale_log2, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    REST_WIDTH: tl.constexpr, REST: tl.constexpr, V_WIDTH: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Takes keys begin..end of `keys` into the running softmax: acc [M, VALUE] and total [M], both times 2^-top [M].
    `rows`: the last key that each row sees."""
    for first in tl.range(begin, end, BLOCK_N):
        k = _load(k_ptr, first, keys, k_stride, BLOCK_N, WIDTH, MAIN)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if REST:
            k_rest = _load(k_rest_ptr, first, keys, k_rest_stride, BLOCK_N, REST_WIDTH, REST)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
        if MASKED:
            cols = first + tl.arange(0, BLOCK_N)
            seen = cols[None, :] <= rows[:, None] if CAUSAL else cols[None, :] < keys
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        v = _load(v_ptr, first, keys, v_stride, BLOCK_N, V_WIDTH, VALUE)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new
    return acc, total, top


@triton.jit
def _mla_attention_fwd_kernel(
    q_ptr, q_rest_ptr, k_ptr, k_rest_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, cu_k_ptr, T, documents, tiles,
    scale_log2, q_stride, q_head, q_rest_stride, q_rest_head, k_stride, k_head, k_rest_stride, k_rest_head, v_stride,
    v_head, out_stride, out_head,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST_WIDTH: tl.constexpr, REST: tl.constexpr,
    V_WIDTH: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M rows of a document and head, a head's last rows (the longest when causal) first; lse [H, T]."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    document, start, length, first = _tile(cu_ptr, documents, tiles - 1 - tl.program_id(0) % tiles, BLOCK_M)
    if first >= length:
        return
    key_start, keys = _document(cu_k_ptr, document)
    k_ptr += key_start * k_stride + head * k_head
    k_rest_ptr += key_start * k_rest_stride + head * k_rest_head
    v_ptr += key_start * v_stride + head * v_head
    q = _load(q_ptr + start * q_stride + head * q_head, first, length, q_stride, BLOCK_M, WIDTH, MAIN)
    q_rest = q
    if REST:
        q_rest_ptr += start * q_rest_stride + head * q_rest_head
        q_rest = _load(q_rest_ptr, first, length, q_rest_stride, BLOCK_M, REST_WIDTH, REST)
    rows = first + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, VALUE), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    lowest: tl.constexpr = -3.4028234663852886e38  # of fp32: what is hidden, -inf, lies below the maximum of no scores
    top = tl.full((BLOCK_M,), lowest, tl.float32)
    ahead = keys - length  # the last row sees the last key
    whole = tl.maximum(first + ahead, 0) if CAUSAL else keys  # keys before it are seen by all rows
    whole = whole // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M + ahead, keys) if CAUSAL else keys
    acc, total, top = _attend(
        acc, total, top, q, q_rest, k_ptr, k_rest_ptr, v_ptr, rows + ahead, 0, whole, keys, k_stride, k_rest_stride,
        v_stride, scale_log2, CAUSAL, False, WIDTH, MAIN, REST_WIDTH, REST, V_WIDTH, VALUE, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, q_rest, k_ptr, k_rest_ptr, v_ptr, rows + ahead, whole, end, keys, k_stride, k_rest_stride,
        v_stride, scale_log2, CAUSAL, True, WIDTH, MAIN, REST_WIDTH, REST, V_WIDTH, VALUE, BLOCK_N,
    )  # fmt: skip
    out_ptr += start * out_stride + head * out_head
    empty = total == 0
    _store(out_ptr, acc / tl.where(empty, 1.0, total)[:, None], first, length, out_stride, BLOCK_M, V_WIDTH, VALUE)
    ln2: tl.constexpr = 0.6931471805599453
    lse = tl.where(empty, float("inf"), (top + tl.log2(total)) * ln2)
    tl.store(lse_ptr + head * T + start + rows, lse, mask=rows < length)


@triton.jit
def _mla_attention_dq_kernel(
    dout_ptr, q_ptr, q_rest_ptr, k_ptr, k_rest_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, dq_rest_ptr, cu_ptr,
    cu_k_ptr, T, documents, tiles, scale, dout_stride, dout_head,
    q_stride, q_head, q_rest_stride, q_rest_head, k_stride, k_head, k_rest_stride, k_rest_head, v_stride, v_head,
    out_stride, out_head, dq_stride, dq_head, dq_rest_stride, dq_rest_head,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST_WIDTH: tl.constexpr, REST: tl.constexpr,
    V_WIDTH: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As the forward's programs; also writes delta [H, T], the rows' sums of dout * out."""
    head = (tl.program_id(0) // tiles).to(tl.int64)
    document, start, length, first = _tile(cu_ptr, documents, tiles - 1 - tl.program_id(0) % tiles, BLOCK_M)
    if first >= length:
        return
    log2e: tl.constexpr = 1.4426950408889634
    key_start, keys = _document(cu_k_ptr, document)
    k_ptr += key_start * k_stride + head * k_head
    k_rest_ptr += key_start * k_rest_stride + head * k_rest_head
    v_ptr += key_start * v_stride + head * v_head
    q = _load(q_ptr + start * q_stride + head * q_head, first, length, q_stride, BLOCK_M, WIDTH, MAIN)
    dq = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if REST:
        q_rest_ptr += start * q_rest_stride + head * q_rest_head
        q_rest = _load(q_rest_ptr, first, length, q_rest_stride, BLOCK_M, REST_WIDTH, REST)
        dq_rest = tl.zeros((BLOCK_M, REST), tl.float32)
    rows = first + tl.arange(0, BLOCK_M)
    out = _load(out_ptr + start * out_stride + head * out_head, first, length, out_stride, BLOCK_M, V_WIDTH, VALUE)
    dout_ptr += start * dout_stride + head * dout_head
    dout = _load(dout_ptr, first, length, dout_stride, BLOCK_M, V_WIDTH, VALUE)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + start + rows, delta, mask=rows < length)
    lse = tl.load(lse_ptr + head * T + start + rows, mask=rows < length, other=0.0) * log2e
    ahead = keys - length
    whole = tl.minimum(first + ahead + 1, keys) if CAUSAL else keys  # keys before it are seen by all rows
    end = tl.minimum(first + BLOCK_M + ahead, keys) if CAUSAL else keys
    for key in tl.range(0, end, BLOCK_N):
        k = _load(k_ptr, key, keys, k_stride, BLOCK_N, WIDTH, MAIN)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if REST:
            k_rest = _load(k_rest_ptr, key, keys, k_rest_stride, BLOCK_N, REST_WIDTH, REST)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
        v = _load(v_ptr, key, keys, v_stride, BLOCK_N, V_WIDTH, VALUE)
        dp = tl.dot(dout, v.T, input_precision="ieee")
        if key + BLOCK_N > whole:  # no second loop: ptxas would wait for every wgmma of both
            cols = key + tl.arange(0, BLOCK_N)
            seen = cols[None, :] <= rows[:, None] + ahead if CAUSAL else cols[None, :] < keys
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores * (scale * log2e) - lse[:, None])
        dscores = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(dscores, k, dq, input_precision="ieee")
        if REST:
            dq_rest = tl.dot(dscores, k_rest, dq_rest, input_precision="ieee")
    dq_ptr += start * dq_stride + head * dq_head
    _store(dq_ptr, dq * scale, first, length, dq_stride, BLOCK_M, WIDTH, MAIN)
    if REST:
        dq_rest_ptr += start * dq_rest_stride + head * dq_rest_head
        _store(dq_rest_ptr, dq_rest * scale, first, length, dq_rest_stride, BLOCK_M, REST_WIDTH, REST)


@triton.jit
def _mla_attention_dkdv_kernel(
    dout_ptr, q_ptr, q_rest_ptr, k_ptr, k_rest_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dk_rest_ptr, dv_ptr, cu_ptr,
    cu_k_ptr, T, documents, tiles, heads, heads_each, scale, dout_stride, dout_head,
    q_stride, q_head, q_rest_stride, q_rest_head, k_stride, k_head, k_rest_stride, k_rest_head, v_stride, v_head,
    dk_stride, dk_part, dk_rest_stride, dk_rest_part, dv_stride, dv_part,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST_WIDTH: tl.constexpr, REST: tl.constexpr,
    V_WIDTH: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N keys of a document, for `heads_each` heads one after the other; writes one part of dk and dv.
    Rows beyond the document are zeros with lse 0 and delta 0, and give nothing."""
    part = (tl.program_id(0) // tiles).to(tl.int64)
    document, key_start, keys, first = _tile(cu_k_ptr, documents, tl.program_id(0) % tiles, BLOCK_N)
    if first >= keys:
        return
    start, length = _document(cu_ptr, document)
    log2e: tl.constexpr = 1.4426950408889634
    head = part * heads_each
    k = _load(k_ptr + key_start * k_stride + head * k_head, first, keys, k_stride, BLOCK_N, WIDTH, MAIN)
    v = _load(v_ptr + key_start * v_stride + head * v_head, first, keys, v_stride, BLOCK_N, V_WIDTH, VALUE)
    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, VALUE), tl.float32)
    if REST:
        k_rest_ptr += key_start * k_rest_stride + head * k_rest_head
        k_rest = _load(k_rest_ptr, first, keys, k_rest_stride, BLOCK_N, REST_WIDTH, REST)
        dk_rest = tl.zeros((BLOCK_N, REST), tl.float32)
    cols = first + tl.arange(0, BLOCK_N) - (keys - length)  # the first row that sees each
    begin = tl.maximum(first - (keys - length), 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    for at in tl.range(head, tl.minimum(head + heads_each, heads)):
        for query in tl.range(begin, length, BLOCK_M):
            q = _load(q_ptr + start * q_stride + at * q_head, query, length, q_stride, BLOCK_M, WIDTH, MAIN)
            scores = tl.dot(k, q.T, input_precision="ieee")
            if REST:
                q_rest_row = q_rest_ptr + start * q_rest_stride + at * q_rest_head
                q_rest = _load(q_rest_row, query, length, q_rest_stride, BLOCK_M, REST_WIDTH, REST)
                scores = tl.dot(k_rest, q_rest.T, scores, input_precision="ieee")
            rows = query + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + at * T + start + rows, mask=rows < length, other=0.0) * log2e
            dout_row = dout_ptr + start * dout_stride + at * dout_head
            dout = _load(dout_row, query, length, dout_stride, BLOCK_M, V_WIDTH, VALUE)
            dp = tl.dot(v, dout.T, input_precision="ieee")
            exponent = scores * (scale * log2e) - lse[None, :]
            if CAUSAL:
                exponent = tl.where(cols[:, None] <= rows[None, :], exponent, float("-inf"))
            p = tl.exp2(exponent)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            delta = tl.load(delta_ptr + at * T + start + rows, mask=rows < length, other=0.0)
            dscores = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(dscores, q, dk, input_precision="ieee")
            if REST:
                dk_rest = tl.dot(dscores, q_rest, dk_rest, input_precision="ieee")
    _store(dk_ptr + key_start * dk_stride + part * dk_part, dk * scale, first, keys, dk_stride, BLOCK_N, WIDTH, MAIN)
    _store(dv_ptr + key_start * dv_stride + part * dv_part, dv, first, keys, dv_stride, BLOCK_N, V_WIDTH, VALUE)
    if REST:
        dk_rest_ptr += key_start * dk_rest_stride + part * dk_rest_part
        _store(dk_rest_ptr, dk_rest * scale, first, keys, dk_rest_stride, BLOCK_N, REST_WIDTH, REST)


# --- launchers --------------------------------------------------------------------------------------------------------


def _is_wide(x: Tensor) -> bool:
    """Whether x [T, H, D] is as kernels need it: width and strides in multiples of 16 and a start at 16 bytes, so that
    a thread fetches 16 bytes at a time (Triton 3.6 on sm_90 gives wrong numbers where wide tiles come in loads of two
    bytes), and rows near enough for 32-bit offsets within a tile."""
    numbers = (x.shape[2], x.data_ptr(), *_strides(x))
    return x.shape[2] == 0 or (x.stride(2) == 1 and x.stride(0) < 1 << 23 and all(n % 16 == 0 for n in numbers))


def _wide(x: Tensor) -> Tensor:
    """x, or a copy of it with zeros behind each row."""
    return x if _is_wide(x) else F.pad(x, (0, -x.shape[2] % 16)).contiguous()


@contextlib.contextmanager
def _written(*outs: Tensor) -> Iterator[list[Tensor]]:
    """What kernels write instead of `outs` [T, H, D], which is copied over afterwards."""
    wide = [x if _is_wide(x) else x.new_empty(*x.shape[:2], triton.cdiv(x.shape[2], 16) * 16) for x in outs]
    yield wide
    for out, rows in zip(outs, wide, strict=True):
        if rows is not out:
            out.copy_(rows[..., : out.shape[2]])


def _strides(*tensors: Tensor) -> list[int]:
    """Token and head strides of each [T, H or 1, D]."""
    return [s for x in tensors for s in (x.stride(0), x.stride(1) if x.shape[1] > 1 else 0)]


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _split(width: int) -> int:
    """Columns of q and k in their first product: 192 -> 128, 48 -> 32; all where two would be as wide as one."""
    half = padded(width) // 2
    return half if half >= 16 and half + padded(width - half) < 2 * half else width


def _shape(q: Tensor, q_rest: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    """Constexpr arguments that all kernels have."""
    width, rest, value = q.shape[2], q_rest.shape[2], v.shape[2]
    return dict(
        CAUSAL=causal, WIDTH=width, MAIN=padded(width), REST_WIDTH=rest, REST=padded(rest) if rest else 0,
        V_WIDTH=value, VALUE=padded(value),
    )  # fmt: skip


def _config(kernel: str, q: Tensor, shape: dict[str, Any]) -> dict[str, Any]:
    width = shape["MAIN"] + shape["REST"] + shape["VALUE"]
    return _launch.config("mla_attention", kernel, _launch.arch(q), WIDTH=width, BITS=torch.finfo(q.dtype).bits)


def _tiles(tokens: int, documents: int, block: int) -> int:
    return tokens // block + documents


def _width(q: list[Tensor], k: list[Tensor]) -> int:
    """Columns of a row's first part."""
    return next((x[0].shape[2] for x in (q, k) if len(x) == 2), _split(q[0].shape[2]))


def _apart(q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both parts of q and of k as the kernels see them: those given, else views."""
    width = _width(q, k)
    main, rest, k_main, k_rest = (_wide(part) for x in (q, k) for part in _halves(x, width))
    return main, rest, k_main, k_rest


def _halves(x: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    return (x[0], x[1]) if len(x) == 2 else (x[0][..., :width], x[0][..., width:])


def forward(
    q: list[Tensor], k: list[Tensor], v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float,
    with_lse: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, heads, _), documents = q[0].shape, cu_seqlens.shape[0] - 1
    out = v.new_empty(tokens, heads, v.shape[2])
    lse = v.new_empty(heads, tokens, dtype=torch.float32)
    main, rest, k_main, k_rest = _apart(q, k)
    v = _wide(v)
    shape = _shape(main, rest, v, causal)
    config = _config("mla_attention_fwd", v, shape)
    tiles = _tiles(tokens, documents, config["BLOCK_M"])
    with _written(out) as [wide]:
        _launch.launch(
            _mla_attention_fwd_kernel, (tiles * heads,),
            main, rest, k_main, k_rest, v, wide, lse, cu_seqlens, cu_seqlens_k, tokens, documents, tiles,
            scale * math.log2(math.e), *_strides(main, rest, k_main, k_rest, v, wide), **shape, **config,
        )  # fmt: skip
    return out, lse, v.new_empty(0)


def backward(
    dout: Tensor, q: list[Tensor], k: list[Tensor], v: Tensor, out: Tensor, lse: Tensor, kept: Tensor,
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float, dq: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """dq [T, H, D], whole or in two parts, is written to; -> dk, dv."""
    (tokens, heads, _), documents = q[0].shape, cu_seqlens.shape[0] - 1
    main, rest, k_main, k_rest = _apart(q, k)
    width = _width(q, k)
    delta = torch.empty_like(lse)
    dout, out, wide_v = _wide(dout), _wide(out), _wide(v)
    shape = _shape(main, rest, wide_v, causal)
    config = _config("mla_attention_dq", v, shape)
    tiles = _tiles(tokens, documents, config["BLOCK_M"])
    with _written(*_halves(dq, width)) as outs:
        _launch.launch(
            _mla_attention_dq_kernel, (tiles * heads,),
            dout, main, rest, k_main, k_rest, wide_v, out, lse, delta, *outs, cu_seqlens, cu_seqlens_k, tokens,
            documents, tiles, scale, *_strides(dout, main, rest, k_main, k_rest, wide_v, out, *outs), **shape, **config,
        )  # fmt: skip

    config = _config("mla_attention_dkdv", v, shape)
    keys = v.shape[0]
    tiles = _tiles(keys, documents, config["BLOCK_N"])
    all_shared = all(x.shape[1] == 1 for x in (*k, v))
    heads_each = triton.cdiv(heads, triton.cdiv(4 * _launch.multiprocessors(v), max(1, tiles))) if all_shared else 1
    parts = triton.cdiv(heads, max(1, heads_each))

    def buffer(x: Tensor) -> Tensor:
        shared = x.shape[1] < heads
        return x.new_empty(keys, parts, x.shape[2], dtype=torch.float32 if shared and parts > 1 else x.dtype)

    dk, dv = [buffer(part) for part in k], buffer(v)
    with _written(*_halves(dk, width), dv) as outs:
        _launch.launch(
            _mla_attention_dkdv_kernel, (tiles * parts,),
            dout, main, rest, k_main, k_rest, wide_v, lse, delta, *outs, cu_seqlens, cu_seqlens_k, tokens, documents,
            tiles, heads, heads_each, scale, *_strides(dout, main, rest, k_main, k_rest, wide_v, *outs), **shape,
            **config,
        )  # fmt: skip
    summed = (
        d.sum(1, keepdim=True).to(x.dtype) if x.shape[1] < d.shape[1] else d
        for d, x in zip((*dk, dv), (*k, v), strict=True)
    )
    return list(summed)
