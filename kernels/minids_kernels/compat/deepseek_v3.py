"""DeepSeek-V3's own inference kernels by name, signature and result, so that its `inference/model.py` runs on ours:

    import sys, minids_kernels.compat.deepseek_v3 as kernel
    sys.modules["kernel"] = kernel  # before `import model`

After https://github.com/deepseek-ai/DeepSeek-V3/blob/9b4e9788e4a3a731f7567338ed15d3ec549ce03b/inference/kernel.py:

    act_quant       per group: s = max(amax, 1e-4) / 448, with "ue8m0" rounded up to a power of two; codes e4m3(x / s)
    weight_dequant  codes * s, in torch.get_default_dtype()
    fp8_gemm        sum over groups of 128: (a @ b.T) * a_s * b_s in fp32, in torch.get_default_dtype()

Where theirs asserts, these raise ValueError or TypeError. A group of zeros has code 0 and scale 1e-4 / 448.
Test: tests/kernels/test_compat_deepseek_v3.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_shape
from .._ops import ops
from ..fp8_gemm import fp8_gemm as blockwise_fp8_gemm

__all__ = ["act_quant", "fp8_gemm", "weight_dequant"]

E4M3 = torch.float8_e4m3fn
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_BLOCK = 1024


def _check_contiguous(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()} for shape {tuple(x.shape)}, allowed is contiguous")


def _check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name}: got {x.dtype}, allowed is {' or '.join(map(str, allowed))}")


def _check_block(block_size: int) -> None:
    if not 0 < block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size: got {block_size}, allowed are powers of two up to {LARGEST_BLOCK}")


def act_quant(x: Tensor, block_size: int = 128, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] contiguous, K a multiple of `block_size` -> codes [..., K] e4m3, s [..., K / block_size] fp32.

    `scale_fmt`: None, or "ue8m0" for powers of two. Raises TypeError unless x is fp32, bf16 or fp16, ValueError for
    other strides, another K, format or block size.
    """
    _check_dtype("x", x, ACTIVATIONS)
    _check_contiguous(x=x)
    _check_block(block_size)
    if x.dim() == 0 or x.shape[-1] % block_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is a last dimension divisible by {block_size}")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, allowed are None and 'ue8m0'")
    *leading, k = x.shape
    codes, scales = ops.quantize_tiles(x.view(math.prod(leading), k), block_size, scale_fmt == "ue8m0", True)
    return codes.view(E4M3).view(x.shape), scales.view(*leading, k // block_size)


def weight_dequant(x: Tensor, s: Tensor, block_size: int = 128) -> Tensor:
    """x [M, N] e4m3, s [ceil(M / block_size), ceil(N / block_size)] fp32, both contiguous -> x * s [M, N] in
    torch.get_default_dtype().

    Raises TypeError for other dtypes, ValueError for other shapes, strides or block sizes.
    """
    _check_dtype("x", x, (E4M3,))
    _check_dtype("s", s, (torch.float32,))
    _check_contiguous(x=x, s=s)
    _check_block(block_size)
    check_shape("x", x, (None, None))
    check_shape("s", s, tuple(-(-size // block_size) for size in x.shape))
    return ops.dequantize(x.view(torch.uint8), s, block_size, block_size, torch.get_default_dtype())


def fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor) -> Tensor:
    """a [..., K] and b [N, K] e4m3, a_s [..., ceil(K / 128)] and b_s [ceil(N / 128), ceil(K / 128)] fp32, all
    contiguous -> [..., N] in torch.get_default_dtype(). Raises what `minids_kernels.fp8_gemm` raises, and ValueError
    for other strides."""
    _check_contiguous(a=a, a_s=a_s, b=b, b_s=b_s)
    *leading, k = a.shape
    check_shape("a_s", a_s, (*leading, -(-k // 128)))
    rows = math.prod(leading)
    out = blockwise_fp8_gemm(a.view(rows, k), a_s.view(rows, -(-k // 128)), b, b_s, torch.get_default_dtype())
    return out.view(*leading, b.shape[0])
