"""Quantisation to fp8: bit for bit what torch's own cast to e4m3 gives of x / scale, on every path."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from minids_kernels import (
    dequantize_blocks,
    dequantize_tiles,
    fp8_quant,
    quantize_blocks,
    quantize_blocks_reference,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_both_reference,
    quantize_tiles_reference,
    quantize_tiles_transposed,
    quantize_tiles_transposed_reference,
)
from minids_kernels._launch import tl, triton
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, poisoned_memory

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["fp32", "ue8m0"]
SHAPES = [(1, 1), (5, 129), (130, 7), (129, 300), (0, 5), (5, 0)]

PAIRS = {
    "tiles": (quantize_tiles, quantize_tiles_reference),
    "blocks": (quantize_blocks, quantize_blocks_reference),
    "transposed": (quantize_tiles_transposed, quantize_tiles_transposed_reference),
    "both": (quantize_tiles_both, quantize_tiles_both_reference),
}


def bits(x: Tensor) -> Tensor:
    """What x is made of, NaN without its sign: hardware's is positive, x86's Inf * 0 negative."""
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8)) if x.dtype == E4M3 else x


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.is_contiguous() or (a.dtype == torch.float32 and a.flatten(0, -2).T.is_contiguous())
        assert torch.equal(bits(a.cpu()), bits(b.cpu()))


def sizes_of_many_kinds(m: int, k: int) -> Tensor:
    """Columns and rows whose sizes lie 2^-40 to 2^40 apart, so that tiles differ and most reach e4m3's subnormals."""
    return torch.randn(m, k) * torch.randn(m, 1).mul(8).exp2() * torch.randn(1, k).mul(8).exp2()


def one_tile(x: Tensor, scale_format: str) -> tuple[Tensor, float]:
    """Codes as fp64 numbers and the scale of one tile, from the definition, a number at a time in Python."""
    amax = max((abs(v) for v in x.flatten().tolist()), default=0.0)
    scale = float(torch.tensor(amax) / 448) if amax else 1.0
    if scale_format == "ue8m0":
        scale = 2.0 ** math.ceil(math.log2(scale))
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # all e4m3 numbers from 0 up
    ratio = x.double() * (1 / torch.tensor(scale)).double()
    # the product is rounded to fp32 before it is rounded to e4m3, as on every chip
    ratio = ratio.float().double()
    distance = (ratio.abs().unsqueeze(-1) - grid).abs()
    nearest = distance.amin(-1, keepdim=True)
    even = torch.arange(127) % 2 == 0
    choice = torch.where(distance == nearest, torch.where(even, 2, 1), 0).argmax(-1)
    return grid[choice] * ratio.sign(), scale


def test_scales_lie_as_products_read_them(device: torch.device) -> None:
    """Those of a step, one of each row, side by side."""
    x = torch.randn(2, 5, 300, device=device)
    scales = quantize_tiles(x)[1]
    assert scales.shape == (2, 5, 3) and scales.stride() == (5, 1, 10)
    codes_scales, codes_scales_t = quantize_tiles_both(x[0])[1::2]
    for found in (codes_scales, codes_scales_t, quantize_tiles_transposed(x[0])[1]):
        assert found.T.is_contiguous()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype: torch.dtype, scale_format: str, device: torch.device) -> None:
    """Tile by tile against arithmetic on the list of all e4m3 numbers."""
    x = sizes_of_many_kinds(130, 131).clamp(-6e4, 6e4).to(dtype).to(device)
    whole = slice(None)
    for name, rows, cols in (("tiles", 1, 128), ("blocks", 128, 128), ("transposed", 128, 1)):
        codes, scales = (t.cpu() for t in PAIRS[name][0](x, scale_format))
        if name == "transposed":
            codes, scales = codes.t(), scales.t()
        for i in range(0, 130, rows) if rows > 1 else (0, 77, 129):
            for j in range(0, 131, cols) if cols > 1 else (0, 78, 130):
                tile = slice(i, i + rows), slice(j, j + cols)
                want, scale = one_tile(x.float().cpu()[tile], scale_format)
                assert scales[i // rows, j // cols] == scale, (name, i, j)
                assert torch.equal(codes[tile].double(), want), (name, i, j)
    assert codes[whole].float().abs().max() <= 448


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_bits_as_the_reference(
    name: str, shape: tuple[int, int], scale_format: str, device: torch.device
) -> None:
    op, reference = PAIRS[name]
    x = sizes_of_many_kinds(*shape).to(torch.float32 if scale_format == "fp32" else torch.bfloat16)
    assert_same_bits(op(x.to(device), scale_format), reference(x, scale_format))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", PAIRS)
def test_numbers_at_the_ends(name: str, scale_format: str, device: torch.device) -> None:
    """Zeros, fp32's largest and least numbers, subnormal tiles, NaN and Inf, each in tiles of their own."""
    op, reference = PAIRS[name]
    x = torch.randn(7 * 128, 256)
    x[:128] = 0
    x[128:256] *= 1e38
    x[256:384] = 3e-45
    x[384:512] *= 1e-37
    x[512 + 5, 7] = math.nan
    x[640 + 5, 7] = math.inf
    x[640 + 9, 200] = -math.inf
    x[768:] = math.nan
    assert_same_bits(op(x.to(device), scale_format), reference(x, scale_format))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_nan_stays_alone_and_inf_is_seen(scale_format: str, device: torch.device) -> None:
    x = torch.randn(256, 256, device=device)
    clean = x.clone()
    clean[3, 5] = 0
    x[3, 5], x[200, 130] = math.nan, math.inf
    codes, scales = quantize_tiles(x, scale_format)
    seen = dequantize_tiles(codes, scales, torch.float32).isnan()
    assert seen[3, 5] and seen[200, 128:].all() and int(seen.sum()) == 129
    _, clean_scales = quantize_tiles(clean, scale_format)
    assert torch.equal(scales[3], clean_scales[3])
    seen = dequantize_blocks(*quantize_blocks(x, scale_format), torch.float32).isnan()
    assert seen[3, 5] and seen[128:, 128:].all() and int(seen.sum()) == 1 + 128 * 128
    seen = dequantize_tiles(*quantize_tiles_transposed(x, scale_format), torch.float32).t().isnan()
    assert seen[3, 5] and seen[128:, 130].all() and int(seen.sum()) == 129


def test_zeros(device: torch.device) -> None:
    for op, _ in PAIRS.values():
        codes, scales, *_ = op(torch.zeros(130, 140, device=device))
        assert not codes.view(torch.uint8).any() and (scales == 1).all()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_error_of_a_round_trip(scale_format: str, device: torch.device) -> None:
    """e4m3 has 3 stored bits of mantissa: half a step is 1/16 of a number; below 2^-6 it is 2^-10 of the scale."""
    x = torch.randn(128, 256)
    for quantise, dequantise, rows, cols in (
        (quantize_tiles, dequantize_tiles, 1, 128),
        (quantize_blocks, dequantize_blocks, 128, 128),
    ):
        codes, scales = quantise(x.to(device), scale_format)
        scale = scales.cpu().repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        error = (dequantise(codes, scales, torch.float32).cpu() - x).abs()
        assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)).all()
        # no scale is larger than it must be
        assert scale.max() <= x.abs().max() / 448 * (2 if scale_format == "ue8m0" else 1 + 1e-6)
        if scale_format == "ue8m0":
            assert (torch.frexp(scales)[0] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantise(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Every code, exact in fp32, rounded once to others."""
    m, k = shape
    codes = torch.randint(256, shape, dtype=torch.uint8).view(E4M3)
    for op, rows in ((dequantize_tiles, 1), (dequantize_blocks, 128)):
        scales = torch.randn(-(-m // rows), -(-k // 128)).exp2()
        want = codes.float() * scales.repeat_interleave(rows, 0)[:m].repeat_interleave(128, 1)[:, :k]
        got = op(codes.to(device), scales.to(device), dtype).cpu()
        assert got.dtype == dtype and got.shape == want.shape
        cut = 2.0 if dtype == torch.bfloat16 and device.type == "cpu" else 1.0  # the interpreter cuts bf16 off
        torch.testing.assert_close(
            got.float(), want, rtol=cut * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0,
            atol=1e-7 if dtype == torch.float16 else 0.0, equal_nan=True,
        )  # fmt: skip


def test_dequantises_codes_that_lie_transposed(device: torch.device) -> None:
    codes, scales = quantize_blocks(torch.randn(128, 256, device=device))
    want = dequantize_blocks(codes, scales, torch.float32)
    assert torch.equal(dequantize_blocks(codes.T, scales.T, torch.float32), want.T)


@triton.jit
def _encode_kernel(x_ptr, codes_ptr, back_ptr, n, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = fp8_quant.encode_e4m3(tl.load(x_ptr + index, mask=index < n), NATIVE)
    tl.store(codes_ptr + index, codes, mask=index < n)
    tl.store(back_ptr + index, fp8_quant.decode_e4m3(codes), mask=index < n)


def test_integer_arithmetic_gives_what_torch_casts() -> None:
    """Every e4m3 number, every middle of two, their neighbours, and numbers spread over all of fp32, both signs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    marks = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([464.0, 480.0, 1e30, math.inf])])
    near = marks.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)
    spread = torch.arange(0, 2**31, 65_521).int()
    positive = torch.cat([near.flatten().clamp(min=0), spread])
    x = torch.cat([positive, positive | -(2**31)]).view(torch.float32)
    want = torch.where(x.isnan(), x, x.clamp(-448, 448)).to(E4M3)
    for native in (False, True) if device.type == "cuda" and fp8_quant.native_e4m3(x.to(device)) else (False,):
        codes = torch.empty(x.shape, dtype=E4M3, device=device)
        back = torch.empty(x.shape, device=device)
        grid = (triton.cdiv(len(x), 4096),)
        _encode_kernel[grid](x.to(device), codes.view(torch.uint8), back, len(x), BLOCK=4096, NATIVE=native)
        assert torch.equal(bits(codes.cpu()), bits(want))
        assert torch.equal(back.cpu().nan_to_num(999.0), want.float().nan_to_num(999.0))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x = torch.randn(131, 140, device=device).bfloat16()
    for op, _ in PAIRS.values():
        assert_same_bits(op(layout(x)), op(x))
    codes, scales = quantize_tiles(x)
    strided = layout(codes.view(torch.uint8).short()).to(torch.uint8, memory_format=torch.preserve_format).view(E4M3)
    assert torch.equal(
        dequantize_tiles(strided, layout(scales), torch.float32), dequantize_tiles(codes, scales, torch.float32)
    )


def test_leading_dimensions(device: torch.device) -> None:
    x = torch.randn(2, 3, 200, device=device)
    codes, scales = quantize_tiles(x)
    assert codes.shape == x.shape and scales.shape == (2, 3, 2)
    flat = quantize_tiles(x.view(6, 200))
    assert_same_bits((codes.view(6, 200), scales.view(6, 2)), flat)
    assert torch.equal(dequantize_tiles(codes, scales, x.dtype).view(6, 200), dequantize_tiles(*flat, x.dtype))
    codes, scales = quantize_tiles(x[0, 0])
    assert codes.shape == (200,) and scales.shape == (2,)


def test_nothing_is_left_unwritten_and_bits_repeat(device: torch.device) -> None:
    x = torch.randn(130, 200, device=device)
    for op, _ in PAIRS.values():
        first = op(x)
        with poisoned_memory():
            assert_same_bits(op(x), first)


def test_the_widest_tables(device: torch.device) -> None:
    """More than one program along a row."""
    x = sizes_of_many_kinds(2, 2500)
    assert_same_bits(quantize_tiles(x.to(device)), quantize_tiles_reference(x))


@pytest.mark.parametrize("op", [pair[0] for pair in PAIRS.values()])
def test_bad_input(op: Callable[..., tuple[Tensor, ...]]) -> None:
    with pytest.raises(TypeError, match=r"got torch.float64, allowed are torch.float32, torch.bfloat16, torch.float16"):
        op(torch.zeros(3, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale_format: got 'e8m0', allowed are 'fp32' and 'ue8m0'"):
        op(torch.zeros(3, 8), "e8m0")
    with pytest.raises(ValueError, match=r"got shape \(\), allowed is \("):
        op(torch.tensor(1.0))


def test_bad_codes() -> None:
    codes, scales = quantize_tiles(torch.zeros(3, 200))
    with pytest.raises(ValueError, match=r"scales: got shape \(3, 1\), allowed is \(3, 2\)"):
        dequantize_tiles(codes, scales[:, :1], torch.float32)
    with pytest.raises(ValueError, match=r"scales: got shape \(3, 2\), allowed is \(1, 2\)"):
        dequantize_blocks(codes, scales, torch.float32)
    with pytest.raises(TypeError, match=r"codes: got torch.uint8, allowed is torch.float8_e4m3fn"):
        dequantize_tiles(codes.view(torch.uint8), scales, torch.float32)
    with pytest.raises(TypeError, match=r"scales: got torch.float64, allowed is torch.float32"):
        dequantize_tiles(codes, scales.double(), torch.float32)
    with pytest.raises(TypeError, match=r"dtype: got torch.int8, allowed are"):
        dequantize_tiles(codes, scales, torch.int8)


def test_registration(device: torch.device) -> None:
    x = torch.randn(5, 140, device=device)
    codes, scales = quantize_tiles(x)
    opcheck(ops.quantize_tiles.default, (x, 128, True, False))
    opcheck(ops.quantize_tiles.default, (x, 32, False, True))
    opcheck(ops.quantize_blocks.default, (x, False))
    opcheck(ops.quantize_tiles_transposed.default, (x, False))
    opcheck(ops.quantize_tiles_both.default, (x, False))
    opcheck(ops.dequantize.default, (codes.view(torch.uint8), scales, 1, 128, torch.bfloat16))


def test_one_graph_under_compile(device: torch.device) -> None:
    def round_trip(x: Tensor) -> Tensor:
        codes, scales, codes_t, scales_t = quantize_tiles_both(x)
        blocks = dequantize_blocks(*quantize_blocks(x), torch.float32)
        turned = dequantize_tiles(codes_t, scales_t, torch.float32).t()
        return dequantize_tiles(codes, scales, torch.float32) + turned + blocks

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((130, 140), (3, 256)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x), round_trip(x))
