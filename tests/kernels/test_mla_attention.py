"""Attention over packed documents against torch's scaled_dot_product_attention in fp64 under a mask of documents."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import mla_attention, mla_attention_reference
from torch import Tensor

from tests.kernels.numerics import MODES, assert_near, check, error_bound, run

room = importlib.import_module("minids_kernels.mla_attention")
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
    q, k, v = (x.expand(-1, HEADS, -1).transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


DOCUMENTS = {
    "none": [],
    "one of nothing": [0],
    "one token": [1],
    "one": [37],
    "equal": [8, 8, 8],
    "mixed": [5, 0, 19, 1, 0, 0, 40, 3],
    "more than a block": [131, 2, 260],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_agrees_with_torch(lengths: list[int], causal: bool, mode: str) -> None:
    cu_seqlens = cumulative(lengths)
    check(
        lambda q, k, v: mla_attention(q, k, v, cu_seqlens, causal),
        lambda q, k, v: exact(q, k, v, cu_seqlens, causal),
        inputs(sum(lengths)), mode, roundings=ROUNDINGS, length=max(lengths, default=0) + WIDTH,
    )  # fmt: skip


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
    scale=st.sampled_from([None, 0.1, 1.0]), block=st.sampled_from([1, 5, 16, 128]), kept=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_documents(
    lengths: list[int], causal: bool, key_heads: int, value_heads: int, scale: float | None, block: int, kept: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    cu_seqlens = cumulative(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "QUERY_BLOCK", block)
        if not kept:
            patch.setattr(room, "KEPT_ELEMENTS", 0)
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


def test_causal_rows_never_see_what_follows() -> None:
    """Later tokens of the own document may change, too; and no gradient flows back from earlier rows to later ones."""
    cu_seqlens, (q, k, v) = cumulative([150, 30]), inputs(180)
    out = mla_attention(q, k, v, cu_seqlens)
    k2, v2 = k.clone(), v.clone()
    k2[140:150], v2[140:150] = 50.0, 1e30
    assert torch.equal(mla_attention(q, k2, v2, cu_seqlens)[:140], out[:140])
    dout = torch.zeros_like(out)
    dout[:140] = 1
    _, (_, dk, dv) = run(lambda q, k, v: mla_attention(q, k, v, cu_seqlens), [q, k, v], dout)
    assert dk[140:].count_nonzero() == dv[140:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores of 10^4: attention becomes a choice of the largest, gradients stay finite."""
    q, k, v = (t.to(dtype) for t in inputs(40))
    out, grads = run(lambda q, k, v: mla_attention(q, k, v, cumulative([40]), scale=1.0), [70 * q, 20 * k, v])
    assert all(t.isfinite().all() for t in (out, *grads))
    assert (out.abs().amax() <= v.abs().amax()).item()


def test_one_token_sees_itself() -> None:
    q, k, v = inputs(5)
    assert torch.equal(mla_attention(q, k, v, cumulative([1] * 5)), v)


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
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: got .*, allowed is 0, rising, to 4"),
        ({"cu_seqlens": torch.tensor([1, 4])}, ValueError, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([]).int()}, ValueError, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, ValueError, r"cu_seqlens: got shape \(1, 2\)"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = dict(q=torch.zeros(4, 2, 6), k=torch.zeros(4, 2, 6), v=torch.zeros(4, 2, 5), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(error, match=message):
        mla_attention(**{**good, **change})
