"""RMSNorm with quantisation: the bits of norm and quantisation one after the other, and near torch's norm in fp64."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import quantize_tiles_both, rms_norm, rms_norm_quant, rms_norm_quant_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, poisoned_memory

E4M3 = torch.float8_e4m3fn
EPS = 1e-5
SHAPES = [(0, 8), (1, 1), (5,), (3, 128), (2, 5, 129), (131, 31), (3, 500)]
MODES = [(torch.float32, "fp32", False), (torch.float16, "ue8m0", True), (torch.bfloat16, "fp32", True)]


@pytest.fixture(params=[False, True], ids=["", "wide"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then with rows of more than 128 columns too wide for registers, as those of more than 16,384 are."""
    if request.param:
        for room in ("rms_norm_quant", "rms_norm"):
            module = import_module(f"minids_kernels.{room}")
            monkeypatch.setattr(module, "MAX_BLOCK" if room == "rms_norm_quant" else "MAX_BLOCK_FWD", 128)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight in fp32, residual."""
    x, residual = (3 * torch.randn(2, *shape) + 0.5).to(device, dtype)
    return x, 1 + torch.randn(shape[-1], device=device) / 4, residual


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.is_contiguous() or (a.dtype == torch.float32 and a.flatten(0, -2).T.is_contiguous())
        assert torch.equal(a.view(torch.uint8) if a.dtype == E4M3 else a, b.view(torch.uint8) if b.dtype == E4M3 else b)


def assert_near_norm(codes: Tensor, scales: Tensor, y: Tensor) -> None:
    """codes [R, C], scales [R, ceil(C / 128)] against exact y: half a step of e4m3 is 1/16 of a number, below 2^-6 of
    its scale 2^-10 of the scale; 1e-4 more for the norm's own fp32 roundings, since next to the middle of two steps
    they decide between them."""
    scale = scales.double().repeat_interleave(128, -1)[:, : codes.shape[1]]
    error = (codes.double() * scale - y).abs()
    assert (error <= torch.maximum(y.abs() / 16, scale * 2**-10) * (1 + 1e-4)).all()


@pytest.mark.parametrize(("dtype", "scale_format", "with_residual"), MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(
    shape: tuple[int, ...], dtype: torch.dtype, scale_format: str, with_residual: bool, device: torch.device
) -> None:
    x, weight, residual = inputs(shape, dtype, device)
    results = rms_norm_quant(x, weight, EPS, residual if with_residual else None, scale_format, transposed=True)
    codes, scales, *totals, codes_t, scales_t = results
    if with_residual:
        (total,) = totals
        if device.type == "cuda" or dtype != torch.bfloat16:  # the interpreter cuts bf16 off
            assert torch.equal(total, x + residual)
    else:
        total = x
    assert codes.shape == x.shape and codes.dtype == codes_t.dtype == E4M3
    assert scales.shape == (*x.shape[:-1], -(-x.shape[-1] // 128))
    y = F.rms_norm(total.double(), weight.shape, weight.double(), EPS).view(-1, shape[-1])
    assert_near_norm(codes.view(y.shape), scales.view(y.shape[0], -1) if y.numel() else scales, y)
    assert_near_norm(codes_t, scales_t, y.t())


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_the_bits_of_both_steps(scale_format: str, wide: None, device: torch.device) -> None:
    """The fp32 norm, quantised by the op that is tested bit for bit. A GPU's two norms may sum in two orders."""
    if device.type == "cuda":
        pytest.skip("sums of another order may round otherwise")
    x, weight, residual = inputs((130, 140), torch.float32, device)
    y, total = rms_norm(x, weight, EPS, residual=residual)
    codes, scales, *turned = quantize_tiles_both(y, scale_format)
    assert_same_bits(rms_norm_quant(x, weight, EPS, residual, scale_format, True), (codes, scales, total, *turned))
    assert_same_bits(rms_norm_quant(x, weight, EPS, residual, scale_format), (codes, scales, total))
    plain = quantize_tiles_both(rms_norm(x, weight, EPS), scale_format)
    assert_same_bits(rms_norm_quant(x, weight, EPS, None, scale_format, True), plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_reference(transposed: bool) -> None:
    x, weight, residual = inputs((130, 200), torch.bfloat16, torch.device("cpu"))
    codes, scales, total, *turned = rms_norm_quant_reference(x, weight, EPS, residual, "fp32", transposed)
    assert torch.equal(total, x + residual)
    y = F.rms_norm(total.double(), weight.shape, weight.double(), EPS)
    assert_near_norm(codes, scales, y)
    assert len(turned) == 2 * transposed
    if transposed:
        assert_near_norm(*turned, y.t())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_and_unwritten_memory(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """poisoned_memory fills codes with NaN's bits as well."""
    x, weight, residual = inputs((133, 140), torch.float32, device)
    want = rms_norm_quant(x, weight, EPS, residual, transposed=True)
    with poisoned_memory():
        got = rms_norm_quant(layout(x), weight, EPS, layout(residual), transposed=True)
    assert_same_bits(got, want)
    assert_same_bits(rms_norm_quant(x, weight, EPS, residual, transposed=True), want)


def test_nan_and_infinity_are_seen(device: torch.device) -> None:
    x, weight, _ = inputs((3, 140), torch.float32, device)
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    codes, _, codes_t, _ = rms_norm_quant(x, weight, EPS, transposed=True)
    assert codes.float().isnan().any(1).tolist() == [True, True, False]
    assert codes_t.float().isnan().any(0).tolist() == [True, True, False]


def test_zeros(device: torch.device) -> None:
    codes, scales = rms_norm_quant(torch.zeros(3, 140, device=device), torch.ones(140, device=device), EPS)
    assert not codes.float().any() and (scales == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_operator_is_registered_well(with_residual: bool, transposed: bool, device: torch.device) -> None:
    x, weight, residual = inputs((6, 140), torch.float32, device)
    opcheck(ops.rms_norm_quant.default, (x, weight, residual if with_residual else None, EPS, False, transposed))


def test_one_graph_under_compile(device: torch.device) -> None:
    x, weight, residual = inputs((2, 3, 140), torch.float32, device)
    compiled = torch.compile(rms_norm_quant, fullgraph=True, backend="aot_eager", dynamic=True)
    got = compiled(x, weight, EPS, residual, transposed=True)
    assert_same_bits(got, rms_norm_quant(x, weight, EPS, residual, transposed=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(3, 8).double()), TypeError, "x: got torch.float64, allowed are .*bfloat16"),
        (dict(weight=torch.ones(7)), ValueError, r"weight: got shape \(7,\), allowed is \(8\)"),
        (dict(residual=torch.zeros(8)), ValueError, r"residual: got shape \(8,\), allowed is \(3, 8\)"),
        (dict(residual=torch.zeros(3, 8).half()), TypeError, "residual: got torch.float16, allowed is x's"),
        (dict(scale_format="fp8"), ValueError, "scale_format: got 'fp8', allowed are 'fp32' and 'ue8m0'"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = dict(x=torch.zeros(3, 8), weight=torch.ones(8)) | change
    with pytest.raises(error, match=message):
        rms_norm_quant(**arguments)  # type: ignore[arg-type]
