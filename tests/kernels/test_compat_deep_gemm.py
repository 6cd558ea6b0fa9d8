"""DeepGEMM's interface, called as its tests/generators.py lays operands out, against products in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from minids_kernels import dequantize_blocks, dequantize_tiles, quantize_blocks, quantize_tiles
from minids_kernels._ops import ops
from minids_kernels.compat.deep_gemm import (
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    fp8_m_grouped_gemm_nt_masked,
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    k_grouped_fp8_gemm_nt_contiguous,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks.aot import record
from tests.kernels.numerics import assert_near, error_bound, poisoned_memory, tensor_core_error

Operand = tuple[Tensor, Tensor]


def tiles(x: Operand) -> Tensor:
    return dequantize_tiles(*x, torch.float32).double().cpu()


def blocks(w: Operand) -> Tensor:
    return dequantize_blocks(*w, torch.float32).double().cpu()


def column_major(x: Operand) -> Operand:
    """Scales with rows side by side in memory, as DeepGEMM aligns them for tensor copies."""
    codes, scales = x
    padded = scales.new_zeros(scales.shape[1], -(-scales.shape[0] // 4) * 4)
    padded[:, : scales.shape[0]] = scales.T
    return codes, padded.T[: scales.shape[0]]


def bound(dtype: torch.dtype, length: int, device: torch.device) -> float:
    """One rounding to `dtype` (the interpreter cuts bf16 off) and sums in fp32."""
    return error_bound(dtype, 2, 1) + error_bound(torch.float32, 2, length) + tensor_core_error(device, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense(dtype: torch.dtype, device: torch.device) -> None:
    """Written, and added to c: another tensor, or d itself; tiles for both operands, as weight gradients have them."""
    a, b = torch.randn(20, 256, device=device), torch.randn(140, 256, device=device)
    left, right = column_major(quantize_tiles(a)), quantize_blocks(b)
    want, near = tiles(left) @ blocks(right).T, bound(dtype, 256, device)
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
    want = tiles(left) @ tiles(both).T + c.cpu().double()
    fp8_gemm_nt(left, both, d, c=c, recipe_a=(1, 128), recipe_b=(1, 128))
    assert_near(d.cpu(), want, near)
    fp8_gemm_nt(left, both, c, c=c, recipe=(1, 1, 128))
    assert torch.equal(c, d)


@pytest.mark.parametrize("layout", ["tn", "nt"])
@pytest.mark.parametrize("ks", [[128, 0, 256], [0, 128], [0]], ids=str)
def test_k_grouped(ks: list[int], layout: str, device: torch.device) -> None:
    """Weights' gradients: written, and added to c, another tensor or d itself; zero or c for a group without rows."""
    parts = [tuple(quantize_tiles(torch.randn(rows, k, device=device)) for rows in (40, 24)) for k in ks]
    want = torch.stack([tiles(left) @ tiles(right).T for left, right in parts])
    operands = []
    for side in zip(*parts, strict=True):
        codes, scales = (
            [t.view(torch.uint8) if t.element_size() == 1 else t for t in ts] for ts in zip(*side, strict=True)
        )
        if layout == "tn":
            pair = torch.cat([t.T for t in codes]), torch.cat([t.T for t in scales])
        else:
            pair = torch.cat([t.flatten() for t in codes]), torch.cat(scales, dim=1)
        operands.append((pair[0].view(torch.float8_e4m3fn), pair[1]))
    function = k_grouped_fp8_gemm_tn_contiguous if layout == "tn" else k_grouped_fp8_gemm_nt_contiguous
    lengths = torch.tensor(ks, dtype=torch.int32, device=device)
    c, near = torch.randn(len(ks), 40, 24, device=device), bound(torch.float32, 256, device)
    with poisoned_memory():
        d = torch.empty_like(c)
        function(*operands, d, ks, lengths)
    assert_near(d.cpu(), want, near, floor=1.0)
    function(*operands, d, ks, lengths, c)
    assert_near(d.cpu(), want + c.cpu().double(), near, floor=1.0)
    function(*operands, c, ks, lengths, c, recipe=(1, 1, 128))
    assert torch.equal(c, d)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ks_cpu": [100, 28]}, ValueError, r"ks_cpu: got \[100, 28\], allowed are multiples of 128"),
        ({"ks_cpu": [128]}, ValueError, r"grouped_layout: got shape \(2,\), allowed is \(1\)"),
        ({"ks_cpu": [128, 128]}, ValueError, r"a: got shape \(128, 8\), allowed is \(256, any\)"),
        (
            {"grouped_layout": torch.tensor([128, 0])},
            TypeError,
            "grouped_layout: got torch.int64, allowed is torch.int32",
        ),
        ({"c": torch.zeros(2, 8, 4).half()}, TypeError, "c: got torch.float16, allowed is d's torch.float32"),
        ({"recipe": (1, 128, 128)}, ValueError, r"recipe: got \(1, 128, 128\), allowed are \(1, 1, 128\)"),
        ({"d": torch.zeros(2, 8, 5)}, ValueError, r"d: got shape \(2, 8, 5\), allowed is \(2, 8, 4\)"),
    ],
)
def test_bad_input_to_k_grouped(change: dict[str, Any], error: type[Exception], message: str) -> None:
    def operand(columns: int) -> Operand:
        return torch.zeros(128, columns).to(torch.float8_e4m3fn), torch.ones(1, columns)

    good = dict(
        a=operand(8), b=operand(4), d=torch.zeros(2, 8, 4), ks_cpu=[128, 0],
        grouped_layout=torch.tensor([128, 0], dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        k_grouped_fp8_gemm_tn_contiguous(**{**good, **change})


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
    a = (torch.randn(len(indices), 256) * (indices >= 0)[:, None]).to(device)
    weights = [quantize_blocks(torch.randn(40, 256, device=device)) for _ in counts]
    left = column_major(quantize_tiles(a))
    right = tuple(torch.stack(parts) for parts in zip(*weights, strict=True))
    with poisoned_memory():
        d = torch.empty(len(indices), 40, dtype=torch.bfloat16, device=device)
        m_grouped_fp8_gemm_nt_contiguous(left, right, d, indices.to(device))
    rows = tiles(left)
    want = torch.stack([rows[i] @ blocks(weights[g]).T if g >= 0 else rows[i, :40] for i, g in enumerate(indices)])
    used = indices >= 0
    assert_near(d.cpu()[used], want[used], bound(torch.bfloat16, 256, device))
    assert d.isfinite().all()


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("counts", [[5, 0, 130, 128], [0, 0, 3], [256]], ids=str)
def test_grouped_by_prefix_sums(counts: list[int], zeros: bool, device: torch.device) -> None:
    """Groups begin at multiples of 128; what lies between may be anything."""
    ends, rows, used = [], 0, []
    for count in counts:
        used += range(rows, rows + count)
        ends.append(rows + count)
        rows = -(-ends[-1] // 128) * 128
    codes, scales = quantize_tiles(torch.randn(rows, 256, device=device))
    idle = torch.ones(rows, dtype=torch.bool)
    idle[used] = False
    codes.view(torch.uint8)[idle.to(device)] = 0x7F  # NaN
    weights = [quantize_blocks(torch.randn(40, 256, device=device)) for _ in counts]
    right = tuple(torch.stack(parts) for parts in zip(*weights, strict=True))
    layout = torch.tensor(ends, dtype=torch.int32, device=device)
    with poisoned_memory():
        d = torch.empty(rows, 40, dtype=torch.float32, device=device)
        m_grouped_fp8_gemm_nt_contiguous(
            (codes, scales), right, d, layout, recipe_a=(1, 128), recipe_b=(128, 128), use_psum_layout=True,
            ensure_zero_padding=zeros, expected_m_for_psum_layout=64,
        )  # fmt: skip
    left = tiles((codes, scales))
    for g, (end, count) in enumerate(zip(ends, counts, strict=True)):
        here = slice(end - count, end)
        assert_near(d[here].cpu(), left[here] @ blocks(weights[g]).T, bound(torch.float32, 256, device))
    if zeros:
        assert (d.cpu()[idle] == 0).all()


def test_other_orders_of_memory(device: torch.device) -> None:
    """Operands transposed, and results that are no contiguous tensor."""
    left, right = quantize_tiles(torch.randn(20, 256, device=device)), quantize_blocks(torch.randn(140, 256).to(device))
    turned_left, turned_right = ((codes.mT.contiguous(), scales.mT) for codes, scales in (left, right))
    want, d, wide = (torch.empty(20, n, dtype=torch.bfloat16, device=device) for n in (140, 140, 150))
    fp8_gemm_nt(left, right, want)
    for function, a, b in (
        (fp8_gemm_nn, left, turned_right), (fp8_gemm_tn, turned_left, turned_right), (fp8_gemm_tt, turned_left, right),
    ):  # fmt: skip
        with poisoned_memory():
            function(a, b, d, compiled_dims="mn")
        assert torch.equal(d, want)
    fp8_gemm_nt(left, right, wide[:, :140], recipe_a=(1, 128), recipe_b=(128, 128))
    assert torch.equal(wide[:, :140], want)
    layout = torch.zeros(20, dtype=torch.int32, device=device)
    m_grouped_fp8_gemm_nn_contiguous(left, (turned_right[0][None], turned_right[1][None]), wide[:, 10:], layout)
    assert torch.equal(wide[:, 10:], want)


@pytest.mark.parametrize("shape", [(13, 2), (3, 13, 2), (8, 1)], ids=str)
def test_scales_as_tensor_copies_want_them(shape: tuple[int, ...]) -> None:
    scales = torch.randn(shape)
    found = get_mn_major_tma_aligned_tensor(scales)
    pitch = get_tma_aligned_size(shape[-2], 4)
    assert torch.equal(found, scales) and found.stride()[-2:] == (1, pitch) and pitch == -(-shape[-2] // 4) * 4
    assert get_mn_major_tma_aligned_tensor(found) is found


def test_arguments_go_by_deepgemms_names() -> None:
    """Those of 2.6's csrc/apis/gemm.hpp."""
    dense = "a b d c recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast"
    contiguous = dense.replace(" c ", " grouped_layout ") + " use_psum_layout ensure_zero_padding"
    by_k = "a b d ks_cpu grouped_layout c recipe compiled_dims use_psum_layout"
    for function, names in (
        (fp8_gemm_nt, dense),
        (m_grouped_fp8_gemm_nt_contiguous, contiguous + " expected_m_for_psum_layout"),
        (m_grouped_fp8_gemm_nt_masked, dense.replace(" c ", " masked_m expected_m ")),
        (fp8_m_grouped_gemm_nt_masked, dense.replace(" c ", " masked_m expected_m ")),
        (k_grouped_fp8_gemm_tn_contiguous, by_k), (k_grouped_fp8_gemm_nt_contiguous, by_k),
    ):  # fmt: skip
        assert list(inspect.signature(function).parameters) == names.split(), function


def masked(counts: list[int], rows: int, device: torch.device) -> tuple[Operand, Operand, Tensor]:
    """a, b and masked_m of `counts` in room for `rows` each; codes and scales behind a group's rows are NaN."""
    a = [column_major(quantize_tiles(torch.randn(rows, 256, device=device))) for _ in counts]
    b = [quantize_blocks(torch.randn(40, 256, device=device)) for _ in counts]
    for (codes, scales), count in zip(a, counts, strict=True):
        codes.view(torch.uint8)[count:], scales[count:] = 0x7F, torch.nan
    left, right = (tuple(torch.stack(parts) for parts in zip(*pairs, strict=True)) for pairs in (a, b))
    return left, right, torch.tensor(counts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("counts", [[5, 0, 70, 64], [0, 0], [], [1]], ids=str)
def test_grouped_masked(counts: list[int], device: torch.device) -> None:
    """What lies behind a group's rows is neither read into results nor written."""
    if counts:
        left, right, sizes = masked(counts, 70, device)
    else:
        left = torch.zeros(0, 70, 256, device=device).to(torch.float8_e4m3fn), torch.zeros(0, 70, 2, device=device)
        right = torch.zeros(0, 40, 256, device=device).to(torch.float8_e4m3fn), torch.zeros(0, 1, 2, device=device)
        sizes = torch.zeros(0, dtype=torch.int32, device=device)
    d = torch.full((len(counts), 70, 40), 7.0, dtype=torch.bfloat16, device=device)
    m_grouped_fp8_gemm_nt_masked(left, right, d, sizes, 35)
    for g, count in enumerate(counts):
        want = tiles((left[0][g, :count], left[1][g, :count])) @ blocks((right[0][g], right[1][g])).T
        assert_near(d[g, :count].cpu(), want, bound(torch.bfloat16, 256, device))
        assert (d[g, count:] == 7).all()


def test_what_writes_into_a_tensor_is_one_operator(device: torch.device) -> None:
    """All of opcheck but the schema's test, which multiplies the inputs: torch cannot multiply fp8."""
    left, right, sizes = masked([3, 0], 8, device)
    out = torch.zeros(2, 8, 40, dtype=torch.bfloat16, device=device)
    rows, offsets = (left[0].flatten(0, 1), left[1].flatten(0, 1)), torch.tensor([0, 8, 16], dtype=torch.int32)
    for op, args in (
        (ops.grouped_fp8_gemm_masked, (*left, *right, sizes, 2, out)),
        (ops.grouped_fp8_gemm_into, (*rows, *right, offsets.to(device), out.flatten(0, 1))),
        (ops.fp8_gemm_into, (*rows, right[0][0], right[1][0], out.flatten(0, 1))),
    ):
        opcheck(
            op.default,
            args,
            test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


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
    with pytest.raises(ValueError, match=r"recipe, recipe_a, recipe_b: got None, \(1, 128\), None, allowed is"):
        fp8_gemm_nt(LEFT, RIGHT, D, recipe_a=(1, 128))
    with pytest.raises(ValueError, match=r"grouped_layout: got shape \(4,\), allowed is \(1\)"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(4).int(), use_psum_layout=True)
    for groups in ([0, 1, 0, 0], [2, 2, 2, 2], [1, -1, 0, -1]):
        two = GROUPS[0].view(torch.uint8).expand(2, 5, 128).view(torch.float8_e4m3fn), GROUPS[1].expand(2, 1, 1)
        with pytest.raises(RuntimeError, match=r"grouped_layout: got groups out of order, allowed is 0 to 1, or -1"):
            m_grouped_fp8_gemm_nt_contiguous(LEFT, two, D, torch.tensor(groups, dtype=torch.int32))
    room = LEFT[0][None], LEFT[1][None]
    with pytest.raises(ValueError, match=r"counts: got shape \(2,\), allowed is \(1\)"):
        m_grouped_fp8_gemm_nt_masked(room, GROUPS, D[None], torch.zeros(2).int(), 4)
    with pytest.raises(ValueError, match=r"out: got shape \(1, 5, 4\), allowed is \(1, 4, 5\)"):
        m_grouped_fp8_gemm_nt_masked(room, GROUPS, D.T[None], torch.zeros(1).int(), 4)
    with pytest.raises(ValueError, match=r"out: got strides .*, allowed is a contiguous tensor"):
        m_grouped_fp8_gemm_nt_masked(room, GROUPS, torch.zeros(1, 5, 4).mT, torch.zeros(1).int(), 4)
    with pytest.raises(ValueError, match=r"grouped_layout: got shape \(3,\), allowed is \(4\)"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(3).int())
    with pytest.raises(TypeError, match=r"grouped_layout: got torch\.int64, allowed is torch\.int32"):
        m_grouped_fp8_gemm_nt_contiguous(LEFT, GROUPS, D, torch.zeros(4).long())


def test_no_index_leaves_the_device() -> None:
    """Tensors without values: whatever asked for one would raise."""
    with FakeTensorMode():
        codes = torch.empty(300, 64, dtype=torch.float8_e4m3fn)
        weights = torch.empty(4, 48, 64, dtype=torch.float8_e4m3fn)
        left, right = (codes, torch.empty(300, 1)), (weights, torch.empty(4, 1, 1))
        d, indices = torch.empty(300, 48), torch.empty(300, dtype=torch.int32)
        room, counts = (codes.view(4, 75, 64), torch.empty(4, 75, 1)), torch.empty(4, dtype=torch.int32)
        record([("", lambda: m_grouped_fp8_gemm_nt_masked(room, right, d.view(4, 75, 48), counts, 60))], "sm_90")
        record([("", lambda: m_grouped_fp8_gemm_nt_contiguous(left, right, d, indices))], "sm_90")
