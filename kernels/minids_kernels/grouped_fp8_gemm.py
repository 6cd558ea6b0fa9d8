"""Products of fp8 (e4m3) codes for each expert's rows (DeepSeek-V3 report, arXiv 2412.19437, section 3.3): `fp8_gemm`
for segments of rows, as `grouped_gemm` has them.

    y[t]  = a[t] @ b[e].T        a [T, K] in 1x128 tiles, b [E, N, K] in 128x128 blocks, t in the segment of expert e
    dw[e] = dy_e.T @ x_e         both in 128x1 tiles, summed in fp32

offsets int32 [E + 1] on the device: expert e owns rows offsets[e] to offsets[e + 1], of any number; nothing is padded.
Rows from offsets[E] on belong to no expert: their result is zero. No count leaves the device, and grids depend on T and
E alone, so that a CUDA graph captured once serves any routing. Tiles are numbered as in `grouped_gemm`; up to SMALL
rows (decoding) each hit expert's weights are read once, as the operand that tensor cores want 64 rows of. A tile's
products are summed, scaled and promoted to fp32 every 128 numbers by `fp8_gemm`'s code, codes fetched by tensor
descriptors where the launch table says TMA, the whole by `_grouped_fp8_gemm_hopper` where it says GROUPS; chips without
e4m3 (sm_80, sm_86) widen codes in registers.

The weight gradient multiplies along rows, where a tile of 128 must not hold rows of two experts. So tiles begin at
each segment's own first row: `quantize_segments_transposed` numbers them like the product's, expert e's from
offsets[e] // 128 + e on, and stores tile number i in columns 128 i to 128 i + 127, zeros behind a segment's end. That
is at most 128 columns an expert more than T, and every segment begins where 16 bytes can be fetched at once.
Padding experts' rows to the tile is what pytorch/torchtitan#2255 would be rid of.
Test: tests/kernels/test_grouped_fp8_gemm.py. Benchmark: benchmarks/ops/grouped_fp8_gemm.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _launch
from ._checks import check_dtype, check_shape
from ._launch import tl, triton
from ._operator import operator
from .fp8_gemm import (
    E4M3,
    GROUP,
    OUT_DTYPES,
    PLAIN,
    _aligned,
    _dequantize,
    _generation,
    _origin,
    _tile,
    _torch_gemm,
    _values,
    check_out,
)
from .fp8_quant import (
    empty_codes,
    encode_e4m3,
    quantize_tiles_transposed,
    quantize_tiles_transposed_reference,
    scales_of,
)
from .grouped_gemm import SMALL, by_hand, describable, host_bounds, segment_at, segment_of

if _launch.HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "grouped_fp8_gemm",
    "grouped_fp8_gemm_masked",
    "grouped_fp8_gemm_reference",
    "grouped_fp8_gemm_wgrad",
    "grouped_fp8_gemm_wgrad_reference",
    "quantize_segments_transposed",
    "quantize_segments_transposed_reference",
]


def grouped_fp8_gemm_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Values in fp32, one product an expert: what `grouped_fp8_gemm` computes."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    rows = _dequantize(a, a_scale, 1)
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        out[start:end] = rows[start:end] @ _dequantize(b[expert], b_scale[expert], GROUP).T
    return out.to(out_dtype)


def grouped_fp8_gemm_wgrad_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    """Values in fp32, one product an expert: what `grouped_fp8_gemm_wgrad` computes without `out`."""
    left, right = _dequantize(a, a_scale, 1), _dequantize(b, b_scale, 1)
    columns = [slice(first, first + count) for first, count in _columns(offsets)]
    return torch.stack([left[:, c] @ right[:, c].T for c in columns])


def quantize_segments_transposed_reference(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, one expert after the other: what `quantize_segments_transposed` gives."""
    groups = x.shape[0] // GROUP + offsets.shape[0] - 1
    codes = torch.zeros(x.shape[1], groups * GROUP, dtype=torch.uint8, device=x.device)
    scales = torch.ones(x.shape[1], groups, device=x.device)
    for (start, end), (first, count) in zip(_bounds(offsets), _columns(offsets), strict=True):
        piece, piece_scales = quantize_tiles_transposed_reference(x[start:end])
        codes[:, first : first + count] = piece.view(torch.uint8)
        scales[:, first // GROUP : first // GROUP + piece_scales.shape[1]] = piece_scales
    return codes.view(E4M3), scales


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """First and last row of each segment, on the host."""
    return list(itertools.pairwise(offsets.tolist()))


def _columns(offsets: Tensor) -> list[tuple[int, int]]:
    """First column and number of columns of each segment in the transposed codes, on the host."""
    return [((start // GROUP + e) * GROUP, end - start) for e, (start, end) in enumerate(_bounds(offsets))]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _grouped_fp8_gemm_kernel(
    a, a_scale, b, b_scale, offsets, out, T, E, N, K,
    a_stride, as_stride, as_k_stride, b_stride, bs_expert, bs_stride, bs_k_stride,
    WIDE: tl.constexpr, TMA: tl.constexpr, EXPERTS: tl.constexpr, STRIPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [T, N] contiguous a program. EXPERTS: a power of two above E; E itself stands for "no expert".
    b [E * N, K]; TMA: a and b are descriptors. Rows past the segment's end, or past N, are another's then, which
    changes nothing that is stored."""
    number, column = _origin(tl.program_id(0), T // BLOCK_P + E + 1, N, 1, BLOCK_Q, STRIPE)
    expert, row, end = segment_of(number, offsets, E, T, BLOCK_P, EXPERTS)
    if row < end:
        rows = (a, 0, 0) if TMA else a
        weights = (b, expert * N, 0) if TMA else b + expert.to(tl.int64) * N * b_stride
        scales = b_scale + expert.to(tl.int64) * bs_expert
        depth = tl.where(expert < E, K, 0)
        _tile(
            rows, a_scale, weights, scales, out, row, column, end, N, depth,
            a_stride, as_stride, as_k_stride, b_stride, bs_stride, bs_k_stride, N, 1,
            False, True, WIDE, False, TMA, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _grouped_fp8_gemm_masked_kernel(
    a, a_scale, b, b_scale, counts, out, M, N, K,
    a_stride, as_stride, as_k_stride, b_stride, bs_expert, bs_stride, bs_k_stride,
    WIDE: tl.constexpr, TMA: tl.constexpr, STRIPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [E * M, N] contiguous a program, of expert program_id(1), whose rows begin at M times it. b and
    TMA as in `_grouped_fp8_gemm_kernel`."""
    expert = tl.program_id(1)
    p, q = _origin(tl.program_id(0), M, N, BLOCK_P, BLOCK_Q, STRIPE)
    count = tl.minimum(tl.load(counts + expert), M)
    if p < count:
        rows = (a, 0, 0) if TMA else a
        weights = (b, expert * N, 0) if TMA else b + expert.to(tl.int64) * N * b_stride
        scales = b_scale + expert.to(tl.int64) * bs_expert
        _tile(
            rows, a_scale, weights, scales, out, expert * M + p, q, expert * M + count, N, K,
            a_stride, as_stride, as_k_stride, b_stride, bs_stride, bs_k_stride, N, 1,
            False, True, WIDE, False, TMA, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _grouped_fp8_gemm_small_kernel(
    a, a_scale, b, b_scale, offsets, out, T, E, N, K,
    a_stride, as_stride, as_k_stride, b_stride, bs_expert, bs_stride, bs_k_stride,
    WIDE: tl.constexpr, TMA: tl.constexpr, EXPERTS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """T <= BLOCK_Q: the whole segment that begins at row program_id(1), BLOCK_P columns of it, as its transpose. b and
    TMA as in `_grouped_fp8_gemm_kernel`."""
    row = tl.program_id(1)
    expert, end = segment_at(row, offsets, E, T, EXPERTS)
    if row < end:
        rows = (a, 0, 0) if TMA else a
        weights = (b, expert * N, 0) if TMA else b + expert.to(tl.int64) * N * b_stride
        scales = b_scale + expert.to(tl.int64) * bs_expert
        depth = tl.where(expert < E, K, 0)
        _tile(
            weights, scales, rows, a_scale, out, tl.program_id(0) * BLOCK_P, row, N, end, depth,
            b_stride, bs_stride, bs_k_stride, a_stride, as_stride, as_k_stride, 1, N,
            True, False, WIDE, False, TMA, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _grouped_fp8_gemm_wgrad_kernel(
    a, a_scale, b, b_scale, offsets, out, N, K,
    a_stride, as_stride, as_k_stride, b_stride, bs_stride, bs_k_stride, out_expert, p_stride, q_stride,
    WIDE: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr, STRIPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [E, N, K] a program, which walks through its expert's tiles of tokens. TMA: a and b are
    descriptors."""
    tiles = tl.cdiv(N, BLOCK_P) * tl.cdiv(K, BLOCK_Q)
    expert = tl.program_id(0) // tiles
    p, q = _origin(tl.program_id(0) % tiles, N, K, BLOCK_P, BLOCK_Q, STRIPE)
    start = tl.load(offsets + expert)
    first = start // 128 + expert
    group = first.to(tl.int64)
    tokens = tl.cdiv(tl.load(offsets + expert + 1) - start, 128) * 128
    left = (a, 0, first * 128) if TMA else a + group * 128
    right = (b, 0, first * 128) if TMA else b + group * 128
    _tile(
        left, a_scale + group * as_k_stride, right, b_scale + group * bs_k_stride,
        out + expert.to(tl.int64) * out_expert, p, q, N, K, tokens,
        a_stride, as_stride, as_k_stride, b_stride, bs_stride, bs_k_stride, p_stride, q_stride,
        False, False, WIDE, ADD, TMA, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _quantize_segments_kernel(
    x_ptr, token_ptr, offsets_ptr, codes_ptr, scales_ptr, E, K, x_stride,
    GATHERED: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile number i, columns COLS j.. of x, of its row token[t] where GATHERED, else of row t. codes
    [K, 128 tiles] contiguous, scales as `fp8_quant.empty_codes` has them."""
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    _, first, end = segment_of(tile, offsets_ptr, E, 0, TILE, EXPERTS)
    lane = tl.arange(0, TILE)
    rows = (first + lane).to(tl.int64)[:, None]
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    cols = col[None, :]
    source = tl.load(token_ptr + rows, mask=rows < end, other=0) if GATHERED else rows
    x = tl.load(x_ptr + source * x_stride + cols, mask=(rows < end) & (cols < K), other=0.0).to(tl.float32)
    scale, inverse = scales_of(tl.max(tl.abs(x), axis=0), False)
    codes = encode_e4m3(x * inverse[None, :], False)
    tl.store(codes_ptr + (cols * tiles + tile) * TILE + lane[:, None], codes, mask=cols < K)
    tl.store(scales_ptr + tile.to(tl.int64) * K + col, scale, mask=col < K)


# --- launchers --------------------------------------------------------------------------------------------------------


def _fetched(
    a: Tensor, b: Tensor, config: Mapping[str, Any], blocks: tuple[str, str]
) -> tuple[Any, Any, dict[str, Any]]:
    """`_aligned` codes a and b as a kernel takes them, and what it is to know: descriptors of tiles of `blocks` rows
    where the launch table says so, else pointers, to uint8 for chips without e4m3."""
    wide, tma = _generation(a) < 89, config.get("TMA", False) and describable(a) and describable(b)
    if wide:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    x, y = (
        TensorDescriptor.from_tensor(codes, [config[block], config["BLOCK_K"]]) if tma else codes
        for codes, block in zip((a, b), blocks, strict=True)
    )
    return x, y, {**config, "WIDE": wide, "TMA": tma}


def _triton_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    (rows, width), (experts, cols, _) = a.shape, b.shape
    arch, small = _launch.arch(a), rows <= SMALL
    a, b = _aligned(a), _aligned(b.reshape(experts * cols, width))
    if small:
        config = _launch.config("grouped_fp8_gemm", "small", arch)
        config = config | {"BLOCK_Q": max(config["BLOCK_Q"], triton.next_power_of_2(rows))}
        grid: tuple[int, ...] = triton.cdiv(cols, config["BLOCK_P"]), rows
    else:
        config = _launch.config("grouped_fp8_gemm", "many", arch, rows=rows // max(1, experts))
        if "GROUPS" in config:
            if by_hand(a, b, out):
                from ._grouped_fp8_gemm_hopper import grouped

                grouped(a, a_scale, b, b_scale, offsets, out, **config)
                return
            config = PLAIN
        grid = ((rows // config["BLOCK_P"] + experts + 1) * triton.cdiv(cols, config["BLOCK_Q"]),)
    x, y, meta = _fetched(a, b, config, ("BLOCK_Q", "BLOCK_P") if small else ("BLOCK_P", "BLOCK_Q"))
    _launch.launch(
        _grouped_fp8_gemm_small_kernel if small else _grouped_fp8_gemm_kernel, grid,
        x, a_scale, y, b_scale, offsets, out, rows, experts, cols, a.shape[1],
        a.stride(0), *a_scale.stride(), b.stride(0), *b_scale.stride(),
        EXPERTS=triton.next_power_of_2(experts + 1), **meta,
    )  # fmt: skip


def _triton_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor
) -> None:
    (experts, rows, width), cols = a.shape, b.shape[1]
    if out.numel() == 0:
        return
    a, b = (_aligned(x.reshape(-1, width)) for x in (a, b))
    a_scale = a_scale.reshape(experts * rows, -1)
    config = _launch.config("grouped_fp8_gemm", "many", _launch.arch(a), rows=expected)
    config = PLAIN if "GROUPS" in config else config
    x, y, meta = _fetched(a, b, config, ("BLOCK_P", "BLOCK_Q"))
    _launch.launch(
        _grouped_fp8_gemm_masked_kernel,
        (triton.cdiv(rows, config["BLOCK_P"]) * triton.cdiv(cols, config["BLOCK_Q"]), experts),
        x, a_scale, y, b_scale, counts, out, rows, cols, a.shape[1],
        a.stride(0), *a_scale.stride(), b.stride(0), *b_scale.stride(), **meta,
    )  # fmt: skip


def _triton_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor, add: bool = False
) -> None:
    """Writes each expert's a @ b.T into `out` [E, N, K], or adds it."""
    if out.numel() == 0:
        return
    experts, rows, cols = out.shape
    a, b = _aligned(a), _aligned(b)
    config = _launch.config("grouped_fp8_gemm", "wgrad", _launch.arch(a))
    if "GROUPS" in config:
        if by_hand(a, b, out) and out.is_contiguous():
            from ._grouped_fp8_gemm_hopper import wgrad

            wgrad(a, a_scale, b, b_scale, offsets, out, add, config["STAGES"], config["STRIPE"])
            return
        config = PLAIN
    tiles = triton.cdiv(rows, config["BLOCK_P"]) * triton.cdiv(cols, config["BLOCK_Q"])
    x, y, meta = _fetched(a, b, config, ("BLOCK_P", "BLOCK_Q"))
    _launch.launch(
        _grouped_fp8_gemm_wgrad_kernel, (experts * tiles,),
        x, a_scale, y, b_scale, offsets, out, rows, cols,
        a.stride(0), *a_scale.stride(), b.stride(0), *b_scale.stride(), *out.stride(), ADD=add, **meta,
    )  # fmt: skip


def _empty_segments(x: Tensor, offsets: Tensor, token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales as `quantize_segments_transposed` gives them, unwritten."""
    groups = (x if token is None else token).shape[0] // GROUP + offsets.shape[0] - 1
    return empty_codes(x, (x.shape[1], groups * GROUP), 1, GROUP)


def _triton_segments(x: Tensor, offsets: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scales = _empty_segments(x, offsets, token)
    config = _launch.config("grouped_fp8_gemm", "quantize_segments_transposed", _launch.arch(x))
    _launch.launch(
        _quantize_segments_kernel, (scales.shape[1], triton.cdiv(x.shape[1], config["COLS"])),
        x, offsets if token is None else token, offsets, codes, scales, offsets.shape[0] - 1, x.shape[1], x.stride(0),
        GATHERED=token is not None, TILE=GROUP, EXPERTS=triton.next_power_of_2(offsets.shape[0]), **config,
    )  # fmt: skip
    return codes, scales


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _torch_grouped(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Weights of experts without rows are not widened."""
    bounds = host_bounds(offsets, a.shape[0])
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            rows, scales = a[start:end], a_scale[start:end]
            out[start:end] = _torch_gemm(rows, scales, b[expert], b_scale[expert], out.dtype, GROUP)
    out[bounds[-1] :].zero_()


def _torch_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor
) -> None:
    for expert, count in enumerate(counts.clamp(max=a.shape[1]).tolist()):
        rows, scales = a[expert, :count], a_scale[expert, :count]
        out[expert, :count] = _torch_gemm(rows, scales, b[expert], b_scale[expert], out.dtype, GROUP)


def _torch_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor, add: bool = False
) -> None:
    for expert, (first, count) in enumerate(_columns(offsets)):
        if count:
            columns, groups = slice(first, first + count), slice(first // GROUP, (first + count - 1) // GROUP + 1)
            left = _values(a[:, columns], a_scale[:, groups], 1)
            right = _values(b[:, columns], b_scale[:, groups], 1)
            out[expert].addmm_(left, right.T, beta=int(add))
        elif not add:
            out[expert].zero_()


def _torch_segments(x: Tensor, offsets: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows go to where their segment's tiles lie, zeros between; one quantisation for all."""
    x = x if token is None else x.index_select(0, token)
    starts, live = offsets[:-1], int(offsets[-1])
    shift = (starts // GROUP + torch.arange(starts.shape[0], device=x.device)) * GROUP - starts
    rows = torch.arange(live, device=x.device) + shift.repeat_interleave(offsets.diff(), output_size=live)
    padded = x.new_zeros((x.shape[0] // GROUP + starts.shape[0]) * GROUP, x.shape[1])
    codes, scales = quantize_tiles_transposed(padded.index_copy_(0, rows, x[:live]))
    return codes.view(torch.uint8), scales


# --- registration -----------------------------------------------------------------------------------------------------


@operator("grouped_fp8_gemm")
def _grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)
    (_triton_gemm if _launch.use_triton(a) else _torch_grouped)(a, a_scale, b, b_scale, offsets, out)
    return out


@operator("grouped_fp8_gemm_into", mutates_args=("out",))
def _grouped_fp8_gemm_into(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> None:  # fmt: skip
    """`_grouped_fp8_gemm` written to `out` [T, N], contiguous."""
    (_triton_gemm if _launch.use_triton(a) else _torch_grouped)(a, a_scale, b, b_scale, offsets, out)


@operator("grouped_fp8_gemm_masked", mutates_args=("out",))
def _grouped_fp8_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor
) -> None:
    (_triton_masked if _launch.use_triton(a) else _torch_masked)(a, a_scale, b, b_scale, counts, expected, out)


@operator("grouped_fp8_gemm_wgrad")
def _grouped_fp8_gemm_wgrad(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_empty(offsets.shape[0] - 1, a.shape[0], b.shape[0], dtype=torch.float32)
    (_triton_wgrad if _launch.use_triton(a) else _torch_wgrad)(a, a_scale, b, b_scale, offsets, out)
    return out


@operator("grouped_fp8_gemm_wgrad_add", mutates_args=("out",))
def _grouped_fp8_gemm_wgrad_add(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> None:
    (_triton_wgrad if _launch.use_triton(a) else _torch_wgrad)(a, a_scale, b, b_scale, offsets, out, add=True)


@operator("quantize_segments_transposed")
def _quantize_segments(x: Tensor, offsets: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes are uint8 here, e4m3's bits."""
    return (_triton_segments if _launch.use_triton(x) else _torch_segments)(x, offsets, token)


@_grouped_fp8_gemm.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


@_grouped_fp8_gemm_into.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> None:
    return None


@_grouped_fp8_gemm_masked.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, expected: int, out: Tensor) -> None:
    return None


@_grouped_fp8_gemm_wgrad.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[0], b.shape[0], dtype=torch.float32)


@_grouped_fp8_gemm_wgrad_add.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> None:
    return None


_quantize_segments.register_fake(_empty_segments)


# --- public ops -------------------------------------------------------------------------------------------------------


def _check_offsets(offsets: Tensor, experts: int | None) -> None:
    check_shape("offsets", offsets, (None if experts is None else experts + 1,))
    check_dtype("offsets", offsets, torch.int32)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: got shape (0,), allowed is one number more than experts")


def _check_depth(name: str, x: Tensor) -> None:
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is a last dimension of 1 or more")


def _check_operands(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    for name, tensor, dtype in (
        ("a", a, E4M3),
        ("b", b, E4M3),
        ("a_scale", a_scale, torch.float32),
        ("b_scale", b_scale, torch.float32),
    ):
        check_dtype(name, tensor, dtype)
    _check_depth("a", a)
    *rows, width = a.shape
    groups = -(-width // GROUP)
    check_shape("a_scale", a_scale, (*rows, groups))
    check_shape("b", b, (None, None, width))
    check_shape("b_scale", b_scale, (b.shape[0], -(-b.shape[1] // GROUP), groups))


def grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a [T, K] sorted by expert, b [E, N, K] e4m3 codes; a_scale [T, ceil(K / 128)] and b_scale [E, ceil(N / 128),
    ceil(K / 128)] fp32, any strides; offsets int32 [E + 1] -> [T, N] in out_dtype (bf16, fp16 or fp32): rows
    offsets[e] to offsets[e + 1] of a @ b[e].T, zero for rows past offsets[E]. offsets must not decrease, begin with 0
    and end at T or less: kernels do not look at their values. Not differentiable: `grouped_fp8_linear` is.

    Raises TypeError for codes that are not torch.float8_e4m3fn, scales that are not fp32, offsets that are not int32 or
    another out_dtype, ValueError for shapes that do not fit and, on the PyTorch path, for other offsets.
    """
    check_shape("a", a, (None, None))
    _check_operands(a, a_scale, b, b_scale)
    _check_offsets(offsets, b.shape[0])
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, allowed are {', '.join(map(str, OUT_DTYPES))}")
    return _grouped_fp8_gemm(a, a_scale, b, b_scale, offsets, out_dtype)


def grouped_fp8_gemm_into(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> None:  # fmt: skip
    """`grouped_fp8_gemm` written to out [T, N] (bf16, fp16 or fp32, contiguous). Raises as it does, and for such an
    `out`."""
    check_shape("a", a, (None, None))
    _check_operands(a, a_scale, b, b_scale)
    _check_offsets(offsets, b.shape[0])
    check_out(out, (a.shape[0], b.shape[1]))
    _grouped_fp8_gemm_into(a, a_scale, b, b_scale, offsets, out)


def grouped_fp8_gemm_masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, expected: int
) -> None:
    """Writes the first counts[e] rows (int32 [E], at most M) of a[e] @ b[e].T into out [E, M, N] (bf16, fp16 or fp32,
    contiguous) for each expert e; its other rows stay as they are. a [E, M, K] with a_scale [E, M, ceil(K / 128)], b
    and b_scale as `grouped_fp8_gemm`: the layout of decoding under a CUDA graph, where each expert has room for M rows
    and counts change. `expected`: rows an expert has on average, by which the tile is chosen.

    Raises TypeError and ValueError as `grouped_fp8_gemm`.
    """
    check_shape("a", a, (b.shape[0], None, None))
    _check_operands(a, a_scale, b, b_scale)
    check_shape("counts", counts, (b.shape[0],))
    check_dtype("counts", counts, torch.int32)
    check_out(out, (*a.shape[:2], b.shape[1]))
    _grouped_fp8_gemm_masked(a, a_scale, b, b_scale, counts, expected, out)


def grouped_fp8_gemm_wgrad(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor | None = None
) -> Tensor:
    """a [N, 128 G], b [K, 128 G] e4m3 codes and scales [N, G], [K, G] fp32 of `quantize_segments_transposed`, offsets
    int32 [E + 1] -> [E, N, K] fp32: dy_e.T @ x_e for each expert where a are dy's codes and b are x's; zero for an
    expert without rows. With `out` [E, N, K] fp32 it is added to it in place, and `out` returned.

    Raises TypeError for codes that are not torch.float8_e4m3fn, scales or `out` that are not fp32 or offsets that are
    not int32, ValueError for shapes that do not fit.
    """
    for name, codes, scale in (("a", a, a_scale), ("b", b, b_scale)):
        check_dtype(name, codes, E4M3)
        check_dtype(f"{name}_scale", scale, torch.float32)
        check_shape(name, codes, (None, None if name == "a" else a.shape[1]))
        if codes.shape[1] % GROUP:
            raise ValueError(f"{name}: got shape {tuple(codes.shape)}, allowed are multiples of {GROUP} columns")
        check_shape(f"{name}_scale", scale, (codes.shape[0], codes.shape[1] // GROUP))
    _check_offsets(offsets, None)
    if out is None:
        return _grouped_fp8_gemm_wgrad(a, a_scale, b, b_scale, offsets)
    check_dtype("out", out, torch.float32)
    check_shape("out", out, (offsets.shape[0] - 1, a.shape[0], b.shape[0]))
    _grouped_fp8_gemm_wgrad_add(a, a_scale, b, b_scale, offsets, out)
    return out


def quantize_segments_transposed(
    x: Tensor, offsets: Tensor, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [T, K] fp32, bf16 or fp16 sorted by expert, offsets int32 [E + 1] -> codes [K, 128 G] e4m3, scales [K, G] fp32,
    G = T // 128 + E: each segment's 128x1 tiles, transposed, expert e's from column 128 (offsets[e] // 128 + e) on.
    Columns between segments hold zeros; rows past offsets[E] are left out. Scales as `quantize_tiles` has them. With
    `token` int64 [T], a `MoePlan`'s, x is not sorted: row t is x[token[t]], and is not copied before.

    Raises TypeError for another dtype, offsets that are not int32 or tokens that are not int64, ValueError for shapes
    that do not fit.
    """
    check_dtype("x", x, *OUT_DTYPES)
    check_shape("x", x, (None, None))
    _check_offsets(offsets, None)
    if token is not None:
        check_shape("token", token, (None,))
        check_dtype("token", token, torch.int64)
    codes, scales = _quantize_segments(x, offsets, token)
    return codes.view(E4M3), scales
