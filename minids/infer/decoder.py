"""One token of one or a few sequences on the CPU, as fast as the memory of the weights allows.

At batch 1 every weight is read once a token and the rest is the cost of calling operators, so this does the arithmetic
of `forward.py` in few calls: matrix-vector products into buffers made once, projections of one input joined into one
matrix, an RMSNorm's statistic and the router's choice as Python numbers, rotations as complex products. Weights are
read by numpy, whose BLAS takes 0.6 us to call, runs on all cores and reads a matrix stored by columns 1.2 to 6 times as
fast as torch.mv; for that they are copied, 3 ms a million, to fp32, which numpy multiplies in: half precision is
slower to read with PyTorch than the copy with numpy. What a context's length multiplies is torch's, which on one
core is as fast as numpy on two (with more, its threads and numpy's would wait for each other). A few sequences take
turns layer by layer, while the layer's weights are in the processor's caches. Figures: benchmarks/decode.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minids.config import ModelConfig
from minids.infer.cache import LatentCache
from minids.infer.forward import blocks
from minids.model.attention import Attention
from minids.model.block import Block
from minids.model.model import DeepseekV3
from minids.model.moe import MLP, MoE
from minids.model.norm import RMSNorm
from minids.model.rope import rope_angles

Array = NDArray[np.float32]
MOST_SEQUENCES = 8  # above, matrix products over all sequences at once are faster
MOST_PARAMETERS = 1 << 30  # the copy of the weights takes 4 bytes each
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _column_major(*parts: Tensor) -> Array:
    """Matrices [Ni, K] as one [N, K], stored by columns; or a stack [E, N, K], each of its matrices stored so."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.detach().mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mT.numpy()


def _empty(*shape: int) -> Array:
    return np.empty(shape, np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For torch's operators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Norm:
    """RMSNorm of one vector."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach().float().numpy(), norm.eps
        self.out = np.empty_like(self.weight)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        out = self.out if out is None else out
        np.multiply(x, self.weight, out=out)
        out *= (float(x.dot(x)) / len(x) + self.eps) ** -0.5
        return out


class _Attention:
    """H heads, N/R nope and rope widths, C latent width."""

    def __init__(self, module: Attention, norm: RMSNorm) -> None:
        config = module.config
        heads, latent, rotary = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        first = module.q_proj if config.q_lora_rank is None else module.q_a_proj
        self.latent_width = latent
        self.norm, self.latent_norm = _Norm(norm), _Norm(module.kv_a_layernorm)
        w_latent, w_key = module.kv_a_proj_with_mqa.weight.split([latent, rotary])
        self.w_in = _column_major(w_key, w_latent, first.weight)
        self.joined = _empty(len(self.w_in))
        key, self.latent, q = np.split(self.joined, [rotary, rotary + latent])
        self.key = key.view(np.complex64)
        self.q_norm = None
        if config.q_lora_rank is not None:
            self.q_low, self.q_norm, self.w_q = q, _Norm(module.q_a_layernorm), _column_major(module.q_b_proj.weight)
            q = _empty(heads * config.qk_head_dim)
        self.q = q
        nope, rotary_q = np.split(q.reshape(heads, -1), [config.qk_nope_head_dim], axis=1)
        self.nope, self.rotary = nope[:, None], rotary_q.view(np.complex64)
        up = module.kv_b_proj.weight.detach().float().view(heads, -1, latent)
        w_uk, w_uv = up.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.w_uk, self.w_uv = (w_uk * config.softmax_scale).numpy(), w_uv.contiguous().numpy()
        self.absorbed = torch.empty(heads, latent + rotary)
        absorbed = self.absorbed.numpy()
        self.absorbed_nope = absorbed[:, None, :latent]
        self.absorbed_rotary = absorbed[:, latent:].view(np.complex64)
        self.out = _empty(heads, config.v_head_dim, 1)
        self.w_out = _column_major(module.o_proj.weight)

    def __call__(self, x: Array, turn: Array, q_turn: Array, rows: Tensor, latent: Array, key: Array) -> None:
        """Adds the attention's output to x [D]. rows [T, C + R] of all tokens, latent [C] and complex key [R/2] the new
        one's part of them; turn [R/2] its complex rotation, q_turn that times the softmax scale."""
        np.dot(self.w_in, self.norm(x), out=self.joined)
        self.latent_norm(self.latent, latent)
        np.multiply(self.key, turn, out=key)
        if self.q_norm is not None:
            np.dot(self.w_q, self.q_norm(self.q_low), out=self.q)
        np.matmul(self.nope, self.w_uk, out=self.absorbed_nope)
        np.multiply(self.rotary, q_turn, out=self.absorbed_rotary)
        scores = torch.mm(self.absorbed, rows.T)
        seen = torch.mm(torch.softmax(scores, 1, out=scores), rows).numpy()[:, : self.latent_width]
        np.matmul(self.w_uv, seen[..., None], out=self.out)
        x += np.dot(self.w_out, self.out.reshape(-1))


class _Dense:
    def __init__(self, module: MLP, norm: RMSNorm) -> None:
        self.norm = _Norm(norm)
        self.w_in = _column_major(module.gate_proj.weight, module.up_proj.weight)
        self.w_out = _column_major(module.down_proj.weight)
        products = torch.empty(len(self.w_in))
        self.joined, (self.gate, self.up) = products.numpy(), products.chunk(2)

    def __call__(self, x: Array) -> None:
        """Adds the layer's output to x [D]."""
        np.dot(self.w_in, self.norm(x), out=self.joined)
        x += np.dot(self.w_out, F.silu(self.gate).mul_(self.up).numpy())


class _MoE:
    """The shared experts (one MLP, n * F wide) are taken as n experts of width F, so that they and the k chosen ones
    share one buffer [n + k, 2F] of gate and up products, which the router's E logits precede."""

    def __init__(self, module: MoE, norm: RMSNorm) -> None:
        self.config = config = module.gate.config
        experts, inner, width = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        shared = config.n_shared_experts
        self.norm = _Norm(norm)
        self.bias: list[float] = module.gate.e_score_correction_bias.tolist()
        parts: list[Tensor] = [module.gate.weight]
        self.w_shared = None
        if module.shared_experts is not None:
            gate, up = module.shared_experts.gate_proj.weight, module.shared_experts.up_proj.weight
            parts.append(torch.stack((gate.view(shared, inner, width), up.view(shared, inner, width)), 1).flatten(0, 2))
            self.w_shared = _column_major(module.shared_experts.down_proj.weight)
        self.w_in = _column_major(*parts)
        slots = shared + config.num_experts_per_tok
        buffer = torch.empty(experts + slots * 2 * inner)
        self.joined, self.logits = buffer[: len(self.w_in)].numpy(), buffer[:experts]
        products = buffer[experts:].view(slots, 2 * inner)
        self.products = list(products[shared:].numpy())
        self.gate, self.up = products.chunk(2, dim=1)
        self.active = torch.empty(slots, inner)
        self.active_shared = self.active[:shared].view(-1).numpy()
        self.active_routed = list(self.active[shared:].numpy())
        self.gate_up = list(_column_major(module.experts.gate_up_proj))
        self.down = list(_column_major(module.experts.down_proj))

    def __call__(self, x: Array) -> None:
        """Adds the layer's output to x [D]."""
        normed = self.norm(x)
        np.dot(self.w_in, normed, out=self.joined)
        ids, weights = choose_experts(self.logits.sigmoid_().tolist(), self.bias, self.config)
        for expert, product in zip(ids, self.products, strict=True):
            np.dot(self.gate_up[expert], normed, out=product)
        torch.mul(F.silu(self.gate), self.up, out=self.active)
        if self.w_shared is not None:
            x += np.dot(self.w_shared, self.active_shared)
        for expert, weight, active in zip(ids, weights, self.active_routed, strict=True):
            active *= weight
            x += np.dot(self.down[expert], active)


def choose_experts(scores: list[float], bias: list[float], config: ModelConfig) -> tuple[list[int], list[float]]:
    """One token's experts and their weights, as minids_kernels.moe_gate, from the E sigmoid scores."""
    choice = [score + offset for score, offset in zip(scores, bias, strict=True)]
    candidates = range(len(scores))
    if config.n_group > 1:
        size = len(scores) // config.n_group
        best_two = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
        groups = sorted(range(config.n_group), key=best_two.__getitem__, reverse=True)[: config.topk_group]
        candidates = [e for g in groups for e in range(g * size, (g + 1) * size)]  # type: ignore[assignment]
    ids = sorted(candidates, key=choice.__getitem__, reverse=True)[: config.num_experts_per_tok]
    scale = config.routed_scaling_factor
    if config.norm_topk_prob:
        scale /= sum(scores[e] for e in ids) + 1e-20
    return ids, [scores[e] * scale for e in ids]


class Decoder:
    """Steps a model through a few sequences, with its weights as they are now. For models it `fits`."""

    @staticmethod
    def fits(model: DeepseekV3, batch: int = 1) -> bool:
        """Few sequences, weights on the CPU in fp32 or half precision, even widths before rotated parts (complex views
        need that)."""
        even = model.config.kv_lora_rank % 2 == 0 and model.config.qk_nope_head_dim % 2 == 0
        weights = list(model.parameters())
        plain = all(p.dtype in DTYPES and p.device.type == "cpu" for p in weights)
        return batch <= MOST_SEQUENCES and even and plain and sum(p.numel() for p in weights) <= MOST_PARAMETERS

    @torch.inference_mode()
    def __init__(self, model: DeepseekV3) -> None:
        self.config = model.config
        self.embedding, self.head = model.model.embed_tokens.weight.detach(), _column_major(model.lm_head.weight)
        self.norm = _Norm(model.model.norm)
        self.layers = [(_Attention(b.self_attn, b.input_layernorm), _feed_forward(b)) for b in blocks(model)]
        self.turns = np.empty((0, 0), np.complex64)

    @torch.inference_mode()
    def step(self, tokens: list[int], cache: LatentCache) -> Tensor:
        """Appends a token to each of the B sequences in `cache` -> logits [B, V]."""
        place, latent = cache.length, self.config.kv_lora_rank
        cache.convert(torch.float32)
        cache.reserve(1)
        if place >= len(self.turns):
            self.turns = torch.complex(*rope_angles(self.config, torch.arange(cache.capacity))).numpy()
        turn = self.turns[place]
        q_turn = turn * np.float32(self.config.softmax_scale)
        rows = cache.rows.flatten(0, 1)[:, : place + 1]
        new = rows[:, place].numpy()
        latents, keys = new[:, :latent], new[:, latent:].view(np.complex64)
        views = zip(rows.unbind(), latents, keys, strict=True)
        sequences = self.embedding[tokens].float().numpy()
        with _one_thread():
            for attention, feed_forward in self.layers:
                for x in sequences:
                    attention(x, turn, q_turn, *next(views))
                    feed_forward(x)
        cache.length = place + 1
        return torch.from_numpy(np.stack([np.dot(self.head, self.norm(x)) for x in sequences]))


def _feed_forward(block: Block) -> _Dense | _MoE:
    norm = block.post_attention_layernorm
    return _MoE(block.mlp, norm) if isinstance(block.mlp, MoE) else _Dense(block.mlp, norm)
