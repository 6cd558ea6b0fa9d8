"""Absorbed attention of new tokens over a paged cache of latents: multi-head latent attention as multi-query attention.

The up-projections of keys and values are folded into the query and the output (DeepSeek-V2 report, arXiv 2405.04434,
section 2.1.2; FlashMLA's calling convention), so a cached token is one row of Dc + Dr numbers shared by all heads: its
latent, which is key and value at once, and its rotated key. With L = seq_lens[b] and row j of sequence b at
kv_cache[block_table[b, j // page], j % page]:
    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . row_j) row_j[:v_dim],  j < L, and j <= L - S + i when causal.

The PyTorch path reads pages that follow each other in place, without a copy, and treats sequences of one length as one
batch. Test: tests/kernels/test_mla_decode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_float, check_shape

__all__ = ["mla_decode", "mla_decode_reference"]


def mla_decode_reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """fp32, one sequence and one query token after the other; shapes as `mla_decode`."""
    batch, new, heads, _ = q.shape
    page = kv_cache.shape[1]
    out = torch.zeros(batch, new, heads, v_dim)
    lse = torch.zeros(batch, new, heads)
    for b, length in enumerate(seq_lens.tolist()):
        rows = torch.stack([kv_cache[block_table[b, j // page], j % page] for j in range(length)]).float()
        for i in range(new):
            seen = rows[: length - new + i + 1] if causal else rows
            scores = scale * (q[b, i].float() @ seen.T)
            lse[b, i] = scores.logsumexp(-1)
            out[b, i] = scores.softmax(-1) @ seen[:, :v_dim]
    return out.to(q.dtype), lse


def _rows(kv_cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """[B, length, Dc + Dr]: the first `length` rows of each sequence, in place where the pages follow each other."""
    table = block_table[:, : -(-length // kv_cache.shape[1])]
    pages = table.flatten().tolist()
    if pages == list(range(pages[0], pages[0] + len(pages))):
        rows = kv_cache[pages[0] : pages[0] + len(pages)]
    else:
        rows = kv_cache[table.flatten()]
    return rows.reshape(table.shape[0], -1, kv_cache.shape[2])[:, :length]


def _attend(q: Tensor, rows: Tensor, v_dim: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [B, S, H, W] over rows [B, L, W] -> out [B, S, H, v_dim], lse [B, S, H] fp32."""
    batch, new, heads, width = q.shape
    length = rows.shape[1]
    scores = torch.bmm(q.reshape(batch, new * heads, width), rows.transpose(1, 2)).float().mul_(scale)
    if causal and new > 1:
        hidden = torch.ones(new, length, dtype=torch.bool, device=q.device).triu_(length - new + 1)
        scores.view(batch, new, heads, length).masked_fill_(hidden.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.bmm(scores.sub_(lse).exp_().to(rows.dtype), rows[..., :v_dim])
    return out.view(batch, new, heads, v_dim), lse.view(batch, new, heads)


def mla_decode(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, v_dim: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, Dc + Dr] (S new tokens each), kv_cache [pages, page, Dc + Dr], block_table [B, P] page numbers,
    seq_lens [B] rows of each sequence, the S new ones among them -> out [B, S, H, v_dim] in q's dtype, lse [B, S, H]
    fp32 (natural log of the softmax's denominator).

    For inference: not registered with autograd. Raises TypeError for dtypes that differ or are no floats, ValueError
    when shapes disagree, a sequence is shorter than S or longer than its pages, or v_dim exceeds the row.
    """
    check_float("q", q)
    batch, new, _, width = q.shape
    check_shape("kv_cache", kv_cache, (None, None, width))
    check_shape("block_table", block_table, (batch, None))
    check_shape("seq_lens", seq_lens, (batch,))
    if kv_cache.dtype != q.dtype:
        raise TypeError(f"kv_cache: got {kv_cache.dtype}, allowed is q's {q.dtype}")
    if not 0 < v_dim <= width:
        raise ValueError(f"v_dim: got {v_dim}, allowed is 1 to the row's {width}")
    lengths = seq_lens.tolist()
    room = block_table.shape[1] * kv_cache.shape[1]
    if any(not new <= length <= room for length in lengths):
        raise ValueError(f"seq_lens: got {lengths[:8]}, allowed is {new} (new tokens) to {room} (rows of the pages)")
    if len(set(lengths)) == 1:
        return _attend(q, _rows(kv_cache, block_table, lengths[0]), v_dim, scale, causal)
    parts = [
        _attend(q[b : b + 1], _rows(kv_cache, block_table[b : b + 1], length), v_dim, scale, causal)
        for b, length in enumerate(lengths)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
