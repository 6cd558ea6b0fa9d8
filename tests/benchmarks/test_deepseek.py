"""The peer that stands for DeepSeek's kernels computes what ours do, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from minids_kernels import fp8_gemm_reference, quantize_blocks, quantize_tiles, quantize_tiles_reference

from tests.kernels.numerics import assert_near, error_bound

deepseek = pytest.importorskip("benchmarks.deepseek", reason="no Triton for this platform")


def test_act_quant() -> None:
    x = torch.randn(5, 384).bfloat16()
    codes, scales = deepseek.act_quant(x)
    want, want_scales = quantize_tiles_reference(x)
    assert_near(scales, want_scales.double(), error_bound(torch.float32, 2, 1))
    exact = x.float() / scales.repeat_interleave(128, 1)
    far, want = (codes.float() - exact).abs(), want.float()
    carried = want.frexp().mantissa.abs() == 0.5  # where Triton's interpreter loses the carry of rounding up to 2^n
    assert (far <= (want - exact).abs() * (1 + 1e-6))[~carried].all() and not carried.all()  # ties may go either way


@pytest.mark.parametrize(("m", "n", "k"), [(20, 40, 256), (1, 200, 384)])
def test_fp8_gemm(m: int, n: int, k: int) -> None:
    a, b = quantize_tiles(torch.randn(m, k)), quantize_blocks(torch.randn(n, k))
    out = torch.full((m, n), torch.nan)
    deepseek.fp8_gemm_kernel[(-(-m // 16), -(-n // 64))](
        a[0], b[0], out, a[1].contiguous(), b[1], m, n, k, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128
    )
    assert_near(out, fp8_gemm_reference(*a, *b, torch.float32).double(), error_bound(torch.float32, 4, k))
