"""fp8_gemm against products of the dequantised values in fp64; quantisation here is plain torch."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from minids_kernels import (
    _launch,
    fp8_gemm,
    fp8_gemm_reference,
    fp8_gemm_wgrad,
    fp8_gemm_wgrad_reference,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_transposed,
)
from minids_kernels._ops import ops
from minids_kernels.fp8_gemm import PLAIN
from torch import Tensor
from torch.library import opcheck

from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.numerics import LAYOUTS, assert_near, error_bound, poisoned_memory, serves, tensor_core_error

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 1), (0, 5, 3), (3, 0, 128), (17, 40, 127), (5, 133, 160), (66, 20, 257)]

# by name: chip, and the launch that serves there whatever the shape
TILE = dict(BLOCK_K=128, STRIPE=2, num_warps=4)
WAYS = {
    "pointers, widened": ("sm_80", dict(TILE, BLOCK_P=64, BLOCK_Q=32, BLOCK_K=64, STAGES=2)),
    "pointers": ("sm_89", dict(TILE, BLOCK_P=32, BLOCK_Q=64, STAGES=2)),
    "pointers, swapped": ("sm_89", dict(TILE, SWAP=True, BLOCK_P=64, BLOCK_Q=16, STAGES=2)),
    "descriptors": ("sm_90", dict(TILE, TMA=True, BLOCK_P=64, BLOCK_Q=128, STAGES=2)),
    "descriptors, swapped": ("sm_90", dict(TILE, TMA=True, SWAP=True, BLOCK_P=128, BLOCK_Q=16, STAGES=2)),
    "descriptors, parts": ("sm_90", dict(TILE, TMA=True, PARTS=3, BLOCK_P=64, BLOCK_Q=64, STAGES=2)),
    "descriptors, swapped parts": ("sm_90", dict(TILE, TMA=True, SWAP=True, PARTS=2, BLOCK_P=64, BLOCK_Q=16, STAGES=2)),
}
WAYS |= {
    f"by hand, {groups} groups, {pieces}": ("sm_90", dict(GROUPS=groups, PIECES=pieces, STAGES=4, STRIPE=2))
    for groups, pieces in ((2, 1), (2, 2), (3, 1))
}


@pytest.fixture(params=["torch", *WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The PyTorch path, then every kernel and form of launch. On a GPU, those of no newer chip."""
    name = str(request.param)
    monkeypatch.setattr(_launch, "BACKEND", "torch" if name == "torch" else "triton")
    if name != "torch":
        arch, config = WAYS[name]
        if torch.cuda.is_available() and not serves(arch, "GROUPS" in config):
            pytest.skip(f"the machine's GPU is not the {arch} of this launch")
        monkeypatch.setattr(_launch, "arch", lambda x: arch)
        wgrad = config | ({"GROUPS": 2} if "GROUPS" in config else {})
        monkeypatch.setattr(_launch, "config", lambda room, table, *_, **shape: wgrad if "wgrad" in table else config)
    with interpreted(0) if name.startswith("by hand") and not torch.cuda.is_available() else contextlib.nullcontext():
        yield name


@pytest.fixture
def device(way: str) -> torch.device:
    return torch.device("cuda" if way != "torch" and torch.cuda.is_available() else "cpu")


def quantize(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x [R, K] fp32 -> e4m3 codes [R, K], scales of blocks of `rows` x 128, fp32."""
    height, width = x.shape
    down, right = -(-height // rows), -(-width // 128)
    padded = x.new_zeros(down * rows, right * 128)
    padded[:height, :width] = x
    blocks = padded.view(down, rows, right, 128)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-30) / 448
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(E4M3)
    return codes.view(padded.shape)[:height, :width].contiguous(), scale


def values(codes: Tensor, scale: Tensor, rows: int) -> Tensor:
    """codes * scale in fp64."""
    scale = scale.double().repeat_interleave(rows, 0)[: codes.shape[0]]
    return codes.double() * scale.repeat_interleave(128, 1)[:, : codes.shape[1]]


def operands(m: int, n: int, k: int, rows: int) -> list[Tensor]:
    """Sizes differ from group to group by up to 2^12, so that a wrong scale is seen."""
    a, b = (torch.randn(r, k) * torch.exp2(torch.randint(-6, 7, (r, k))) for r in (m, n))
    return [*quantize(a, 1), *quantize(b, rows)]


def exact(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int) -> Tensor:
    return values(a, a_scale, 1) @ values(b, b_scale, rows).T


def bound(dtype: torch.dtype, k: int, device: torch.device) -> float:
    """One rounding to `dtype`, sums of k terms in fp32 in any order, a rounding of each scale product. The interpreter
    cuts bf16 off."""
    roundings = 2 if dtype == torch.bfloat16 else 1
    return error_bound(dtype, roundings, 1) + error_bound(torch.float32, 2, k) + tensor_core_error(device, k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, int, int], way: str, device: torch.device) -> None:
    tensors = operands(*shape, 128)
    want = exact(*tensors, 128)
    with poisoned_memory():
        got = fp8_gemm(*(t.to(device) for t in tensors), torch.float32)
    assert_near(got.cpu(), want, bound(torch.float32, shape[2], device), way)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(shape: tuple[int, int, int], way: str, device: torch.device) -> None:
    """Written, and added to what is there."""
    tensors = operands(*shape, 1)
    want = exact(*tensors, 1)
    on_device = [t.to(device) for t in tensors]
    with poisoned_memory():
        got = fp8_gemm_wgrad(*on_device)
    assert got.dtype == torch.float32
    assert_near(got.cpu(), want, bound(torch.float32, shape[2], device), way)
    start = torch.randn(want.shape) * (want.square().mean().sqrt().float() if want.numel() else 1)
    out = start.clone().to(device)
    assert fp8_gemm_wgrad(*on_device, out=out) is out
    assert_near(out.cpu(), start.double() + want, bound(torch.float32, shape[2], device), way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_the_result(dtype: torch.dtype, way: str, device: torch.device) -> None:
    tensors = [*quantize(torch.randn(20, 200), 1), *quantize(torch.randn(70, 200), 128)]
    got = fp8_gemm(*(t.to(device) for t in tensors), dtype)
    assert got.dtype == dtype
    assert_near(got.cpu(), exact(*tensors, 128), bound(dtype, 200, device), way)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rows", [128, 1], ids=["forward", "weight gradient"])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], rows: int, way: str, device: torch.device) -> None:
    tensors = [t.to(device) for t in operands(9, 140, 144, rows)]
    strided = [layout(t.view(torch.uint8)).view(E4M3) if t.dtype == E4M3 else layout(t) for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    if rows == 1:
        got, want = fp8_gemm_wgrad(*strided), fp8_gemm_wgrad(*tensors)
        out = fp8_gemm_wgrad(*strided, out=torch.zeros(140, 9, device=device).T)
    else:
        got, want = fp8_gemm(*strided, torch.float32), fp8_gemm(*tensors, torch.float32)
        out = got
    if way == "torch":  # other strides may take another product
        assert_near(got, want.double(), bound(torch.float32, 144, device))
        assert_near(out, want.double(), bound(torch.float32, 144, device))
    else:
        assert torch.equal(got, want) and torch.equal(out, want)


def test_every_code(way: str, device: torch.device) -> None:
    """One times each code is that code's value, exactly: subnormals, both zeros, and NaN to NaN (which the interpreter
    takes for 480 where codes are not widened)."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(256, 1)
    one = torch.ones(1, 1).to(E4M3)
    got = fp8_gemm(codes.to(device), torch.ones(256, 1, device=device), one.to(device), torch.ones(1, 1, device=device))
    nan = 480.0 if device.type == "cpu" and way not in ("torch", "pointers, widened") else 500.0
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(128)[:, None] if nan == 480.0 else 1.0
    want = torch.where(codes.float().isnan(), nan * sign, codes.float())
    assert torch.equal(got.cpu().float().nan_to_num(500.0), want)


def test_infinite_scale_is_seen(way: str, device: torch.device) -> None:
    """A tile that held an Inf has codes 0 and the scale Inf: its row of the result is NaN, no other."""
    tensors = [t.to(device) for t in operands(5, 9, 256, 128)]
    tensors[0].view(torch.uint8)[2, :128] = 0
    tensors[1][2, 0] = torch.inf
    nan = fp8_gemm(*tensors, torch.float32).isnan()
    assert nan[2].all() and not nan[[0, 1, 3, 4]].any()


def test_the_same_bits_twice(way: str, device: torch.device) -> None:
    tensors = [t.to(device) for t in operands(40, 50, 200, 128)]
    assert torch.equal(fp8_gemm(*tensors), fp8_gemm(*tensors))


def test_autocast_rounds_no_values(way: str, device: torch.device) -> None:
    blocks, tiles = ([t.to(device) for t in operands(17, 40, 257, rows)] for rows in (128, 1))
    want, wanted = fp8_gemm(*blocks, torch.float32), fp8_gemm_wgrad(*tiles)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(fp8_gemm(*blocks, torch.float32), want)
        assert torch.equal(fp8_gemm_wgrad(*tiles), wanted)
        assert torch.equal(fp8_gemm_wgrad(*tiles, out=torch.zeros_like(wanted)), wanted)


def test_references() -> None:
    """They are one product in fp32 of values in fp32: a rounding each."""
    tensors = operands(9, 200, 300, 128)
    want = exact(*tensors, 128)
    assert_near(fp8_gemm_reference(*tensors, torch.float32), want, error_bound(torch.float32, 2, 300))
    tensors = operands(9, 200, 300, 1)
    assert_near(fp8_gemm_wgrad_reference(*tensors), exact(*tensors, 1), error_bound(torch.float32, 2, 300))


def test_error_against_the_true_product() -> None:
    """e4m3 has 3 bits of mantissa: a rounding errs by at most 2^-4 of a number, and uniformly, by 2^-4 / sqrt(3) in the
    root mean square; two operands double the variance. Numbers within 2^-9 of their tile's largest are normal."""
    a, b = torch.randn(64, 512), torch.randn(200, 512)
    got = fp8_gemm(*quantize(a, 1), *quantize(b, 128), torch.float32)
    assert_near(got, a.double() @ b.double().T, math.sqrt(2 / 3) * 2.0**-4)


def test_launch_tables_serve_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tables choose is right too, on the chip the interpreter stands for."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for m in (8, 40, 100):
        tensors = operands(m, 140, 140, 128)
        got = fp8_gemm(*(t.to(device) for t in tensors), torch.float32)
        assert_near(got.cpu(), exact(*tensors, 128), bound(torch.float32, 140, device))


A, A_SCALE, B, B_SCALE = torch.zeros(3, 130).to(E4M3), torch.ones(3, 2), torch.zeros(5, 130).to(E4M3), torch.ones(1, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(a=A.float()), TypeError, "a: got torch.float32, allowed is torch.float8_e4m3fn"),
        (dict(b=B.view(torch.uint8)), TypeError, "b: got torch.uint8, allowed is torch.float8_e4m3fn"),
        (dict(a=A[0]), ValueError, r"a: got shape \(130,\), allowed is \(any, any\)"),
        (dict(a=A[:, :0]), ValueError, r"a: got shape \(3, 0\), allowed is a last dimension of 1 or more"),
        (dict(b=B[:, :5]), ValueError, r"b: got shape \(5, 5\), allowed is \(any, 130\)"),
        (dict(a_scale=A_SCALE[:, :1]), ValueError, r"a_scale: got shape \(3, 1\), allowed is \(3, 2\)"),
        (dict(a_scale=A_SCALE.half()), TypeError, "a_scale: got torch.float16, allowed is torch.float32"),
        (dict(b_scale=torch.ones(5, 2)), ValueError, r"b_scale: got shape \(5, 2\), allowed is \(1, 2\)"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype: got torch.float64, allowed are torch.bfloat16"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = dict(a=A, a_scale=A_SCALE, b=B, b_scale=B_SCALE, out_dtype=torch.float32) | change
    with pytest.raises(error, match=message):
        fp8_gemm(**arguments)  # type: ignore[arg-type]


def test_bad_input_of_the_weight_gradient() -> None:
    with pytest.raises(ValueError, match=r"b_scale: got shape \(1, 2\), allowed is \(5, 2\)"):
        fp8_gemm_wgrad(A, A_SCALE, B, B_SCALE)
    with pytest.raises(ValueError, match=r"out: got shape \(5, 3\), allowed is \(3, 5\)"):
        fp8_gemm_wgrad(A, A_SCALE, B, torch.ones(5, 2), out=torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"out: got torch\.bfloat16, allowed is torch\.float32"):
        fp8_gemm_wgrad(A, A_SCALE, B, torch.ones(5, 2), out=torch.zeros(3, 5).bfloat16())


def test_registration(way: str, device: torch.device) -> None:
    """All of opcheck but the schema's test, which multiplies the inputs: torch cannot multiply fp8."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tensors = [t.to(device) for t in operands(6, 20, 40, 128)]
    opcheck(ops.fp8_gemm.default, (*tensors, torch.float32), test_utils=tests)
    tensors = [t.to(device) for t in operands(6, 20, 40, 1)]
    opcheck(ops.fp8_gemm_wgrad.default, tuple(tensors), test_utils=tests)
    out = torch.zeros(6, 20, device=device)
    opcheck(ops.fp8_gemm_wgrad_add.default, (*tensors, out), test_utils=tests)
    before = [t.clone() for t in tensors]
    fp8_gemm_wgrad(*tensors, out=out)
    assert all(torch.equal(t.view(torch.uint8), b.view(torch.uint8)) for t, b in zip(tensors, before, strict=True))


def test_one_graph_under_compile(way: str, device: torch.device) -> None:
    compiled = torch.compile(fp8_gemm_wgrad, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 7):
        tensors = [t.to(device) for t in operands(m, 5, 130, 1)]
        assert torch.equal(compiled(*tensors), fp8_gemm_wgrad(*tensors))
        out = torch.ones(m, 5, device=device)
        assert torch.equal(compiled(*tensors, out=out), fp8_gemm_wgrad(*tensors, out=torch.ones_like(out)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
@pytest.mark.parametrize(("groups", "pieces"), [(2, 1), (2, 2), (3, 1)])
def test_by_hand_in_any_order(groups: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever warps go ahead, however late a copy or product is: the numbers of Triton's kernel, over several tiles a
    program and more steps than the ring has buffers."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    forward, gradient = operands(200, 528, 400, 128), operands(200, 528, 400, 1)
    by_hand = dict(GROUPS=groups, PIECES=pieces, STAGES=2, STRIPE=2)
    monkeypatch.setattr(_launch, "config", lambda *_, **__: PLAIN)
    want, wanted = fp8_gemm(*forward, torch.float32), fp8_gemm_wgrad(*gradient)
    monkeypatch.setattr(_launch, "config", lambda *_, **__: by_hand)
    for seed in range(5):
        with interpreted(seed), poisoned_memory():
            assert torch.equal(fp8_gemm(*forward, torch.float32), want)
    for seed in range(5 if groups == 2 else 0):
        with interpreted(seed), poisoned_memory():
            assert torch.equal(fp8_gemm_wgrad(*gradient), wanted)


@pytest.mark.skipif(not _launch.HAS_TRITON, reason="no Triton here")
def test_scales_are_read_where_they_lie() -> None:
    """By a weight gradient by hand, if a bulk copy can; `quantize_tiles_transposed` has them so."""
    of_groups = importlib.import_module("minids_kernels._fp8_gemm_hopper")._of_groups
    found = quantize_tiles_transposed(torch.randn(300, 8))[1]
    one_group = torch.rand(300, 1).expand(300, 4)
    for scale, copied in (
        (found, False), (found[:, 1:], False), (found[1:], True), (torch.rand(6, 3).T, True), (one_group, True),
    ):  # fmt: skip
        described = of_groups(scale, 64)
        assert described.shape == [scale.shape[1], scale.shape[0]] and described.block_shape == [1, 64]
        assert torch.equal(described.base.as_strided(described.shape, described.strides), scale.T)
        assert (described.base.data_ptr() != scale.data_ptr()) == copied


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("groups", "pieces"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("shape", [(1, 16, 16), (128, 128, 128), (300, 520, 1000), (2000, 3000, 7168)])
def test_by_hand_sums_as_the_interpreted_kernel_does(
    shape: tuple[int, int, int], groups: int, pieces: int, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hopper kernel takes the same products and sums in the same order as Triton's, so every number is the same, at
    every tail, in every run."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    m, n, k = shape
    a, a_scale = quantize_tiles(torch.randn(m, k, device="cuda"))
    b, b_scale = quantize_blocks(torch.randn(n, k, device="cuda"))
    results = []
    for config in (PLAIN, *[dict(GROUPS=groups, PIECES=pieces, STAGES=4, STRIPE=8)] * 3):
        monkeypatch.setattr(_launch, "config", lambda *_, config=config, **__: config)
        with poisoned_memory():
            results.append(fp8_gemm(a, a_scale, b, b_scale, out_dtype))
    assert not results[0].isnan().any() and all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("shape", [(1, 16, 16), (128, 128, 128), (300, 521, 1000), (2000, 3000, 7168)])
def test_weight_gradient_by_hand_sums_as_the_interpreted_kernel_does(
    shape: tuple[int, int, int], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and added."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    m, n, k = shape
    operands = [x for rows in (m, n) for x in quantize_tiles(torch.randn(rows, k, device="cuda"))]
    old, results = torch.randn(m, n, device="cuda"), []
    for config in (PLAIN, *[dict(GROUPS=2, PIECES=pieces, STAGES=6, STRIPE=8)] * 3):
        monkeypatch.setattr(_launch, "config", lambda *_, config=config, **__: config)
        with poisoned_memory():
            results.append((fp8_gemm_wgrad(*operands), fp8_gemm_wgrad(*operands, out=old.clone())))
    assert not results[0][0].isnan().any()
    assert all(torch.equal(x, y) for again in results[1:] for x, y in zip(again, results[0], strict=True))
