"""SwiGLU with quantisation: the bits of both steps one after the other, and near torch's own in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import (
    quantize_tiles,
    quantize_tiles_both,
    swiglu,
    swiglu_backward_quant,
    swiglu_backward_quant_reference,
    swiglu_quant,
    swiglu_quant_reference,
)
from minids_kernels._ops import ops
from minids_kernels.swiglu import swiglu_backward
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, poisoned_memory

E4M3 = torch.float8_e4m3fn
SHAPES = [(0, 8), (4, 0), (1, 2), (131, 34), (3, 256), (5, 2 * 150), (2, 2 * 400)]
MODES = [(torch.float32, "fp32"), (torch.float16, "ue8m0"), (torch.bfloat16, "fp32")]


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """dy, gate_up."""
    rows, width = shape
    return torch.randn(rows, width // 2).to(device, dtype), (3 * torch.randn(shape)).to(device, dtype)


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.is_contiguous() or (a.dtype == torch.float32 and a.flatten(0, -2).T.is_contiguous())
        assert torch.equal(a.view(torch.uint8) if a.dtype == E4M3 else a, b.view(torch.uint8) if b.dtype == E4M3 else b)


def assert_near_exact(codes: Tensor, scales: Tensor, y: Tensor) -> None:
    """codes [R, C], scales [R, ceil(C / 128)] against exact y: half a step of e4m3 is 1/16 of a number, below 2^-6 of
    its scale 2^-10 of the scale; 1e-4 more for fp32 roundings, since next to the middle of two steps they decide."""
    assert codes.dtype == E4M3 and codes.shape == y.shape and scales.shape == (y.shape[0], -(-y.shape[1] // 128))
    scale = scales.double().repeat_interleave(128, -1)[:, : codes.shape[1]]
    error = (codes.double() * scale - y).abs()
    assert (error <= torch.maximum(y.abs() / 16, scale * 2**-10) * (1 + 1e-4)).all()


def exact(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """fp64: swiglu, and its gradient by torch's autograd."""
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    y = F.silu(gate) * up
    return y.detach(), torch.autograd.grad(y, leaf, dy.double())[0]


@pytest.mark.parametrize(("dtype", "scale_format"), MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple[int, int], dtype: torch.dtype, scale_format: str, device: torch.device) -> None:
    dy, gate_up = inputs(shape, dtype, device)
    y, grad = exact(dy, gate_up)
    assert_near_exact(*swiglu_quant(gate_up, scale_format), y)
    weight = torch.randn(shape[0]).to(device)
    assert_near_exact(*swiglu_quant(gate_up, scale_format, weight), y * weight.double().unsqueeze(1))
    codes, scales, codes_t, scales_t = swiglu_backward_quant(dy, gate_up, scale_format)
    assert_near_exact(codes, scales, grad)
    assert_near_exact(codes_t, scales_t, grad.t())


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(131, 2 * 150), (3, 2 * 256)], ids=str)
def test_the_bits_of_both_steps(shape: tuple[int, int], scale_format: str, device: torch.device) -> None:
    """fp32, quantised by the ops that are tested bit for bit; compilers may contract products and sums otherwise."""
    if device.type == "cuda":
        pytest.skip("two kernels may be compiled to other roundings")
    dy, gate_up = inputs(shape, torch.float32, device)
    assert_same_bits(swiglu_quant(gate_up, scale_format), quantize_tiles(swiglu(gate_up), scale_format))
    weight = torch.randn(shape[0], device=device)
    weighted = quantize_tiles(swiglu(gate_up) * weight.unsqueeze(1), scale_format)
    assert_same_bits(swiglu_quant(gate_up, scale_format, weight), weighted)
    want = quantize_tiles_both(swiglu_backward(dy, gate_up), scale_format)
    assert_same_bits(swiglu_backward_quant(dy, gate_up, scale_format), want)


def test_references() -> None:
    dy, gate_up = inputs((131, 300), torch.bfloat16, torch.device("cpu"))
    y, grad = exact(dy, gate_up)
    assert_near_exact(*swiglu_quant_reference(gate_up), y)
    weight = torch.randn(131)
    assert_near_exact(*swiglu_quant_reference(gate_up, weight=weight), y * weight.double().unsqueeze(1))
    codes, scales, codes_t, scales_t = swiglu_backward_quant_reference(dy, gate_up)
    assert_near_exact(codes, scales, grad)
    assert_near_exact(codes_t, scales_t, grad.t())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_and_unwritten_memory(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """poisoned_memory fills codes with NaN's bits as well."""
    dy, gate_up = inputs((33, 300), torch.float32, device)
    weight = torch.randn(33, device=device)
    want = (*swiglu_quant(gate_up, weight=weight), *swiglu_backward_quant(dy, gate_up))
    with poisoned_memory():
        forward = swiglu_quant(layout(gate_up), weight=weight.repeat_interleave(2)[::2])
        got = (*forward, *swiglu_backward_quant(layout(dy), layout(gate_up)))
    assert_same_bits(got, want)


def test_any_number_of_dimensions(device: torch.device) -> None:
    _, gate_up = inputs((6, 300), torch.float32, device)
    codes, scales = swiglu_quant(gate_up.view(2, 3, 300))
    assert codes.shape == (2, 3, 150) and scales.shape == (2, 3, 2)
    assert_same_bits((codes.view(6, 150), scales.view(6, 2)), swiglu_quant(gate_up))
    weight = torch.randn(6, device=device)
    codes, scales = swiglu_quant(gate_up.view(2, 3, 300), weight=weight.view(2, 3))
    assert_same_bits((codes.view(6, 150), scales.view(6, 2)), swiglu_quant(gate_up, weight=weight))
    codes, scales = swiglu_quant(gate_up[0])
    assert codes.shape == (150,) and scales.shape == (2,)


def test_nan_is_seen(device: torch.device) -> None:
    dy, gate_up = inputs((3, 300), torch.float32, device)
    gate_up[1, 7] = float("nan")
    assert swiglu_quant(gate_up)[0].float().isnan().nonzero().tolist() == [[1, 7]]
    codes, _, codes_t, _ = swiglu_backward_quant(dy, gate_up)
    assert codes.float().isnan().nonzero().tolist() == [[1, 7], [1, 157]]
    assert codes_t.float().isnan().nonzero().tolist() == [[7, 1], [157, 1]]


def test_operators_are_registered_well(device: torch.device) -> None:
    dy, gate_up = inputs((5, 300), torch.float32, device)
    opcheck(ops.swiglu_quant.default, (gate_up, None, False))
    opcheck(ops.swiglu_quant.default, (gate_up, torch.randn(5, device=device), False))
    opcheck(ops.swiglu_backward_quant.default, (dy, gate_up, True))


def test_one_graph_under_compile(device: torch.device) -> None:
    dy, gate_up = inputs((5, 300), torch.float32, device)

    def both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
        return *swiglu_quant(gate_up), *swiglu_backward_quant(dy, gate_up)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same_bits(compiled(dy, gate_up), both(dy, gate_up))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"gate_up: got torch\.float64, allowed are .*bfloat16"):
        swiglu_quant(torch.zeros(3, 8).double())
    with pytest.raises(ValueError, match=r"gate_up: got shape \(3, 7\), allowed is an even last dimension"):
        swiglu_quant(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"weight: got shape \(4,\), allowed is \(3\)"):
        swiglu_quant(torch.zeros(3, 8), weight=torch.zeros(4))
    with pytest.raises(ValueError, match="scale_format: got 'fp8', allowed are 'fp32' and 'ue8m0'"):
        swiglu_quant(torch.zeros(3, 8), "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dy: got shape \(3, 8\), allowed is \(3, 4\)"):
        swiglu_backward_quant(torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(TypeError, match=r"dy: got torch\.int32"):
        swiglu_backward_quant(torch.zeros(3, 4).int(), torch.zeros(3, 8))
