"""Blockwise quantisation to fp8 (e4m3): codes and fp32 scales, value = code * scale (DeepSeek-V3 report, arXiv
2412.19437, section 3.3: activations in 1x128 tiles, weights in 128x128 blocks).

    scale = amax / 448, at least 2^-126; "ue8m0" rounds it up to a power of two; 1 where all is zero
    code  = x * (1 / scale), rounded to the nearest e4m3 number, ties to even

x in fp32, bf16 or fp16, any sizes from 0 up, strided rows; tails of a tile count as zeros. A NaN becomes the code NaN
and does not touch its tile's scale; an Inf makes the scale Inf, so that its whole tile dequantises to NaN. Every
quantiser gives the same bits on every backend (but for the sign of NaN). Not differentiable.

The weight gradient multiplies along the rows of x: `quantize_tiles_transposed` gives x's 128x1 tiles, stored as rows;
`quantize_tiles_both` gives both, by two kernels: one that read x once took longer, since its tile of 128 x 128 left no
room for a second program on a multiprocessor. All run on every GPU that Triton knows: codes travel as uint8, and chips
without e4m3 instructions (before sm_89) make them by integer arithmetic.
Test: tests/kernels/test_fp8_quant.py. Benchmark: benchmarks/ops/fp8_quant.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._checks import check_shape
from ._launch import tl, triton
from ._operator import operator

__all__ = [
    "decode_e4m3",
    "dequantize_blocks",
    "dequantize_tiles",
    "encode_e4m3",
    "native_e4m3",
    "quantize_blocks",
    "quantize_blocks_reference",
    "quantize_groups",
    "quantize_tiles",
    "quantize_tiles_both",
    "quantize_tiles_both_reference",
    "quantize_tiles_reference",
    "quantize_tiles_transposed",
    "quantize_tiles_transposed_reference",
    "scales_of",
    "transpose_blocks",
]

ScaleFormat = Literal["fp32", "ue8m0"]

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TILE = 128
LEAST_SCALE = 2.0**-126  # its reciprocal is still finite


def _over_448(amax: Tensor) -> Tensor:
    """Rounded once. By a Python number CUDA tensors would not be divided but multiplied by its rounded reciprocal."""
    return amax / amax.new_full((), 448.0)


def _reference(x: Tensor, rows: int, cols: int, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """x [M, K] in tiles of [rows, cols] -> codes [M, K], scales [ceil(M / rows), ceil(K / cols)]."""
    m, k = x.shape
    padded = F.pad(x.float(), (0, -k % cols, 0, -m % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    amax = tiles.nan_to_num(0.0, math.inf, -math.inf).abs().amax((1, 3))
    scales = _over_448(amax).clamp(min=LEAST_SCALE)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scales)
        power = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        scales = torch.where(amax.isinf(), amax, power)
    scales = torch.where(amax == 0, 1.0, scales)
    codes = tiles * (1.0 / scales)[:, None, :, None]
    return codes.view(padded.shape)[:m, :k].to(E4M3), scales


def quantize_tiles_reference(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Plain PyTorch: x [M, K] -> codes [M, K], scales [M, ceil(K / 128)]."""
    return _reference(x, 1, TILE, scale_format)


def quantize_blocks_reference(w: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Plain PyTorch: w [N, K] -> codes [N, K], scales [ceil(N / 128), ceil(K / 128)]."""
    return _reference(w, TILE, TILE, scale_format)


def quantize_tiles_transposed_reference(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Plain PyTorch: x [M, K] -> codes [K, M], scales [K, ceil(M / 128)]."""
    codes, scales = _reference(x, TILE, 1, scale_format)
    return codes.t().contiguous(), scales.t()


def quantize_tiles_both_reference(
    x: Tensor, scale_format: ScaleFormat = "fp32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch: what `quantize_tiles_reference` and `quantize_tiles_transposed_reference` give."""
    return *quantize_tiles_reference(x, scale_format), *quantize_tiles_transposed_reference(x, scale_format)


# --- for rooms that multiply ------------------------------------------------------------------------------------------


def transpose_blocks(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` of w.T from those of w [N, K], whose codes may come as uint8: blocks are square, so that only
    codes turn."""
    return codes.view(torch.uint8).T.contiguous().view(E4M3), scales.T


# --- for kernels, here and in rooms that fuse quantisation ------------------------------------------------------------


@triton.jit
def encode_e4m3(y, NATIVE: tl.constexpr):
    """fp32 of any shape -> uint8: the nearest e4m3 number's bits, ties to even, beyond 448 saturated, NaN to NaN.

    NATIVE: by the conversion instruction of sm_89 and later (`native_e4m3(x)` tells) instead of some 14 integer ones,
    which run at half rate and outweigh the 3 bytes that a bf16 number's way through memory costs. The same bits either
    way (NaN loses its sign when NATIVE). Tiles that are stored transposed must come from integer arithmetic: ptxas 12.9
    miscompiles e4m3 tiles that are stored both ways (triton issue 11111).
    """
    if NATIVE:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    is_nan = size > 0x7F800000
    size = tl.minimum(size, 0x43E00000)  # 448
    # Normal: round the mantissa to 3 bits, exponent bias from 127 to 7. Subnormal, below 2^-6: added to 2^14, whose
    # last bit is worth 2^-9 like e4m3's subnormals', fp32 does the rounding.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(codes):
    """uint8 of any shape -> fp32, exact, NaN to NaN."""
    bits = codes.to(tl.int32)
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # exponent bias 7 to 127: 2^120
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(bits >= 0x80, -size, size)


@triton.jit
def round_up_to_power_of_two(scale):
    """Positive fp32 of any shape; Inf stays."""
    return ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(amax, UE8M0: tl.constexpr):
    """Largest absolute values, fp32 of any shape -> (scale, 1 / scale), fp32. Zero and NaN give 1, Inf gives (Inf, 0);
    UE8M0: the scale is rounded up to a power of two."""
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)  # 2^-126
    if UE8M0:
        scale = round_up_to_power_of_two(scale)
    scale = tl.where(amax > 0, scale, 1.0)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def quantize_groups(x, UE8M0: tl.constexpr, NATIVE: tl.constexpr):
    """x [R, G, 128] fp32, tails filled with zeros -> codes [R, G, 128] uint8 (e4m3 bits), scales [R, G] fp32: what
    `quantize_tiles` gives, bit for bit. NATIVE: see `encode_e4m3`. Store the codes to `codes.view(torch.uint8)`."""
    scale, inverse = scales_of(tl.max(tl.abs(x), axis=2), UE8M0)
    return encode_e4m3(x * inverse[:, :, None], NATIVE), scale


def native_e4m3(x: Tensor) -> bool:
    """NATIVE for a kernel that runs on x's device: whether it has instructions for e4m3. The interpreter counts as a
    chip without them."""
    found = re.fullmatch(r"sm_(\d+)", _launch.arch(x))
    return found is not None and int(found.group(1)) >= 89 and not _launch.INTERPRETED


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_tiles_kernel(
    x_ptr, codes_ptr, scales_ptr, M, K, n_groups, x_stride, scale_stride, scale_group_stride,
    UE8M0: tl.constexpr, NATIVE: tl.constexpr, DEEPSEEK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ROWS rows, GROUPS tiles of each. codes [M, K] contiguous, scales [M, n_groups]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    rows = row[:, :, None]
    cols = group[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    mask = (rows < M) & (cols < K)
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if DEEPSEEK:
        scale = tl.maximum(tl.max(tl.abs(x), axis=2), 1e-4) / 448.0
        if UE8M0:
            scale = round_up_to_power_of_two(scale)
        codes = encode_e4m3(x / scale[:, :, None], NATIVE)
    else:
        codes, scale = quantize_groups(x, UE8M0, NATIVE)
    tl.store(codes_ptr + rows * K + cols, codes, mask=mask)
    place = row * scale_stride + group.to(tl.int64) * scale_group_stride
    tl.store(scales_ptr + place, scale, mask=(row < M) & (group < n_groups))


@triton.jit
def _quantize_blocks_kernel(
    w_ptr, codes_ptr, scales_ptr, N, K, w_stride,
    UE8M0: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): block (i, j). codes [N, K] and scales contiguous."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    mask = (rows < N) & (cols < K)
    w = tl.load(w_ptr + rows * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = scales_of(tl.max(tl.max(tl.abs(w), axis=1), axis=0), UE8M0)
    tl.store(codes_ptr + rows * K + cols, encode_e4m3(w * inverse, NATIVE), mask=mask)
    tl.store(scales_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def _quantize_transposed_kernel(
    x_ptr, codes_ptr, scales_ptr, M, K, x_stride, UE8M0: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr
):
    """Program (i, j): rows 128 i.., columns COLS j.. . codes [K, M] contiguous, scales as `empty_codes` has them."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    rows, cols = row[:, None], col[None, :]
    mask = (rows < M) & (cols < K)
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = scales_of(tl.max(tl.abs(x), axis=0), UE8M0)
    tl.store(codes_ptr + cols * M + rows, encode_e4m3(x * inverse[None, :], False), mask=mask)
    tl.store(scales_ptr + tl.program_id(0).to(tl.int64) * K + col, scale, mask=col < K)


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, out_ptr, M, K, n_groups, codes_stride, scale_stride, scale_group_stride,
    TILE_M: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ROWS rows, GROUPS tiles of each. scales [ceil(M / TILE_M), n_groups], out [M, K] contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    place = row // TILE_M * scale_stride + group.to(tl.int64) * scale_group_stride
    scale = tl.load(scales_ptr + place, mask=(row < M) & (group < n_groups), other=0.0)
    rows = row[:, :, None]
    cols = group[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    mask = (rows < M) & (cols < K)
    x = decode_e4m3(tl.load(codes_ptr + rows * codes_stride + cols, mask=mask, other=0)) * scale[:, :, None]
    tl.store(out_ptr + rows * K + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [M, K] with neighbouring columns side by side; rows may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def empty_codes(x: Tensor, shape: Sequence[int], tile_m: int, tile: int) -> tuple[Tensor, Tensor]:
    """Codes of `shape` [M, K] as uint8 and scales for tiles of [tile_m, tile], unwritten, where x lies. A step of a
    product along K takes one scale of each row: where tiles are of one row, these lie side by side."""
    rows, cols = shape
    codes, groups = x.new_empty(rows, cols, dtype=torch.uint8), -(-cols // tile)
    if tile_m == 1:
        return codes, x.new_empty(groups, rows, dtype=torch.float32).t()
    return codes, x.new_empty(-(-rows // tile_m), groups, dtype=torch.float32)


def _tile_config(kernel: str, x: Tensor, tile: int) -> dict[str, int]:
    """Table entries count tiles of 128 columns; other tiles make up the same width."""
    config = dict(_launch.config("fp8_quant", kernel, _launch.arch(x), K=x.shape[1]))
    config["GROUPS"] = max(1, config["GROUPS"] * TILE // tile)
    return config


def _empty_tiles(x: Tensor, tile: int, deepseek: bool) -> tuple[Tensor, Tensor]:
    codes, scales = empty_codes(x, x.shape, 1, tile)
    return codes, torch.empty_like(scales, memory_format=torch.contiguous_format) if deepseek else scales


def _triton_tiles(x: Tensor, tile: int, ue8m0: bool, deepseek: bool) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    x = _rows(x)
    codes, scales = _empty_tiles(x, tile, deepseek)
    config = _tile_config("quantize_tiles", x, tile)
    grid = triton.cdiv(m, config["ROWS"]), triton.cdiv(scales.shape[1], config["GROUPS"])
    _launch.launch(
        _quantize_tiles_kernel, grid, x, codes, scales, m, k, scales.shape[1], x.stride(0), *scales.stride(),
        UE8M0=ue8m0, NATIVE=native_e4m3(x), DEEPSEEK=deepseek, TILE=tile, **config,
    )  # fmt: skip
    return codes, scales


def _triton_blocks(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    w = _rows(w)
    codes, scales = empty_codes(w, w.shape, TILE, TILE)
    config = _launch.config("fp8_quant", "quantize_blocks", _launch.arch(w), N=w.shape[0], K=w.shape[1])
    _launch.launch(
        _quantize_blocks_kernel, tuple(scales.shape), w, codes, scales, *w.shape, w.stride(0),
        UE8M0=ue8m0, NATIVE=native_e4m3(w), TILE=TILE, **config,
    )  # fmt: skip
    return codes, scales


def _triton_transposed(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    x = _rows(x)
    codes, scales = empty_codes(x, (k, m), 1, TILE)
    config = _launch.config("fp8_quant", "quantize_tiles_transposed", _launch.arch(x), K=k)
    _launch.launch(
        _quantize_transposed_kernel, (triton.cdiv(m, TILE), triton.cdiv(k, config["COLS"])),
        x, codes, scales, m, k, x.stride(0), UE8M0=ue8m0, TILE=TILE, **config,
    )  # fmt: skip
    return codes, scales


def _triton_dequantize(codes: Tensor, scales: Tensor, tile_m: int, tile: int, dtype: torch.dtype) -> Tensor:
    m, k = codes.shape
    codes = _rows(codes)
    out = codes.new_empty(m, k, dtype=dtype)
    config = _tile_config("dequantize", codes, tile)
    grid = triton.cdiv(m, config["ROWS"]), triton.cdiv(scales.shape[1], config["GROUPS"])
    _launch.launch(
        _dequantize_kernel, grid, codes, scales, out, m, k, scales.shape[1], codes.stride(0), *scales.stride(),
        TILE_M=tile_m, TILE=tile, **config,
    )  # fmt: skip
    return out


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _tiled(x: Tensor, tile_m: int, tile: int) -> Tensor:
    """x [M, K] -> [ceil(M / tile_m), tile_m, ceil(K / tile), tile], zeros in the tails; a view where there are none."""
    m, k = x.shape
    tail_m, tail = -m % tile_m, -k % tile
    if tail_m or tail:
        x = F.pad(x, (0, tail, 0, tail_m))
    return x.reshape((m + tail_m) // tile_m, tile_m, (k + tail) // tile, tile)


def _torch_amax(tiles: Tensor) -> Tensor:
    """[R, tile_m, C, tile] -> [R, C], NaN where a tile has one. Two sweeps that write nothing beat one of abs(), one
    dimension after the other beats both at once."""
    if tiles.shape[3] == 1:
        columns = tiles.squeeze(3)
        return torch.maximum(columns.amax(1), columns.amin(1).neg_())
    rows = torch.maximum(tiles.amax(3), tiles.amin(3).neg_())
    return rows.amax(1)


def _torch_quantize(x: Tensor, tile_m: int, tile: int, ue8m0: bool, deepseek: bool = False) -> tuple[Tensor, Tensor]:
    """Tiles of [tile_m, tile]: codes [M, K], scales [ceil(M / tile_m), ceil(K / tile)]."""
    m, k = x.shape
    tiles = _tiled(x.float(), tile_m, tile)
    amax = _torch_amax(tiles)
    if amax.isnan().any():
        amax = _torch_amax(tiles.nan_to_num(0.0, math.inf, -math.inf))
    scales = _over_448(amax.clamp(min=1e-4)) if deepseek else _over_448(amax).clamp_(min=LEAST_SCALE)
    if ue8m0:
        scales = scales.view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    out = None if tiles.data_ptr() == x.data_ptr() else tiles
    if deepseek:
        codes = torch.div(tiles, scales[:, None, :, None], out=out)
    else:
        scales.masked_fill_(amax == 0, 1.0)
        codes = torch.mul(tiles, scales.reciprocal()[:, None, :, None], out=out)
    codes = codes.view(tiles.shape[0] * tile_m, tiles.shape[2] * tile)[:m, :k]
    return codes.to(E4M3, memory_format=torch.contiguous_format).view(torch.uint8), scales


def _torch_tiles(x: Tensor, tile: int, ue8m0: bool, deepseek: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _torch_quantize(x, 1, tile, ue8m0, deepseek)
    return codes, scales if deepseek else scales.t().contiguous().t()


def _torch_blocks(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return _torch_quantize(w, TILE, TILE, ue8m0)


def _torch_transposed(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _torch_quantize(x, TILE, 1, ue8m0)
    return codes.t().contiguous(), scales.t()


def _torch_dequantize(codes: Tensor, scales: Tensor, tile_m: int, tile: int, dtype: torch.dtype) -> Tensor:
    """Looks the 256 codes up, many times faster than a cast from e4m3."""
    m, k = codes.shape
    values = torch.arange(256, dtype=torch.uint8, device=codes.device).view(E4M3).float()
    tiles = _tiled(codes, tile_m, tile)
    x = values.index_select(0, tiles.int().flatten()).view(tiles.shape).mul_(scales[:, None, :, None])
    x = x.view(tiles.shape[0] * tile_m, tiles.shape[2] * tile)[:m, :k]
    return x.to(dtype, memory_format=torch.contiguous_format)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("quantize_tiles")
def _quantize_tiles(x: Tensor, tile: int, ue8m0: bool, deepseek: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K], scales [M, ceil(K / tile)], tile a power of two. deepseek: amax counts as at least
    1e-4, code = x / scale, and scales are contiguous (`compat.deepseek_v3`). Codes are uint8 here, e4m3's bits:
    `opcheck` knows no e4m3."""
    return (_triton_tiles if _launch.use_triton(x) else _torch_tiles)(x, tile, ue8m0, deepseek)


@operator("quantize_blocks")
def _quantize_blocks(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """w [N, K] -> codes [N, K], scales [ceil(N / 128), ceil(K / 128)]."""
    return (_triton_blocks if _launch.use_triton(w) else _torch_blocks)(w, ue8m0)


@operator("quantize_tiles_transposed")
def _quantize_tiles_transposed(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [K, M], scales [K, ceil(M / 128)]."""
    return (_triton_transposed if _launch.use_triton(x) else _torch_transposed)(x, ue8m0)


@operator("quantize_tiles_both")
def _quantize_tiles_both(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K] -> what quantize_tiles gives, then what quantize_tiles_transposed gives."""
    if _launch.use_triton(x):
        return *_triton_tiles(x, TILE, ue8m0, False), *_triton_transposed(x, ue8m0)
    return *_torch_tiles(x, TILE, ue8m0, False), *_torch_transposed(x, ue8m0)


@operator("dequantize")
def _dequantize(codes: Tensor, scales: Tensor, tile_m: int, tile: int, dtype: torch.dtype) -> Tensor:
    """codes [M, K], scales [ceil(M / tile_m), ceil(K / tile)] -> [M, K], tile a power of two."""
    return (_triton_dequantize if _launch.use_triton(codes) else _torch_dequantize)(codes, scales, tile_m, tile, dtype)


@_quantize_tiles.register_fake
def _(x: Tensor, tile: int, ue8m0: bool, deepseek: bool) -> tuple[Tensor, Tensor]:
    return _empty_tiles(x, tile, deepseek)


@_quantize_blocks.register_fake
def _(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return empty_codes(w, w.shape, TILE, TILE)


@_quantize_tiles_transposed.register_fake
def _(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return empty_codes(x, x.shape[::-1], 1, TILE)


@_quantize_tiles_both.register_fake
def _(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_codes(x, x.shape, 1, TILE), *empty_codes(x, x.shape[::-1], 1, TILE)


@_dequantize.register_fake
def _(codes: Tensor, scales: Tensor, tile_m: int, tile: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


# --- public ops -------------------------------------------------------------------------------------------------------


def _check_input(name: str, x: Tensor, scale_format: str) -> bool:
    """Whether scales are to be powers of two."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {x.dtype}, allowed are {', '.join(map(str, FLOATS))}")
    if scale_format not in ("fp32", "ue8m0"):
        raise ValueError(f"scale_format: got {scale_format!r}, allowed are 'fp32' and 'ue8m0'")
    return scale_format == "ue8m0"


def _check_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
    if codes.dtype != E4M3:
        raise TypeError(f"codes: got {codes.dtype}, allowed is {E4M3}")
    if scales.dtype != torch.float32:
        raise TypeError(f"scales: got {scales.dtype}, allowed is torch.float32")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}, allowed are {', '.join(map(str, FLOATS))}")


def _flat(name: str, x: Tensor) -> Tensor:
    """x [..., K] -> [M, K]."""
    if x.dim() == 0:
        raise ValueError(f"{name}: got shape (), allowed is (..., K)")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def quantize_tiles(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """x [..., K] fp32, bf16 or fp16 -> codes [..., K] e4m3, scales [..., ceil(K / 128)] fp32, in 1x128 tiles. Scales of
    neighbouring rows lie side by side, as products read them.

    `scale_format`: "fp32", or "ue8m0" for powers of two (still fp32 numbers). Raises TypeError for another dtype,
    ValueError for no dimension or another format.
    """
    ue8m0 = _check_input("x", x, scale_format)
    codes, scales = _quantize_tiles(_flat("x", x), TILE, ue8m0, False)
    return codes.view(E4M3).view(x.shape), scales.view(*x.shape[:-1], scales.shape[1])


def quantize_blocks(w: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """w [N, K] -> codes [N, K] e4m3, scales [ceil(N / 128), ceil(K / 128)] fp32, in 128x128 blocks; dtypes and errors
    as in `quantize_tiles`."""
    ue8m0 = _check_input("w", w, scale_format)
    check_shape("w", w, (None, None))
    codes, scales = _quantize_blocks(w, ue8m0)
    return codes.view(E4M3), scales


def quantize_tiles_transposed(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [K, M] e4m3, scales [K, ceil(M / 128)] fp32: 128x1 tiles of x, 1x128 ones of its transpose;
    order of scales, dtypes and errors as in `quantize_tiles`."""
    ue8m0 = _check_input("x", x, scale_format)
    check_shape("x", x, (None, None))
    codes, scales = _quantize_tiles_transposed(x, ue8m0)
    return codes.view(E4M3), scales


def quantize_tiles_both(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K] -> codes and scales of `quantize_tiles`, then those of `quantize_tiles_transposed`."""
    ue8m0 = _check_input("x", x, scale_format)
    check_shape("x", x, (None, None))
    codes, scales, codes_t, scales_t = _quantize_tiles_both(x, ue8m0)
    return codes.view(E4M3), scales, codes_t.view(E4M3), scales_t


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., K] e4m3, scales [..., ceil(K / 128)] fp32 -> code * scale [..., K] in `dtype` (fp32, bf16 or fp16).

    Raises TypeError for other dtypes, ValueError for scales that do not fit.
    """
    _check_codes(codes, scales, dtype)
    flat = _flat("codes", codes.view(torch.uint8))
    check_shape("scales", scales, (*codes.shape[:-1], -(-codes.shape[-1] // TILE)))
    return _dequantize(flat, scales.reshape(flat.shape[0], scales.shape[-1]), 1, TILE, dtype).view(codes.shape)


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [N, K] e4m3, scales [ceil(N / 128), ceil(K / 128)] fp32 -> code * scale [N, K] in `dtype` (fp32, bf16 or
    fp16); errors as in `dequantize_tiles`."""
    _check_codes(codes, scales, dtype)
    check_shape("codes", codes, (None, None))
    check_shape("scales", scales, (-(-codes.shape[0] // TILE), -(-codes.shape[1] // TILE)))
    return _dequantize(codes.view(torch.uint8), scales, TILE, TILE, dtype)
