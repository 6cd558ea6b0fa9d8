"""DeepGEMM's interface, called as its tests/generators.py lays operands out, against products in fp64."""

from __future__ import annotations

import pytest
import torch
from minids_kernels import dequantize_blocks, dequantize_tiles, quantize_blocks, quantize_tiles
from minids_kernels.compat.deep_gemm import (
    fp8_gemm_nt,
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    m_grouped_fp8_gemm_nt_contiguous,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.aot import record
from tests.kernels.numerics import assert_near, error_bound, poisoned_memory

Operand = tuple[Tensor, Tensor]


def tiles(x: Operand) -> Tensor:
    return dequantize_tiles(*(t.cpu() for t in x), torch.float32).double()


def blocks(w: Operand) -> Tensor:
    return dequantize_blocks(*(t.cpu() for t in w), torch.float32).double()


def column_major(x: Operand) -> Operand:
    """Scales with rows side by side in memory, as DeepGEMM aligns them for tensor copies."""
    codes, scales = x
    padded = scales.new_zeros(scales.shape[1], -(-scales.shape[0] // 4) * 4)
    padded[:, : scales.shape[0]] = scales.T
    return codes, padded.T[: scales.shape[0]]


def bound(dtype: torch.dtype, length: int) -> float:
    """One rounding to `dtype` (the interpreter cuts bf16 off) and sums in fp32; Hopper's tensor cores keep 14 bits."""
    tensor_core = 2.0**-13 if torch.cuda.is_available() else 0.0
    return error_bound(dtype, 2, 1) + error_bound(torch.float32, 2, length) + tensor_core


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense(dtype: torch.dtype, device: torch.device) -> None:
    """Written, and added to c: another tensor, or d itself; tiles for both operands, as weight gradients have them."""
    a, b = torch.randn(20, 256, device=device), torch.randn(140, 256, device=device)
    left, right = column_major(quantize_tiles(a)), quantize_blocks(b)
    want, near = tiles(left) @ blocks(right).T, bound(dtype, 256)
    c = (16 * torch.randn(20, 140, device=device)).to(dtype)
    with poisoned_memory():
        d = torch.empty(20, 140, dtype=dtype, device=device)
        fp8_gemm_nt(left, right, d)
    assert_near(d.cpu(), want, near)
    fp8_gemm_nt(left, right, d, c=c, recipe=(1, 128, 128), compiled_dims="mnk")
    assert_near(d.cpu(), want + c.cpu().double(), near)
    fp8_gemm_nt(left, right, c, c=c)
    assert torch.equal(c, d)
    both = column_major(quantize_tiles(b))
    fp8_gemm_nt(left, both, d, recipe=(1, 1, 128))
    assert_near(d.cpu(), tiles(left) @ tiles(both).T, near)


@pytest.mark.parametrize("alignment", [128, 1])
@pytest.mark.parametrize("counts", [[5, 0, 130, 17], [0, 0, 3]], ids=str)
def test_grouped_contiguous(counts: list[int], alignment: int, device: torch.device) -> None:
    """Each group's rows begin at multiples of DeepGEMM's alignment, or right behind the last group's."""
    padded = [-(-count // alignment) * alignment for count in counts]
    indices = torch.cat(
        [
            torch.tensor([g] * n + [-1] * (m - n), dtype=torch.int32)
            for g, (n, m) in enumerate(zip(counts, padded, strict=True))
        ]
    )
    a = torch.randn(len(indices), 256) * (indices >= 0)[:, None]
    weights = [quantize_blocks(torch.randn(40, 256)) for _ in counts]
    left = tuple(t.to(device) for t in column_major(quantize_tiles(a)))
    right = tuple(torch.stack(parts).to(device) for parts in zip(*weights, strict=True))
    with poisoned_memory():
        d = torch.empty(len(indices), 40, dtype=torch.bfloat16, device=device)
        m_grouped_fp8_gemm_nt_contiguous(left, right, d, indices.to(device))
    rows = tiles(left)
    want = torch.stack([rows[i] @ blocks(weights[g]).T if g >= 0 else rows[i, :40] for i, g in enumerate(indices)])
    used = indices >= 0
    assert_near(d.cpu()[used], want[used], bound(torch.bfloat16, 256))
    assert d.isfinite().all()


def test_alignment_is_deepgemms() -> None:
    assert get_mk_alignment_for_contiguous_layout() == get_m_alignment_for_contiguous_layout() == 128


LEFT = torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 1)
RIGHT = torch.zeros(5, 128).to(torch.float8_e4m3fn), torch.ones(1, 1)
GROUPS = RIGHT[0][None], RIGHT[1][None]
D = torch.zeros(4, 5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"d: got shape \(5, 4\), allowed is \(4, 5\)"):
        fp8_gemm_nt(LEFT, RIGHT, D.T)
    with pytest.raises(ValueError, match=r"recipe: got \(1, 1, 32\), allowed are \(1, 128, 128\), \(1, 1, 128\)"):
        fp8_gemm_nt(LEFT, RIGHT, D, recipe=(1, 1, 32))
    with pytest.raises(TypeError, match=r"c: got torch\.bfloat16, allowed is d's torch\.float32"):
        fp8_gemm_nt(LEFT, RIGHT, D, c=D.bfloat16())
    with pytest.raises(TypeError, match=r"b_scale: got torch\.int32, allowed is torch\.float32"):
        fp8_gemm_nt(LEFT, (RIGHT[0], RIGHT[1].int()), D)
    with pytest.raises(ValueError, match=r"use_psum_layout: got True"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(1).int(), use_psum_layout=True)
    with pytest.raises(ValueError, match=r"m_indices: got shape \(3,\), allowed is \(4\)"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(3).int())
    with pytest.raises(TypeError, match=r"m_indices: got torch\.int64, allowed is torch\.int32"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(4).long())


def test_no_index_leaves_the_device() -> None:
    """Tensors without values: whatever asked for one would raise."""
    with FakeTensorMode():
        codes = torch.empty(300, 64, dtype=torch.float8_e4m3fn)
        weights = torch.empty(4, 48, 64, dtype=torch.float8_e4m3fn)
        left, right = (codes, torch.empty(300, 1)), (weights, torch.empty(4, 1, 1))
        d, indices = torch.empty(300, 48), torch.empty(300, dtype=torch.int32)
        record([("", lambda: m_grouped_fp8_gemm_nt_contiguous(left, right, d, indices))], "sm_90")
