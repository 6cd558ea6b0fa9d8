"""Experts against one token and slot after the other in fp64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import (
    _launch,
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_fp8_linear,
    grouped_gemm,
    moe_experts,
    moe_experts_reference,
    moe_permute,
    moe_unpermute,
    quantize_blocks,
    quantize_tiles,
)
from minids_kernels._ops import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks.aot import record
from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.numerics import MODES, assert_near, check, error_bound, poisoned_memory, run

room = importlib.import_module("minids_kernels.moe")


def inputs(tokens: int, width: int, inner: int, experts: int, top_k: int) -> list[Tensor]:
    """x, weights of the router, w_gate_up, w_down of sizes that leave outputs of about 1."""
    return [
        torch.randn(tokens, width),
        torch.rand(tokens, top_k) + 0.1,
        torch.randn(experts, 2 * inner, width) / math.sqrt(width),
        torch.randn(experts, width, inner) * math.sqrt(3 / inner),
    ]


def route(tokens: int, experts: int, top_k: int) -> Tensor:
    """Different experts for each token, unequal loads."""
    return (torch.rand(tokens, experts) + torch.linspace(0, 0.7, experts)).topk(top_k, -1).indices


def exact(x: Tensor, ids: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    rows = []
    for token, experts in enumerate(ids.tolist()):
        row = torch.zeros_like(x[token])
        for slot, expert in enumerate(experts):
            gate, up = (w_gate_up[expert] @ x[token]).chunk(2)
            row = row + weight[token, slot] * (w_down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else x * sum(t.sum() * 0 for t in (weight, w_gate_up, w_down))


def check_routing(
    ids: Tensor, tensors: list[Tensor], mode: str, factor: int = 1, device: str | torch.device = "cpu"
) -> None:
    check(
        lambda x, weight, wg, wd: moe_experts(x, ids.to(device), weight, wg, wd),
        lambda x, weight, wg, wd: exact(x, ids, weight, wg, wd),
        tensors, mode, roundings=12 * factor, length=4 * max(tensors[0].shape[1], *tensors[3].shape, len(ids)),
        device=device,
    )  # fmt: skip


# tokens, width, inner, experts, top_k; rows of 17 and 33 are no multiple of 16 bytes in any dtype, those of 32 and 48
# are what tensor descriptors take
SIZES = [(0, 8, 4, 4, 2), (1, 8, 4, 4, 2), (23, 17, 33, 5, 2), (23, 33, 17, 7, 3), (40, 16, 8, 1, 1), (9, 12, 20, 4, 4),
         (150, 6, 3, 2, 1), (31, 1, 1, 3, 2), (70, 32, 48, 5, 2)]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts_agree_with_a_loop(
    size: tuple[int, int, int, int, int], mode: str, backend: str, device: torch.device
) -> None:
    if backend == "triton" and device.type == "cpu" and mode in ("bf16", "autocast"):
        pytest.skip("Triton's interpreter takes bf16 operands of tl.dot for integers")
    tokens, _, _, experts, top_k = size
    check_routing(route(tokens, experts, top_k), inputs(*size), mode, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
def test_experts_by_hand_agree_with_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the layer and of its gradients by `_grouped_gemm_hopper`."""
    real, names = _launch.config, []
    by_hand = dict(BLOCK_N=128, DEPTH=32, PIECES=2, STAGES=4, STRIPE=2)

    def config(room: str, kernel: str, arch: str, **shape: int) -> dict[str, Any]:
        return by_hand if room == "grouped_gemm" else real(room, kernel, arch, **shape)

    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(_launch, "config", config)
    monkeypatch.setattr(_launch, "multiprocessors", lambda x: 2)
    monkeypatch.setattr(importlib.import_module("minids_kernels.grouped_gemm"), "COPIED", 1)
    with interpreted(0):
        emulated = _launch._launched_by

        def launched(kernel: Any, *args: Any, **kwargs: Any) -> None:
            names.append(kernel.fn.__name__)
            emulated(kernel, *args, **kwargs)

        with _launch.launched_by(launched):
            check_routing(route(70, 5, 2), inputs(70, 64, 128, 5, 2), "fp16")
    products = [name for name in names if name.startswith(("_grouped_gemm", "_grouped_outer"))]
    assert {name: products.count(name) for name in products} == {
        "_grouped_gemm_hopper_kernel": 2 + 2 + 2,  # the forward once more, without gradients
        "_grouped_outer_hopper_kernel": 2,
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_agrees_with_a_loop(size: tuple[int, int, int, int, int]) -> None:
    tokens, _, _, experts, top_k = size
    ids, (x, weight, wg, wd) = route(tokens, experts, top_k), inputs(*size)
    want = exact(x.double(), ids, weight.double(), wg.double(), wd.double())
    assert_near(moe_experts_reference(x, ids, weight, wg, wd), want, error_bound(torch.float32, 8, 100))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 20), experts=st.integers(1, 6), top_k=st.integers(1, 4), width=st.integers(1, 9),
    inner=st.integers(1, 9), used=st.integers(1, 6), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_routing(tokens: int, experts: int, top_k: int, width: int, inner: int, used: int, seed: int) -> None:
    """All tokens to a few experts, the same expert twice for a token, no tokens."""
    torch.manual_seed(seed)
    ids = torch.randperm(experts)[:used][torch.randint(min(used, experts), (tokens, top_k))]
    check_routing(ids, inputs(tokens, width, inner, experts, top_k), "fp64", factor=16)


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.integers(0, 50), experts=st.integers(1, 6), top_k=st.integers(1, 3), used=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_routing_in_triton(tokens: int, experts: int, top_k: int, used: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randperm(experts)[:used][torch.randint(min(used, experts), (tokens, top_k))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "BACKEND", "triton")
        check_routing(ids, inputs(tokens, 12, 20, experts, top_k), "fp32", device=device)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_fp32_weights_get_fp32_gradients(autocast: bool, backend: str, device: torch.device) -> None:
    """Of products in half precision: as exact as with weights rounded before, and by kernels not rounded after."""
    dtype = torch.bfloat16 if autocast else torch.float16
    if autocast and backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter takes bf16 operands of tl.dot for integers")
    x, weight, wg, wd = inputs(70, 32, 48, 5, 2)
    wg, wd = (w.to(dtype).float() for w in (wg, wd))
    ids, dout = route(70, 5, 2), torch.randn(70, 32).to(dtype)
    tensors = [x.to(torch.float32 if autocast else dtype), weight, wg, wd]
    want = run(lambda x, *rest: exact(x, ids, *rest), [t.double() for t in (x.to(dtype), *tensors[1:])], dout.double())
    with torch.autocast(device.type, dtype, enabled=autocast):
        _, grads = run(
            lambda x, *rest: moe_experts(x, ids.to(device), *rest), [t.to(device) for t in tensors], dout.to(device)
        )
    for got, exactly in zip(grads[2:], want[1][2:], strict=True):
        assert got.dtype == torch.float32
        assert_near(got.cpu(), exactly, error_bound(dtype, 12, 300))
        assert torch.equal(got, got.to(dtype).float()) == (backend == "torch")


@pytest.mark.parametrize("fp8", [False, True])
def test_a_base_is_added(fp8: bool, backend: str, device: torch.device) -> None:
    """And its gradient is the output's; nobody else's changes, nor does it itself."""
    tensors, ids = [t.to(device) for t in inputs(70, 32, 48, 5, 2)], route(70, 5, 2).to(device)
    base, dout = torch.randn(2, 70, 32, device=device)
    plain, grads = run(lambda x, *rest: moe_experts(x, ids, *rest, fp8=fp8), tensors, dout)
    out, (*same, dbase) = run(
        lambda x, w, wg, wd, base: moe_experts(x, ids, w, wg, wd, fp8, base), [*tensors, base], dout
    )
    assert torch.equal(dbase, dout)
    assert all(torch.equal(x, y) for x, y in zip(same, grads, strict=True))
    torch.testing.assert_close(
        out, plain + base, rtol=0, atol=4 * torch.finfo(torch.float32).eps * out.abs().max().item()
    )


def test_only_a_base_wants_a_gradient(backend: str, device: torch.device) -> None:
    """Experts are frozen, and what is beside them is not."""
    x, *weights = (t.to(device) for t in inputs(70, 32, 48, 5, 2))
    base, dout = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    moe_experts(x, route(70, 5, 2).to(device), *weights, base=base).backward(dout)
    assert base.grad is not None and torch.equal(base.grad, dout)


def test_all_tokens_to_one_expert(device: torch.device) -> None:
    """The others' gradients are exactly zero."""
    tensors = [t.to(device) for t in inputs(130, 8, 6, 4, 1)]
    ids = torch.full((130, 1), 2, device=device)
    check_routing(ids.cpu(), tensors, "fp32", device=device)
    _, (_, _, dwg, dwd) = run(lambda x, w, wg, wd: moe_experts(x, ids, w, wg, wd), tensors)
    assert dwg[[0, 1, 3]].count_nonzero() == dwd[[0, 1, 3]].count_nonzero() == 0
    assert dwg[2].count_nonzero() == dwg[2].numel()


@pytest.mark.parametrize("tokens", [9, 150])
def test_no_count_leaves_the_device(tokens: int) -> None:
    """Tensors without values: whatever asked for one would raise. What is launched serves any routing."""
    with FakeTensorMode():
        x, weight, wg, wd = (t.requires_grad_() for t in inputs(tokens, 32, 16, 6, 3))
        ids = torch.empty(tokens, 3, dtype=torch.int64)

        def both() -> None:
            given = [t.detach() for t in (x, weight, wg, wd)]
            out, *kept = room._moe_experts.function(given[0], ids, *given[1:], None, False, True)
            room._moe_experts_backward.function(out, *given, *kept, False)

        names = [launch.kernel.__name__ for launch in record([("", both)], "sm_90")]
    product = f"_grouped_gemm_{'small_' * (3 * tokens <= 32)}kernel"
    plan = ["_moe_count_kernel", "_moe_scan_kernel"] * (3 * tokens > 256) + ["_moe_plan_kernel"]
    assert names[: len(plan)] == plan
    assert names[len(plan) :] == [
        *(product, product, "_combine_kernel"),
        *(product, "_activate_backward_kernel", "_grouped_outer_kernel", "_grouped_outer_kernel", product),
        "_combine_kernel",
    ]


def test_what_is_kept_for_the_backward(device: torch.device) -> None:
    """Inputs, the gate_up products and int64 indices: nothing else of a size that grows with the tokens."""
    tokens, width, inner, experts, top_k = 90, 16, 32, 4, 2
    x, weight, wg, wd = (t.to(device).requires_grad_() for t in inputs(tokens, width, inner, experts, top_k))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_experts(x, route(tokens, experts, top_k).to(device), weight, wg, wd)
    given = {t.data_ptr() for t in (x, weight, wg, wd)}
    extra = sum(t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in given)
    assert extra == tokens * top_k * 2 * inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_without_gradients_nothing_is_kept(fp8: bool, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """And the same comes out."""
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes bf16 operands of tl.dot for integers")
    x, weight, wg, wd = (t.to(device, dtype) for t in inputs(90, 17, 33, 4, 2))
    ids = route(90, 4, 2).to(device)
    want, *_ = ops.moe_experts(x, ids, weight, wg, wd, None, fp8, True)
    with poisoned_memory():
        got, gate_up, *_ = ops.moe_experts(x, ids, weight, wg, wd, None, fp8, False)
    assert gate_up.shape == (0, 66) and torch.equal(got, want)


@pytest.mark.parametrize("fp8", [False, True])
def test_operators_are_registered_well(fp8: bool, device: torch.device) -> None:
    x, weight, wg, wd = (t.to(device) for t in inputs(40, 8, 6, 4, 2))
    ids = route(40, 4, 2).to(device)
    with_grad = [t.detach().requires_grad_() for t in (x, weight, wg, wd)]
    base = torch.randn_like(x)
    opcheck(ops.moe_experts.default, (with_grad[0], ids, *with_grad[1:], None, fp8, True))
    opcheck(ops.moe_experts.default, (with_grad[0], ids, *with_grad[1:], base.requires_grad_(), fp8, True))
    opcheck(ops.moe_experts.default, (x, ids, weight, wg, wd, None, fp8, False))
    _, *kept = ops.moe_experts(x, ids, weight, wg, wd, None, fp8, True)
    opcheck(ops.moe_experts_backward.default, (torch.randn_like(x), x, weight, wg, wd, *kept, fp8))


E4M3_ROUNDING = 2**-4 / math.sqrt(3)  # of a number, in the root mean square


@pytest.mark.parametrize(
    "size", [(0, 8, 4, 4, 2), (23, 17, 33, 5, 2), (150, 136, 20, 2, 1), (40, 130, 140, 3, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_is_near(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Against fp64: eight roundings to e4m3, of independent error, lie between inputs and a gradient; through a SwiGLU
    an error of gate and one of up count one and a half times at most."""
    ids = route(size[0], size[3], size[4])
    tensors = [t.to(dtype) for t in inputs(*size)]
    dout = torch.randn(size[0], size[1]).to(dtype)
    with poisoned_memory():
        out, grads = run(
            lambda x, weight, wg, wd: moe_experts(x, ids.to(x.device), weight, wg, wd, fp8=True),
            [t.to(device) for t in tensors], dout.to(device),
        )  # fmt: skip
    want, wanted = run(lambda *t: exact(t[0], ids, *t[1:]), [t.double() for t in tensors], dout.double())
    for got, expected in zip((out, *grads), (want, *wanted), strict=True):
        assert got.dtype == dtype
        assert_near(got.cpu(), expected, 1.5 * math.sqrt(8) * E4M3_ROUNDING)


def test_fp8_is_a_composition_of_fp8_products(device: torch.device) -> None:
    """Permute, grouped_fp8_linear, SwiGLU, grouped_fp8_linear, unpermute: the same products of the same codes; a code
    may differ in its last place where a gradient's rounding does."""
    tokens, width, inner, experts, top_k = 70, 40, 24, 3, 2
    tensors = [t.to(device) for t in inputs(tokens, width, inner, experts, top_k)]
    ids = route(tokens, experts, top_k).to(device)

    def composed(x: Tensor, weight: Tensor, wg: Tensor, wd: Tensor) -> Tensor:
        rows, plan = moe_permute(x, ids, experts)
        gate, up = grouped_fp8_linear(rows, wg, plan.offsets).chunk(2, dim=-1)
        scaled = F.silu(gate) * up * weight.flatten()[plan.pair, None]
        return moe_unpermute(grouped_fp8_linear(scaled, wd, plan.offsets), plan, torch.ones_like(weight))

    dout = torch.randn(tokens, width, device=device)
    out, grads = run(lambda *t: moe_experts(t[0], ids, *t[1:], fp8=True), tensors, dout)
    want, wanted = run(composed, tensors, dout)
    for got, expected in zip((out, *grads), (want, *wanted), strict=True):
        assert_near(got.cpu(), expected.cpu().double(), error_bound(torch.float32, 12, 4 * tokens) + 1e-3)


def test_fp8_takes_weights_as_they_are(device: torch.device) -> None:
    """Under autocast, too, fp32 weights are quantised from fp32, and their gradients, sums in fp32, are not rounded."""
    x, weight, wg, wd = (t.to(device) for t in inputs(70, 40, 24, 3, 2))
    ids, dout = route(70, 3, 2).to(device), torch.randn(70, 40, device=device).bfloat16()
    tensors = [x.bfloat16(), weight, wg, wd]

    def experts(x: Tensor, weight: Tensor, wg: Tensor, wd: Tensor) -> Tensor:
        return moe_experts(x, ids, weight, wg, wd, fp8=True)

    want, wanted = run(experts, tensors, dout)
    with torch.autocast(device.type, torch.bfloat16):
        out, grads = run(experts, tensors, dout)
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), (want, *wanted), strict=True))
    rounded, _ = run(experts, [*tensors[:2], wg.bfloat16(), wd.bfloat16()], dout)
    assert not torch.equal(out, rounded)
    for grad in grads[2:]:
        assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_tokens_do_not_meet(device: torch.device) -> None:
    """Changing one token changes no other's output or gradient, whichever experts they share."""
    x, weight, wg, wd = (t.to(device) for t in inputs(20, 8, 6, 4, 2))
    ids = route(20, 4, 2).to(device)
    other = x.clone()
    other[0] = 100.0
    out, (dx, dweight, _, _) = run(lambda *t: moe_experts(t[0], ids, *t[1:]), [x, weight, wg, wd])
    out2, (dx2, dweight2, _, _) = run(lambda *t: moe_experts(t[0], ids, *t[1:]), [other, weight, wg, wd])
    for one, two in ((out, out2), (dx, dx2), (dweight, dweight2)):
        assert torch.equal(one[1:], two[1:]) and not torch.equal(one[0], two[0])


@pytest.mark.parametrize("mode", ["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("size", [(0, 8, 4, 2), (23, 17, 5, 3), (40, 24, 1, 1)], ids=str)
def test_permuted_products_agree_with_a_loop(size: tuple[int, int, int, int], mode: str, device: torch.device) -> None:
    """moe_permute, grouped_gemm, moe_unpermute against sum_j weight[t, j] * w[ids[t, j]] @ x[t]."""
    tokens, width, experts, top_k = size
    ids = route(tokens, experts, top_k)

    def op(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
        rows, plan = moe_permute(x, ids.to(x.device), experts)
        return moe_unpermute(grouped_gemm(rows, w, plan.offsets), plan, weight)

    def loop(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
        return (weight[:, :, None] * (w[ids.to(w.device)] @ x[:, None, :, None]).squeeze(-1)).sum(1)

    tensors = [torch.randn(tokens, width), torch.rand(tokens, top_k) + 0.1, torch.randn(experts, width, width)]
    tensors[2] /= math.sqrt(width)
    check(op, loop, tensors, mode, roundings=6, length=4 * max(width, tokens), device=device)


def test_plan(device: torch.device) -> None:
    """By hand: rows of one expert in the order of tokens."""
    ids = torch.tensor([[2, 0], [2, 3], [0, 2]], device=device)
    x = torch.arange(3.0, device=device)[:, None]
    rows, plan = moe_permute(x, ids, 5)
    assert plan.offsets.tolist() == [0, 2, 2, 5, 6, 6]
    assert plan.token.tolist() == rows[:, 0].tolist() == [0, 2, 0, 1, 2, 1]
    assert plan.place.tolist() == [2, 0, 3, 5, 1, 4]


def test_permuted_codes_are_those_of_permuted_rows(device: torch.device) -> None:
    """Tiles lie within rows. What comes out is what the grouped product takes."""
    x, ids = torch.randn(70, 200, device=device), route(70, 4, 2).to(device)
    rows, plan = moe_permute(x, ids, 4)
    (codes, scales), same = moe_permute(x, ids, 4, "ue8m0")
    want, wanted = quantize_tiles(rows, "ue8m0")
    assert torch.equal(codes.float(), want.float()) and torch.equal(scales, wanted)
    assert codes.is_contiguous() and all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))
    w, w_scale = quantize_blocks(torch.randn(48, 200, device=device), "ue8m0")
    out = grouped_fp8_gemm(codes, scales, w.expand(4, -1, -1), w_scale.expand(4, -1, -1), same.offsets, torch.float32)
    want = fp8_gemm(want, wanted, w, w_scale, torch.float32).cpu().double()
    assert_near(out.cpu(), want, error_bound(torch.float32, 4, 4 * 200))


def test_permutations_are_registered_well(device: torch.device) -> None:
    x, weight = torch.randn(7, 12, device=device).requires_grad_(), torch.rand(7, 2, device=device).requires_grad_()
    ids = route(7, 4, 2).to(device)
    opcheck(ops.moe_permute.default, (x, ids, 4))
    rows, _, place, pair, _ = ops.moe_permute(x, ids, 4)
    opcheck(ops.moe_unpermute.default, (rows.detach().requires_grad_(), place, pair, 2, weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": torch.zeros(3, 0).long()}, ValueError, r"topk_ids: got shape \(3, 0\), allowed is one expert"),
        ({"x": torch.zeros(3, 4).int()}, TypeError, "x: got torch.int32"),
        ({"x": torch.zeros(12)}, ValueError, r"x: got shape \(12,\), allowed is \(any, any\)"),
        ({"w_down": torch.zeros(4, 6)}, ValueError, r"w_down: got shape \(4, 6\), allowed is \(any, 4, any\)"),
        ({"w_down": torch.zeros(2, 5, 6)}, ValueError, r"w_down: got shape \(2, 5, 6\), allowed is \(any, 4, any\)"),
        ({"w_gate_up": torch.zeros(2, 11, 4)}, ValueError, r"w_gate_up: got .*, allowed is \(2, 12, 4\)"),
        ({"topk_ids": torch.zeros(4, 1).long()}, ValueError, r"topk_ids: got shape \(4, 1\), allowed is \(3, any\)"),
        ({"topk_ids": torch.zeros(3, 1).int()}, TypeError, "topk_ids: got torch.int32, allowed is torch.int64"),
        ({"topk_weight": torch.zeros(3, 2)}, ValueError, r"topk_weight: got .*, allowed is \(3, 1\)"),
        ({"base": torch.zeros(3, 5)}, ValueError, r"base: got shape \(3, 5\), allowed is \(3, 4\)"),
        ({"base": torch.zeros(3, 4).int()}, TypeError, "base: got torch.int32"),
        ({"w_down": torch.zeros(2, 4, 6).half()}, TypeError, "w_down: got torch.float16, allowed is .* torch.float32"),
        ({"w_down": torch.zeros(2, 4, 6).to(torch.float8_e4m3fn)}, TypeError, "w_down: got torch.float8_e4m3fn"),
        ({"w_gate_up": torch.zeros(2, 12, 4).int()}, TypeError, "w_gate_up: got torch.int32"),
        ({"topk_weight": torch.zeros(3, 1).long()}, TypeError, "topk_weight: got torch.int64"),
        ({"topk_ids": torch.full((3, 1), 2)}, ValueError, "topk_ids: got 2 to 2, allowed is 0 to 1"),
        *(
            (
                {name: torch.zeros(size, device="meta", dtype=dtype)},
                ValueError,
                f"{name}: got device meta, allowed is cpu",
            )
            for name, size, dtype in (
                ("topk_ids", (3, 1), torch.int64),
                ("topk_weight", (3, 1), torch.float32),
                ("base", (3, 4), None),
                ("w_gate_up", (2, 12, 4), torch.float32),
                ("w_down", (2, 4, 6), torch.float32),
            )
        ),
    ],
)
def test_bad_input_to_experts(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = dict(
        x=torch.zeros(3, 4), topk_ids=torch.zeros(3, 1).long(), topk_weight=torch.zeros(3, 1),
        w_gate_up=torch.zeros(2, 12, 4), w_down=torch.zeros(2, 4, 6),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        moe_experts(**{**good, **change})


def test_codes_of_permuted_rows_want_no_gradient() -> None:
    (codes, scales), _ = moe_permute(torch.randn(3, 128, requires_grad=True), torch.zeros(3, 1).long(), 2, "fp32")
    assert not codes.requires_grad and not scales.requires_grad
    with pytest.raises(ValueError, match="n_experts: got 0, allowed is 1 or more"):
        moe_permute(torch.randn(3, 128), torch.zeros(3, 1).long(), 0)


def test_fp8_has_no_fp64() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x: got torch.float64, allowed with fp8 are torch.float32"):
        moe_experts(
            x, torch.zeros(3, 1).long(), torch.zeros(3, 1), torch.zeros(2, 12, 4), torch.zeros(2, 4, 6), fp8=True
        )
