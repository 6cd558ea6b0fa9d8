"""RMSNorm against torch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import rms_norm, rms_norm_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import MODES, assert_near, check, error_bound

SHAPES = [(0, 8), (1, 1), (1, 7), (5,), (13, 64), (3, 5, 129), (257, 31), (2, 4099), (3, 8300), (2, 16_500)]


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def inputs(shape: tuple[int, ...]) -> list[Tensor]:
    return [3 * torch.randn(shape) + 0.5, 1 + torch.randn(shape[-1]) / 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple[int, ...], mode: str, device: torch.device) -> None:
    # One number's norm is its sign: its gradient is nothing but rounding unless eps is large.
    eps = 50.0 if shape[-1] == 1 else 1e-6
    rows = max(1, torch.Size(shape[:-1]).numel())
    check(
        lambda x, w: rms_norm(x, w, eps), lambda x, w: exact(x, w, eps), inputs(shape), mode,
        roundings=4, length=shape[-1] + rows, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_agrees_with_torch(shape: tuple[int, ...], mode: str, device: torch.device) -> None:
    """Norm and sum side by side, so that the gradient of both is what flows back."""
    eps = 50.0 if shape[-1] == 1 else 1e-6

    def ours(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        return torch.stack(rms_norm(x, w, eps, residual=residual))

    def theirs(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        total = (x + residual).to(MODES[mode][0]).double() if mode == "fp16" else x + residual
        return torch.stack((exact(total, w, eps), total))

    x, weight = inputs(shape)
    rows = max(1, torch.Size(shape[:-1]).numel())
    check(ours, theirs, [x, torch.randn(shape), weight], mode, roundings=5, length=shape[-1] + rows, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8), (5, 130)], ids=str)
def test_residual_wider_than_x(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """The sum keeps the residual's fp32: as if x had been fp32 of the same values, gradients too, x's then rounded."""
    x, weight = inputs(shape)
    tensors = [x.to(device, dtype), torch.randn(shape).to(device), weight.to(device)]
    dy, dsum = torch.randn(2, *shape).to(device)

    def both(x: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *tensors[1:])]
        y, total = rms_norm(leaves[0], leaves[2], residual=leaves[1])
        assert total.dtype == torch.float32 and y.dtype == x.dtype
        return [total, y, *torch.autograd.grad([y, total], leaves, [dy.to(y.dtype), dsum])]

    got, want = both(tensors[0]), both(tensors[0].float())
    assert torch.equal(got[0], want[0])
    bound = error_bound(dtype, 2, 1)  # y and dy are rounded, in Triton's interpreter towards zero
    for one, other in zip(got[1:], want[1:], strict=True):
        assert_near(one, other, bound, floor=shape[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_agrees_with_torch(shape: tuple[int, ...]) -> None:
    x, weight = inputs(shape)
    got = rms_norm_reference(x, weight, 1e-5)
    assert_near(got, exact(x.double(), weight.double(), 1e-5), error_bound(torch.float32, 4, shape[-1]))


@pytest.mark.parametrize(("x", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weight_of_another_dtype(x: torch.dtype, weight: torch.dtype) -> None:
    """Gradients come in each tensor's own dtype; bf16 activations with fp32 weights are what mixed training has."""
    a, w = (t.to(dtype).requires_grad_() for t, dtype in zip(inputs((17, 40)), (x, weight), strict=True))
    dout = torch.randn(17, 40).to(x)
    out = rms_norm(a, w)
    out.backward(dout)
    a64, w64 = (t.detach().double().requires_grad_() for t in (a, w))
    want = exact(a64, w64, 1e-6)
    want.backward(dout.double())
    assert out.dtype == x and a.grad is not None and a.grad.dtype == x
    assert w.grad is not None and w.grad.dtype == weight
    for got, expected in ((out, want.detach()), (a.grad, a64.grad), (w.grad, w64.grad)):
        assert expected is not None
        assert_near(got.detach(), expected, error_bound(torch.bfloat16, 4, 40))


def test_sizes_at_the_ends_of_fp32() -> None:
    """Rows of 1e18, whose squares' sum still fits, rows of 1e-15 that eps outweighs, and rows of zeros."""
    x = torch.randn(3, 64) * torch.tensor([[1e18], [1e-15], [0.0]])
    weight = torch.ones(64)
    assert_near(rms_norm(x, weight)[0], exact(x.double(), weight.double(), 1e-6)[0], 1e-6)
    assert_near(rms_norm(x, weight)[1], exact(x.double(), weight.double(), 1e-6)[1], 1e-6)
    assert torch.equal(rms_norm(x, weight)[2], torch.zeros(64))


def test_large_fp16_does_not_overflow() -> None:
    x = torch.full((2, 512), 3e4, dtype=torch.float16)  # squares and their sum are far beyond fp16
    assert_near(rms_norm(x, torch.ones(512).half()), torch.ones(2, 512).double(), error_bound(torch.float16, 2, 512))


def test_autocast_gives_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(torch.randn(3, 8), torch.ones(8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.int64), torch.ones(8), TypeError, "x: got torch.int64, allowed are .*float32"),
        (torch.zeros(3, 8), torch.ones(7), ValueError, r"weight: got shape \(7,\), allowed is \(8\)"),
        (torch.zeros(3, 65_537), torch.ones(65_537), ValueError, "x: got shape .* last dimension of 1 to 65536"),
        (torch.tensor(1.0), torch.ones(1), ValueError, r"x: got shape \(\), allowed is a last dimension"),
        (torch.zeros(3, 8), torch.ones(1, 8), ValueError, r"weight: got shape \(1, 8\), allowed is \(8\)"),
    ],
)
def test_bad_input(x: Tensor, weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(x, weight)


def test_bad_residual() -> None:
    with pytest.raises(ValueError, match=r"residual: got shape \(8,\), allowed is \(3, 8\)"):
        rms_norm(torch.zeros(3, 8), torch.ones(8), residual=torch.zeros(8))
    with pytest.raises(TypeError, match=r"residual: got torch.float64, allowed is x's torch.float32 or torch.float32"):
        rms_norm(torch.zeros(3, 8), torch.ones(8), residual=torch.zeros(3, 8).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype: torch.dtype, device: torch.device) -> None:
    x, residual, dy = torch.randn(3, 6, 40, device=device, dtype=dtype)
    weight = torch.randn(40, device=device)
    x, residual, weight = (t.requires_grad_() for t in (x, residual, weight))
    opcheck(ops.rms_norm.default, (x, weight, 1e-6, dtype))
    opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-6, dtype))
    opcheck(
        ops.rms_norm_backward.default,
        (dy, x.detach(), weight.detach(), torch.rand(6, device=device), residual.detach()),
    )
