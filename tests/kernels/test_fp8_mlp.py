"""fp8_mlp against two fp8_linear with swiglu between them, and against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from minids_kernels import fp8_linear, fp8_mlp, fp8_mlp_reference, swiglu
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, assert_near, error_bound, leaves, poisoned_memory, run

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 129), (17, 40, 65, 20), (130, 20, 140, 33)]  # M, N, F, K
E4M3_ROUNDING = 2**-4 / math.sqrt(3)  # of a number, in the root mean square


def inputs(m: int, n: int, f: int, k: int) -> list[Tensor]:
    """Of sizes that leave outputs of about 1."""
    return [torch.randn(m, k), torch.randn(2 * f, k) / math.sqrt(k), torch.randn(n, f) * math.sqrt(3 / f)]


def composed(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    return fp8_linear(swiglu(fp8_linear(x, w_gate_up)), w_down)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_linear_layers(shape: tuple[int, int, int, int], device: torch.device) -> None:
    """In fp32, where nothing is rounded between the steps: the same products of the same codes, but for one that turns
    over where sums differ in their last bits."""
    tensors, dy = [t.to(device) for t in inputs(*shape)], torch.randn(shape[:2], device=device)
    with poisoned_memory():
        y, grads = run(fp8_mlp, tensors, dy)
    want, wanted = run(composed, tensors, dy)
    for got, expected in zip((y, *grads), (want, *wanted), strict=True):
        assert_near(got, expected.double(), error_bound(torch.float32, 12, max(shape)) + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_is_near_the_true_products(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Eight roundings to e4m3, of independent error, lie between inputs and a gradient; through SwiGLU an error of gate
    and one of up count one and a half times at most."""
    tensors, dy = [t.to(device, dtype) for t in inputs(*shape)], torch.randn(shape[:2]).to(device, dtype)
    y, grads = run(fp8_mlp, tensors, dy)
    want, wanted = run(fp8_mlp_reference, [t.float() for t in tensors], dy.float())
    for got, expected in zip((y, *grads), (want, *wanted), strict=True):
        assert got.dtype == dtype
        assert_near(got, expected.double(), 1.5 * math.sqrt(8) * E4M3_ROUNDING)


def test_reference() -> None:
    x, w_gate_up, w_down = (t.double() for t in inputs(5, 6, 7, 8))
    gate, up = (x @ w_gate_up.T).chunk(2, -1)
    got = fp8_mlp_reference(x.float(), w_gate_up.float(), w_down.float())
    assert_near(got, (gate / (1 + torch.exp(-gate)) * up) @ w_down.T, error_bound(torch.float32, 8, 8))


def test_leading_dimensions_and_no_rows(device: torch.device) -> None:
    x, *weights = (t.to(device) for t in inputs(6, 5, 9, 7))
    y, (dx, *_) = run(fp8_mlp, [x.view(2, 3, 7), *weights])
    assert y.shape == (2, 3, 5) and dx.shape == (2, 3, 7)
    assert torch.equal(y.view(6, 5), fp8_mlp(x, *weights))
    y, (dx, *grads) = run(fp8_mlp, [x.view(2, 3, 7)[:0], *weights])
    assert y.shape == (0, 3, 5) and dx.shape == (0, 3, 7)
    assert all(torch.equal(grad, torch.zeros_like(w)) for grad, w in zip(grads, weights, strict=True))


def test_dtypes_may_differ_and_autocast(device: torch.device) -> None:
    """fp32 weights are quantised from fp32, and their gradients, sums in fp32, are not rounded."""
    x, *weights = (t.to(device) for t in inputs(70, 20, 12, 33))
    tensors, dy = [x.bfloat16(), *weights], torch.randn(70, 20, device=device).bfloat16()
    want, wanted = run(fp8_mlp, tensors, dy)
    with torch.autocast(device.type, torch.bfloat16):
        y, grads = run(fp8_mlp, tensors, dy)
        assert fp8_mlp(x, *weights).dtype == torch.bfloat16
    assert y.dtype == grads[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))
    for grad in grads[1:]:
        assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    tensors, dy = [t.to(device) for t in inputs(6, 20, 9, 12)], torch.randn(6, 20, device=device)
    y, grads = run(fp8_mlp, [layout(t) for t in tensors], layout(dy))
    want, wanted = run(fp8_mlp, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))


def test_each_gradient_alone_and_the_same_bits_twice(device: torch.device) -> None:
    tensors = [t.to(device) for t in inputs(6, 20, 9, 12)]
    _, grads = run(fp8_mlp, tensors)
    for index, want in enumerate(grads):
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        fp8_mlp(*alone).sum().backward()
        assert torch.equal(torch.stack([t.grad for t in alone if t.grad is not None]), want[None])
    assert not fp8_mlp(*tensors).requires_grad


def test_what_is_kept() -> None:
    """gate_up, and codes with their scales."""
    kept: list[Tensor] = []
    m, n, f, k = 130, 20, 140, 260
    tensors = leaves([t.bfloat16() for t in inputs(m, n, f, k)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_mlp(*tensors)
    sizes = {torch.bfloat16: m * 2 * f, torch.uint8: k * m + 2 * f * k + n * f, torch.float32: k * 2 + 3 * 3 + 1 * 2}
    assert {dtype: sum(t.numel() for t in kept if t.dtype == dtype) for dtype in {t.dtype for t in kept}} == sizes


def test_one_graph_under_compile(device: torch.device) -> None:
    compiled = torch.compile(fp8_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 9):
        tensors, dy = [t.to(device) for t in inputs(m, 20, 9, 12)], torch.randn(m, 20, device=device)
        y, grads = run(compiled, tensors, dy)
        want, wanted = run(fp8_mlp, tensors, dy)
        assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want, *wanted), strict=True))


def test_registration(device: torch.device) -> None:
    tensors = [t.to(device) for t in inputs(6, 20, 9, 12)]
    opcheck(ops.fp8_mlp.default, (*tensors, torch.float32, False))
    opcheck(ops.fp8_mlp.default, (*leaves(tensors), torch.float32, True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 8).double()}, TypeError, "x: got torch.float64, allowed are torch.bfloat16"),
        ({"w_down": torch.zeros(5, 4).int()}, TypeError, "w_down: got torch.int32, allowed are torch.bfloat16"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: got shape \(3, 0\), allowed is a last dimension of 1"),
        ({"w_down": torch.zeros(5, 0)}, ValueError, r"w_down: got shape \(5, 0\), allowed is a last dimension of 1"),
        ({"w_gate_up": torch.zeros(7, 8)}, ValueError, r"w_gate_up: got shape \(7, 8\), allowed is \(8, 8\)"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(3, 8), "w_gate_up": torch.zeros(8, 8), "w_down": torch.zeros(5, 4)}
    with pytest.raises(error, match=message):
        fp8_mlp(**{**good, **change})
