"""Grouped products of fp8 codes against one product an expert in fp64 of what the codes stand for: any counts, empty
experts, rows of nobody, tiles along tokens that hold one expert's rows only."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from minids_kernels import (
    _launch,
    dequantize_blocks,
    dequantize_tiles,
    grouped_fp8_gemm,
    grouped_fp8_gemm_reference,
    grouped_fp8_gemm_wgrad,
    grouped_fp8_gemm_wgrad_reference,
    grouped_fp8_linear,
    grouped_fp8_linear_reference,
    quantize_blocks,
    quantize_segments_transposed,
    quantize_segments_transposed_reference,
    quantize_tiles,
    quantize_tiles_transposed,
)
from minids_kernels._ops import ops
from minids_kernels.fp8_gemm import PLAIN
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks.aot import record
from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.numerics import LAYOUTS, assert_near, error_bound, poisoned_memory, run, serves, tensor_core_error

room = importlib.import_module("minids_kernels.grouped_fp8_gemm")

E4M3 = torch.float8_e4m3fn

# rows of each expert, rows of no expert, N, K; at most 32 rows take the kernel for decoding
SIZES = [
    ([5, 0, 17, 1], 0, 24, 40), ([0, 19, 0], 5, 130, 20), ([3, 4], 0, 1, 1), ([0, 0], 0, 8, 8), ([0, 0], 3, 8, 8),
    ([40, 0, 65], 0, 33, 130), ([0, 33], 70, 16, 64), ([130, 128, 0, 1], 9, 12, 20),
]  # fmt: skip

# by name: the oldest chip, and its tiles, small for the interpreter; chips with e4m3 do not widen codes
TILE = dict(BLOCK_P=64, BLOCK_Q=64, num_warps=4, STAGES=2)
WAYS = {
    "widened": ("sm_80", dict(TILE, BLOCK_K=64)),
    "e4m3": ("sm_89", dict(TILE, BLOCK_K=128)),
    "descriptors": ("sm_90", dict(TILE, TMA=True, BLOCK_K=128)),
}
BY_HAND = [(2, 1), (2, 2), (3, 1)]  # groups of warps, pieces of 64 rows
WAYS |= {f"by hand, {g} groups, {p}": ("sm_90", dict(GROUPS=g, PIECES=p, STAGES=4)) for g, p in BY_HAND}


@pytest.fixture(params=["torch", *WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The PyTorch path, then kernels with codes widened and not, and fetched by descriptors. On a GPU, those of no
    newer chip."""
    name = str(request.param)
    monkeypatch.setattr(_launch, "BACKEND", "torch" if name == "torch" else "triton")
    if name != "torch":
        arch, tile = WAYS[name]
        if torch.cuda.is_available() and not serves(arch, "GROUPS" in tile):
            pytest.skip(f"the machine's GPU is not the {arch} of this launch")
        monkeypatch.setattr(_launch, "arch", lambda x: arch)
        real = _launch.config

        def config(room: str, kernel: str, arch: str, **shape: int) -> dict[str, Any]:
            if room != "grouped_fp8_gemm" or kernel.startswith("quantize"):
                return real(room, kernel, arch, **shape)
            if kernel == "small":
                return tile if "GROUPS" not in tile else dict(TILE, BLOCK_K=128)
            return tile | {"STRIPE": 2}

        monkeypatch.setattr(_launch, "config", config)
    with interpreted(0) if name.startswith("by hand") and not torch.cuda.is_available() else contextlib.nullcontext():
        yield name


@pytest.fixture
def device(way: str) -> torch.device:
    return torch.device("cuda" if way != "torch" and torch.cuda.is_available() else "cpu")


def offsets_of(counts: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def spread(*shape: int) -> Tensor:
    """Sizes differ by up to 2^12, so that a wrong scale is seen."""
    return torch.randn(shape) * torch.exp2(torch.randint(-6, 7, shape))


def blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = zip(*(quantize_blocks(matrix) for matrix in w), strict=True)
    return torch.stack(codes), torch.stack(scales)


def operands(counts: Sequence[int], spare: int, width: int, depth: int, device: torch.device) -> list[Tensor]:
    a, b = spread(sum(counts) + spare, depth).to(device), spread(len(counts), width, depth).to(device)
    return [*quantize_tiles(a), *blocks(b), offsets_of(counts, device)]


def segments(counts: Sequence[int], spare: int, width: int, depth: int, device: torch.device) -> list[Tensor]:
    offsets, rows = offsets_of(counts, device), sum(counts) + spare
    dy, x = spread(rows, width).to(device), spread(rows, depth).to(device)
    return [*quantize_segments_transposed(dy, offsets), *quantize_segments_transposed(x, offsets), offsets]


def tiles(codes: Tensor, scale: Tensor) -> Tensor:
    return dequantize_tiles(codes, scale, torch.float32).double().cpu()


def exact(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Sequence[int]) -> Tensor:
    """One product an expert, on the CPU; rows of nobody are zero."""
    pieces = tiles(a, a_scale)[: sum(counts)].split(list(counts))
    weights = [dequantize_blocks(*pair, torch.float32).double().cpu() for pair in zip(b, b_scale, strict=True)]
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    out[: sum(counts)] = torch.cat([piece @ weight.T for piece, weight in zip(pieces, weights, strict=True)])
    return out


def bound(dtype: torch.dtype, length: int, device: torch.device) -> float:
    """One rounding to `dtype`, sums of `length` terms in fp32, a rounding of each scale product. The interpreter cuts
    bf16 off."""
    return error_bound(dtype, 2, 1) + error_bound(torch.float32, 2, length) + tensor_core_error(device, length)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size: tuple[list[int], int, int, int], way: str, device: torch.device) -> None:
    tensors = operands(*size, device)
    with poisoned_memory():
        got = grouped_fp8_gemm(*tensors, torch.float32)
    assert_near(got.cpu(), exact(*tensors[:4], size[0]), bound(torch.float32, size[3], device), way)
    assert not got[sum(size[0]) :].any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_gradient(size: tuple[list[int], int, int, int], way: str, device: torch.device) -> None:
    """Written, and added to what is there. Each expert's rows are quantised alone: no tile holds two experts'."""
    counts, spare, width, depth = size
    offsets, rows = offsets_of(counts, device), sum(counts) + spare
    dy, x = spread(rows, width).to(device), spread(rows, depth).to(device)
    pairs = [[t[s:e] for t in (dy, x)] for s, e in itertools.pairwise(offsets.tolist())]
    want = torch.stack(
        [tiles(*quantize_tiles_transposed(dy_e)) @ tiles(*quantize_tiles_transposed(x_e)).T for dy_e, x_e in pairs]
    )
    with poisoned_memory():
        codes = [t for x in (dy, x) for t in quantize_segments_transposed(x, offsets)]
        got = grouped_fp8_gemm_wgrad(*codes, offsets)
    assert_near(got.cpu(), want, bound(torch.float32, rows, device), way)
    start = torch.randn(want.shape) * (want.square().mean().sqrt().float() + 1)
    out = start.clone().to(device)
    assert grouped_fp8_gemm_wgrad(*codes, offsets, out=out) is out
    assert_near(out.cpu(), start.double() + want, bound(torch.float32, rows, device), way)
    turned = start.transpose(0, 2).contiguous().transpose(0, 2).to(device)
    assert torch.equal(grouped_fp8_gemm_wgrad(*codes, offsets, out=turned), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[5, 0, 130, 128, 1], [0, 0], [300]], ids=str)
def test_quantisation_of_segments(counts: list[int], dtype: torch.dtype, way: str, device: torch.device) -> None:
    """Bit for bit each segment's own 128x1 tiles, zeros and ones where no tile is."""
    x = (torch.randn(sum(counts) + 3, 70) * torch.randn(70).mul(3).exp2()).to(device, dtype)
    offsets = offsets_of(counts, device)
    with poisoned_memory():
        codes, scales = quantize_segments_transposed(x, offsets)
    want_codes, want_scales = quantize_segments_transposed_reference(x, offsets)
    assert codes.dtype == E4M3 and scales.shape == (70, (sum(counts) + 3) // 128 + len(counts))
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8)) and torch.equal(scales, want_scales)
    assert scales.T.is_contiguous()  # as the product reads them
    token = torch.randperm(len(x), device=device)
    of_tokens = quantize_segments_transposed(torch.empty_like(x).index_copy_(0, token, x), offsets, token)
    assert torch.equal(of_tokens[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(of_tokens[1], scales)
    strided = x.T.contiguous().T
    assert torch.equal(quantize_segments_transposed(strided, offsets)[0].view(torch.uint8), codes.view(torch.uint8))
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        first = (start // 128 + expert) * 128
        own, own_scales = quantize_tiles_transposed(x[start:end])
        assert torch.equal(codes[:, first : first + end - start].view(torch.uint8), own.view(torch.uint8))
        assert torch.equal(scales[:, first // 128 : first // 128 + own_scales.shape[1]], own_scales)


def test_references() -> None:
    """They are products in fp32 of values in fp32: a rounding each."""
    counts, spare, width, depth = SIZES[1]
    tensors = operands(counts, spare, width, depth, torch.device("cpu"))
    near = error_bound(torch.float32, 2, depth)
    assert_near(grouped_fp8_gemm_reference(*tensors, torch.float32), exact(*tensors[:4], counts), near)
    codes = segments([130, 0, 7], 2, 20, 30, torch.device("cpu"))
    assert_near(grouped_fp8_gemm_wgrad(*codes), grouped_fp8_gemm_wgrad_reference(*codes).double(), near)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype, size: tuple[list[int], int, int, int], way: str, device: torch.device) -> None:
    """Against fp64 products of what its operands dequantise to: output, both gradients, dtypes, all memory written."""
    counts, spare, width, depth = size
    offsets = offsets_of(counts, device)
    rows = sum(counts) + spare
    x = torch.randn(rows, depth).to(device, dtype)
    w = torch.randn(len(counts), width, depth).to(device, dtype)
    dy = torch.randn(rows, width).to(device, dtype)
    with poisoned_memory():
        y, (dx, dw) = run(lambda x, w: grouped_fp8_linear(x, w, offsets), [x, w], dy)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    codes, scales = blocks(w)
    turned = codes.view(torch.uint8).transpose(1, 2).contiguous().view(E4M3), scales.transpose(1, 2).contiguous()
    near = bound(dtype, max(width, depth, rows), device)
    assert_near(y.cpu(), exact(*quantize_tiles(x), codes, scales, counts), near, "y")
    assert_near(dx.cpu(), exact(*quantize_tiles(dy), *turned, counts), near, "dx")
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        left, right = (tiles(*quantize_tiles_transposed(t[start:end])) for t in (dy, x))
        assert_near(dw[expert].cpu(), left @ right.T, near, f"dw {expert}")


@settings(max_examples=6, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 150)), min_size=1, max_size=3), spare=st.sampled_from([0, 9]),
    width=st.integers(1, 40), depth=st.integers(1, 140), triton=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
@example(counts=[0, 9], spare=0, width=1, depth=1, triton=False, seed=588)  # a sum smaller than its terms
def test_any_counts(counts: list[int], spare: int, width: int, depth: int, triton: bool, seed: int) -> None:
    """An operand's e4m3 rounding errs by at most 2^-4 of a number, 2^-4 / sqrt(3) in the root mean square, which many
    results must keep to; the errors of a product's two operands are independent. No result may err by more than all
    its products do at most; numbers below 2^-6 of their scale, which is at most 5 / 448, err by 2^-10 of it."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "BACKEND", "triton" if triton else "torch")
        device = torch.device("cuda" if triton and torch.cuda.is_available() else "cpu")
        offsets = offsets_of(counts, device)
        rows = sum(counts) + spare
        x, w = torch.randn(rows, depth, device=device), torch.randn(len(counts), width, depth, device=device)
        dy = torch.randn(rows, width, device=device)
        y, grads = run(lambda x, w: grouped_fp8_linear(x, w, offsets), [x, w], dy)
        want, wanted = run(lambda x, w: grouped_fp8_linear_reference(x, w, offsets), [x, w], dy)
        sizes = run(lambda x, w: grouped_fp8_linear_reference(x, w, offsets), [x.abs(), w.abs()], dy.abs())
        tiny = 2 * 5 * 2.0**-10 * 5 / 448 * max(width, depth, rows)
        for got, true, size in zip((y, *grads), (want, *wanted), (sizes[0], *sizes[1]), strict=True):
            assert ((got - true).abs() <= ((1 + 2.0**-4) ** 2 - 1) * size + tiny).all()
            if true.numel() > 50:
                assert_near(got, true.double(), math.sqrt(2 / 3) * 2.0**-4)


@pytest.mark.parametrize("counts", [[3, 9, 2], [20, 145, 6]], ids=["few rows", "many rows"])
def test_segments_do_not_meet(counts: list[int], way: str, device: torch.device) -> None:
    """What one expert is fed, however large, reaches no other's rows or weights' gradient."""
    x, w = torch.randn(sum(counts) + 4, 40, device=device), torch.randn(3, 24, 40, device=device)
    offsets = offsets_of(counts, device)
    other = x.clone()
    other[counts[0] : counts[0] + counts[1]] *= 1e6
    dy = torch.randn(x.shape[0], 24, device=device)
    (y, grads), (y2, grads2) = (run(lambda x, w: grouped_fp8_linear(x, w, offsets), [t, w], dy) for t in (x, other))
    mine = torch.ones(x.shape[0], dtype=torch.bool)
    mine[counts[0] : counts[0] + counts[1]] = False
    assert torch.equal(y[mine], y2[mine]) and not torch.equal(y, y2)
    assert torch.equal(grads[1][[0, 2]], grads2[1][[0, 2]]) and not torch.equal(grads[1][1], grads2[1][1])


@pytest.mark.parametrize("counts", [[3, 9, 2], [20, 145, 6]], ids=["few rows", "many rows"])
def test_nan_stays_where_it_is(counts: list[int], way: str, device: torch.device) -> None:
    """What others hold, codes and scales, is multiplied with nothing of one's own."""
    a, a_scale, b, b_scale, offsets = operands(counts, 4, 24, 140, device)
    first, last = counts[0], counts[0] + counts[1]
    want = grouped_fp8_gemm(a, a_scale, b, b_scale, offsets)
    others = torch.ones(len(a), dtype=torch.bool, device=device)
    others[first:last] = False
    a.view(torch.uint8)[others], a_scale[others] = 0x7F, torch.nan
    b.view(torch.uint8)[[0, 2]], b_scale[[0, 2]] = 0x7F, torch.nan
    got = grouped_fp8_gemm(a, a_scale, b, b_scale, offsets)
    assert torch.equal(got[first:last], want[first:last]) and got[:first].isnan().all()

    *codes, offsets = segments(counts, 4, 24, 40, device)
    want = grouped_fp8_gemm_wgrad(*codes, offsets)
    group = first // 128 + 1
    others = torch.ones(codes[1].shape[1], dtype=torch.bool, device=device)
    others[group : group + (counts[1] + 127) // 128] = False
    for values, scales in (codes[:2], codes[2:]):
        values.view(torch.uint8)[:, others.repeat_interleave(128)], scales[:, others] = 0x7F, torch.nan
    got = grouped_fp8_gemm_wgrad(*codes, offsets)
    assert torch.equal(got[1], want[1]) and got[0].isnan().all()


@pytest.mark.parametrize("experts", [2, 0])
@pytest.mark.parametrize("steps", [1, 0], ids=["rows", "one row for all"])
def test_descriptors_stand_for_what_they_can(steps: int, experts: int) -> None:
    """By sm_90's shipped table; rows that do not lie at multiples of 16 bytes are copied first."""
    rows = torch.zeros(40, 20, dtype=torch.uint8).view(E4M3) if steps else torch.zeros(1, 32).to(E4M3).expand(40, 32)
    width = rows.shape[1]
    weights, scales = torch.zeros(experts, 24, width).to(E4M3), torch.zeros(experts, 1, 1)
    (launch,) = record(
        [("", lambda: grouped_fp8_gemm(rows, torch.ones(40, 1), weights, scales, offsets_of([7] * experts)))], "sm_90"
    )
    assert launch.kwargs["TMA"] == (steps == 1 and experts > 0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], way: str, device: torch.device) -> None:
    for op, tensors in (
        (grouped_fp8_gemm, operands([20, 0, 15], 2, 140, 144, device)),
        (grouped_fp8_gemm_wgrad, segments([7, 130], 2, 9, 20, device)),
    ):
        *tensors, offsets = tensors
        strided = [layout(t.view(torch.uint8)).view(E4M3) if t.dtype == E4M3 else layout(t) for t in tensors]
        assert_near(op(*strided, offsets), op(*tensors, offsets).double(), bound(torch.bfloat16, 144, device))


def test_dtypes_of_the_result_and_the_same_bits_twice(way: str, device: torch.device) -> None:
    counts, *rest = SIZES[5]
    tensors = operands(counts, *rest, device)
    want = exact(*tensors[:4], counts)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scaled = [tensors[0], tensors[1] * 2**-12, *tensors[2:]]  # within fp16's range
        got = grouped_fp8_gemm(*scaled, dtype)
        assert got.dtype == dtype
        assert_near(got.cpu(), want * 2**-12, bound(dtype, rest[2], device) + error_bound(torch.bfloat16, 1, 1), way)
        assert torch.equal(got, grouped_fp8_gemm(*scaled, dtype))


def test_autocast_rounds_no_values(way: str, device: torch.device) -> None:
    counts = [6, 0, 130]
    rows, tiles = operands(counts, 4, 20, 257, device), segments(counts, 4, 20, 40, device)
    want, wanted = grouped_fp8_gemm(*rows, torch.float32), grouped_fp8_gemm_wgrad(*tiles)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(grouped_fp8_gemm(*rows, torch.float32), want)
        assert torch.equal(grouped_fp8_gemm_wgrad(*tiles), wanted)


def test_launch_tables_serve_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tables choose is right too, on the chip the interpreter stands for."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for counts in ([5, 9], [30, 0, 70]):
        tensors = operands(counts, 1, 140, 140, device)
        got = grouped_fp8_gemm(*tensors, torch.float32)
        assert_near(got.cpu(), exact(*tensors[:4], counts), bound(torch.float32, 140, device))


@pytest.mark.parametrize("tokens", [17, 200])
def test_no_count_leaves_the_device(tokens: int) -> None:
    """Tensors without values: whatever asked for one would raise. The grids that come out serve any counts."""
    with FakeTensorMode():
        offsets, x = torch.empty(7, dtype=torch.int32), torch.empty(tokens, 32)
        a, b = torch.empty(tokens, 32, dtype=E4M3), torch.empty(6, 48, 32, dtype=E4M3)
        y = torch.empty(tokens, 48)
        codes = torch.empty(32, (tokens // 128 + 6) * 128, dtype=E4M3), torch.empty(32, tokens // 128 + 6)
        out = torch.empty(6, 32, 32)
        calls = [
            ("", lambda: room._triton_segments(x, offsets, None)),
            ("", lambda: room._triton_gemm(a, torch.empty(tokens, 1), b, torch.empty(6, 1, 1), offsets, y)),
            ("", lambda: room._triton_wgrad(*codes, *codes, offsets, out)),
        ]
        names = [launch.kernel.__name__ for launch in record(calls, "sm_90")]
    product = f"_grouped_fp8_gemm_{'small_' * (tokens <= 32)}kernel"
    assert names == ["_quantize_segments_kernel", product, "_grouped_fp8_gemm_wgrad_kernel"]


@pytest.mark.parametrize("way", ["torch", "descriptors"], indirect=True)  # tiles make no difference
def test_registration(way: str, device: torch.device) -> None:
    """All of opcheck but the schema's test, which multiplies the inputs: torch cannot multiply fp8."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tensors = operands([5, 0, 40], 2, 20, 40, device)
    opcheck(ops.grouped_fp8_gemm.default, (*tensors, torch.float32), test_utils=tests)
    tensors = segments([5, 0, 40], 2, 20, 40, device)
    opcheck(ops.grouped_fp8_gemm_wgrad.default, tuple(tensors), test_utils=tests)
    opcheck(ops.grouped_fp8_gemm_wgrad_add.default, (*tensors, torch.zeros(3, 20, 40, device=device)), test_utils=tests)
    x, w = torch.randn(47, 40, device=device), torch.randn(3, 20, 40, device=device)
    opcheck(ops.quantize_segments_transposed.default, (x, tensors[4], None))
    opcheck(ops.quantize_segments_transposed.default, (x, tensors[4], torch.randint(len(x), (90,), device=device)))
    leaves = x.requires_grad_(), w.requires_grad_()
    for for_x, for_w in ((True, True), (False, True), (True, False)):
        arguments = (leaves[0] if for_x else x.detach(), leaves[1] if for_w else w.detach(), tensors[4])
        opcheck(ops.grouped_fp8_linear.default, (*arguments, torch.float32, for_x, for_w))


@pytest.mark.parametrize("way", ["torch", "descriptors"], indirect=True)  # tiles make no difference
def test_one_graph_under_compile(way: str, device: torch.device) -> None:
    compiled = torch.compile(grouped_fp8_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for counts in ([5, 0, 40], [130, 2, 3]):
        offsets = offsets_of(counts, device)
        x, w = torch.randn(sum(counts), 20, device=device), torch.randn(3, 6, 20, device=device)
        dy = torch.randn(sum(counts), 6, device=device)
        (y, grads), (want, wanted) = (
            run(lambda x, w, op=op, offsets=offsets: op(x, w, offsets), [x, w], dy)
            for op in (compiled, grouped_fp8_linear)
        )
        assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))


def test_each_gradient_alone_and_autocast(way: str, device: torch.device) -> None:
    offsets = offsets_of([6, 0, 30], device)
    tensors = [torch.randn(40, 20, device=device), torch.randn(3, 12, 20, device=device)]
    _, grads = run(lambda x, w: grouped_fp8_linear(x, w, offsets), tensors)
    for index, want in enumerate(grads):
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        grouped_fp8_linear(*alone, offsets).sum().backward()
        assert torch.equal(torch.stack([t.grad for t in alone if t.grad is not None]), want[None])
    assert not grouped_fp8_linear(*tensors, offsets).requires_grad
    with torch.autocast(device.type, torch.bfloat16):
        y, (dx, dw) = run(lambda x, w: grouped_fp8_linear(x, w, offsets), tensors)
    assert y.dtype == torch.bfloat16 and dx.dtype == dw.dtype == torch.float32


GOOD = dict(
    a=torch.zeros(3, 130).to(E4M3), a_scale=torch.ones(3, 2), b=torch.zeros(2, 5, 130).to(E4M3),
    b_scale=torch.ones(2, 1, 2), offsets=torch.zeros(3).int(), out_dtype=torch.float32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(a=torch.zeros(3, 130)), TypeError, "a: got torch.float32, allowed is torch.float8_e4m3fn"),
        (dict(b_scale=torch.ones(2, 1, 2).half()), TypeError, "b_scale: got torch.float16, allowed is torch.float32"),
        (dict(b_scale=torch.ones(2, 5, 2)), ValueError, r"b_scale: got shape \(2, 5, 2\), allowed is \(2, 1, 2\)"),
        (dict(a_scale=torch.ones(3, 1)), ValueError, r"a_scale: got shape \(3, 1\), allowed is \(3, 2\)"),
        (dict(a=torch.zeros(3, 0).to(E4M3)), ValueError, r"a: got shape \(3, 0\), allowed is a last dimension of 1"),
        (dict(offsets=torch.zeros(2).int()), ValueError, r"offsets: got shape \(2,\), allowed is \(3\)"),
        (dict(offsets=torch.zeros(3)), TypeError, "offsets: got torch.float32, allowed is torch.int32"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype: got torch.float64, allowed are torch.bfloat16"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grouped_fp8_gemm(**(GOOD | change))  # type: ignore[arg-type]


def test_bad_input_of_the_others() -> None:
    codes, scale, offsets = torch.zeros(4, 256).to(E4M3), torch.ones(4, 2), torch.zeros(3).int()
    with pytest.raises(ValueError, match=r"a: got shape \(4, 100\), allowed are multiples of 128 columns"):
        grouped_fp8_gemm_wgrad(codes[:, :100], scale[:, :1], codes, scale, offsets)
    with pytest.raises(ValueError, match=r"out: got shape \(4, 4\), allowed is \(2, 4, 4\)"):
        grouped_fp8_gemm_wgrad(codes, scale, codes, scale, offsets, out=torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"x: got torch\.float64, allowed are torch\.bfloat16"):
        quantize_segments_transposed(torch.zeros(3, 4).double(), offsets)
    with pytest.raises(ValueError, match=r"offsets: got shape \(0,\), allowed is one number more than experts"):
        quantize_segments_transposed(torch.zeros(3, 4), offsets[:0])
    with pytest.raises(TypeError, match=r"token: got torch\.int32, allowed is torch\.int64"):
        quantize_segments_transposed(torch.zeros(3, 4), offsets, torch.zeros(5).int())
    with pytest.raises(ValueError, match=r"w: got shape \(2, 5, 3\), allowed is \(any, any, 4\)"):
        grouped_fp8_linear(torch.zeros(3, 4), torch.zeros(2, 5, 3), offsets)
    with pytest.raises(ValueError, match=r"w: got shape \(2, 0, 4\), allowed is 1 row an expert or more"):
        grouped_fp8_linear(torch.zeros(3, 4), torch.zeros(2, 0, 4), offsets)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
@pytest.mark.parametrize(("groups", "pieces"), BY_HAND)
def test_by_hand_in_any_order(groups: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever warps go ahead, however late a copy or product is: the numbers of Triton's kernels."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    counts, cpu = [70, 0, 1, 200, 0, 64], torch.device("cpu")
    forward, gradient = operands(counts, 70, 272, 400, cpu), segments(counts, 70, 136, 144, cpu)
    old = torch.randn(len(counts), 136, 144)
    by_hand = dict(GROUPS=groups, PIECES=pieces, STAGES=2, STRIPE=2)

    def results() -> tuple[Tensor, ...]:
        with poisoned_memory():
            return (
                grouped_fp8_gemm(*forward, torch.float32),
                grouped_fp8_gemm_wgrad(*gradient),
                grouped_fp8_gemm_wgrad(*gradient, out=old.clone()),
            )

    monkeypatch.setattr(_launch, "config", lambda *_, **__: PLAIN)
    want = results()
    monkeypatch.setattr(_launch, "config", lambda *_, **__: by_hand)
    for seed in range(3):
        with interpreted(seed):
            assert all(torch.equal(x, y) for x, y in zip(results(), want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "pieces"), BY_HAND)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "counts", [[512] * 8, [3000, 0, 1, 500, 64, 0, 131, 1000], [0, 4096, 0], [192, 128, 64, 65, 63]], ids=str
)
def test_by_hand_sums_as_the_interpreted_kernel_does(
    counts: list[int], out_dtype: torch.dtype, groups: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and weight gradient: every number is the same as the proven kernel's, in every run, and rows of nobody
    are zero."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    device = torch.device("cuda")
    forward, gradient = operands(counts, 70, 1096, 1000, device), segments(counts, 70, 520, 384, device)
    old = torch.randn(len(counts), 520, 384, device=device)
    results = []
    for config in (PLAIN, *[dict(GROUPS=groups, PIECES=pieces, STAGES=4, STRIPE=8)] * 3):
        monkeypatch.setattr(_launch, "config", lambda *_, config=config, **__: config)
        with poisoned_memory():
            out, total = grouped_fp8_gemm(*forward, out_dtype), old.clone()
            results.append((out, grouped_fp8_gemm_wgrad(*gradient), grouped_fp8_gemm_wgrad(*gradient, out=total)))
    assert not any(x.isnan().any() for x in results[0]) and not results[0][0][sum(counts) :].any()
    assert all(torch.equal(x, y) for again in results[1:] for x, y in zip(again, results[0], strict=True))
