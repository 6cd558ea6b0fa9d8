"""FlashMLA's interface, called as its README does, against torch's attention in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import dequantize_tiles, quantize_latent_cache, quantize_tiles
from minids_kernels.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from torch import Tensor

LATENT, WIDTH, PAGE = 64, 80, 64
LENGTHS = [0, 1, 20, 140]
NEW = 2


def call(device: torch.device, key_heads: int, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and the cache's rows [B, most, Hk, D], and what comes of them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # no bf16 products in the interpreter
    q = (torch.randn(len(LENGTHS), NEW, 4, WIDTH) / 10).to(device, dtype)
    cache = (torch.randn(12, PAGE, key_heads, WIDTH) / 10).to(device, dtype)
    table = torch.randperm(12, device=device)[: len(LENGTHS) * 3].view(-1, 3).int()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    metadata, num_splits = get_mla_metadata(lengths, NEW * 4 // key_heads, key_heads)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, LATENT, metadata, num_splits, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    return q, cache[table.long()].flatten(1, 2), out, lse


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_scale": 0.7, "causal": True}], ids=str)
def test_agrees_with_torch(key_heads: int, options: dict[str, Any], device: torch.device) -> None:
    """Tolerances of FlashMLA's tests: absolute or relative."""
    q, rows, out, lse = (x.cpu().double() for x in call(device, key_heads, **options))
    scale = options.get("softmax_scale", WIDTH**-0.5)
    for b, length in enumerate(LENGTHS):
        for i in range(NEW):
            seen = max(0, length - NEW + 1 + i) if options.get("causal") else length
            keys = rows[b, :seen].repeat_interleave(4 // key_heads, dim=1).transpose(0, 1)  # [4, seen, D]
            if seen == 0:
                assert not out[b, i].any() and (lse[b, :, i] == torch.inf).all()
                continue
            query = q[b, i].unsqueeze(1)
            want = F.scaled_dot_product_attention(query, keys, keys[..., :LATENT], scale=scale)[:, 0]
            want_lse = (scale * query @ keys.transpose(1, 2)).logsumexp(-1)[:, 0]
            error, lse_error = (out[b, i] - want).abs(), (lse[b, :, i] - want_lse).abs()
            assert ((error < 8e-4) | (error < 2.01 / 128 * want.abs())).all()
            assert ((lse_error < 1e-6) | (lse_error < 8.01 / 65536 * want_lse.abs())).all()


def test_fp8_cache(device: torch.device) -> None:
    """Rows of 656 bytes in pages that lie apart, as FlashMLA's tests lay them, against a cache of what they hold."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    q, latent, rotary = (torch.randn(*s, device=device) / 10 for s in ((2, 2, 3, 576), (4, 20, 512), (4, 20, 64)))
    memory = torch.full((4, 21, 656), 255, dtype=torch.uint8, device=device)
    memory[:, :20] = quantize_latent_cache(latent, rotary)
    cache = memory[:, :20].unsqueeze(2).view(torch.float8_e4m3fn)
    table = torch.tensor([[2, 0], [1, 2147480000]], dtype=torch.int32, device=device)
    lengths = torch.tensor([33, 7], dtype=torch.int32, device=device)
    q, metadata = q.to(dtype), get_mla_metadata()[0]
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, 512, metadata, causal=True, is_fp8_kvcache=True)
    codes, scales = quantize_tiles(latent, "ue8m0")
    plain = torch.cat((dequantize_tiles(codes, scales, torch.float32), rotary.bfloat16().float()), dim=-1)
    want, want_lse = flash_mla_with_kvcache(
        q.float(), plain.unsqueeze(2), table, lengths, 512, metadata, causal=True
    )  # fmt: skip
    torch.testing.assert_close(out.float(), want, atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=0)  # the PyTorch path rounds scores of size 1 to fp16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(1, 1, 4)}, "indices: got a tensor, allowed is None"),
        ({"attn_sink": torch.zeros(4)}, "attn_sink: got a tensor"),
        ({"is_fp8_kvcache": True}, "is_fp8_kvcache: got True with torch.float32, allowed is True for a cache of uint8"),
        ({"k_cache": torch.zeros(2, 4, 1, 656).byte()}, "is_fp8_kvcache: got False with torch.uint8"),
        ({"k_cache": torch.zeros(2, 4, 2, 656).byte(), "is_fp8_kvcache": True}, "k_cache: got shape"),
        ({"block_table": None}, "block_table: got None"),
        ({"cache_seqlens": None}, "cache_seqlens: got None"),
        ({"k_cache": torch.zeros(2, 4, 3, WIDTH)}, "k_cache: got 3 heads, allowed are divisors of q's 4"),
        ({"q": torch.zeros(1, 4, WIDTH)}, "q: got shape"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = dict(
        q=torch.zeros(1, 1, 4, WIDTH), k_cache=torch.zeros(2, 4, 1, WIDTH), block_table=torch.tensor([[0, 1]]).int(),
        cache_seqlens=torch.tensor([5]).int(), head_dim_v=LATENT, tile_scheduler_metadata=get_mla_metadata()[0],
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(**{**good, **change})
