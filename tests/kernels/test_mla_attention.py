"""Attention over packed documents against torch's scaled_dot_product_attention in fp64 under a mask of documents."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import _launch, _mla_attention_torch, mla_attention, mla_attention_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import MODES, assert_near, check, error_bound, poisoned_memory, run

HEADS, WIDTH, V_WIDTH = 3, 12, 7

# fp64 roundings that an unfused attention has: scores of size up to 4, probabilities, products, and back
ROUNDINGS = 24


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(tokens: int, key_heads: int = HEADS, value_heads: int = HEADS) -> list[Tensor]:
    return [
        torch.randn(tokens, HEADS, WIDTH),
        torch.randn(tokens, key_heads, WIDTH),
        torch.randn(tokens, value_heads, V_WIDTH),
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    document = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff().long())
    mask = document.unsqueeze(1) == document
    if causal:
        mask = mask.tril()
    mask = mask.to(q.device)
    q, k, v = (x.expand(-1, HEADS, -1).transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


@contextlib.contextmanager
def pieces_of(block: int, scores: int, kept: bool) -> Iterator[None]:
    """The PyTorch path in pieces of another size, with and without what its forward keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mla_attention_torch, "QUERY_BLOCK", block)
        patch.setattr(_mla_attention_torch, "SCORES", scores)
        if not kept:
            patch.setattr(_mla_attention_torch, "KEPT_ELEMENTS", 0)
        _mla_attention_torch._rectangles.cache_clear()
        yield


def rotary_angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    """cos and sin of angles that are no positions', times a factor as YaRN's are."""
    angle = torch.rand(tokens, pairs) * 6
    return 1.1 * angle.cos(), 1.1 * angle.sin()


DOCUMENTS = {
    "none": [],
    "one of nothing": [0],
    "one token": [1],
    "one": [37],
    "equal": [8, 8, 8],
    "mixed": [5, 0, 19, 1, 0, 0, 40, 3],
    "many": [i % 4 for i in range(14)],
    "more than a block": [131, 2, 70],
}


def multiplies(mode: str, device: torch.device) -> None:
    """Skips what is PyTorch's whatever the backend, and what the interpreter cannot do: its products of bf16 are
    garbage."""
    if _launch.BACKEND == "triton" and mode == "fp64":
        pytest.skip("fp64 is always PyTorch's")
    if _launch.BACKEND == "triton" and device.type == "cpu" and mode in ("bf16", "autocast"):
        pytest.skip("Triton's interpreter does not multiply bf16")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_agrees_with_torch(lengths: list[int], causal: bool, mode: str, device: torch.device) -> None:
    multiplies(mode, device)
    cu_seqlens = cumulative(lengths)
    check(
        lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal),
        lambda q, k, v: exact(q, k, v, cu_seqlens, causal),
        inputs(sum(lengths)), mode, roundings=ROUNDINGS, length=max(lengths, default=0) + WIDTH, device=device,
    )  # fmt: skip


# V3's, a mini model's, two parts of which one is ragged, one part ragged, the two widths far apart, single columns
WIDTHS = [
    (192, 128, "fp16"), (48, 32, "fp16"), (48, 32, "fp32"), (40, 24, "fp32"), (24, 8, "fp16"), (16, 128, "fp16"),
    (136, 1, "fp16"), (1, 5, "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("width", "v_width", "mode"), WIDTHS)
def test_widths(width: int, v_width: int, mode: str, device: torch.device) -> None:
    """Shared keys, shared values, both and neither take turns."""
    cu_seqlens, causal = cumulative([35, 0, 66]), width != 48
    key_heads, value_heads = (1 if width in (192, 40) else HEADS), (1 if width in (192, 24) else HEADS)
    tensors = [torch.randn(101, heads, last) for heads, last in ((HEADS, width), (key_heads, width))]
    check(
        lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal),
        lambda q, k, v: exact(q, k, v, cu_seqlens, causal),
        [*tensors, torch.randn(101, value_heads, v_width)], mode, roundings=ROUNDINGS, length=66 + width, device=device,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nope", "rope", "v_width"), [(128, 64, 128), (24, 0, 8), (136, 0, 1), (40, 24, 7), (8, 33, 33)]
)
@pytest.mark.parametrize("apart", [False, True])
def test_kernels_see_rows_that_load_16_bytes_at_a_time(
    nope: int, rope: int, v_width: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row starts in the middle of a wider one; what is fine already is not copied."""
    seen: list[Tensor] = []
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *args, **kwargs: seen.extend(tensors_of(args)))
    q, k, v = (torch.randn(9, HEADS, width + 3).half() for width in (nope + rope, nope + rope, v_width))
    fine = (nope, v_width) == (128, 128)
    q, k, v = (x[..., :-3].contiguous() if fine else x[..., 3:] for x in (q, k, v))
    rows = [x.requires_grad_() for x in (*(k.split([nope, rope], -1) if apart and rope else (k,)), q, v)]
    *keys, q, v = rows
    mla_attention(q, tuple(keys) if len(keys) == 2 else keys[0], v, cumulative([9])).sum().backward()
    assert len(seen) == 6 + 9 + 9
    for x in seen:
        if x.shape[2]:
            assert x.stride(2) == 1 and all(n % 16 == 0 for n in (x.shape[2], x.data_ptr(), *x.stride()[:2]))
    if fine:
        assert {q.data_ptr(), v.data_ptr(), keys[0].data_ptr()} <= {x.data_ptr() for x in seen}


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """Rows [T, H, D] among them."""
    return [x for x in args if isinstance(x, Tensor) and x.dim() == 3]


@pytest.mark.parametrize(("apart_q", "apart_k"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("nope", "rope", "mode"), [(8, 4, "fp32"), (32, 16, "fp16"), (40, 24, "fp16"), (80, 80, "fp32")]
)
@pytest.mark.parametrize(("nope_heads", "rope_heads", "value_heads"), [(HEADS, 1, HEADS), (1, HEADS, 1), (1, 1, 1)])
def test_parts_of_rows_apart(
    apart_q: bool, apart_k: bool, nope: int, rope: int, mode: str, nope_heads: int, rope_heads: int, value_heads: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Against rows that are concatenated; each part's heads share on their own. 80 + 80 is wider than kernels hold in
    two parts."""
    cu_seqlens, tokens = cumulative([17, 0, 33]), 50
    key_shapes = [(nope_heads, nope), (rope_heads, rope)] if apart_k else [(nope_heads, nope + rope)]
    query_shapes = [(HEADS, nope), (HEADS, rope)] if apart_q else [(HEADS, nope + rope)]
    tensors = [torch.randn(tokens, *shape) for shape in [*query_shapes, *key_shapes, (value_heads, V_WIDTH)]]

    def rows(*tensors: Tensor) -> tuple[Any, Any, Tensor]:
        *parts, v = tensors
        q, k = tuple(parts[: len(query_shapes)]), tuple(parts[len(query_shapes) :])
        return q if apart_q else q[0], k if apart_k else k[0], v

    def whole(x: Any) -> Tensor:
        return torch.cat([part.expand(-1, HEADS, -1) for part in x], -1) if isinstance(x, tuple) else x

    def wanted(*tensors: Tensor) -> Tensor:
        q, k, v = rows(*tensors)
        return exact(whole(q), whole(k), v, cu_seqlens, True)

    check(
        lambda *tensors: mla_attention(*rows(*tensors), cu_seqlens), wanted, tensors, mode, roundings=ROUNDINGS,
        length=33 + nope + rope, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["fp32", "fp16", "autocast"])
@pytest.mark.parametrize(
    ("nope", "rotary", "apart_q", "apart_k", "key_heads"),
    [
        (8, 4, False, True, 1), (8, 4, True, False, HEADS), (8, 4, True, True, HEADS), (0, 12, False, False, 1),
        (5, 2, False, False, HEADS), (136, 24, False, True, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made again"])
def test_rotates_on_the_way(
    nope: int, rotary: int, apart_q: bool, apart_k: bool, key_heads: int, mode: str, kept: bool, device: torch.device
) -> None:  # fmt: skip
    """Against a rotation before an attention, both in fp64. 136 + 24 is wider than kernels hold in two parts; pairs
    that begin at odd places of memory are no complex numbers there."""
    multiplies(mode, device)
    tokens, width, cu_seqlens = 50, nope + rotary, cumulative([17, 0, 33])
    cos, sin = rotary_angles(tokens, rotary // 2)

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (turned(x, cos.to(x), sin.to(x)) for x in (q, k))
        return exact(q, k, v, cu_seqlens, True)

    def rotating(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.split([nope, rotary], -1) if apart else x for x, apart in ((q, apart_q), (k, apart_k)))
        return mla_attention(*rows, v, cu_seqlens, rotary_cos=cos.to(q.device), rotary_sin=sin.to(q.device))

    shapes = (HEADS, width), (key_heads, width), (HEADS, V_WIDTH)
    with pieces_of(64, 1 << 20, kept):
        check(
            rotating, exactly, [torch.randn(tokens, *shape) for shape in shapes], mode, roundings=ROUNDINGS + 4,
            length=33 + width, device=device,
        )  # fmt: skip


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last columns' rotation as a matrix product for each token and pair."""
    passed, tail = x.split([x.shape[-1] - 2 * cos.shape[1], 2 * cos.shape[1]], -1)
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return torch.cat((passed, torch.einsum("tpij,thpj->thpi", turn, tail.unflatten(-1, (-1, 2))).flatten(-2)), -1)


def test_rows_are_not_held_twice() -> None:
    """What the forward keeps holds them: those given can be freed."""
    q, k, v = (x.requires_grad_() for x in inputs(40))
    out = mla_attention(q * 1, k * 1, v * 1, cumulative([40]))
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved if x is not None}
    probabilities, once = HEADS * 40 * 40, 40 * HEADS * (2 * WIDTH + V_WIDTH)
    assert sum(held.values()) <= 4 * (probabilities + once + 40 * HEADS * V_WIDTH) + 64  # and out


@pytest.mark.parametrize("apart", [True, False])
def test_shared_keys_are_not_copied_to_heads(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At DeepSeek-V3's widths the operator gets what was given."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    seen: list[Any] = []

    def operator(*args: Any) -> tuple[Tensor, ...]:
        seen.extend(args[:5])
        return torch.zeros(4, 2, 128), torch.zeros(2, 4), torch.zeros(0)

    monkeypatch.setattr(importlib.import_module("minids_kernels.mla_attention"), "_mla_attention", operator)
    q, k, k_pe, v = (torch.zeros(4, *shape) for shape in ((2, 192), (1, 128 if apart else 192), (1, 64), (1, 128)))
    mla_attention(q, (k, k_pe) if apart else k, v, cumulative([4]))
    assert [None if x is None else x.data_ptr() for x in seen] == [
        q.data_ptr(), None, k.data_ptr(), k_pe.data_ptr() if apart else None, v.data_ptr(),
    ]  # fmt: skip


def exact_over_keys(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int], causal: bool
) -> Tensor:  # fmt: skip
    """Document by document through torch's attention under a mask aligned to the last query and key."""
    outs = []
    for qd, kd, vd in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
        mask = torch.ones(len(qd), len(kd), dtype=torch.bool, device=q.device)
        mask = mask.tril(len(kd) - len(qd)) if causal else mask
        rows = mask.any(1)
        out = F.scaled_dot_product_attention(
            *(x.expand(-1, HEADS, -1).transpose(0, 1) for x in (qd[rows], kd, vd)), attn_mask=mask[rows]
        )
        outs.append(v.new_zeros(len(qd), HEADS, v.shape[2]).index_put((rows,), out.transpose(0, 1)))
    return torch.cat(outs)


# queries and keys of each document
PAIRS = {
    "more keys": [(5, 19), (33, 100), (1, 40)],
    "fewer keys": [(40, 3), (100, 33), (2, 1)],
    "none of either": [(0, 7), (9, 0), (0, 0), (6, 11), (20, 20)],
    "equal twice": [(16, 32), (16, 32), (64, 64)],
}


@pytest.mark.parametrize("mode", ["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_keys_that_are_not_the_queries_tokens(
    pairs: list[tuple[int, int]], causal: bool, mode: str, device: torch.device
) -> None:  # fmt: skip
    multiplies(mode, device)
    lengths, key_lengths = [q for q, _ in pairs], [k for _, k in pairs]
    cu_seqlens, cu_seqlens_k = cumulative(lengths), cumulative(key_lengths)
    tensors = [inputs(sum(lengths))[0], *inputs(sum(key_lengths), 1)[1:]]
    check(
        lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal, cu_seqlens_k=cu_seqlens_k),
        lambda q, k, v: exact_over_keys(q, k, v, lengths, key_lengths, causal),
        tensors, mode, roundings=ROUNDINGS, length=max(*lengths, *key_lengths) + WIDTH, device=device,
    )  # fmt: skip
    got = mla_attention_reference(*tensors, cu_seqlens, causal, cu_seqlens_k=cu_seqlens_k)
    want = exact_over_keys(*(t.double() for t in tensors), lengths, key_lengths, causal)
    assert_near(got, want, error_bound(torch.float32, ROUNDINGS, 100))


@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_no_key(causal: bool, device: torch.device) -> None:
    """Of 5 queries the first 3 see none of 2 keys when causal; a document without keys shows none at all."""
    q, k, v = (x.to(device, torch.float16) for x in inputs(9))
    q.requires_grad_()
    with poisoned_memory():
        out, lse = mla_attention(
            q, k[:2], v[:2], cumulative([5, 4]), causal, return_lse=True, cu_seqlens_k=cumulative([2, 0])
        )
        out.sum().backward()
    blind = [*range(3 if causal else 0), *range(5, 9)]
    seeing = [i for i in range(9) if i not in blind]
    assert q.grad is not None
    assert out[blind].count_nonzero() == 0 and q.grad[blind].count_nonzero() == 0
    assert (lse[blind] == torch.inf).all() and lse[seeing].isfinite().all() and out[seeing].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25)), min_size=1, max_size=6), causal=st.booleans(),
    block=st.sampled_from([1, 5, 16]), scores=st.sampled_from([1, 1 << 10]), kept=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_queries_and_keys(
    pairs: list[tuple[int, int]], causal: bool, block: int, scores: int, kept: bool, seed: int
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    lengths, key_lengths = [q for q, _ in pairs], [k for _, k in pairs]
    cu_seqlens, cu_seqlens_k = cumulative(lengths), cumulative(key_lengths)
    with pieces_of(block, scores, kept):
        check(
            lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal, cu_seqlens_k=cu_seqlens_k),
            lambda q, k, v: exact_over_keys(q, k, v, lengths, key_lengths, causal),
            [inputs(sum(lengths))[0], *inputs(sum(key_lengths))[1:]], "fp64", roundings=8 * ROUNDINGS, length=40,
        )  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
def test_shared_keys_for_any_number_of_parts(
    multiprocessors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads one after the other, two and one, each on its own: the sums of gradients are the same but for their
    order."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda x: multiprocessors)
    cu_seqlens = cumulative([30, 60, 40])
    check(
        lambda q, k, v: mla_attention(q, k, v, cu_seqlens), lambda q, k, v: exact(q, k, v, cu_seqlens, True),
        inputs(130, 1, 1), "fp16", roundings=ROUNDINGS, length=60 + WIDTH, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_log_sum_exp(causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    lengths = [5, 0, 70, 1]
    cu_seqlens, (q, k, v) = cumulative(lengths), (x.to(device, dtype) for x in inputs(sum(lengths), 1))
    out, lse = mla_attention(q.requires_grad_(), k, v, cu_seqlens, causal, 0.4, return_lse=True)
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and out.requires_grad and not lse.requires_grad
    assert torch.equal(out, mla_attention(q, k, v, cu_seqlens, causal, 0.4))
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("mhd,nd->hmn", q[start:end].double(), k[start:end, 0].double()) * 0.4
        if causal:
            scores += torch.full_like(scores[0], -torch.inf).triu(1)
        want = scores.logsumexp(-1).t()
        assert_near(lse.detach()[start:end], want, error_bound(dtype, 6, WIDTH), floor=1.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_all_is_written_and_the_same_bits_twice(heads: int, causal: bool, device: torch.device) -> None:
    """Several tiles and documents, memory poisoned with NaN."""
    cu_seqlens, tensors = cumulative([70, 0, 3, 40]), [x.to(device, torch.float16) for x in inputs(113, heads, heads)]
    dout = torch.randn(113, HEADS, V_WIDTH).to(device, torch.float16)

    def once() -> tuple[Tensor, list[Tensor]]:
        with poisoned_memory():
            return run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal), tensors, dout)

    (one, grads), (other, others) = once(), once()
    assert all(x.isfinite().all() for x in (one, *grads))
    assert all(torch.equal(a, b) for a, b in zip((one, *grads), (other, *others), strict=True))


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("changed", [0, 2, 3])
def test_a_document_never_sees_its_neighbour(changed: int, filler: float, device: torch.device) -> None:
    """The documents' ends lie within tiles."""
    cu_seqlens, tensors = cumulative([70, 0, 33, 40]), [x.to(device, torch.float16) for x in inputs(143, 1)]
    dout = torch.randn(143, HEADS, V_WIDTH).to(device, torch.float16)
    start, end = cu_seqlens[changed : changed + 2].tolist()
    others = [t.clone() for t in (*tensors, dout)]
    for t in others:
        t[start:end] = filler
    before, grads = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens), tensors, dout)
    after, grads_after = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens), others[:3], others[3])
    for one, other in zip((before, *grads), (after, *grads_after), strict=True):
        assert torch.equal(one[:start], other[:start]) and torch.equal(one[end:], other[end:])


def test_tokens_beyond_two_to_the_31(device: torch.device) -> None:
    """Rows so far apart that the last documents' offsets need 64 bits; only the rows' own pages are touched."""
    lengths, stride = [300, 219], 1 << 22
    far = torch.empty(sum(lengths) * stride, dtype=torch.float16, device=device)
    far = far.as_strided((sum(lengths), HEADS, WIDTH), (stride, WIDTH, 1))
    q, k, v = (x.to(device, torch.float16) for x in inputs(sum(lengths)))
    far.copy_(k)
    one = mla_attention(q, k, v, cumulative(lengths))
    assert torch.equal(mla_attention(q, far, v, cumulative(lengths)), one)


@pytest.mark.parametrize(("apart", "rotary"), [(True, True), (False, False)])  # each argument given once, once None
def test_registration(apart: bool, rotary: bool, device: torch.device) -> None:
    cu_seqlens = cumulative([5, 0, 1, 8]).to(device)
    q, k, v = (x.to(device) for x in inputs(14, 1))
    cos_sin = [x.to(device) for x in rotary_angles(14, 2)] if rotary else [None, None]
    rows = [q[..., :8], q[..., 8:], k[..., :8], k[..., 8:], v] if apart else [q, None, k, None, v]
    for kept, keys in ((False, None), (True, cumulative([4, 1, 1, 8]).to(device))):
        leaves = [None if x is None else x.detach().requires_grad_() for x in rows]
        opcheck(ops.mla_attention.default, (*leaves, cu_seqlens, keys, *cos_sin, True, 0.3, kept, kept))
    out, lse, probabilities = ops.mla_attention(*rows, cu_seqlens, None, *cos_sin, True, 0.3, True, True)
    dout = torch.randn(14, HEADS, V_WIDTH, device=device)
    opcheck(
        ops.mla_attention_backward.default,
        (dout, *rows, out, lse, probabilities, cu_seqlens, None, *cos_sin, True, 0.3),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_reference_agrees_with_torch(lengths: list[int], causal: bool) -> None:
    cu_seqlens, tensors = cumulative(lengths), inputs(sum(lengths), 1, HEADS)
    got = mla_attention_reference(*tensors, cu_seqlens, causal, 0.3)
    want = exact(*(t.double() for t in tensors), cu_seqlens, causal, 0.3)
    assert_near(got, want, error_bound(torch.float32, ROUNDINGS, 300))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 45)), max_size=6), causal=st.booleans(),
    key_heads=st.sampled_from([1, HEADS]), value_heads=st.sampled_from([1, HEADS]),
    scale=st.sampled_from([None, 0.1, 1.0]), block=st.sampled_from([1, 5, 16, 128]),
    scores=st.sampled_from([1, 1 << 10, 1 << 18]),
    kept=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_documents(
    lengths: list[int], causal: bool, key_heads: int, value_heads: int, scale: float | None, block: int, scores: int,
    kept: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    cu_seqlens = cumulative(lengths)
    with pieces_of(block, scores, kept):
        check(
            lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal, scale),
            lambda q, k, v: exact(q, k, v, cu_seqlens, causal, scale),
            inputs(sum(lengths), key_heads, value_heads), "fp64", roundings=8 * ROUNDINGS, length=60,
        )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=6), causal=st.booleans(), data=st.data(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_documents_never_meet(lengths: list[int], causal: bool, data: st.DataObject, seed: int) -> None:
    """Whatever one document holds, even NaN, all others' outputs and gradients stay as they are, bit for bit."""
    torch.manual_seed(seed)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    filler = data.draw(st.sampled_from([torch.nan, torch.inf, 1e30, 0.5]))
    cu_seqlens, tensors = cumulative(lengths), inputs(sum(lengths), 1)
    dout = torch.randn(sum(lengths), HEADS, V_WIDTH)
    start, end = cu_seqlens[changed : changed + 2].tolist()
    others = [t.clone() for t in (*tensors, dout)]
    for t in others:
        t[start:end] = filler
    before, grads = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal), tensors, dout)
    after, grads_after = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal), others[:3], others[3])
    for one, other in zip((before, *grads), (after, *grads_after), strict=True):
        assert torch.equal(one[:start], other[:start]) and torch.equal(one[end:], other[end:])


def test_causal_rows_never_see_what_follows(device: torch.device) -> None:
    """Later tokens of the own document may change, too; and no gradient flows back from earlier rows to later ones."""
    cu_seqlens, (q, k, v) = cumulative([150, 30]), (x.to(device, torch.float16) for x in inputs(180))
    out = mla_attention(q, k, v, cu_seqlens)
    k2, v2 = k.clone(), v.clone()
    k2[140:150], v2[140:150] = 50.0, 6e4
    assert torch.equal(mla_attention(q, k2, v2, cu_seqlens)[:140], out[:140])
    dout = torch.zeros_like(out)
    dout[:140] = 1
    _, (_, dk, dv) = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens), [q, k, v], dout)
    assert dk[140:].count_nonzero() == dv[140:].count_nonzero() == 0


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_large_scores_do_not_overflow(mode: str, device: torch.device) -> None:
    """Scores of 10^4: attention becomes a choice of the largest, gradients stay finite."""
    multiplies(mode, device)
    q, k, v = (t.to(device, MODES[mode][0]) for t in inputs(40))
    out, grads = run(lambda q, k, v: mla_attention(q, k, v, cumulative([40]), scale=1.0), [70 * q, 20 * k, v])
    assert all(t.isfinite().all() for t in (out, *grads))
    assert (out.abs().amax() <= v.abs().amax()).item()


def test_one_token_sees_itself(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in inputs(5))
    assert torch.equal(mla_attention(q, k, v, cumulative([1] * 5)), v)


def angles(x: Tensor) -> dict[str, Any]:
    return {"rotary_cos": x, "rotary_sin": x}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 2, 6).int()}, TypeError, "q: got torch.int32"),
        ({"k": torch.zeros(4, 2, 6).int()}, TypeError, "k: got torch.int32"),
        ({"v": torch.zeros(4, 2, 6).int()}, TypeError, "v: got torch.int32"),
        ({"q": torch.zeros(4, 12)}, ValueError, r"q: got shape \(4, 12\), allowed is \(any, any, any\)"),
        ({"k": torch.zeros(4, 2, 5)}, ValueError, r"k: got shape \(4, 2, 5\), allowed is \(4, any, 6\)"),
        ({"v": torch.zeros(3, 2, 5)}, ValueError, r"v: got shape \(3, 2, 5\), allowed is \(4, any, any\)"),
        ({"k": torch.zeros(4, 3, 6)}, ValueError, "k: got 3 heads, allowed is 1 or q's 2"),
        ({"v": torch.zeros(4, 4, 5)}, ValueError, "v: got 4 heads, allowed is 1 or q's 2"),
        ({"cu_seqlens": torch.tensor([]).int()}, ValueError, "cu_seqlens: got nothing"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 4])}, ValueError, r"cu_seqlens_k: got shape \(3,\), allowed is \(2\)"),
        (
            {"cu_seqlens_k": torch.tensor([0, 3]), "v": torch.zeros(3, 2, 5)},
            ValueError,
            r"v: got shape \(3, 2, 5\), allowed is \(4, any, any\)",
        ),
        ({"scale": 0.0}, ValueError, "scale: got 0.0, allowed is above 0"),
        ({"scale": float("nan")}, ValueError, "scale: got nan, allowed is above 0"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, ValueError, r"cu_seqlens: got shape \(1, 2\)"),
        ({"q": (torch.zeros(4, 2, 6),) * 3}, ValueError, "q: got 3 tensors, allowed are one or two"),
        ({"q": (torch.zeros(4, 2, 4), torch.zeros(4, 1, 2))}, ValueError, r"q\[1\]: got shape \(4, 1, 2\)"),
        (
            {"k": (torch.zeros(4, 2, 4), torch.zeros(4, 3, 2))},
            ValueError,
            r"k\[1\]: got 3 heads, allowed is 1 or q's 2",
        ),
        ({"k": (torch.zeros(4, 2, 4), torch.zeros(4, 1, 3))}, ValueError, r"k: got 4 \+ 3 columns, allowed are q's 6"),
        ({"k": (torch.zeros(4, 2, 4), torch.zeros(4, 1, 2).int())}, TypeError, r"k\[1\]: got torch.int32"),
        (
            {name: (torch.zeros(4, 2, a), torch.zeros(4, 2, 6 - a)) for name, a in (("q", 4), ("k", 2))},
            ValueError,
            r"k\[0\]: got shape \(4, 2, 2\), allowed is \(4, any, 4\)",
        ),
        ({"rotary_cos": torch.zeros(4, 1)}, ValueError, "got one of them, allowed are both or neither"),
        (angles(torch.zeros(3, 1)), ValueError, r"rotary_cos: got shape \(3, 1\), allowed is \(4, any\)"),
        (
            {**angles(torch.zeros(4, 2)), "rotary_sin": torch.zeros(4, 1)},
            ValueError,
            r"rotary_sin: got shape \(4, 1\), allowed is \(4, 2\)",
        ),
        (angles(torch.zeros(4, 4)), ValueError, "rotary_cos: got 4 angles, allowed .* of 6"),
        (angles(torch.zeros(4, 0)), ValueError, "rotary_cos: got 0 angles"),
        (
            {**angles(torch.zeros(4, 2)), "q": (torch.zeros(4, 2, 4), torch.zeros(4, 2, 2))},
            ValueError,
            r"rotary_cos: got 2 angles, allowed are half as many as q has columns to rotate, of 4 \+ 2",
        ),
        (
            {**angles(torch.zeros(4, 2)), "cu_seqlens_k": torch.tensor([0, 4])},
            ValueError,
            "rotary_cos: got angles and cu_seqlens_k, allowed are angles where q's tokens are k's",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(q=torch.zeros(4, 2, 6), k=torch.zeros(4, 2, 6), v=torch.zeros(4, 2, 5), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(error, match=message):
        mla_attention(**{**good, **change})


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4]])
def test_bounds_that_do_not_run_to_the_end(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens: got .*, allowed is 0, rising, to 4"):
        mla_attention(torch.zeros(4, 2, 6), torch.zeros(4, 2, 6), torch.zeros(4, 2, 5), torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"cu_seqlens_k: got .*, allowed is 0, rising, to 4"):
        own = torch.tensor([0, *[1] * (len(bounds) - 1)])
        mla_attention(
            torch.zeros(1, 2, 6), torch.zeros(4, 2, 6), torch.zeros(4, 2, 5), own, cu_seqlens_k=torch.tensor(bounds)
        )


def test_widths_that_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    q, v, cu_seqlens = torch.zeros(4, 2, 200), torch.zeros(4, 2, 136), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="q: got 200 columns, allowed are up to 192"):
        mla_attention(q, q, v, cu_seqlens)
    with pytest.raises(ValueError, match="v: got 136 columns, allowed are up to 128"):
        mla_attention(q[..., :8], q[..., :8], v, cu_seqlens)
