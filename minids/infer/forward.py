"""The model against a latent cache: any number of new tokens of any number of sequences, all of one length.

Tokens' latents and rotated keys go into the cache first. A few new tokens attend in absorbed form: the up-projections
W_UK and W_UV of kv_b_proj go into the query and the output, so that cached latents are never expanded again
(DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2). For many, a prompt above all, expanding costs less than the wider
products would. `decoder.py` takes single tokens on the CPU, faster.
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


def _absorbed(
    attention: Attention, q: tuple[Tensor, Tensor], rows: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:  # fmt: skip
    """q ([B * S, H, N], [B * S, H, R]) of each sequence's last S tokens -> [B * S, H, V]; cache as in `mla_decode`."""
    config = attention.config
    w_uk, w_uv = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1)).split(
        [config.qk_nope_head_dim, config.v_head_dim], dim=1
    )
    nope, rotary = q
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk), rotary), dim=-1).unflatten(0, (len(table), -1))
    latent, _ = mla_decode(absorbed, rows, table, lengths, config.kv_lora_rank, config.softmax_scale)
    return torch.einsum("thc,hvc->thv", latent.flatten(0, 1), w_uv)


def _attend(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, start: int) -> Tensor:
    """Normed x [B * S, D] of tokens from place `start` on -> [B * S, H, V]; writes their rows [B, capacity, C + R]."""
    config, (batch, capacity, width) = attention.config, rows.shape
    new = len(x) // batch
    queries, kv = attention.project(x).tensor_split([-width], dim=-1)
    nope, q_pe = attention.queries(queries)
    sequence = torch.arange(batch, device=x.device)
    slots = (sequence * capacity).unsqueeze(1) + torch.arange(start, start + new, device=x.device)
    norm = attention.kv_a_layernorm
    rotated = write_latent_cache(kv, norm.weight, cos, sin, rows, slots.flatten(), norm.eps, q_pe)
    q, table = (nope, rotated), sequence.unsqueeze(1)  # a sequence's rows are one page
    lengths = torch.full((batch,), start + new)
    if start and new <= MOST_ABSORBED:
        return _absorbed(attention, q, rows, table, lengths.to(x.device))
    bounds = torch.arange(batch + 1, dtype=torch.int32) * new
    return mla_prefill(q, rows, table, lengths, bounds, attention.kv_b_proj.weight, config.softmax_scale)


def _step(model: DeepseekV3, input_ids: Tensor, cache: LatentCache) -> Tensor:
    """Normed hidden states [B, S, D] of input_ids [B, S]; the cache gains S tokens."""
    batch, new = input_ids.shape
    start = cache.length
    cache.reserve(new)
    positions = torch.arange(start, start + new, device=input_ids.device).repeat(batch)
    cos, sin = rope_angles(model.config, positions)
    x, residual = model.model.embed_tokens(input_ids.flatten()), None
    for layer, rows in zip(blocks(model), cache.rows, strict=True):
        normed, residual = layer.input_layernorm(x, residual)
        out = layer.self_attn.o_proj(_attend(layer.self_attn, normed, cos, sin, rows, start).flatten(1))
        normed, residual = layer.post_attention_layernorm(out, residual)
        x = layer.mlp(normed)[0] if isinstance(layer.mlp, MoE) else layer.mlp(normed)
    cache.length = start + new
    return model.model.norm(x, residual)[0].unflatten(0, (batch, new))


@torch.inference_mode()
def forward_cached(model: DeepseekV3, input_ids: Tensor, cache: LatentCache, last_only: bool = False) -> Tensor:
    """input_ids [B, S] int64, following the tokens in `cache`, which gains them -> logits [B, S, V], or [B, 1, V]
    of the last token with `last_only`.

    Raises InputError when cached and new tokens exceed max_position_embeddings (nothing is done then).
    """
    check_length(model, cache.length + input_ids.shape[1])
    hidden = _step(model, input_ids, cache)
    return model.lm_head(hidden[:, -1:] if last_only else hidden)
