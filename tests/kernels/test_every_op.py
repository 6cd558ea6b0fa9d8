"""What holds of every differentiable op: gradients by finite differences, any strides, no harm to inputs, no memory
left unwritten, the same bits twice. Values are each op's own test's matter."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import minids_kernels as kernels
import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import LAYOUTS, Op, assert_near, error_bound, leaves, poisoned_memory, run

TOKENS = 14
CU_SEQLENS = torch.tensor([0, 5, 5, 6, TOKENS], dtype=torch.int32)
TARGETS = torch.tensor([3, -100, 0, 6, 6, 1, -100, 2, 3, 4, 5, 0, 1, 2])
IDS = torch.tensor([[0, 1], [2, 1], [2, 0], [1, 2], [0, 1], [0, 2], [1, 0]] * 2)  # expert 3 stays empty
OFFSETS = torch.tensor([0, 5, 5, 6, TOKENS - 2], dtype=torch.int32)  # expert 1 is empty, two rows are nobody's
ANGLE = torch.linspace(0, 3, TOKENS * 2).view(TOKENS, 2)
BIAS = torch.linspace(-0.2, 0.2, 6)

Inputs = Callable[[], list[Tensor]]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels.mla_attention(q, k, v, CU_SEQLENS.to(q.device))


def _attention_of_parts(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor) -> Tensor:
    return kernels.mla_attention(q, (k_nope, k_pe), v, CU_SEQLENS.to(q.device))


def _cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(x, weight, TARGETS.to(x.device))


def _smoothed_cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(x, weight, TARGETS.to(x.device), label_smoothing=0.2, z_loss=0.1)


def _permute_and_back(x: Tensor, weight: Tensor) -> Tensor:
    rows, plan = kernels.moe_permute(x, IDS.to(x.device), 4)
    return kernels.moe_unpermute(rows.sin(), plan, weight)


def _attention_inputs() -> list[Tensor]:
    return [torch.randn(TOKENS, 2, 6), torch.randn(TOKENS, 2, 6), torch.randn(TOKENS, 2, 4)]


def _attention_of_parts_inputs() -> list[Tensor]:
    q, k, v = _attention_inputs()
    return [q, k[..., :4].clone(), torch.randn(TOKENS, 1, 2), v]


def _cross_entropy_inputs() -> list[Tensor]:
    return [torch.randn(TOKENS, 5), torch.randn(7, 5)]


CASES: dict[str, tuple[Op, Inputs]] = {
    "rms_norm": (kernels.rms_norm, lambda: [torch.randn(5, TOKENS), 1 + torch.rand(TOKENS)]),
    "rms_norm with a residual": (
        lambda x, residual, w: torch.stack(kernels.rms_norm(x, w, residual=residual)),
        lambda: [torch.randn(5, TOKENS), torch.randn(5, TOKENS), 1 + torch.rand(TOKENS)],
    ),
    "swiglu": (kernels.swiglu, lambda: [torch.randn(5, TOKENS)]),
    "rope": (lambda x: kernels.rope(x, ANGLE.cos(), ANGLE.sin()), lambda: [torch.randn(TOKENS, 3, 6)]),
    "cross-entropy": (_cross_entropy, _cross_entropy_inputs),
    "cross-entropy, computed again": (_cross_entropy, _cross_entropy_inputs),
    "smoothed cross-entropy": (_smoothed_cross_entropy, _cross_entropy_inputs),
    "smoothed cross-entropy, computed again": (_smoothed_cross_entropy, _cross_entropy_inputs),
    "attention, computed again": (_attention, _attention_inputs),
    "attention": (_attention, _attention_inputs),
    "attention of parts": (_attention_of_parts, _attention_of_parts_inputs),
    "attention, both ways": (
        lambda q, k, v: kernels.mla_attention(q, k, v, CU_SEQLENS.to(q.device), causal=False),
        _attention_inputs,
    ),
    "attention, shared keys": (
        _attention,
        lambda: [torch.randn(TOKENS, 2, 6), torch.randn(TOKENS, 1, 6), torch.randn(TOKENS, 1, 4)],
    ),
    "grouped product": (
        lambda x, w: kernels.grouped_gemm(x, w, OFFSETS.to(x.device)),
        lambda: [torch.randn(TOKENS, 5), torch.randn(4, 6, 5)],
    ),
    "permutation": (_permute_and_back, lambda: [torch.randn(TOKENS, 5), torch.rand(TOKENS, 2)]),
    "experts": (
        lambda x, weight, w_gate_up, w_down: kernels.moe_experts(x, IDS.to(x.device), weight, w_gate_up, w_down),
        lambda: [torch.randn(TOKENS, 5), torch.rand(TOKENS, 2), torch.randn(4, 6, 5), torch.randn(4, 5, 3)],
    ),
    "gate's weights": (
        lambda logits: kernels.moe_gate(logits, BIAS.to(logits.device), 2, n_group=3, topk_group=2, scale=2.5)[1],
        lambda: [torch.randn(TOKENS, 6)],
    ),
    "gate's scores": (
        lambda logits: kernels.moe_gate(logits, BIAS.to(logits.device), 2)[2],
        lambda: [torch.randn(TOKENS, 6)],
    ),
}


# those that have Triton kernels
TRITON = {
    "attention",
    "attention, both ways",
    "attention, shared keys",
    "cross-entropy",
    "smoothed cross-entropy",
    "experts",
    "gate's scores",
    "gate's weights",
    "grouped product",
    "permutation",
    "rms_norm",
    "rms_norm with a residual",
    "swiglu",
}


@pytest.fixture(params=[*CASES, *(f"{name}, triton" for name in CASES if name in TRITON)])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Op, list[Tensor]]:
    """An op and its inputs, for Triton on the GPU where there is one; large problems' ways are taken by small ones
    too."""
    name = request.param.removesuffix(", triton")
    device = "cpu"
    if name != request.param:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        monkeypatch.setattr(importlib.import_module("minids_kernels._launch"), "BACKEND", "triton")
    op, inputs = _case(name, monkeypatch)
    return op, [x.to(device) for x in inputs]


@pytest.fixture(params=CASES)
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Op, list[Tensor]]:
    """The same in fp64, which is PyTorch's on every device."""
    op, inputs = _case(request.param, monkeypatch)
    return op, leaves([x.double() for x in inputs])


def _case(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Op, list[Tensor]]:
    op, inputs = CASES[name]
    if "computed again" in name:
        monkeypatch.setattr(importlib.import_module("minids_kernels.cross_entropy"), "KEPT_ELEMENTS", 0)
        monkeypatch.setattr(importlib.import_module("minids_kernels._mla_attention_torch"), "KEPT_ELEMENTS", 0)
    return op, inputs()


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        assert torch.equal(a, b)


def assert_equal_but_for_rounding(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    """Other strides may take other matrix products: sums of at most TOKENS terms in another order, a few in a row."""
    for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        assert_near(a, b.double(), error_bound(torch.float32, 16, TOKENS))


def test_gradients_by_finite_differences(wide: tuple[Op, list[Tensor]]) -> None:
    op, inputs = wide
    assert torch.autograd.gradcheck(op, inputs, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_inputs_do_not_matter(case: tuple[Op, list[Tensor]], layout: Callable[[Tensor], Tensor]) -> None:
    op, inputs = case
    strided = [layout(x) for x in inputs]
    assert any(not x.is_contiguous() for x in strided)
    dout = torch.randn_like(op(*inputs))
    assert_equal_but_for_rounding(run(op, strided, dout), run(op, inputs, dout))


def test_expanded_inputs(case: tuple[Op, list[Tensor]]) -> None:
    """Columns that share memory: nothing may be written through one."""
    op, inputs = case
    expanded = [x[..., :1].expand(x.shape) for x in inputs]
    plain = [x.contiguous() for x in expanded]
    dout = torch.randn_like(op(*plain))
    assert_equal_but_for_rounding(run(op, expanded, dout), run(op, plain, dout))


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), None], ids=[*LAYOUTS, "expanded"])
def test_strides_of_the_gradient_do_not_matter(
    case: tuple[Op, list[Tensor]], layout: Callable[[Tensor], Tensor] | None
) -> None:
    """`.sum()` hands down one number expanded."""
    op, inputs = case
    out = op(*inputs)
    if layout is None:
        assert_equal_but_for_rounding(run(op, inputs), run(op, inputs, torch.ones_like(out)))
    else:
        dout = torch.randn_like(out)
        assert_equal_but_for_rounding(run(op, inputs, layout(dout)), run(op, inputs, dout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are(case: tuple[Op, list[Tensor]], dtype: torch.dtype) -> None:
    op, inputs = case
    inputs = [x.to(dtype) for x in inputs]
    copies = [x.clone() for x in inputs]
    dout = torch.randn_like(op(*inputs))
    dout_copy = dout.clone()
    run(op, inputs, dout)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert torch.equal(dout, dout_copy)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_same_bits_twice_and_no_memory_left_unwritten(case: tuple[Op, list[Tensor]], autocast: bool) -> None:
    op, inputs = case
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=autocast):
        dout = torch.randn_like(op(*inputs))
        first = run(op, inputs, dout)
        assert_same(run(op, inputs, dout), first)
        with poisoned_memory():
            out, grads = run(op, inputs, dout)
    assert all(t.isfinite().all() for t in (out, *grads))
    assert_equal_but_for_rounding((out, grads), first)


def test_backward_may_run_twice(case: tuple[Op, list[Tensor]]) -> None:
    """What the forward kept is not used up."""
    op, inputs = case
    inputs = leaves(inputs)
    out = op(*inputs)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    second = torch.autograd.grad(out, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_right_or_refused(wide: tuple[Op, list[Tensor]]) -> None:
    """No op has a gradient of its gradient that is silently wrong."""
    op, inputs = wide
    try:
        grads = torch.autograd.grad(op(*inputs).square().sum(), inputs, create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
    except RuntimeError as error:
        assert "once_differentiable" in str(error) or "no autograd formula was registered" in str(error)
    else:
        assert torch.autograd.gradgradcheck(op, inputs, atol=1e-6)


def test_inputs_that_want_no_gradient(case: tuple[Op, list[Tensor]]) -> None:
    """Each alone gets what it gets beside the others; without any there is no graph."""
    op, inputs = case
    dout = torch.randn_like(op(*inputs))
    _, grads = run(op, inputs, dout)
    for index, want in enumerate(grads):
        alone = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
        op(*alone).backward(dout)
        got = alone[index].grad
        assert got is not None and all(x.grad is None for i, x in enumerate(alone) if i != index)
        assert_near(got, want.double(), math.sqrt(TOKENS) * torch.finfo(torch.float32).eps)
    assert not op(*inputs).requires_grad


def test_inference_mode_gives_the_same(case: tuple[Op, list[Tensor]]) -> None:
    op, inputs = case
    with torch.inference_mode():
        quiet = op(*inputs)
    assert_near(quiet.clone(), op(*leaves(inputs)).detach().double(), error_bound(torch.float32, 4, TOKENS))


@pytest.mark.parametrize("name", sorted(TRITON))
def test_one_graph_under_compile(name: str) -> None:
    """Forward and backward, without a break, and the same values; a change of size compiles nothing wrong."""
    op, inputs = CASES[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(2):
        tensors = inputs()
        dout = torch.randn_like(op(*tensors))
        assert_equal_but_for_rounding(run(compiled, tensors, dout), run(op, tensors, dout))


LARGE = (
    "fp8_gemm", "fp8_gemm_wgrad", "grouped_fp8_gemm", "grouped_fp8_gemm_wgrad", "mla_decode", "mla_decode, fp8",
    "sum of losses",
)  # fmt: skip


def _gradients_of_a_sum(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Both, one after the other."""
    pair = leaves([x, weight])
    loss = kernels.linear_cross_entropy(*pair, targets, reduction="sum")
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, pair)])


def _large(name: str) -> tuple[Callable[..., object], list[Tensor]]:
    """A forward op, and inputs for which several programs of its largest launch share a multiprocessor."""
    x, w, stacked = torch.randn(4000, 1024), torch.randn(1096, 1024), torch.randn(4, 520, 1024)
    offsets = torch.tensor([0, 1700, 1700, 2100, 3950], dtype=torch.int32)
    tokens, weights = kernels.quantize_tiles(x), [kernels.quantize_blocks(matrix) for matrix in (w, *stacked)]
    if name == "fp8_gemm":
        return kernels.fp8_gemm, [*tokens, *weights[0]]
    if name == "fp8_gemm_wgrad":
        return kernels.fp8_gemm_wgrad, [*tokens, *kernels.quantize_tiles(w)]
    if name == "grouped_fp8_gemm":
        codes, scales = zip(*weights[1:], strict=True)
        return kernels.grouped_fp8_gemm, [*tokens, torch.stack(codes), torch.stack(scales), offsets]
    if name == "grouped_fp8_gemm_wgrad":
        sides = (kernels.quantize_segments_transposed(side, offsets) for side in (x[:, :384], x[:, :640]))
        return kernels.grouped_fp8_gemm_wgrad, [*(part for side in sides for part in side), offsets]
    if name == "sum of losses":
        targets = torch.randint(len(w), (len(x),))
        targets[::7] = -100
        return _gradients_of_a_sum, [x.bfloat16(), w.bfloat16(), targets]
    cache, table = torch.randn(600, 64, 576).bfloat16(), torch.randperm(600, dtype=torch.int32).view(12, 50)
    if name == "mla_decode, fp8":
        codes = cache[..., :512].to(torch.float8_e4m3fn)
        parts = codes, torch.rand(600, 64, 4), cache[..., 512:].contiguous()
        cache = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    lengths = torch.tensor([3200, 0, 1, 64, 65, 777, 2000, 31, 1000, 3199, 5, 128], dtype=torch.int32)
    q = torch.randn(12, 2, 16, 576).bfloat16()
    return lambda *inputs: kernels.mla_decode(*inputs, 512, 0.1)[0], [q, cache, table, lengths]


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_are_right(name: str) -> None:
    """What the next test repeats on a GPU, once by PyTorch."""
    forward, inputs = _large(name)
    out = forward(*inputs)
    assert isinstance(out, Tensor) and out.isfinite().all() and out.count_nonzero() > out.numel() / 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*LARGE, *sorted(TRITON)])
def test_a_thousand_launches_give_the_same_bits(name: str) -> None:
    if name in TRITON:
        op, make = CASES[name]
        inputs = [x.cuda() for x in make()]
        grad = torch.randn_like(op(*inputs))

        def call() -> list[Tensor]:
            rows = leaves(inputs)
            out = op(*rows)
            return [out, *torch.autograd.grad(out, rows, grad)]

    else:
        forward, inputs = _large(name)
        inputs = [x.cuda() for x in inputs]

        def call() -> list[Tensor]:
            return [forward(*inputs)]  # type: ignore[list-item]

    first = call()
    assert all(torch.equal(a, b) for _ in range(1000) for a, b in zip(call(), first, strict=True))
