"""Two peers from vLLM's wheel: FlashMLA's decoding and FlashAttention-3's forward (Hopper). Their libraries are loaded
as they lie in the installed wheel; vLLM itself and what it needs are not imported.

Arguments follow vllm/third_party/flashmla/flash_mla_interface.py and vllm/vllm_flash_attn/flash_attn_interface.py of
vLLM 0.23, which is built for torch 2.11.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import Inputs, Run


@functools.cache
def library(name: str) -> Any:
    """The operators of vLLM's library `name`."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).rglob(f"{name}*.so")]
    if not files:
        raise ImportError(f"{name}: no such library in vLLM's folders {folders}")
    torch.ops.load_library(files[0])
    return getattr(torch.ops, name)


def flash_mla_decode(inputs: Inputs, v_dim: int, scale: float) -> Run:
    """`mla_decode`'s arguments (pages of 64). The first call works out the schedule that later ones are given."""
    q, cache, table, lengths = inputs.args
    run = library("_flashmla_C").dense_decode_fwd
    *_, schedule, splits = run(q, cache.unsqueeze(2), v_dim, lengths, table, scale, True, None, None, None)
    return lambda: run(q, cache.unsqueeze(2), v_dim, lengths, table, scale, True, schedule, splits, None)[0]


def _fa3(
    q: Tensor, k: Tensor, v: Tensor, q_v: Tensor | None, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    lengths: Tensor | None, longest: tuple[int, int], table: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Causal. `lengths` and `table` for paged k and v, else cu_seqlens_k; `longest` counts queries and keys."""
    out: Tensor = library("_vllm_fa3_C").fwd(
        q, k, v, None, None, q_v, None, cu_seqlens, cu_seqlens_k, None, None, lengths, *longest, table,
        *(None,) * 8, scale, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip
    return out


def fa3_decode(inputs: Inputs, v_dim: int, scale: float) -> Run:
    """`mla_decode`'s arguments: latents are values, and keys in part, by the operator's second queries."""
    q, cache, table, lengths = inputs.args
    batch, new = q.shape[:2]
    latent, rotary = (x.unsqueeze(2) for x in cache.tensor_split([v_dim], -1))
    q_latent, q_rotary = (x.flatten(0, 1).contiguous() for x in q.tensor_split([v_dim], -1))
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * new
    longest = new, int(lengths.max())
    return lambda: _fa3(
        q_rotary, rotary, latent, q_latent, cu_seqlens, None, lengths, longest, table, scale
    ).view(batch, new, -1, v_dim)  # fmt: skip


def fa3_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, longest: tuple[int, int], scale: float
) -> Tensor:
    """`mla_attention`'s arguments, whole rows."""
    return _fa3(q, k, v, None, cu_seqlens, cu_seqlens_k, None, longest, None, scale)
