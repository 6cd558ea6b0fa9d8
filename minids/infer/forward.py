"""The model against a latent cache: any number of new tokens of any number of sequences, all of one length.

Tokens' latents and rotated keys go into the cache first. A few new tokens attend in absorbed form: the up-projections
W_UK and W_UV of kv_b_proj go into the query and the output, so that cached latents are never expanded again
(DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2). For many, a prompt above all, expanding costs less than the wider
products would. `decoder.py` takes single tokens on the CPU, faster, and `recorded.py` on a GPU.
"""

from __future__ import annotations

import torch
from minids_kernels import mla_decode, mla_prefill, write_latent_cache
from torch import Tensor

from minids.errors import InputError
from minids.infer.cache import LatentCache
from minids.model.attention import Attention
from minids.model.block import Block
from minids.model.model import DeepseekV3
from minids.model.moe import MoE
from minids.model.rope import rope_angles

MOST_ABSORBED = 128  # new tokens of a sequence; expanding pays from 64 at the mini model's widths, from 170 at V3's


def check_length(model: DeepseekV3, tokens: int) -> None:
    """Raises InputError when a sequence of `tokens` is longer than the model's positions."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise InputError(f"{tokens} tokens (prompt and answer); the model's max_position_embeddings is {limit}")


def blocks(model: DeepseekV3) -> list[Block]:
    """The main model's layers, without the MTP modules behind them."""
    return [b for b in model.model.layers[: model.config.num_hidden_layers] if isinstance(b, Block)]


class _Places:
    """Where the next `new` tokens of each sequence lie, the same in all layers: angles of their rotation
    [B * S, R / 2], slots [B * S] in a cache whose pages are a sequence's rows each, that cache's page table, and
    sequences' lengths [B]. To expand rows, the host needs lengths, too."""

    def __init__(self, model: DeepseekV3, rows: Tensor, new: int, start: Tensor, length: int | None) -> None:
        _, batch, capacity, _ = rows.shape
        positions = start + torch.arange(new, device=rows.device)
        self.cos, self.sin = rope_angles(model.config, positions.repeat(batch))
        self.table = torch.arange(batch, device=rows.device).unsqueeze(1)
        self.slots = (self.table * capacity + positions).flatten()
        self.seq_lens = (start + new).expand(batch)
        self.expanded: tuple[Tensor, Tensor] | None = None
        if length is not None and not (length > 0 and 0 < new <= MOST_ABSORBED):
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * new
            self.expanded = torch.full((batch,), length + new), cu_seqlens


def _absorbed(attention: Attention, q: tuple[Tensor, Tensor], rows: Tensor, places: _Places) -> Tensor:
    """q ([B * S, H, N], [B * S, H, R]) of each sequence's last S tokens, all written to rows [B, capacity, C + R]
    -> [B * S, H, V]."""
    config, (nope, rotary), batch = attention.config, q, len(rows)
    w_uk, w_uv = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1)).split(
        [config.qk_nope_head_dim, config.v_head_dim], dim=1
    )
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk), rotary), dim=-1).unflatten(0, (batch, -1))
    latent, _ = mla_decode(absorbed, rows, places.table, places.seq_lens, config.kv_lora_rank, config.softmax_scale)
    return torch.einsum("thc,hvc->thv", latent.flatten(0, 1), w_uv)


def _attend(attention: Attention, x: Tensor, rows: Tensor, places: _Places) -> Tensor:
    """Normed x [B * S, D] -> [B * S, H, V]; writes the tokens' rows [B, capacity, C + R]."""
    norm, scale = attention.kv_a_layernorm, attention.config.softmax_scale
    queries, kv = attention.project(x).tensor_split([-rows.shape[2]], dim=-1)
    nope, q_pe = attention.queries(queries).split([attention.config.qk_nope_head_dim, places.cos.shape[1] * 2], dim=-1)
    rotated = write_latent_cache(kv, norm.weight, places.cos, places.sin, rows, places.slots, norm.eps, q_pe)
    q, weight = (nope, rotated), attention.kv_b_proj.weight
    if places.expanded is None:
        return _absorbed(attention, q, rows, places)
    return mla_prefill(q, rows, places.table, *places.expanded, weight, scale)


def hidden_states(
    model: DeepseekV3, input_ids: Tensor, rows: Tensor, start: Tensor, length: int | None = None
) -> Tensor:
    """Normed hidden states [B, S, D] of input_ids [B, S], behind the first `start` [1] int64 tokens in a cache's `rows`
    [layers, B, capacity, C + R], where theirs are written. `length`: the same number for the host; without it nothing
    waits for a GPU, and new tokens attend in absorbed form, however many."""
    batch, new = input_ids.shape
    places = _Places(model, rows, new, start, length)
    x, residual = model.model.embed_tokens(input_ids.flatten()), None
    for layer, own in zip(blocks(model), rows, strict=True):
        normed, residual = layer.input_layernorm(x, residual)
        out = layer.self_attn.o_proj(_attend(layer.self_attn, normed, own, places).flatten(1))
        normed, residual = layer.post_attention_layernorm(out, residual)
        x = layer.mlp(normed)[0] if isinstance(layer.mlp, MoE) else layer.mlp(normed)
    return model.model.norm(x, residual)[0].unflatten(0, (batch, new))


@torch.inference_mode()
def forward_cached(model: DeepseekV3, input_ids: Tensor, cache: LatentCache, last_only: bool = False) -> Tensor:
    """input_ids [B, S] int64, following the tokens in `cache`, which gains them -> logits [B, S, V], or [B, 1, V]
    of the last token with `last_only`.

    Raises InputError when cached and new tokens exceed max_position_embeddings (nothing is done then).
    """
    new = input_ids.shape[1]
    check_length(model, cache.length + new)
    cache.convert(model.lm_head.weight.dtype)  # decoder.py leaves fp32
    cache.reserve(new)
    start = torch.full((1,), cache.length, device=input_ids.device)
    hidden = hidden_states(model, input_ids, cache.rows, start, cache.length)
    cache.length += new
    return model.lm_head(hidden[:, -1:] if last_only else hidden)
