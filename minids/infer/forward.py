"""The model against a latent cache: any number of new tokens of any number of sequences, all of one length.

An empty cache is filled by ordinary attention over the prompt. Later tokens attend in absorbed form: the up-projections
W_UK and W_UV of kv_b_proj go into the query and the output, so that cached latents are never expanded again
(DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2). `decoder.py` does the same for single tokens, faster.
"""

from __future__ import annotations

import torch
from minids_kernels import mla_decode
from torch import Tensor

from minids.errors import InputError
from minids.infer.cache import LatentCache
from minids.model.attention import Attention
from minids.model.block import Block
from minids.model.model import DeepseekV3
from minids.model.moe import MoE
from minids.model.rope import rope_angles

ABSORBED_CHUNK = 256  # tokens at once against a filled cache: bounds the scores [B, chunk * H, length]


def check_length(model: DeepseekV3, tokens: int) -> None:
    """Raises InputError when a sequence of `tokens` is longer than the model's positions."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise InputError(f"{tokens} tokens (prompt and answer); the model's max_position_embeddings is {limit}")


def blocks(model: DeepseekV3) -> list[Block]:
    """The main model's layers, without the MTP modules behind them."""
    return [b for b in model.model.layers[: model.config.num_hidden_layers] if isinstance(b, Block)]


def _absorbed(attention: Attention, q: tuple[Tensor, Tensor], rows: Tensor, length: int) -> Tensor:
    """q ([B * S, H, N], [B * S, H, R]) of the last S of `length` tokens, whose latents are in rows
    [B, capacity, C + R] -> [B * S, H, V]."""
    config = attention.config
    batch = rows.shape[0]
    w_uk, w_uv = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1)).split(
        [config.qk_nope_head_dim, config.v_head_dim], dim=1
    )
    nope, rotary = q
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk), rotary), dim=-1).unflatten(0, (batch, -1))
    table = torch.arange(batch, device=rows.device).unsqueeze(1)  # a sequence's rows are one page
    lengths = torch.full((batch,), length, device=rows.device)
    latent, _ = mla_decode(absorbed, rows, table, lengths, config.kv_lora_rank, config.softmax_scale)
    return torch.einsum("thc,hvc->thv", latent.flatten(0, 1), w_uv)


def _step(model: DeepseekV3, input_ids: Tensor, cache: LatentCache) -> Tensor:
    """Normed hidden states [B, S, D] of input_ids [B, S]; the cache gains S tokens."""
    batch, new = input_ids.shape
    start, length = cache.length, cache.length + new
    cache.reserve(new)
    positions = torch.arange(start, length, device=input_ids.device).repeat(batch)
    cos, sin = rope_angles(model.config, positions)
    bounds = torch.arange(0, batch * new + 1, max(new, 1), dtype=torch.int32)
    x, residual = model.model.embed_tokens(input_ids.flatten()), None
    for layer, rows in zip(blocks(model), cache.rows, strict=True):
        attention = layer.self_attn
        normed, residual = layer.input_layernorm(x, residual)
        q, latent, k_pe = attention.project(normed, cos, sin)
        rows[:, start:length] = torch.cat((latent, k_pe), dim=-1).unflatten(0, (batch, new))
        out = _absorbed(attention, q, rows, length) if start else attention.attend(q, latent, k_pe, bounds)
        normed, residual = layer.post_attention_layernorm(attention.o_proj(out.flatten(1)), residual)
        x = layer.mlp(normed)[0] if isinstance(layer.mlp, MoE) else layer.mlp(normed)
    cache.length = length
    return model.model.norm(x, residual)[0].unflatten(0, (batch, new))


@torch.inference_mode()
def forward_cached(model: DeepseekV3, input_ids: Tensor, cache: LatentCache, last_only: bool = False) -> Tensor:
    """input_ids [B, S] int64, following the tokens in `cache`, which gains them -> logits [B, S, V], or [B, 1, V]
    of the last token with `last_only`.

    Raises InputError when cached and new tokens exceed max_position_embeddings (nothing is done then).
    """
    check_length(model, cache.length + input_ids.shape[1])
    pieces = input_ids.split(ABSORBED_CHUNK if cache.length else input_ids.shape[1], dim=1)
    hidden = [_step(model, piece, cache) for piece in pieces]
    return model.lm_head(hidden[-1][:, -1:] if last_only else torch.cat(hidden, dim=1))
