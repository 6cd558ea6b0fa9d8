"""FlashMLA's decoding interface (github.com/deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py) on `mla_decode`.

    from minids_kernels.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata

For the dense cache in bf16 or fp16, on every GPU that Triton serves; page size, head count and head_dim_v at will. The
schedule is worked out inside the kernel, so the metadata is empty and may be kept for any shapes and lengths. FlashMLA
reads its fp8 cache in sparse attention only; here dense attention reads the same rows. Sparse attention raises
ValueError. Test: tests/kernels/test_compat_flash_mla.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .._checks import check_shape
from ..mla_decode import mla_decode

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What FlashMLA keeps its schedule in; nothing needs to be kept here."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """(metadata, None) to hand to `flash_mla_with_kvcache`; arguments, which FlashMLA's first versions wanted, are
    ignored."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, S, Hq, D], k_cache [pages, page, Hk, D] in q's dtype, or with is_fp8_kvcache [pages, page, 1, bytes] of
    uint8 or e4m3, rows as `minids_kernels.quantize_latent_cache` writes them (656 bytes in DeepSeek-V3), block_table
    [B, P] and cache_seqlens [B] int32 -> out [B, S, Hq, head_dim_v] in q's dtype, lse [B, Hq, S] fp32. Query heads
    j * Hq / Hk.. see key head j. softmax_scale is D ** -0.5 unless given. Queries that see nothing give out 0 and lse
    +inf.

    Raises ValueError for arguments of sparse attention, for an fp8 cache that is none or not announced, without a block
    table or lengths, and when Hk does not divide Hq; what `mla_decode` raises for the rest.
    """
    sparse = dict(
        indices=indices, attn_sink=attn_sink, extra_k_cache=extra_k_cache, topk_length=topk_length,
        extra_indices_in_kvcache=extra_indices_in_kvcache, extra_topk_length=extra_topk_length,
    )  # fmt: skip
    for name, value in sparse.items():
        if value is not None:
            raise ValueError(f"{name}: got a tensor, allowed is None (sparse attention is not served)")
    if is_fp8_kvcache != (k_cache.element_size() == 1):
        allowed = "True for a cache of uint8 or e4m3, False for one in q's dtype"
        raise ValueError(f"is_fp8_kvcache: got {is_fp8_kvcache} with {k_cache.dtype}, allowed is {allowed}")
    if block_table is None or cache_seqlens is None:
        name = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{name}: got None, allowed is a tensor (it may be None in sparse attention only)")
    check_shape("q", q, (None, None, None, None))
    heads, width = q.shape[2:]
    check_shape("k_cache", k_cache, (None, None, 1, None) if is_fp8_kvcache else (None, None, None, width))
    key_heads = k_cache.shape[2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"k_cache: got {key_heads} heads, allowed are divisors of q's {heads}")
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    parts = [
        mla_decode(queries, k_cache[:, :, j], block_table, cache_seqlens, head_dim_v, scale, causal)
        for j, queries in enumerate(q.split(heads // key_heads, dim=2))
    ]
    out, lse = parts[0] if key_heads == 1 else (torch.cat(pieces, dim=2) for pieces in zip(*parts, strict=True))
    return out, lse.transpose(1, 2).contiguous()
