"""fp8_linear against fp64 products of what its operands dequantise to, and against the true product."""

from __future__ import annotations

import gc
import importlib
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

room = importlib.import_module("minids_kernels.fp8_linear")

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


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were quantised, one after the other."""
    calls: list[Tensor] = []
    real = room.quantize_blocks

    def counting(weight: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(weight)
        result: tuple[Tensor, Tensor] = real(weight)
        return result

    monkeypatch.setattr(room, "quantize_blocks", counting)
    return calls


def test_a_weight_is_quantised_once_a_step(quantised: list[Tensor]) -> None:
    """Two micro-batches share codes, forward and backward; an optimizer's step makes new ones."""
    weight = torch.nn.Parameter(torch.randn(20, 12))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for step in (1, 2):
        for _ in range(2):
            x = torch.randn(4, 12, requires_grad=True)
            y = fp8_linear(x, weight)
            assert_near(y.detach(), rows(x.detach()) @ blocks(weight.detach()).T, bound(torch.float32, 12))
            y.square().sum().backward()
        optimizer.step()
        assert len(quantised) == step


def test_new_memory_means_new_codes(quantised: list[Tensor]) -> None:
    weight, x = torch.nn.Parameter(torch.randn(20, 12)), torch.randn(4, 12)
    fp8_linear(x, weight)
    weight.data = torch.randn(20, 12)
    assert_near(fp8_linear(x, weight).detach(), rows(x) @ blocks(weight.detach()).T, bound(torch.float32, 12))
    assert len(quantised) == 2


def test_codes_die_with_their_weight(quantised: list[Tensor]) -> None:
    before = len(room._kept)
    weight = torch.nn.Parameter(torch.randn(20, 12))
    fp8_linear(torch.randn(4, 12), weight).sum().backward()
    assert len(room._kept) == before + 1
    quantised.clear()
    del weight
    gc.collect()
    assert len(room._kept) == before


def test_inference_tensors(quantised: list[Tensor]) -> None:
    """They count no versions: quantised each time."""
    with torch.inference_mode():
        weight, x = torch.randn(20, 12), torch.randn(4, 12)
        assert torch.equal(fp8_linear(x, weight), fp8_linear(x, weight))
    assert len(quantised) == 2


def test_one_graph_under_compile(device: torch.device) -> None:
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 9):
        tensors = inputs(m, 20, 12, torch.float32, device)
        dy = torch.randn(m, 20, device=device)
        y, grads = run(compiled, tensors, dy)
        want, wanted = run(fp8_linear, tensors, dy)
        assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))


def test_registration(device: torch.device) -> None:
    """Opcheck but for its tests that multiply or add up all tensors, which torch cannot do with fp8: the schema's, and
    with codes among the outputs the compiled one (see test_one_graph_under_compile)."""
    tests = ("test_autograd_registration", "test_faketensor")
    x, weight = inputs(6, 20, 12, torch.float32, device)
    opcheck(ops.fp8_linear.default, (x, weight, torch.float32, False), test_utils=tests)
    opcheck(ops.fp8_linear.default, (*leaves([x, weight]), torch.float32, True), test_utils=tests)
    tests = (*tests, "test_aot_dispatch_dynamic")
    opcheck(ops.fp8_linear_dgrad.default, (*quantize_tiles(x @ weight.T), weight, torch.float32), test_utils=tests)


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
