"""Rows of the latent cache: each step of `write_latent_cache` as an op of its own, and fp8 rows field by field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import (
    mla_decode,
    quantize_latent_cache,
    rms_norm,
    rope,
    write_latent_cache,
    write_latent_cache_reference,
)
from minids_kernels._ops import ops
from minids_kernels.mla_cache import row_bytes, row_fields
from torch import Tensor
from torch.library import opcheck

from tests.kernels.numerics import assert_near, error_bound, poisoned_memory

# latent and rotated widths, page size, dtype of kv, fp8 rows or not
SIZES = [
    (512, 64, 16, torch.bfloat16, False), (512, 64, 64, torch.bfloat16, True), (64, 16, 5, torch.float32, False),
    (384, 24, 7, torch.float16, True), (33, 2, 1, torch.float32, False), (128, 0, 4, torch.float16, True),
    (1, 6, 3, torch.float16, False),
]  # fmt: skip


def problem(
    tokens: int, latent: int, rotary: int, page: int, dtype: torch.dtype, fp8: bool, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Arguments up to the slots, of which each third token has none; and queries of 3 heads."""
    kv = torch.randn(tokens, latent + rotary)
    angle = torch.randn(tokens, rotary // 2)
    pages = 2 + tokens // page
    slots = torch.randperm(pages * page)[:tokens]
    slots[::3] = -1
    cache = torch.randint(0, 256, (pages, page, row_bytes(latent, rotary) if fp8 else 1)).to(torch.uint8)
    cache = cache if fp8 else torch.randn(pages, page, latent + rotary).to(dtype)
    args = [kv.to(dtype), 1 + torch.randn(latent) / 4, angle.cos(), angle.sin(), cache, slots]
    return [x.to(device) for x in args], torch.randn(tokens, 3, rotary).to(device, dtype)


def widened(rows: Tensor, latent: int) -> list[Tensor]:
    """Latents and keys of rows of either kind, fp64."""
    if rows.dtype != torch.uint8:
        return [rows[..., :latent].double(), rows[..., latent:].double()]
    codes, scales, key = row_fields(rows, latent)
    values = codes.view(torch.float8_e4m3fn).double().unflatten(-1, (-1, 128)) * scales.double()[..., None]
    return [values.flatten(-2), key.double()]


@pytest.mark.parametrize("tokens", [0, 1, 11])
@pytest.mark.parametrize(("latent", "rotary", "page", "dtype", "fp8"), SIZES, ids=str)
def test_agrees_with_the_reference(
    latent: int, rotary: int, page: int, dtype: torch.dtype, fp8: bool, tokens: int, device: torch.device
) -> None:
    """Other rows keep their bits; latents and keys are roundings apart, codes a step of e4m3."""
    args, q = problem(tokens, latent, rotary, page, dtype, fp8, device)
    want, want_q = write_latent_cache_reference(*args, q_pe=q)
    before, (*_, cache, slots) = args[4].clone(), args
    with poisoned_memory():
        got_q = write_latent_cache(*args, q_pe=q)
    touched = torch.zeros(cache.shape[:2], dtype=torch.bool, device=device).flatten()
    touched[slots[slots >= 0]] = True
    touched = touched.view(cache.shape[:2])
    assert torch.equal(cache[~touched], before[~touched])
    assert got_q is not None and want_q is not None
    step = 2**-4  # of e4m3, half a unit in the last place: where the latent's rounding decides between two codes
    bounds = [step if fp8 else error_bound(dtype, 2, 1), error_bound(torch.bfloat16 if fp8 else dtype, 3, 1)]
    for one, other, bound in zip(widened(cache[touched], latent), widened(want[touched], latent), bounds, strict=True):
        assert_near(one, other, bound)
    assert_near(got_q, want_q.double(), error_bound(dtype, 3, 1))


@pytest.mark.parametrize("fp8", [False, True])
def test_equals_its_steps(fp8: bool) -> None:
    """On the PyTorch path bit for bit what the ops give one after the other."""
    args, q = problem(9, 128, 16, 4, torch.float32, fp8, torch.device("cpu"))
    kv, weight, cos, sin, cache, slots = args
    latent, key = rms_norm(kv[:, :128], weight, 1e-5), rope(kv[:, None, 128:], cos, sin)[:, 0]
    rows = quantize_latent_cache(latent, key) if fp8 else torch.cat((latent, key), -1)
    assert torch.equal(write_latent_cache(*args, eps=1e-5, q_pe=q), rope(q, cos, sin))  # type: ignore[arg-type]
    assert write_latent_cache(*args, eps=1e-5) is None
    real = slots >= 0
    assert torch.equal(cache.flatten(0, 1)[slots[real]], rows[real])


def test_is_what_decoding_reads(device: torch.device) -> None:
    """A sequence written token by token, read by `mla_decode`: attention over the rows."""
    (kv, weight, cos, sin, cache, _), _ = problem(10, 64, 16, 4, torch.float32, False, device)
    table = torch.tensor([[3, 0, 2]], device=device)
    places = torch.arange(10, device=device)
    slots = table[0, places // 4] * 4 + places % 4
    for t in range(10):
        part = slice(t, t + 1)
        write_latent_cache(kv[part], weight, cos[part], sin[part], cache, slots[part].int())
    absorbed = torch.randn(1, 1, 3, 80, device=device)
    out, _ = mla_decode(absorbed, cache, table, torch.tensor([10], device=device), 64, 0.2)
    rows = torch.cat((rms_norm(kv[:, :64], weight), rope(kv[:, None, 64:], cos, sin)[:, 0]), -1)
    want = (absorbed[0, 0] @ rows.T * 0.2).softmax(-1) @ rows[:, :64]
    torch.testing.assert_close(out[0, 0], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
def test_layouts_do_not_matter(fp8: bool, device: torch.device) -> None:
    args, q = problem(7, 128, 16, 4, torch.float16, fp8, device)
    kv, weight, cos, sin, cache, slots = args
    wide = torch.zeros(cache.shape[0], 2 * cache.shape[1], cache.shape[2] + 4, dtype=cache.dtype, device=device)
    apart = wide[:, ::2, : cache.shape[2]]
    apart.copy_(cache)
    want = write_latent_cache(*args, q_pe=q)
    got = write_latent_cache(
        kv.t().contiguous().t(), weight.repeat_interleave(2)[::2], cos.double().t().contiguous().t(), sin, apart,
        slots.int(), q_pe=q.transpose(0, 1).contiguous().transpose(0, 1),
    )  # fmt: skip
    assert torch.equal(apart, cache) and want is not None and got is not None
    assert_near(got, want.double(), error_bound(torch.float16, 2, 1))
    assert not wide[:, 1::2].any() and not wide[..., cache.shape[2] :].any()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12), latent=st.integers(1, 40), half=st.integers(0, 6), page=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_sizes(tokens: int, latent: int, half: int, page: int, seed: int) -> None:
    torch.manual_seed(seed)
    args, q = problem(tokens, latent, 2 * half, page, torch.float64, False, torch.device("cpu"))
    want, want_q = write_latent_cache_reference(*args, q_pe=q)
    got_q = write_latent_cache(*args, q_pe=q)
    torch.testing.assert_close(args[4], want, atol=1e-6, rtol=1e-6)  # the reference rotates in fp32
    torch.testing.assert_close(got_q, want_q, atol=1e-6, rtol=1e-6)


def test_fp8_rows(device: torch.device) -> None:
    """656 bytes in DeepSeek-V3; the error of 3 bits of mantissa, scales of one tile not its neighbour's."""
    latent, rotary = torch.randn(2, 3, 512, device=device), torch.randn(2, 3, 64, device=device)
    latent[0, 0, :128] *= 1e4
    latent[0, 1, 128:256] = 0
    for scale_format in ("ue8m0", "fp32"):
        rows = quantize_latent_cache(latent, rotary, scale_format)
        assert rows.shape == (2, 3, 656) and rows.dtype == torch.uint8
        codes, scales, kept = row_fields(rows, 512)
        values = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128)) * scales[..., None]
        error = (values.flatten(-2) - latent).unflatten(-1, (4, 128)).abs()
        assert (error <= torch.maximum(latent.unflatten(-1, (4, 128)).abs() / 16, scales[..., None] * 2**-10)).all()
        assert torch.equal(kept, rotary.bfloat16())
        assert scale_format == "fp32" or torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))


@pytest.mark.parametrize("fp8", [False, True])
def test_registration(fp8: bool, device: torch.device) -> None:
    args, q = problem(5, 128, 16, 4, torch.float32, fp8, device)
    opcheck(ops.write_latent_cache.default, (*args, 1e-6, q))
    opcheck(ops.write_latent_cache.default, (*args, 1e-6, None))


def test_compiles_whole(device: torch.device) -> None:
    args, q = problem(5, 64, 16, 4, torch.float32, False, device)
    other = [x.clone() for x in args]
    got = torch.compile(write_latent_cache, fullgraph=True)(*args, q_pe=q)
    assert torch.equal(got, write_latent_cache(*other, q_pe=q)) and torch.equal(args[4], other[4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv": torch.zeros(3, 20).int()}, TypeError, "kv: got torch.int32"),
        ({"kv": torch.zeros(3, 19)}, ValueError, "kv: got 19 columns for 16 weights, allowed is an even number above"),
        ({"kv": torch.zeros(3, 12)}, ValueError, "kv: got 12 columns for 16 weights"),
        ({"cos": torch.zeros(3, 3)}, ValueError, r"cos: got shape \(3, 3\), allowed is \(3, 2\)"),
        ({"sin": torch.zeros(2, 2)}, ValueError, r"sin: got shape \(2, 2\), allowed is \(3, 2\)"),
        ({"slots": torch.zeros(3)}, TypeError, "slots: got torch.float32, allowed are torch.int32, torch.int64"),
        ({"slots": torch.tensor([1, 8, 2])}, ValueError, r"slots: got 8, allowed are those below 2 \* 4, or below 0"),
        ({"kv_cache": torch.zeros(2, 4, 20).half()}, TypeError, "kv_cache: got torch.float16, allowed is kv's"),
        (
            {"kv_cache": torch.zeros(2, 4, 21)},
            ValueError,
            r"kv_cache: got shape \(2, 4, 21\), allowed is \(any, any, 20\)",
        ),
        ({"kv_cache": torch.zeros(2, 4, 20).byte()}, ValueError, "an fp8 row: got 16 latent and 4 rotated values"),
        ({"kv_cache": torch.zeros(2, 20, 4).mT}, ValueError, "kv_cache: got strides"),
        ({"q_pe": torch.zeros(3, 2, 5)}, ValueError, r"q_pe: got shape \(3, 2, 5\), allowed is \(3, any, 4\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(
        kv=torch.zeros(3, 20), weight=torch.zeros(16), cos=torch.zeros(3, 2), sin=torch.zeros(3, 2),
        kv_cache=torch.zeros(2, 4, 20), slots=torch.tensor([0, 7, -1]),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        write_latent_cache(**{**good, **change})
