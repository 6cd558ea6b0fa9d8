"""SwiGLU against torch's silu in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import swiglu, swiglu_reference
from minids_kernels._ops import ops
from minids_kernels.swiglu import swiglu_backward
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import LAYOUTS, MODES, assert_near, check, error_bound

SHAPES = [(0, 8), (4, 0), (2,), (1, 2), (1, 6), (13, 34), (3, 5, 66), (257, 62), (3, 2 * 1025)]


def exact(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple[int, ...], mode: str, device: torch.device) -> None:
    check(swiglu, exact, [3 * torch.randn(shape)], mode, roundings=4, length=8, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_agrees_with_torch(shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape)
    assert_near(swiglu_reference(x), exact(x.double()), error_bound(torch.float32, 4, 8))


def test_far_ends(device: torch.device) -> None:
    """silu is 0 far below and its input far above; its gradient 0 and 1."""
    gate_up = torch.tensor([[-1e4, 2.0], [1e4, 2.0], [0.0, 2.0**100]], device=device, requires_grad=True)
    out = swiglu(gate_up)
    assert out.flatten().tolist() == [0.0, 2e4, 0.0]
    out.sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad.tolist() == [[0.0, 0.0], [2.0, 1e4], [2.0**99, 0.0]]


def test_not_a_number_is_seen(device: torch.device) -> None:
    gate_up = torch.tensor([[float("nan"), 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, float("nan")]], device=device)
    assert swiglu(gate_up).isnan().tolist() == [[True, False], [False, True]]
    grad = swiglu_backward(torch.ones(2, 2, device=device), gate_up)
    assert grad.isnan().tolist() == [[True, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_operators_are_registered_well(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    gate_up, dy = layout(torch.randn(7, 34)).to(device), layout(torch.randn(7, 17)).to(device)
    opcheck(ops.swiglu.default, (gate_up.detach().requires_grad_(),))
    opcheck(ops.swiglu_backward.default, (dy, gate_up))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.int32), TypeError, "gate_up: got torch.int32, allowed are .*bfloat16"),
        (torch.zeros(3, 7), ValueError, r"gate_up: got shape \(3, 7\), allowed is an even last dimension"),
        (torch.tensor(1.0), ValueError, r"gate_up: got shape \(\), allowed is an even last dimension"),
    ],
)
def test_bad_input(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(x)
