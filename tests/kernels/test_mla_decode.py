"""Absorbed paged attention against plain attention over keys and values that are spelled out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import mla_decode, mla_decode_reference
from minids_kernels.mla_decode import _rows
from torch import Tensor

LATENT, WIDTH = 16, 24
SCALE = 0.3


def paged(batch: int, table_pages: int, page: int, scattered: bool) -> tuple[Tensor, Tensor]:
    """A cache with spare pages, full of numbers, and a table whose pages follow each other or lie about."""
    spare = 3
    cache = torch.randn(batch * table_pages + spare, page, WIDTH)
    order = torch.randperm(len(cache))[: batch * table_pages] if scattered else 1 + torch.arange(batch * table_pages)
    return cache, order.view(batch, table_pages).int()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), new=st.integers(1, 4), heads=st.integers(1, 3), page=st.sampled_from([1, 4, 7]),
    scattered=st.booleans(), ragged=st.booleans(), causal=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_agrees_with_the_reference(
    batch: int, new: int, heads: int, page: int, scattered: bool, ragged: bool, causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cache, table = paged(batch, 13 // page + 2, page, scattered)
    lengths = torch.randint(new, 14, (batch,)) if ragged else torch.full((batch,), 13)
    q = torch.randn(batch, new, heads, WIDTH)
    out, lse = mla_decode(q, cache, table, lengths.int(), LATENT, SCALE, causal)
    want, want_lse = mla_decode_reference(q, cache, table, lengths, LATENT, SCALE, causal)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_agrees_with_torch_attention(dtype: torch.dtype, tolerance: float) -> None:
    """A whole causal sequence as new tokens is ordinary attention with one key and value head."""
    cache, table = paged(2, 5, 4, scattered=True)
    q = torch.randn(2, 18, 3, WIDTH).to(dtype)
    rows = cache[table.flatten().long()].view(2, 20, WIDTH)[:, :18].to(dtype)
    keys = rows.unsqueeze(1).expand(-1, 3, -1, -1).float()
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2).float(), keys, keys[..., :LATENT], is_causal=True, scale=SCALE
    )
    out, _ = mla_decode(q, cache.to(dtype), table, torch.tensor([18, 18]), LATENT, SCALE)
    assert out.dtype == dtype
    torch.testing.assert_close(out.transpose(1, 2).float(), want, atol=tolerance, rtol=tolerance)


def test_rows_behind_the_length_are_never_read() -> None:
    cache, table = paged(2, 2, 8, scattered=False)
    cache[:] = torch.nan
    cache[1:3, :5] = torch.randn(2, 5, WIDTH)  # the first 5 rows of sequence 0 ...
    cache[3] = torch.randn(8, WIDTH)  # ... and 8 of sequence 1
    cache[1] = torch.randn(8, WIDTH)
    out, lse = mla_decode(torch.randn(2, 1, 2, WIDTH), cache, table, torch.tensor([8 + 5, 8]), LATENT, SCALE)
    assert out.isfinite().all() and lse.isfinite().all()


def test_pages_in_order_are_not_copied() -> None:
    cache, table = paged(3, 2, 8, scattered=False)
    rows = _rows(cache, table, 11)
    assert rows.shape == (3, 11, WIDTH)
    assert rows.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 1, 2, WIDTH, dtype=torch.int64)}, TypeError, "q: got torch.int64"),
        ({"kv_cache": torch.zeros(2, 4, WIDTH - 1)}, ValueError, "kv_cache: got shape"),
        ({"kv_cache": torch.zeros(2, 4, WIDTH).half()}, TypeError, "kv_cache: got torch.float16, allowed is q's"),
        ({"block_table": torch.zeros(2, 2).int()}, ValueError, "block_table: got shape"),
        ({"seq_lens": torch.tensor([9])}, ValueError, r"seq_lens: got \[9\], allowed is 1 .* to 8"),
        ({"seq_lens": torch.tensor([0])}, ValueError, r"seq_lens: got \[0\]"),
        ({"v_dim": WIDTH + 1}, ValueError, "v_dim: got 25, allowed is 1 to the row's 24"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = dict(
        q=torch.zeros(1, 1, 2, WIDTH), kv_cache=torch.zeros(2, 4, WIDTH), block_table=torch.tensor([[0, 1]]),
        seq_lens=torch.tensor([5]), v_dim=LATENT, scale=SCALE,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        mla_decode(**{**good, **change})  # type: ignore[arg-type]
