"""SwiGLU against torch's silu in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import swiglu, swiglu_reference
from torch import Tensor

from tests.kernels.numerics import MODES, assert_near, check, error_bound

SHAPES = [(0, 8), (4, 0), (2,), (1, 2), (1, 6), (13, 34), (3, 5, 66), (257, 62)]


def exact(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(shape: tuple[int, ...], mode: str) -> None:
    check(swiglu, exact, [3 * torch.randn(shape)], mode, roundings=4, length=8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_agrees_with_torch(shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape)
    assert_near(swiglu_reference(x), exact(x.double()), error_bound(torch.float32, 4, 8))


def test_far_ends() -> None:
    """silu is 0 far below and its input far above; its gradient 0 and 1."""
    gate_up = torch.tensor([[-1e4, 2.0], [1e4, 2.0], [0.0, 2.0**100]], requires_grad=True)
    out = swiglu(gate_up)
    assert out.flatten().tolist() == [0.0, 2e4, 0.0]
    out.sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad.tolist() == [[0.0, 0.0], [2.0, 1e4], [2.0**99, 0.0]]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.int32), TypeError, "gate_up: got torch.int32, allowed are .*bfloat16"),
        (torch.zeros(3, 7), ValueError, "gate_up: got last dimension 7, allowed is an even one"),
    ],
)
def test_bad_input(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(x)
