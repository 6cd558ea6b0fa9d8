"""fp8_linear against fp64 products of what its operands dequantise to, and against the true product."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from minids_kernels import (
    dequantize_blocks,
    dequantize_tiles,
    fp8_linear,
    fp8_linear_reference,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_transposed,
)
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, assert_near, error_bound, leaves, poisoned_memory, run, tensor_core_error

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (3, 5, 129), (17, 40, 20), (130, 20, 33)]  # M, N, K


def rows(x: Tensor) -> Tensor:
    return dequantize_tiles(*quantize_tiles(x), torch.float32).double()


def columns(x: Tensor) -> Tensor:
    """x in 128x1 tiles, transposed."""
    return dequantize_tiles(*quantize_tiles_transposed(x), torch.float32).double()


def blocks(weight: Tensor) -> Tensor:
    return dequantize_blocks(*quantize_blocks(weight), torch.float32).double()


def inputs(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    return [torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)]


def bound(dtype: torch.dtype, length: int, device: torch.device = CPU) -> float:
    """One rounding to `dtype`, sums of `length` terms in fp32, scales multiplied; the interpreter cuts bf16 off, where
    hardware rounds it."""
    return error_bound(dtype, 2, length) + error_bound(torch.float32, 2, length) + tensor_core_error(device, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_products(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = inputs(*shape, dtype, device)
    dy = torch.randn(shape[:2]).to(device, dtype)
    with poisoned_memory():
        y, (dx, dweight) = run(fp8_linear, [x, weight], dy)
    assert y.dtype == dx.dtype == dweight.dtype == dtype
    assert_near(y, rows(x) @ blocks(weight).T, bound(dtype, shape[2], device), "y")
    assert_near(dx, rows(dy) @ blocks(weight), bound(dtype, shape[1], device), "dx")
    assert_near(dweight, columns(dy) @ columns(x).T, bound(dtype, shape[0], device), "dweight")


def test_error_against_the_true_products(device: torch.device) -> None:
    """An operand's e4m3 rounding errs by at most 2^-4 of a number, 2^-4 / sqrt(3) in the root mean square; the errors
    of a product's two operands are independent."""
    x, weight = inputs(64, 48, 96, torch.float32, device)
    dy = torch.randn(64, 48, device=device)
    y, grads = run(fp8_linear, [x, weight], dy)
    want, wanted = run(fp8_linear_reference, [x, weight], dy)
    for got, exact in zip((y, *grads), (want, *wanted), strict=True):
        assert_near(got, exact.double(), math.sqrt(2 / 3) * 2.0**-4)


def test_leading_dimensions_and_no_rows(device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 7, device=device), torch.randn(5, 7, device=device)
    y, (dx, _) = run(fp8_linear, [x, weight])
    assert y.shape == (2, 3, 5) and dx.shape == x.shape
    assert torch.equal(y.view(6, 5), fp8_linear(x.view(6, 7), weight))
    y, (dx, dweight) = run(fp8_linear, [x[:0], weight])
    assert y.shape == (0, 3, 5) and dx.shape == (0, 3, 7) and torch.equal(dweight, torch.zeros_like(weight))


def test_dtypes_may_differ_and_autocast(device: torch.device) -> None:
    x, weight = torch.randn(3, 20, device=device).bfloat16(), torch.randn(5, 20, device=device)
    y, (dx, dweight) = run(fp8_linear, [x, weight])
    assert y.dtype == dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        y, (dx, _) = run(fp8_linear, [x.float(), weight])
    assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), lambda x: x[..., :1].expand(x.shape)], ids=[*LAYOUTS, "same"])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, weight = inputs(6, 20, 12, torch.float32, device)
    dy = torch.randn(6, 20, device=device)
    x, weight, dy = (layout(t) for t in (x, weight, dy))
    y, grads = run(fp8_linear, [x, weight], dy)
    want, wanted = run(fp8_linear, [x.contiguous(), weight.contiguous()], dy.contiguous())
    for got, exact in zip((y, *grads), (want, *wanted), strict=True):
        assert_near(got, exact.double(), error_bound(torch.float32, 2, 20))


def test_each_gradient_alone(device: torch.device) -> None:
    tensors = inputs(6, 20, 12, torch.float32, device)
    _, grads = run(fp8_linear, tensors)
    for index, want in enumerate(grads):
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        fp8_linear(*alone).sum().backward()
        assert torch.equal(torch.stack([t.grad for t in alone if t.grad is not None]), want[None])
    assert not fp8_linear(*tensors).requires_grad


def test_the_same_bits_twice(device: torch.device) -> None:
    x, weight = leaves(inputs(6, 20, 12, torch.float32, device))
    y = fp8_linear(x, weight)
    first = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (x, weight))
    assert torch.equal(y, fp8_linear(x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_changed_weight_counts_at_once() -> None:
    """Also after a fused optimizer, which leaves the weight's version as it was, and with new memory."""
    weight, x = torch.nn.Parameter(torch.randn(20, 12)), torch.randn(4, 12, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def stepped() -> None:
        version = weight._version
        optimizer.step()
        assert weight._version == version

    def replaced() -> None:
        weight.data = torch.randn(20, 12)

    for change in (stepped, replaced):
        fp8_linear(x, weight).square().sum().backward()
        change()
        y, want = (fp8_linear(x, w) for w in (weight, weight.detach().clone()))
        assert torch.equal(y, want)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, want)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_codes_are_all_that_is_kept(half: torch.dtype) -> None:
    kept: list[Tensor] = []
    x, weight = (t.requires_grad_() for t in inputs(130, 20, 260, half, "cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, weight)
    sizes = {torch.uint8: 130 * 260 + 20 * 260, torch.float32: 260 * 2 + 1 * 3}  # codes, scales
    assert {dtype: sum(t.numel() for t in kept if t.dtype == dtype) for dtype in {t.dtype for t in kept}} == sizes


def test_one_graph_under_compile(device: torch.device) -> None:
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 9):
        tensors = inputs(m, 20, 12, torch.float32, device)
        dy = torch.randn(m, 20, device=device)
        y, grads = run(compiled, tensors, dy)
        want, wanted = run(fp8_linear, tensors, dy)
        assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_registration(wanted: tuple[bool, bool], device: torch.device) -> None:
    tensors = [t.requires_grad_(w) for t, w in zip(inputs(6, 20, 12, torch.float32, device), wanted, strict=True)]
    opcheck(ops.fp8_linear.default, (*tensors, torch.float32, *wanted))


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(3, 8).double(), torch.zeros(5, 8), TypeError, "x: got torch.float64, allowed are torch.bfloat16"),
        (torch.zeros(3, 8), torch.zeros(5, 8).int(), TypeError, "weight: got torch.int32, allowed are torch.bfloat16"),
        (torch.zeros(3, 8), torch.zeros(5, 7), ValueError, r"weight: got shape \(5, 7\), allowed is \(any, 8\)"),
        (torch.zeros(3, 0), torch.zeros(5, 0), ValueError, r"x: got shape \(3, 0\), allowed is a last dimension of 1"),
    ],
)
def test_bad_input(x: Tensor, weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp8_linear(x, weight)
