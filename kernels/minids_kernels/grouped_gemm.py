"""Grouped matrix product: y[t] = w[e] @ x[t] for every row t of expert e's segment, rows sorted by expert.

x [T, K], w [E, N, K] of one dtype (fp32, bf16 or fp16; fp64 on the PyTorch path), offsets int32 [E + 1] on the same
device: expert e owns rows offsets[e] to offsets[e + 1], offsets[0] is 0. Segments may be empty and of any length;
nothing is padded. Rows from offsets[E] on belong to no expert: their y and their gradient are zero. Sums are fp32;
fp32 operands are multiplied exactly (input_precision="ieee", no tf32).

No count ever leaves the device, and the grids depend on T and E alone: a CUDA graph captured once serves any routing.
A segment's tiles of B rows begin at its own first row; expert e's are numbered from offsets[e] // B + e on, which
leaves it the ceil(count / B) numbers it needs, because floor((o + c) / B) + 1 - floor(o / B) >= ceil(c / B). So a
program finds its expert by counting which of these first numbers are not above its own. Up to SMALL rows (decoding)
each row is a tile of its own, of which only a segment's first does work: weights are read once, and only those that
are hit; there the weights are the operand that tensor cores want 64 rows of.
Where the launch table says TMA, operands are fetched by tensor descriptors, each if its memory lies as these want it;
tokens' rows by pointers, or for wide weight gradients after a copy. Where it says DEPTH, all is done by
`_grouped_gemm_hopper`, if it can be. For moe_experts the epilogue is SwiGLU: half a
tile's columns are gate's, half up's.
Gradients: dx = the same product with w[e].T; dw[e] = dy_e.T @ x_e, one program an output tile walking through the
segment's rows: no atomics, the same bits every time. Runs on every GPU that Triton knows.
Device-side offsets: pytorch/pytorch#146328; rows without padding: pytorch/torchtitan#2255.
Test: tests/kernels/test_grouped_gemm.py. Benchmark: benchmarks/ops/grouped_gemm.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import _launch
from ._checks import check_devices, check_float, check_shape, compute_dtype
from ._launch import tl, triton
from ._operator import operator
from .swiglu import swiglu_values

if _launch.HAS_TRITON:
    from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["grouped_gemm", "grouped_gemm_reference"]

SMALL = 32  # rows up to which weights alone count


def grouped_gemm_reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fp32, one expert after the other; shapes as `grouped_gemm`."""
    y = x.new_zeros(x.shape[0], w.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        y[start:end] = (x[start:end].float() @ w[expert].float().T).to(x.dtype)
    return y


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(program, down, across, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles at a time, column after column, so that programs which
    run together share their operands in L2."""
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    rest = program % (GROUP * across)
    return first + rest % size, rest // size


@triton.jit
def segment_of(tile, offsets_ptr, E, T, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Of the tile of BLOCK rows with number `tile`: its expert (E: no one's), its first row, and where its segment
    ends; the tile is empty unless the row lies before that. EXPERTS: a power of two above E."""
    experts = tl.arange(0, EXPERTS)
    first = tl.load(offsets_ptr + experts, mask=experts <= E, other=0) // BLOCK + experts
    expert = tl.sum(((first <= tile) & (experts <= E)).to(tl.int32), axis=0) - 1
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=T)
    return expert, start + (tile - start // BLOCK - expert) * BLOCK, end


@triton.jit
def segment_at(row, offsets_ptr, E, T, EXPERTS: tl.constexpr):
    """Of the segment that begins at `row`: its expert (E: no one's) and its end; `row` itself where none begins."""
    experts = tl.arange(0, EXPERTS)
    before = tl.load(offsets_ptr + 1 + experts, mask=experts < E, other=T) <= row
    expert = tl.sum((before & (experts < E)).to(tl.int32), axis=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=T)
    return expert, tl.where(row == tl.load(offsets_ptr + expert), end, row)


@triton.jit
def _columns(block, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Columns of a block of BLOCK_N, and which exist; for SwiGLU half of them gate's, and behind these up's to them."""
    place = tl.arange(0, BLOCK_N)
    if SWIGLU:
        inner = block * (BLOCK_N // 2) + place % (BLOCK_N // 2)
        return inner + place // (BLOCK_N // 2) * (N // 2), inner < N // 2
    cols = block * BLOCK_N + place
    return cols, cols < N


@triton.jit
def _activate(gate, up, rows, cols, end, N, y_ptr, weight_ptr, pair_ptr, out_ptr, KEEP: tl.constexpr):
    """Stores out [T, N / 2] = silu(gate) * up * weight[pair], and if KEEP gate and up to y [T, N]."""
    at, inner, mask = rows.to(tl.int64), N // 2, (rows < end) & (cols < N // 2)
    pair = tl.load(pair_ptr + rows, mask=rows < end, other=0)
    weight = tl.load(weight_ptr + pair, mask=rows < end, other=0.0).to(tl.float32)
    out = swiglu_values(gate, up) * weight
    tl.store(out_ptr + at * inner + cols, out.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(y_ptr + at * N + cols, gate.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + at * N + inner + cols, up.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_gemm_kernel(
    x, token_ptr, w, offsets_ptr, y_ptr, weight_ptr, pair_ptr, out_ptr, T, E, N, K, x_row, x_col, w_expert, w_row,
    w_col, X_TMA: tl.constexpr, W_TMA: tl.constexpr, TURNED: tl.constexpr, GATHERED: tl.constexpr, SWIGLU: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of y [T, N] contiguous a program, of row token[t] of x where GATHERED, else of row t; EXPERTS: a power
    of two above E; E itself stands for "no expert". X_TMA: x is a descriptor; rows past the segment's end are another's
    then, which changes nothing that is stored. W_TMA: w is one, of [E, N, K], where TURNED of [E, K, N], for SWIGLU of
    [E, 2, N / 2, K]. SWIGLU: `_activate` instead of y alone."""
    tile, column = _tile(tl.program_id(0), T // BLOCK_M + E + 1, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = segment_of(tile, offsets_ptr, E, T, BLOCK_M, EXPERTS)
    if row < end:
        rows = (row + tl.arange(0, BLOCK_M))[:, None]
        cols, real = _columns(column, N, BLOCK_N, SWIGLU)
        cols, real = cols[None, :], real[None, :]
        depth = tl.arange(0, BLOCK_K)
        if not X_TMA:
            source = tl.load(token_ptr + rows, mask=rows < end, other=0) if GATHERED else rows.to(tl.int64)
            x_ptrs = x + source * x_row + depth[None, :] * x_col
        if not W_TMA:
            w_ptrs = w + expert.to(tl.int64) * w_expert + cols.to(tl.int64) * w_row + depth[:, None] * w_col
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.where(expert < E, K, 0), BLOCK_K):
            if X_TMA:
                left = x.load([row, k])
            else:
                x_mask = rows < end if EVEN_K else (rows < end) & (depth[None, :] < K - k)
                left = tl.load(x_ptrs, mask=x_mask, other=0.0)
                x_ptrs += BLOCK_K * x_col
            if not W_TMA:
                w_mask = real if EVEN_K else real & (depth[:, None] < K - k)
                right = tl.load(w_ptrs, mask=w_mask, other=0.0)
                w_ptrs += BLOCK_K * w_col
            elif SWIGLU:
                right = w.load([expert, 0, column * (BLOCK_N // 2), k]).reshape(BLOCK_N, BLOCK_K).T
            elif TURNED:
                right = w.load([expert, k, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                right = w.load([expert, column * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
            acc = tl.dot(left, right, acc, input_precision="ieee")
        if SWIGLU:
            gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            inner = (column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[None, :]
            _activate(gate, up, rows, inner, end, N, y_ptr, weight_ptr, pair_ptr, out_ptr, KEEP)
        else:
            out = acc.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + rows.to(tl.int64) * N + cols, out, mask=(rows < end) & real)


@triton.jit
def _grouped_gemm_small_kernel(
    x_ptr, token_ptr, w_ptr, offsets_ptr, y_ptr, weight_ptr, pair_ptr, out_ptr, T, E, N, K, x_row, x_col, w_expert,
    w_row, w_col, GATHERED: tl.constexpr, SWIGLU: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """T <= BLOCK_M: the whole segment that begins at row program_id(1), BLOCK_N columns of it, as its transpose."""
    start = tl.program_id(1)
    expert, end = segment_at(start, offsets_ptr, E, T, EXPERTS)
    if start < end:
        rows = (start + tl.arange(0, BLOCK_M))[None, :]
        cols, real = _columns(tl.program_id(0), N, BLOCK_N, SWIGLU)
        cols, real = cols[:, None], real[:, None]
        depth = tl.arange(0, BLOCK_K)
        source = tl.load(token_ptr + rows, mask=rows < end, other=0) if GATHERED else rows.to(tl.int64)
        x_ptrs = x_ptr + source * x_row + depth[:, None] * x_col
        w_ptrs = w_ptr + expert.to(tl.int64) * w_expert + cols.to(tl.int64) * w_row + depth[None, :] * w_col
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.range(0, tl.where(expert < E, K, 0), BLOCK_K):
            x_mask = rows < end if EVEN_K else (rows < end) & (depth[:, None] < K - k)
            w_mask = real if EVEN_K else real & (depth[None, :] < K - k)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
            x_ptrs += BLOCK_K * x_col
            w_ptrs += BLOCK_K * w_col
        if SWIGLU:
            gate, up = tl.split(acc.reshape(2, BLOCK_N // 2, BLOCK_M).permute(1, 2, 0))
            inner = (tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[:, None]
            _activate(gate, up, rows, inner, end, N, y_ptr, weight_ptr, pair_ptr, out_ptr, KEEP)
        else:
            out = acc.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + rows.to(tl.int64) * N + cols, out, mask=(rows < end) & real)


@triton.jit
def _sources(token_ptr, rows, end, GATHERED: tl.constexpr):
    """The rows to read: `rows` themselves, or where GATHERED those of their tokens."""
    return tl.load(token_ptr + rows, mask=rows < end, other=0) if GATHERED else rows.to(tl.int64)


@triton.jit
def _grouped_outer_kernel(
    a, a_token_ptr, b, b_token_ptr, offsets_ptr, out_ptr, parts_ptr, T, E, M, N, a_row, a_col, b_row, b_col,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, A_GATHERED: tl.constexpr, B_GATHERED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One tile of out [E, M, N] contiguous a program: a.T @ b over one expert's rows, which are tokens' where GATHERED.
    TMA: the operand is one of Triton's ragged descriptors, which give zeros behind a segment of any length. ROWS: no
    program sums more rows, and the parts of segments that have more go to parts [2 * (T // ROWS + 1), M, N] fp32, see
    `_part`; 0: one program sums all. EXPERTS: a power of two above E."""
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (down * across)
    tile, column = _tile(tl.program_id(0) % (down * across), down, across, GROUP)
    if ROWS > 0:
        expert, first, end = segment_of(expert, offsets_ptr, E, T, ROWS, EXPERTS)
        start = tl.load(offsets_ptr + expert)
        last = tl.minimum(first + ROWS, end)
        used = (expert < E) & ((first < end) | (first == start))
    else:
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        first, last, used = start, end, True
    if used:
        ms = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        ns = (column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        rows = first + tl.arange(0, BLOCK_T)
        a_rows = _sources(a_token_ptr, rows, end, A_GATHERED)
        b_rows = _sources(b_token_ptr, rows, end, B_GATHERED)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for t in tl.range(first, last, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            if A_TMA:
                left = load_ragged(a, start, end - start, [t - start, tile * BLOCK_M]).T
            else:
                seen = (rows[None, :] < end) & (ms < M)
                left = tl.load(a + a_rows[None, :] * a_row + ms * a_col, mask=seen, other=0.0)
            if B_TMA:
                right = load_ragged(b, start, end - start, [t - start, column * BLOCK_N])
            else:
                seen = (rows[:, None] < end) & (ns < N)
                right = tl.load(b + b_rows[:, None] * b_row + ns * b_col, mask=seen, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            # a step ahead: loads of addresses that are loaded in the same step would halve the pipeline's depth
            a_rows = _sources(a_token_ptr, rows + BLOCK_T, end, A_GATHERED)
            b_rows = _sources(b_token_ptr, rows + BLOCK_T, end, B_GATHERED)
        place, mask = ms.to(tl.int64) * N + ns, (ms < M) & (ns < N)
        if ROWS > 0 and end - start > ROWS:
            tl.store(parts_ptr + _part(first, start, ROWS) * M * N + place, acc, mask=mask)
        else:
            tl.store(out_ptr + expert.to(tl.int64) * M * N + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _part(row, start, ROWS: tl.constexpr):
    """Number of the part from `row` on of a segment from `start` on. Of segments longer than ROWS no two begin, and no
    two other parts, among the same ROWS rows."""
    return (row // ROWS * 2 + (row == start).to(tl.int32)).to(tl.int64)


@triton.jit
def _sum_parts_kernel(parts_ptr, offsets_ptr, out_ptr, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, e): BLOCK numbers of out [E, numbers] of an expert with more than ROWS rows, summed in order."""
    expert = tl.program_id(1).to(tl.int64)
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if end - start > ROWS:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < numbers
        acc = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(start, end, ROWS):
            acc += tl.load(parts_ptr + _part(row, start, ROWS) * numbers + place, mask=mask, other=0.0)
        tl.store(out_ptr + expert * numbers + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------

PARTS, LEAST_PART = 8, 1024  # into how many a weight gradient's rows are divided at most, and rows of one at least
# in place of launches by hand, where these cannot be
PLAIN = {"TMA": True, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}
PLAIN_OUTER = {"TMA": True, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 32, "GROUP": 8, "num_warps": 4, "num_stages": 4}
COPIED = 1024  # columns of the other operand from which on tokens' rows are copied, where there are descriptors
SUM_BLOCK = 1024  # numbers of a program that sums parts


def _config(kernel: str, *tensors: Tensor, **shape: int) -> dict[str, Any]:
    """The table of operands' kind: fp32 has no tensor cores here, and rows that are not 16 elements apart can not be
    copied asynchronously, so that both want small tiles."""
    x = tensors[0]
    odd = any(stride % 16 for tensor in tensors for stride in tensor.stride() if stride != 1)
    kind = "_fp32" if x.dtype == torch.float32 else "_odd" if odd else ""
    return _launch.config("grouped_gemm", kernel + kind, _launch.arch(x), **shape)


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x: it counts in units of 16 bytes, along contiguous rows."""
    *pitches, inner = x.stride()
    whole = all(pitch > 0 and pitch * x.element_size() % 16 == 0 for pitch in pitches)
    return x.numel() > 0 and inner == 1 and whole and x.data_ptr() % 16 == 0


def by_hand(*moved: Tensor) -> bool:
    """Whether Gluon's kernels can run, and descriptors can stand for what they move."""
    return _launch.runs_gluon(moved[0]) and all(describable(x) for x in moved)


def _triton_mm(
    x: Tensor, token: Tensor | None, w: Tensor, offsets: Tensor, y: Tensor,
    swiglu: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """y [T, N] is written to. `swiglu`: weights of T numbers, the rows' pairs int64 [T], and activated rows [T, N / 2],
    written to; only then y may have no rows."""
    rows, (experts, width, depth) = len(x if token is None else token), w.shape
    small = rows <= SMALL
    config = dict(_config("small", x, w) if small else _config("many", x, w, rows=rows // max(1, experts), K=depth))
    turned = w.stride(2) != 1
    if "DEPTH" in config:
        # else a block of gate's columns would reach into up's
        whole = swiglu is None or (width % config["BLOCK_N"] == 0 and not turned)
        even = token is None or depth % 16 == 0  # else the copies of tokens' rows are not known to end at 16 bytes
        if whole and even and by_hand(swiglu[2] if swiglu else y, x, w.transpose(1, 2) if turned else w):
            from ._grouped_gemm_hopper import grouped  # Gluon, which is experimental: imported where it serves

            grouped(x, token, w, offsets, y, swiglu, **config)
            return
        config = dict(PLAIN)
    tma = config.pop("TMA", False)
    if small:
        config["BLOCK_M"] = max(16, triton.next_power_of_2(rows))
    m, n, k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    columns, pitches = triton.cdiv(width, n), (*x.stride(), *w.stride())
    meta = {**config, "GATHERED": token is not None, "EXPERTS": triton.next_power_of_2(experts + 1)}
    if not small:
        stored, block = (w.transpose(1, 2), [1, k, n]) if turned else (w, [1, n, k])
        if swiglu:
            stored, block = w.unflatten(1, (2, -1)), [1, 2, n // 2, k]
        x_tma, w_tma = tma and token is None and describable(x), tma and describable(stored)
        x = TensorDescriptor.from_tensor(x, [m, k]) if x_tma else x
        w = TensorDescriptor.from_tensor(stored, block) if w_tma else w
        meta |= {"X_TMA": x_tma, "W_TMA": w_tma, "TURNED": turned}
    _launch.launch(
        _grouped_gemm_small_kernel if small else _grouped_gemm_kernel,
        (columns, rows) if small else ((rows // m + experts + 1) * columns,),
        x, offsets if token is None else token, w, offsets, y, *(swiglu or (y, y, y)), rows, experts, width, depth,
        *pitches, SWIGLU=swiglu is not None, KEEP=len(y) == rows, EVEN_K=depth % k == 0, **meta,
    )  # fmt: skip


def _triton_outer(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, a_token: Tensor | None, b_token: Tensor | None
) -> None:  # fmt: skip
    experts, down, across = out.shape
    rows = len(a if a_token is None else a_token)
    config = dict(_config("outer", a, b, M=down))
    if "DEPTH" in config or config.get("TMA"):
        (a, a_token), (b, b_token) = _in_order(a, a_token, across), _in_order(b, b_token, down)
    if "DEPTH" in config:
        tiles = triton.cdiv(down, 128) * triton.cdiv(across, config["BLOCK_N"])  # by hand, of an expert
        whole = _most_rows(rows, tiles, _launch.multiprocessors(out)) == 0 and out.dtype != torch.float64
        if whole and a_token is None and b_token is None and by_hand(out, a, b):
            from ._grouped_gemm_hopper import outer

            outer(a, b, offsets, out, **config)
            return
        config = dict(PLAIN_OUTER)
    tma = config.pop("TMA", False)
    a_tma, b_tma = (tma and token is None and describable(x) for x, token in ((a, a_token), (b, b_token)))
    m, n, t = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_T"))
    tiles = triton.cdiv(down, m) * triton.cdiv(across, n)
    most = _most_rows(rows, tiles, _launch.multiprocessors(out))
    parts = out.new_empty(2 * (rows // most + 1) if most else 0, down, across, dtype=torch.float32)
    _launch.launch(
        _grouped_outer_kernel, ((rows // most + experts + 1 if most else experts) * tiles,),
        create_ragged_descriptor(a, [t, m]) if a_tma else a, offsets if a_token is None else a_token,
        create_ragged_descriptor(b, [t, n]) if b_tma else b, offsets if b_token is None else b_token,
        offsets, out, parts, rows, experts, down, across, *a.stride(), *b.stride(), A_TMA=a_tma, B_TMA=b_tma,
        A_GATHERED=a_token is not None, B_GATHERED=b_token is not None, ROWS=most,
        EXPERTS=triton.next_power_of_2(experts + 1), **config,
    )  # fmt: skip
    if most:
        grid = triton.cdiv(down * across, SUM_BLOCK), experts
        _launch.launch(_sum_parts_kernel, grid, parts, offsets, out, down * across, ROWS=most, BLOCK=SUM_BLOCK)


def _in_order(x: Tensor, token: Tensor | None, columns: int) -> tuple[Tensor, Tensor | None]:
    """x and whose rows of it to read, None for all in their order: tokens' rows are copied where they meet so many
    columns that descriptors, which want rows in order, save more time than the copy takes."""
    return (x, token) if token is None or columns < COPIED else (x.index_select(0, token), None)


def _most_rows(rows: int, tiles: int, multiprocessors: int) -> int:
    """How many of an expert's rows a program sums, 0 for all: an expert that has most of the rows must not keep a few
    programs busy, one for each of its tiles, while the rest of the chip waits."""
    most = max(LEAST_PART, triton.next_power_of_2(triton.cdiv(rows, PARTS)))
    return most if tiles < multiprocessors and most < rows else 0


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def host_bounds(offsets: Tensor, rows: int) -> list[int]:
    """Where segments begin, and the last one's end, on the host; ValueError where that is not within `rows`."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] > rows or bounds != sorted(bounds):
        raise ValueError(f"offsets: got {bounds}, allowed are numbers that rise from 0 to {rows} or less")
    return bounds


def _torch_mm(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor) -> None:
    bounds = host_bounds(offsets, x.shape[0])
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            torch.mm(x[start:end], w[expert].T, out=out[start:end])
    out[bounds[-1] :].zero_()


def _torch_outer(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    for expert, (start, end) in enumerate(itertools.pairwise(host_bounds(offsets, a.shape[0]))):
        torch.mm(a[start:end].T, b[start:end], out=out[expert])


# --- for the inside of other ops: no graph sees them ------------------------------------------------------------------


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, token: Tensor | None = None) -> Tensor:
    """x [T, K], w [E, N, K], any strides -> [T, N], zero in rows past the last segment. With `token` int64 [T] row t
    is x[token[t]], which is not copied before."""
    out = x.new_empty(len(x if token is None else token), w.shape[1])
    if _launch.use_triton(x):
        _triton_mm(x, token, w, offsets, out)
    else:
        _torch_mm(x if token is None else x.index_select(0, token), w, offsets, out)
    return out


def grouped_swiglu(
    x: Tensor, w: Tensor, offsets: Tensor, token: Tensor, weight: Tensor, pair: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By a kernel alone: silu(gate) * up * weight[pair] [T, F] of gate and up, the halves of the product with w
    [E, 2F, K], and that product [T, 2F], no rows of it unless `keep`. Arguments as `grouped_mm`'s; weight of T numbers,
    pair int64 [T]."""
    y = x.new_empty(len(token) if keep else 0, w.shape[1])
    out = x.new_empty(len(token), w.shape[1] // 2)
    _triton_mm(x, token, w, offsets, y, (weight.contiguous(), pair, out))
    return out, y


def grouped_outer(
    a: Tensor, b: Tensor, offsets: Tensor, a_token: Tensor | None = None, b_token: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """a [T, M], b [T, N] -> [E, M, N] in `dtype`, by default a's: a.T @ b of each segment, zero for an empty one. With
    `a_token`, `b_token` int64 [T] row t of that operand is that token's, which is copied before where that pays."""
    out = a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1], dtype=dtype)
    if _launch.use_triton(a):
        _triton_outer(a, b, offsets, out, a_token, b_token)
        return out
    a, b = (x if token is None else x.index_select(0, token) for x, token in ((a, a_token), (b, b_token)))
    product = out if out.dtype == a.dtype else torch.empty_like(out, dtype=a.dtype)
    _torch_outer(a, b, offsets, product)
    return product.to(out.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("grouped_gemm")
def _grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(x, w, offsets)


@operator("grouped_outer")
def _grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return grouped_outer(a, b, offsets)


@_grouped_gemm.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_grouped_outer.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, w, offsets = ctx.saved_tensors
    dx = _grouped_gemm(dy, w.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dw = _grouped_outer(dy, x, offsets) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _outer_backward(ctx, dout):
    a, b, offsets = ctx.saved_tensors
    return _grouped_gemm(b, dout, offsets), _grouped_gemm(a, dout.transpose(1, 2), offsets), None


_grouped_gemm.register_autograd(_backward, setup_context=_setup)
_grouped_outer.register_autograd(_outer_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x [T, K] sorted by expert, w [E, N, K], offsets int32 [E + 1] -> [T, N]: x[t] @ w[e].T, rows offsets[e] to
    offsets[e + 1] by expert e, zero for rows past offsets[E]. In x's dtype, under autocast in autocast's.
    Differentiable in x and w, twice too. offsets must not decrease, begin with 0 and end at T or less: kernels do not
    look at their values, since that would wait for the device.

    Raises TypeError for a dtype that is no float, w of another dtype than x's (unless autocast is on) or offsets that
    are not int32, ValueError when shapes or devices disagree and, on the PyTorch path, for other offsets.
    """
    check_float("x", x)
    check_float("w", w)
    check_shape("x", x, (None, None))
    check_shape("w", w, (None, None, x.shape[1]))
    check_shape("offsets", offsets, (w.shape[0] + 1,))
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets: got {offsets.dtype}, allowed is torch.int32")
    check_devices(x, w=w, offsets=offsets)
    dtype = compute_dtype(x)
    if w.dtype not in (x.dtype, dtype):
        raise TypeError(f"w: got {w.dtype}, allowed is x's {x.dtype}")
    return _grouped_gemm(x.to(dtype), w.to(dtype), offsets)
