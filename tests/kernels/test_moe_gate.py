"""The gate against a loop over one token's experts in plain Python, and its gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import moe_gate, moe_gate_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import assert_near, error_bound, poisoned_memory

# experts, top_k, groups, topk_group: powers of two and not
SHAPES = [(8, 2, 1, 1), (7, 3, 1, 1), (1, 1, 1, 1), (16, 4, 4, 2), (15, 5, 3, 2), (24, 8, 8, 4), (256, 8, 8, 4)]


def gradients(gate, logits: Tensor, bias: Tensor, shape: tuple[int, int, int, int], norm: bool) -> list[Tensor]:
    """ids, weights, scores, and the latter two's gradient by logits."""
    leaf = logits.detach().requires_grad_()
    _, top_k, groups, topk_group = shape
    ids, weight, scores = gate(leaf, bias, top_k, groups, topk_group, norm, 2.5)
    torch.manual_seed(1)
    mixture = (weight * torch.randn(weight.shape).to(weight)).sum() + (
        scores * torch.randn(scores.shape).to(scores)
    ).sum()
    return [ids, weight, scores, *torch.autograd.grad(mixture, leaf)]


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_paths_agree_with_the_reference(
    shape: tuple[int, int, int, int], tokens: int, norm: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(tokens, shape[0], device=device), 0.3 * torch.randn(shape[0], device=device)
    with poisoned_memory():
        ids, *got = gradients(moe_gate, logits, bias, shape, norm)
    want_ids, *want = gradients(moe_gate_reference, logits, bias, shape, norm)
    assert torch.equal(ids, want_ids)
    # some 8 operations in a row, sums of up to top_k terms; normalised, gradients are differences of numbers of size 1,
    # and a handful of them may all be small
    floors = 0.0, 0.0, float(logits.numel() < 50)
    for a, b, floor in zip(got, want, floors, strict=True):
        assert_near(a, b.double(), error_bound(torch.float32, 16, shape[1]), floor=floor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_widened(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(9, 16, device=device).to(dtype), torch.zeros(16, device=device)
    shape = (16, 4, 4, 2)
    ids, weight, scores, grad = gradients(moe_gate, logits, bias, shape, True)
    want_ids, want_weight, want_scores, want_grad = gradients(moe_gate, logits.float(), bias, shape, True)
    assert grad.dtype == dtype and weight.dtype == scores.dtype == torch.float32
    assert torch.equal(ids, want_ids) and torch.equal(weight, want_weight) and torch.equal(scores, want_scores)
    assert_near(grad, want_grad.double(), 2 * error_bound(dtype, 1, 1))  # the interpreter truncates bf16


def test_rows_of_a_wider_matrix(device: torch.device) -> None:
    torch.manual_seed(0)
    wide, bias = torch.randn(5, 40, device=device), torch.zeros(8, device=device)
    for logits in (wide[:, 3:11], wide[:, :16:2], wide[:, :8].flip(0).t().contiguous().t()):
        for a, b in zip(moe_gate(logits, bias, 2), moe_gate(logits.contiguous(), bias, 2), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("groups", [1, 3])
def test_numbers_of_experts_are_valid_whatever_comes(value: float, groups: int, device: torch.device) -> None:
    """They are addresses to the kernels that follow. 6 experts leave places of the kernel's 8 empty."""
    logits = torch.zeros(5, 6, device=device)
    logits[1], logits[2, 3], logits[3, :5] = value, value, value
    bias = torch.zeros(6, device=device)
    bias[2] = value
    for some in (torch.zeros(6, device=device), bias):
        ids, weight, _ = moe_gate(logits, some, 4, groups, min(groups, 2))
        assert ((ids >= 0) & (ids < 6)).all()
        assert all(row.unique().numel() == 4 for row in ids)
        if math.isnan(value):
            assert weight[1].isnan().all() and weight[0].isfinite().all()


def test_the_lower_of_equals_is_taken(device: torch.device) -> None:
    ids, _, _ = moe_gate(torch.zeros(4, 12, device=device), torch.zeros(12, device=device), 5, n_group=3, topk_group=2)
    assert torch.equal(ids, torch.arange(5, device=device).expand(4, 5))


def test_operators_are_registered_well(device: torch.device) -> None:
    logits, bias = torch.randn(5, 8, device=device, requires_grad=True), torch.zeros(8, device=device)
    opcheck(ops.moe_gate.default, (logits, bias, 2, 2, 1, True, 1.5))
    weight, scores, ids = ops.moe_gate(logits.detach(), bias, 2, 2, 1, True, 1.5)
    opcheck(ops.moe_gate_backward.default, (weight, None, ids, scores, True, 1.5, logits.dtype))
    compiled = torch.compile(lambda x: moe_gate(x, bias, 2)[1].square().sum(), fullgraph=True)
    compiled(logits).backward()
    got, logits.grad = logits.grad, None
    moe_gate(logits, bias, 2)[1].square().sum().backward()
    torch.testing.assert_close(got, logits.grad)


def gate_by_hand(
    logits: list[float], bias: list[float], top_k: int, groups: int, topk_group: int, norm: bool, scale: float
) -> dict[int, float]:
    """Expert -> weight of one token: the report's section 2.1.2 with plain lists."""
    scores = [1 / (1 + math.exp(-value)) for value in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -sum(sorted((choice[e] for e in members[g]), reverse=True)[:2]))
    allowed = [e for g in best[:topk_group] for e in members[g]] if groups > 1 else members[0]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
    total = sum(scores[e] for e in chosen) if norm else 1.0
    return {e: scores[e] / total * scale for e in chosen}


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 6), groups=st.integers(1, 4), size=st.integers(2, 5), topk_group=st.integers(1, 4),
    top_k=st.integers(1, 6), norm=st.booleans(), scale=st.sampled_from([1.0, 2.5]),
    bias_size=st.sampled_from([0, 1, 9]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gate_agrees_with_a_loop(
    tokens: int, groups: int, size: int, topk_group: int, top_k: int, norm: bool, scale: float, bias_size: int,
    seed: int,
) -> None:  # fmt: skip
    """A large bias chooses against the scores (it may make choices negative); weights are of the scores alone."""
    torch.manual_seed(seed)
    topk_group = min(topk_group, groups)
    top_k = min(top_k, size * topk_group)
    logits = torch.randn(tokens, groups * size, dtype=torch.float64)
    bias = bias_size * torch.randn(groups * size, dtype=torch.float64)
    ids, weight, scores = moe_gate(logits, bias, top_k, groups, topk_group, norm, scale)
    assert ids.dtype == torch.int64 and ids.shape == weight.shape == (tokens, top_k)
    torch.testing.assert_close(scores, logits.sigmoid())
    for token in range(tokens):
        want = gate_by_hand(logits[token].tolist(), bias.tolist(), top_k, groups, topk_group, norm, scale)
        got = dict(zip(ids[token].tolist(), weight[token].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-12)


def test_ties_fall_the_same_way_every_time() -> None:
    """Equal scores (a model at its start, or padding): k different experts, the same for equal rows and every run."""
    logits, bias = torch.zeros(64, 32), torch.zeros(32)
    first, weight, _ = moe_gate(logits, bias, 4, n_group=4, topk_group=2)
    assert torch.equal(first, first[:1].expand_as(first))
    assert first[0].unique().numel() == 4 and first[0].div(8, rounding_mode="floor").unique().numel() <= 2
    assert torch.equal(weight, torch.full((64, 4), 0.25))
    for _ in range(3):
        assert torch.equal(moe_gate(logits, bias, 4, n_group=4, topk_group=2)[0], first)


def test_bias_gets_no_gradient_and_moves_no_weight() -> None:
    logits, bias = torch.randn(5, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    _, weight, scores = moe_gate(logits, bias, 4)
    _, shifted, _ = moe_gate(logits, bias + torch.tensor([5.0, 0, 0, 0]), 4)
    torch.testing.assert_close(weight.sort().values, shifted.sort().values)
    (weight.square().sum() + scores.sum()).backward()
    assert bias.grad is None and logits.grad is not None and logits.grad.count_nonzero() == 20


def test_gate_far_below_does_not_divide_by_zero() -> None:
    """sigmoid(-200) is 0 in fp32: weights become 0, not NaN."""
    _, weight, _ = moe_gate(torch.full((2, 4), -200.0), torch.zeros(4), 2)
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 8).int()}, TypeError, "logits: got torch.int32"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits: got shape \(8,\), allowed is \(any, any\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: got shape \(7,\), allowed is \(8\)"),
        ({"bias": torch.zeros(8).int()}, TypeError, "bias: got torch.int32"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias: got device meta, allowed is cpu"),
        ({"n_group": 0}, ValueError, "n_group: got 0"),
        ({"n_group": 3}, ValueError, "n_group: got 3, allowed is a divisor of 8 experts leaving 2 or more"),
        ({"n_group": 8}, ValueError, "n_group: got 8"),
        ({"topk_group": 3}, ValueError, "topk_group: got 3, allowed is 1 to n_group = 2"),
        ({"topk_group": 0}, ValueError, "topk_group: got 0"),
        ({"top_k": 5}, ValueError, "top_k: got 5, allowed is 1 to 4"),
        ({"top_k": 0}, ValueError, "top_k: got 0"),
    ],
)
def test_bad_input_to_the_gate(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = dict(logits=torch.zeros(3, 8), bias=torch.zeros(8), top_k=2, n_group=2, topk_group=1)
    with pytest.raises(error, match=message):
        moe_gate(**{**good, **change})  # type: ignore[arg-type]
