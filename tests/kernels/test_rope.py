"""Rotary embedding against a rotation written out pair by pair, and the properties that make it one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import rope, rope_reference
from minids_kernels.rope import rotate, rotate_back_
from torch import Tensor

from tests.kernels.numerics import MODES, assert_near, check, error_bound

SHAPES = [
    (0, 2, 8, 4),
    (1, 1, 2, 2),
    (1, 1, 7, 2),
    (1, 3, 7, 2),
    (13, 5, 6, 6),
    (29, 2, 24, 8),
    (7, 0, 8, 4),
]  # T, H, D, R


def angles(tokens: int, width: int, start: int = 0) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(start, start + tokens, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One pair after the other, as the paper's equation 34 has it."""
    passed = x.shape[-1] - 2 * cos.shape[1]
    columns = [x[..., i] for i in range(passed)]
    for i in range(cos.shape[1]):
        a, b = x[..., passed + 2 * i], x[..., passed + 2 * i + 1]
        c, s = cos[:, i : i + 1].to(x.dtype), sin[:, i : i + 1].to(x.dtype)
        columns += [a * c - b * s, a * s + b * c]
    return torch.stack(columns, -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_pairs(shape: tuple[int, int, int, int], mode: str, device: torch.device) -> None:
    *size, width = shape
    cos, sin = (angle.to(device) for angle in angles(size[0], width))
    check(
        lambda x: rope(x, cos, sin), lambda x: exact(x, cos, sin), [torch.randn(size)], mode, roundings=4, length=4,
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph(dynamic: bool | None) -> None:
    x, (cos, sin) = torch.randn(6, 3, 8, requires_grad=True), angles(6, 8)
    compiled = torch.compile(rope, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = compiled(x, cos, sin), rope(x, cos, sin)
    assert_near(got.detach(), want.detach().double(), error_bound(torch.float32, 4, 4))
    dgot, dwant = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want))
    assert_near(dgot, dwant.double(), error_bound(torch.float32, 8, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_there_and_back_where_it_lies(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """The tails of longer rows, in angles' and rows' own strides: neither touches what lies around."""
    rows = torch.randn(9, 3, width + 10, device=device).to(dtype)
    cos, sin = (angle.to(device).repeat_interleave(2, 0)[::2] for angle in angles(9, width))
    tail = rows[:, 1:, 4 : 4 + width]
    turned = rotate(tail, cos, sin)
    bound = error_bound(dtype, 1, 1) + error_bound(torch.float32, 4, 4)
    assert_near(turned, exact(tail.double(), cos, sin), bound)
    back = rows.clone()
    back[:, 1:, 4 : 4 + width] = turned
    around = back.clone()
    rotate_back_(back[:, 1:, 4 : 4 + width], cos, sin)
    assert_near(back[:, 1:, 4 : 4 + width], tail, 2 * bound)
    back[:, 1:, 4 : 4 + width] = around[:, 1:, 4 : 4 + width]
    assert torch.equal(back, around)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_agrees_with_pairs(shape: tuple[int, int, int, int]) -> None:
    *size, width = shape
    x, (cos, sin) = torch.randn(size), angles(size[0], width)
    assert_near(rope_reference(x, cos, sin), exact(x.double(), cos, sin), error_bound(torch.float32, 4, 4))


@settings(max_examples=30, deadline=None)
@given(shift=st.integers(0, 5000), heads=st.integers(1, 3), pairs=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_products_depend_on_distance_alone(shift: int, heads: int, pairs: int, seed: int) -> None:
    """What it is for: <rope(q, m), rope(k, n)> is the same for (m + shift, n + shift); lengths stay."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 6, heads, 2 * pairs, dtype=torch.float64)

    def scores(start: int) -> Tensor:
        angle = angles(6, 2 * pairs, start)
        return torch.einsum("mhd,nhd->hmn", rope(q, *angle), rope(k, *angle))

    # cos and sin are fp32: a product of 2 * pairs numbers of size 1 is off by a few of their roundings
    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-5 * pairs)
    turned = rope(q, *angles(6, 2 * pairs, shift))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)


def test_quarter_turn_and_untouched_part() -> None:
    x = torch.tensor([[[9.0, 8.0, 1.0, 2.0]]])
    out = rope(x, torch.tensor([[math.cos(math.pi / 2)]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(out, torch.tensor([[[9.0, 8.0, -2.0, 1.0]]]))
    assert torch.equal(out[..., :2], x[..., :2])


def test_no_angles_pass_everything() -> None:
    x = torch.randn(3, 2, 4)
    assert torch.equal(rope(x, torch.ones(3, 0), torch.zeros(3, 0)), x)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "error", "message"),
    [
        (torch.zeros(3, 2, 8).int(), (3, 2), (3, 2), TypeError, "x: got torch.int32"),
        (torch.zeros(3, 8), (3, 2), (3, 2), ValueError, r"x: got shape \(3, 8\), allowed is \(any, any, any\)"),
        (torch.zeros(3, 2, 8), (2, 2), (2, 2), ValueError, r"cos: got shape \(2, 2\), allowed is \(3, any\)"),
        (torch.zeros(3, 2, 8), (3, 2), (3, 3), ValueError, r"sin: got shape \(3, 3\), allowed is \(3, 2\)"),
        (torch.zeros(3, 2, 8), (3, 5), (3, 5), ValueError, "cos: got 5 angles, allowed are at most 4 for heads of 8"),
    ],
)
def test_bad_input(x: Tensor, cos: tuple[int, int], sin: tuple[int, int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        rope(x, torch.zeros(cos), torch.zeros(sin))
