"""Puts these kernels into a loaded transformers DeepseekV3ForCausalLM, and takes them out again.

    undo = apply_to_transformers(model)
    ...
    undo()

Replaced is the forward of its RMSNorms, of its attention and of its routed experts (where their activation is silu),
instance by instance: weights, hooks, state_dict and other models of the process stay as they are. Not replaced is the
dense MLP: its gate and up projections are two matrices, whose products would have to be copied side by side first.

Attention without a past (training, prefill) is `mla_attention`, tokens of padding left out. Behind a past it is
`mla_decode`: transformers' caches hold a layer's latents as keys and its rotated keys as values, one head each, and the
new queries go to the latents, where transformers expands keys and values of all the past anew at each step. Where a
gradient is wanted, or `kv_b_proj` is more than its weight (LoRA, hooks, another precision), they are expanded here too.
The caches' own functions (crop, reorder_cache) and the other way's contents stay good, and a cache may change ways.
transformers itself is not imported: its classes are known by their names.
Test: tests/kernels/test_compat_transformers.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import RMSNorm
from ..mla_attention import mla_attention
from ..mla_decode import mla_decode
from ..moe import moe_experts

__all__ = ["apply_to_transformers"]

FAMILY = "DeepseekV3PreTrainedModel"
PAGE = 64  # rows; the same at each step, so that kernels are compiled once


def _class_with_forward(module: nn.Module) -> type:
    """Which of its classes says what the module computes."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return moe_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def _seen(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """What transformers' models give their attention -> which of the keys the last query sees [B, K], None for all.
    Masks are [B, K] or [B, 1, S, K], whose real queries must see the first of these keys up to their own; who sees
    itself and is not among these keys belongs to another document. Reads the mask's values once, for which a GPU is
    waited for."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask: got {type(mask).__name__}, allowed are tensors [B, K] and [B, 1, S, K]")
    allowed = mask if mask.dtype == torch.bool else mask != 0 if mask.dim() == 2 else mask == 0
    seen = allowed[:, -keys:] if mask.dim() == 2 else allowed[:, 0, -1]
    rank = seen.cumsum(-1)
    if queries == keys:
        real, place = seen, rank
    else:
        place = rank[:, -1:] - torch.arange(queries - 1, -1, -1, device=rank.device)
        real = place > 0
        if mask.dim() == 2:
            real = real & seen[:, -queries:]
    other = real.new_zeros(())
    if mask.dim() == 4:
        allowed = allowed[:, 0]
        expected = seen.unsqueeze(1) & (rank.unsqueeze(1) <= place.unsqueeze(2))
        itself = allowed.diagonal(keys - queries, 1, 2) & ~allowed.all(2)  # padding may see nothing, or everything
        other = (real.unsqueeze(2) & (allowed != expected)).any() | (itself & ~seen[:, keys - queries :]).any()
    refused, all_real, all_seen = torch.stack((other, real.all(), seen.all())).tolist()
    if refused:
        raise ValueError("attention_mask: got another mask, allowed is a causal one with padding before or behind")
    if queries < keys and not all_real:
        raise ValueError("attention_mask: got padding among the new tokens, allowed is padding before them")
    return None if all_seen else seen


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()


def _expanded(self: Any, q: Tensor, latent: Tensor, rotary: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, S, H, N + R] of the last tokens over keys and values of all, made from latent [B, K, C], rotary [B, K, R]
    -> [B, S, H, V]. seen [B, K]: the tokens that are no padding; the others give 0."""
    (batch, tokens), keys = q.shape[:2], latent.shape[1]
    q, latent, rotary = q.flatten(0, 1), latent.flatten(0, 1), rotary.flatten(0, 1)
    own = bounds = _bounds(torch.full((batch,), keys, device=q.device) if seen is None else seen.sum(1))
    if tokens < keys:  # behind a past, with all padding in it
        own = _bounds(torch.full((batch,), tokens, device=q.device))
    if seen is not None:
        real = seen.flatten().nonzero().squeeze(1)
        q, latent, rotary = q[real] if own is bounds else q, latent[real], rotary[real]
    k_nope, v = (
        self.kv_b_proj(latent).unflatten(-1, (q.shape[1], -1)).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
    )
    k, own_keys = (k_nope, rotary.unsqueeze(1)), None if own is bounds else bounds
    out = mla_attention(q, k, v, own, scale=self.scaling, cu_seqlens_k=own_keys)
    if seen is not None and own is bounds:
        out = out.new_zeros(batch * tokens, *out.shape[1:]).index_copy(0, real, out)
    return out.unflatten(0, (batch, tokens))


def _absorbed(self: Any, q: Tensor, latent: Tensor, rotary: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, S, H, N + R] of the last tokens over latent [B, K, C] and rotary [B, K, R] of all -> [B, S, H, V]."""
    batch, keys, width = latent.shape
    weight = self.kv_b_proj.weight.view(q.shape[2], -1, width)
    w_uk, w_uv = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
    nope, rotary_q = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
    absorbed = torch.einsum("bshn,hnc->bshc", nope, w_uk)
    q = torch.cat((absorbed, rotary_q.to(absorbed.dtype)), dim=-1)
    pages = -(-keys // PAGE)
    rows = q.new_empty(batch, pages * PAGE, q.shape[-1])  # behind the keys nothing is read
    torch.cat((latent.to(q.dtype), rotary.to(q.dtype)), dim=-1, out=rows[:, :keys])
    lengths = torch.full((batch,), keys, device=q.device, dtype=torch.int32)
    if seen is not None:
        order = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        rows[:, :keys] = rows[:, :keys].gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        lengths = seen.sum(1, dtype=torch.int32)
    table = torch.arange(batch * pages, device=q.device, dtype=torch.int32).view(batch, pages)
    out, _ = mla_decode(q, rows.view(-1, PAGE, rows.shape[-1]), table, lengths, width, self.scaling)
    return torch.einsum("bshc,hvc->bshv", out, w_uv)


def _is_its_weight(layer: nn.Module) -> bool:
    """Whether what the layer does is what its weight says."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and layer.bias is None and "forward" not in vars(layer) and not any(hooks)


def _check_served(self: Any, hidden_states: Tensor, mask: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for what transformers' attention would do with hidden_states [B, S, D] and this one does not.
    given: its other arguments by name."""
    if self.training and self.attention_dropout:
        raise ValueError(f"attention_dropout: got {self.attention_dropout} in training, allowed is 0")
    if not (self.is_causal and getattr(self.config, "is_causal", True) and given.get("is_causal", True)):
        raise ValueError("is_causal: got False, allowed is True")
    position, flash = given.get("position_ids"), "flash" in (self.config._attn_implementation or "")
    packed = given.get("cu_seq_lens_q") is not None
    if flash and mask is None and position is not None and hidden_states.shape[0] == 1 < hidden_states.shape[1]:
        packed = packed or not bool((position.diff() == 1).all())  # without a mask nothing else says it
    if packed:
        raise ValueError("position_ids, cu_seq_lens_q: got packed documents, allowed is one a row")
    if getattr(cache, "is_compileable", False):
        kind = type(cache).__name__
        raise ValueError(f"cache: got a {kind} of fixed length, allowed are caches that grow (DynamicCache)")


def _attention(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None,
    cache: Any = None, past_key_values: Any = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers before 5.24 calls its cache past_key_values."""
    cache = past_key_values if cache is None else cache
    _check_served(self, hidden_states, attention_mask, cache, kwargs)
    if self.q_lora_rank is None:
        q = self.q_proj(hidden_states)
    else:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
    q = q.unflatten(-1, (-1, self.qk_head_dim))
    latent, rotary = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
    latent = self.kv_a_layernorm(latent).unsqueeze(1)
    nope, rotary_q = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
    own = sys.modules[_class_with_forward(self).__module__]
    rotate = own.apply_rotary_pos_emb_interleave if self.config.rope_interleave else own.apply_rotary_pos_emb
    rotary_q, rotary = rotate(rotary_q.transpose(1, 2), rotary.unsqueeze(1), *position_embeddings)
    q = torch.cat((nope, rotary_q.transpose(1, 2)), dim=-1)
    if cache is not None:
        latent, rotary = cache.update(latent, rotary, self.layer_idx)
    latent, rotary = latent.squeeze(1), rotary.squeeze(1)
    seen = _seen(attention_mask, q.shape[1], latent.shape[1])
    past = latent.shape[1] > q.shape[1]
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, latent, rotary, *self.kv_b_proj.parameters()))
    attend = _absorbed if past and not graph and _is_its_weight(self.kv_b_proj) else _expanded
    return self.o_proj(attend(self, q, latent, rotary, seen).flatten(2)), None


def _replacement(module: nn.Module, activation: str) -> Callable[..., Any] | None:
    match _class_with_forward(module).__name__:
        case "DeepseekV3RMSNorm":
            return RMSNorm.forward
        case "DeepseekV3Attention":
            return _attention
        case "DeepseekV3Experts" if activation == "silu":
            return _experts
    return None


def apply_to_transformers(model: nn.Module) -> Callable[[], None]:
    """Serves `model`'s norms, attention and experts by these kernels until the returned function is called, which
    restores it exactly (again: does nothing).

    Numbers differ by rounding: a norm rounds once, transformers' rounds before and after its weight. Under autocast a
    norm's output comes in autocast's dtype. Attention weights (output_attentions) are None. Padding may lie before or
    behind a batch's prompts; other masks, padding among new tokens behind a past, caches of fixed length, packed
    documents, attention that is not causal and dropout of attention raise ValueError when the model is called. A mask
    is read by the host in each layer, which breaks torch.compile's graphs there; without one nothing is. Put hooks that
    replace forwards (accelerate, kernelize) on afterwards, and take them off before. Replicas of nn.DataParallel would
    share one copy's forwards: use DistributedDataParallel.

    Raises TypeError for a model of another class, ValueError where a forward has been replaced already, by this
    function or another; the model is then as it was.
    """
    if FAMILY not in {base.__name__ for base in type(model).__mro__}:
        raise TypeError(f"model: got {type(model).__name__}, allowed is transformers' DeepseekV3ForCausalLM")
    found = [
        (name, module, forward)
        for name, module in model.named_modules()
        if (forward := _replacement(module, model.config.hidden_act)) is not None  # type: ignore[union-attr, arg-type]
    ]
    for name, module, _ in found:
        if "forward" in vars(module):
            raise ValueError(f"model: the forward of {name} has been replaced already, allowed is its class's own")
    for _, module, forward in found:
        module.forward = partial(forward, module)  # which can be pickled and copied with the module

    def undo() -> None:
        while found:
            vars(found.pop()[1]).pop("forward", None)

    return undo
