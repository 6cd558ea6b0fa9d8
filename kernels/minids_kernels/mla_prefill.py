"""Attention of many new tokens over a paged latent cache that holds them and what came before: prefix caching, chunked
prefill, a long message in a chat.

Few tokens attend best in the absorbed form of `mla_decode`; many would multiply by 2 Dc + Dr columns there instead of
Dn + Dr + Dv. So cached latents are expanded to keys and values (DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2),
at most `workspace` rows at a time however long the contexts are, `mla_attention` meets each part, and the parts are
joined by their log-sum-exps. Rope keys are never copied to the heads.

No kernel of its own. Test: tests/kernels/test_mla_prefill.py.
"""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_dtype, check_float, check_shape
from ._launch import queued
from .fp8_quant import E4M3
from .mla_attention import mla_attention, mla_attention_reference
from .mla_cache import row_bytes, widened_rows

__all__ = ["mla_prefill", "mla_prefill_reference"]


def mla_prefill_reference(
    q: tuple[Tensor, Tensor], kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, w_kv: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """fp32, all rows expanded; arguments as `mla_prefill`."""
    latent, (heads, nope) = w_kv.shape[1], q[0].shape[1:]
    kv_cache = kv_cache.view(torch.uint8) if kv_cache.dtype == E4M3 else kv_cache
    rows = [
        torch.stack([kv_cache[table[i // kv_cache.shape[1]], i % kv_cache.shape[1]] for i in range(length)])
        for table, length in zip(block_table.tolist(), seq_lens.tolist(), strict=True)
        if length
    ]
    row = torch.cat(rows) if rows else kv_cache.flatten(0, 1)[:0]
    row = widened_rows(row, latent, torch.float32).float()
    expanded = (row[:, :latent] @ w_kv.float().T).unflatten(1, (heads, -1))
    k = torch.cat((expanded[..., :nope], row[:, None, latent:].expand(-1, heads, -1)), -1)
    whole, v = torch.cat(q, -1).float(), expanded[..., nope:]
    cu_seqlens_k = F.pad(seq_lens.cumsum(0), (1, 0))
    return mla_attention_reference(whole, k, v, cu_seqlens, True, scale, cu_seqlens_k).to(q[0].dtype)


Ranges = list[tuple[int, int]]


def _passes(lengths: list[int], new: list[int], workspace: int) -> list[Ranges]:
    """The rows of each sequence that each pass expands: contexts in equal shares of the workspace; the last pass has
    the new tokens, and before them the contexts' ends as far as there is room."""
    sequences = max(1, len(lengths))
    share, step = max(0, workspace - sum(new)) // sequences, max(1, workspace // sequences)
    before = [max(0, length - own - share) for length, own in zip(lengths, new, strict=True)]
    passes = [
        [(min(first, end), min(first + step, end)) for end in before]
        for first in range(0, max(before, default=0), step)
    ]
    return [*passes, [*zip(before, lengths, strict=True)]]


def _rows(kv_cache: Tensor, block_table: Tensor, ranges: Ranges) -> Tensor:
    """Rows of all ranges, end to end [rows, bytes or columns]."""
    page, device = kv_cache.shape[1], kv_cache.device
    begins, ends = queued(torch.tensor(ranges, dtype=torch.int64), device).view(-1, 2).unbind(1)
    lengths, total = ends - begins, sum(end - begin for begin, end in ranges)
    sequence = torch.arange(len(ranges), device=device).repeat_interleave(lengths, output_size=total)
    place = torch.arange(total, device=device) + (ends - lengths.cumsum(0))[sequence]
    return kv_cache[block_table[sequence, place // page].long(), place % page]


def _check(
    q: tuple[Tensor, Tensor], kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, w_kv: Tensor
) -> tuple[list[int], list[int]]:  # fmt: skip
    """-> each sequence's new tokens and all its rows."""
    nope, rotary = q
    check_float("q[0]", nope)
    check_shape("q[0]", nope, (None, None, None))
    tokens, heads, width = nope.shape
    check_shape("q[1]", rotary, (tokens, heads, None))
    check_shape("w_kv", w_kv, (None, None))
    columns, latent = w_kv.shape
    if heads == 0 or columns % heads or columns // heads <= width:
        raise ValueError(f"w_kv: got {columns} rows, allowed is a multiple of {heads} heads above {heads} * {width}")
    fp8 = kv_cache.dtype in (torch.uint8, E4M3)
    row = row_bytes(latent, rotary.shape[2]) if fp8 else latent + rotary.shape[2]
    check_shape("kv_cache", kv_cache, (None, None, row))
    check_shape("block_table", block_table, (None, None))
    check_shape("seq_lens", seq_lens, (block_table.shape[0],))
    check_shape("cu_seqlens", cu_seqlens, (block_table.shape[0] + 1,))
    for name, x in (("block_table", block_table), ("seq_lens", seq_lens), ("cu_seqlens", cu_seqlens)):
        check_dtype(name, x, torch.int32, torch.int64)
    for name, x in (("q[1]", rotary), ("w_kv", w_kv), ("kv_cache", nope if fp8 else kv_cache)):
        if x.dtype != nope.dtype:
            raise TypeError(f"{name}: got {x.dtype}, allowed is q[0]'s {nope.dtype}")
    lengths, bounds, room = seq_lens.tolist(), cu_seqlens.tolist(), block_table.shape[1] * kv_cache.shape[1]
    new = [end - begin for begin, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or any(n < 0 for n in new):
        raise ValueError(f"cu_seqlens: got {bounds[:8]}, allowed is 0, rising, to {tokens}")
    if any(not own <= length <= room for own, length in zip(new, lengths, strict=True)):
        raise ValueError(
            f"seq_lens: got {lengths[:8]} with {new[:8]} new tokens, allowed is those to {room} (rows of the pages)"
        )
    return new, lengths


@overload
def mla_prefill(
    q: tuple[Tensor, Tensor], kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, w_kv: Tensor,
    scale: float, return_lse: Literal[False] = False, workspace: int = 65_536,
) -> Tensor: ...  # fmt: skip
@overload
def mla_prefill(
    q: tuple[Tensor, Tensor], kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, w_kv: Tensor,
    scale: float, return_lse: Literal[True], workspace: int = 65_536,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@torch.no_grad()
def mla_prefill(
    q: tuple[Tensor, Tensor], kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens: Tensor, w_kv: Tensor,
    scale: float, return_lse: bool = False, workspace: int = 65_536,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """q: new tokens' (nope [T, H, Dn], rotated [T, H, Dr]), sequence b's at cu_seqlens[b]:cu_seqlens[b+1] (int32
    [B + 1]); kv_cache, block_table [B, P] and seq_lens [B] as in `mla_decode`, the new tokens' rows written already and
    counted; w_kv [H * (Dn + Dv), Dc], kv_b_proj's weight -> out [T, H, Dv] in q's dtype; with `return_lse` also the
    scores' log-sum-exp [T, H] in fp32 (fp64 for fp64).

    Each token sees the rows of its sequence up to its own. `workspace`: rows expanded at once, each H * (Dn + Dv)
    numbers in q's dtype; more only where there are more new tokens. The host has to know lengths: keep seq_lens and
    cu_seqlens on the CPU, since on a GPU it waits for them.

    For inference: has no gradient. Raises TypeError for dtypes that differ or are none of mla_decode's, ValueError when
    shapes disagree, for a sequence with more new tokens than rows or more rows than pages, and for a workspace below 1.
    """
    new, lengths = _check(q, kv_cache, block_table, seq_lens, cu_seqlens, w_kv)
    if workspace < 1:
        raise ValueError(f"workspace: got {workspace}, allowed is 1 or more")
    (_, heads, width), latent, dtype = q[0].shape, w_kv.shape[1], q[0].dtype
    cache = kv_cache.view(torch.uint8) if kv_cache.dtype == E4M3 else kv_cache

    def expanded(ranges: Ranges) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Keys, values, and where each sequence's lie."""
        rows = widened_rows(_rows(cache, block_table, ranges), latent, dtype)
        k_nope, v = (rows[:, :latent] @ w_kv.T).unflatten(1, (heads, -1)).tensor_split([width], -1)
        ends = itertools.accumulate(end - begin for begin, end in ranges)
        return (k_nope, rows[:, None, latent:]), v, queued(torch.tensor([0, *ends], dtype=torch.int32), v.device)

    *before, last = _passes(lengths, new, workspace)
    if not before and not return_lse:
        k, v, key_bounds = expanded(last)
        return mla_attention(q, k, v, cu_seqlens, True, scale, cu_seqlens_k=key_bounds).to(dtype)
    outs, lses = [], []
    for ranges in (*before, last):
        k, v, key_bounds = expanded(ranges)
        out, lse = mla_attention(
            q, k, v, cu_seqlens, ranges is last, scale, return_lse=True, cu_seqlens_k=key_bounds
        )  # fmt: skip
        outs.append(out)
        lses.append(lse.masked_fill(lse == torch.inf, -torch.inf))
    lse = torch.stack(lses)
    out = (torch.stack(outs) * lse.softmax(0).unsqueeze(-1)).sum(0).to(dtype)
    return (out, lse.logsumexp(0)) if return_lse else out
