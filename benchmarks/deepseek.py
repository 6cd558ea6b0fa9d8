"""DeepSeek-V3's own inference kernels as a peer: their formulae and schedules, written anew.

After https://github.com/deepseek-ai/DeepSeek-V3/blob/9b4e9788e4a3a731f7567338ed15d3ec549ce03b/inference/kernel.py: a
program for each group of 128 elements to quantise; for the product a plain loop over K in tiles of 128, scales applied
to every tile's product, the tile's shape chosen by `triton.autotune` at the first call of a shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128


@triton.jit
def act_quant_kernel(x_ptr, codes_ptr, scales_ptr, GROUP: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_ptr + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-4) / 448.0
    tl.store(codes_ptr + at, (x / scale).to(codes_ptr.dtype.element_ty))
    tl.store(scales_ptr + program, scale)


@triton.jit
def fp8_gemm_kernel(
    a_ptr, b_ptr, out_ptr, a_scale_ptr, b_scale_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        mask = group * BLOCK_K + depth < K
        a = tl.load(a_ptr + rows[:, None] * K + group * BLOCK_K + depth[None, :], mask=mask[None, :], other=0.0)
        b = tl.load(b_ptr + cols[None, :] * K + group * BLOCK_K + depth[:, None], mask=mask[:, None], other=0.0)
        a_scale = tl.load(a_scale_ptr + rows * groups + group)
        b_scale = tl.load(b_scale_ptr + cols // BLOCK_K * groups + group)
        total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = out_ptr + row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < M) & (col[None, :] < N))


CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": GROUP}, num_stages=stages, num_warps=8)
    for m in (16, 32, 64)
    for n in (32, 64, 128)
    for stages in (3, 4, 5, 6)
]


def act_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] contiguous, K a multiple of 128 -> codes [M, K], scales [M, K / 128]."""
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], x.shape[1] // GROUP, dtype=torch.float32)
    act_quant_kernel[(scales.numel(),)](x, codes, scales, GROUP=GROUP)
    return codes, scales


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a [M, K], b [N, K] e4m3, a_scale [M, ceil(K / 128)], b_scale [ceil(N / 128), ceil(K / 128)] -> bf16 [M, N]."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    _tuned[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"]))](
        a, b, out, a_scale, b_scale, m, n, k
    )
    return out


_tuned = triton.autotune(CONFIGS, key=["N", "K"])(fp8_gemm_kernel)
