"""Ops in eager mode go around torch.library; whatever traces goes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from minids_kernels import linear_cross_entropy, moe_experts, rms_norm
from minids_kernels._operator import Operator, operator
from minids_kernels._ops import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Names of the operators called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _weighted_square() -> Operator:
    """sum x^2 * factor over a list of tensors, and copies of them."""

    @operator("test_weighted_square")
    def weighted_square(xs: list[Tensor], factor: float) -> tuple[Tensor, list[Tensor]]:
        return torch.stack([(x * x).sum() for x in xs]).sum() * factor, [x.clone() for x in xs]

    @weighted_square.register_fake
    def _(xs: list[Tensor], factor: float) -> tuple[Tensor, list[Tensor]]:
        return xs[0].new_empty(()), [torch.empty_like(x) for x in xs]

    return weighted_square


WEIGHTED_SQUARE = _weighted_square()


@pytest.fixture
def leaves() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)]


def test_eager_and_registered_agree_bit_for_bit(leaves: list[Tensor]) -> None:
    dtype = torch.float32

    def run(call: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        y, _ = call(*leaves, 1e-6, dtype)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    direct = run(lambda *args: (rms_norm(*args[:3]), args[0]))
    for got, want in zip(direct, run(ops.rms_norm.default), strict=True):
        assert torch.equal(got, want)


def test_a_gradient_goes_around_the_dispatcher(leaves: list[Tensor]) -> None:
    node = rms_norm(*leaves).grad_fn
    assert type(node).__name__ == "_rms_normBackward"


def test_without_a_gradient_nothing_is_kept(leaves: list[Tensor]) -> None:
    with torch.no_grad():
        assert rms_norm(*leaves).grad_fn is None
    assert not rms_norm(*(x.detach() for x in leaves)).requires_grad


def test_a_mode_sees_the_operator(leaves: list[Tensor]) -> None:
    with Seen() as seen:
        rms_norm(*leaves).sum().backward()
    assert seen.names.count("minids_kernels.rms_norm.default") == 1
    assert seen.names.count("minids_kernels.rms_norm_backward.default") == 1


def test_a_subclass_is_dispatched() -> None:
    """The function itself would ask fake ids for their values."""
    mode = FakeTensorMode()
    ids = torch.tensor([[0, 1]]).expand(5, 2)
    inputs = torch.randn(5, 8), ids, torch.ones(5, 2), torch.ones(2, 4, 8), torch.ones(2, 8, 2)
    y = moe_experts(*(mode.from_tensor(x) for x in inputs))
    assert isinstance(y, FakeTensor) and y.shape == (5, 8)


def test_gradients_of_lists(leaves: list[Tensor]) -> None:
    @operator("test_scaled_total")
    def scaled_total(xs: list[Tensor], factor: Tensor) -> Tensor:
        return torch.stack([x.sum() for x in xs]).sum() * factor

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], *inputs[0])

    def backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], Tensor]:
        factor, *xs = ctx.saved_tensors
        return [(dout * factor).expand_as(x) for x in xs], dout * torch.stack([x.sum() for x in xs]).sum()

    scaled_total.register_autograd(backward, setup_context=setup)
    factor = torch.tensor(3.0, requires_grad=True)
    scaled_total(leaves, factor).backward()
    assert all(x.grad is not None and (x.grad == 3).all() for x in leaves)
    assert factor.grad is not None and torch.allclose(factor.grad, sum(x.detach().sum() for x in leaves))


def test_a_list_is_looked_into(leaves: list[Tensor]) -> None:
    """An op without a formula must not be run where autograd could follow it piece by piece."""
    total, _ = WEIGHTED_SQUARE(leaves, 2.0)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        total.backward()
    total, copies = WEIGHTED_SQUARE([x.detach() for x in leaves], 2.0)
    assert float(total) == pytest.approx(2 * sum(float(x.detach().square().sum()) for x in leaves), rel=1e-6)
    assert torch.equal(copies[1], leaves[1])


def _experts(leaves: list[Tensor]) -> Tensor:
    x = leaves[0]
    ids = torch.tensor([[0, 1]]).expand(5, 2)
    return moe_experts(x, ids, torch.ones(5, 2), torch.ones(2, 4, 8), torch.ones(2, 8, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda leaves: rms_norm(*leaves),
        lambda leaves: rms_norm(*leaves, residual=leaves[0])[0],
        lambda leaves: linear_cross_entropy(leaves[0], leaves[0][:3].detach(), torch.tensor([0, 1, 2, 0, 1])),
        _experts,
    ],
    ids=["rms_norm", "add_rms_norm", "linear_cross_entropy", "moe_experts"],
)
def test_a_second_derivative_is_refused(call: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> None:
    (first,) = torch.autograd.grad(call(leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first.sum(), leaves[:1])
