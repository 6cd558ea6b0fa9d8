"""Blockwise quantisation to fp8 (e4m3): codes and fp32 scales, value = code * scale (DeepSeek-V3 report, arXiv
2412.19437, section 3.3: activations in 1x128 tiles, weights in 128x128 blocks).

    scale = amax / 448, at least 2^-126; "ue8m0" rounds it up to a power of two; 1 where all is zero
    code  = x * (1 / scale), rounded to the nearest e4m3 number, ties to even

x in fp32, bf16 or fp16, any sizes from 0 up, strided rows; tails of a tile count as zeros. A NaN becomes the code NaN
and does not touch its tile's scale; an Inf makes the scale Inf, so that its whole tile dequantises to NaN. Every
quantiser gives the same bits on every backend (but for the sign of NaN). Not differentiable.

The weight gradient multiplies along the rows of x: `quantize_tiles_transposed` gives x's 128x1 tiles, stored as rows;
`quantize_tiles_both` reads x once for both. All run on every GPU that Triton knows: codes travel as uint8, and chips
without e4m3 instructions (before sm_89) make them by integer arithmetic.
Test: tests/kernels/test_fp8_quant.py. Benchmark: benchmarks/ops/fp8_quant.py.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from . import _launch
from ._launch import tl, triton

__all__ = ["decode_e4m3", "encode_e4m3", "native_e4m3", "quantize_groups", "scales_of"]

E4M3 = torch.float8_e4m3fn
TILE = 128
LARGEST = 448.0  # of e4m3
LEAST_SCALE = 2.0**-126  # its reciprocal is still finite

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
def scales_of(amax, UE8M0: tl.constexpr):
    """Largest absolute values, fp32 of any shape -> (scale, 1 / scale), fp32. Zero and NaN give 1, Inf gives (Inf, 0);
    UE8M0: the scale is rounded up to a power of two."""
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)  # 2^-126
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
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
