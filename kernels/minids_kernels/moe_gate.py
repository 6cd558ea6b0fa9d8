"""DeepSeek-V3's gate (report, arXiv 2412.19437, section 2.1.2): which experts a token goes to, with what weights.

    scores = sigmoid(logits), chosen by scores + bias: first the best `topk_group` of `n_group` groups of experts that
    follow each other (a group counts the sum of its two best), then the best `top_k` experts in them;
    weight = scale * the chosen scores, without bias, divided by their sum if `norm_topk_prob`.

logits [T, E]: fp32 inside for bf16 and fp16. Of equal choices the lower number is taken; NaN counts as the largest of
all, so that numbers of experts are valid whatever comes. One launch forward and one backward, on every GPU that Triton
knows; choices are compared as integers that sort as their floats do.
Test: tests/kernels/test_moe_gate.py. Benchmark: benchmarks/ops/moe_gate.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._checks import check_devices, check_float, check_shape
from ._launch import tl, triton
from ._operator import operator

__all__ = ["moe_gate", "moe_gate_reference"]

TINY = 1e-20  # added to the sum of scores


def moe_gate_reference(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1, norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch with autograd; arguments and results as `moe_gate`. Of equal choices the lower number's first."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    choice = (scores + bias).detach().unflatten(-1, (n_group, -1))
    if n_group > 1:
        best = choice.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        groups = best.sort(dim=-1, descending=True, stable=True).indices[..., :topk_group]
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, groups, True)
        choice = choice.masked_fill(~allowed.unsqueeze(-1), -torch.inf)
    ids = choice.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weight = scores.gather(-1, ids)
    if norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + TINY)
    return ids, weight * scale, scores


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sortable(x):
    """int32 that compare as the fp32 numbers do, NaN above all; none is the least int32, which stands for "taken"."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _moe_gate_kernel(
    logits_ptr, bias_ptr, ids_ptr, weight_ptr, scores_ptr, T, row_stride, scale,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program, their GROUPS groups of SIZE experts side by side in [BLOCK_G, BLOCK_S] places."""
    TAKEN: tl.constexpr = -2147483648
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, BLOCK_G * BLOCK_S)
    group, member = place // BLOCK_S, place % BLOCK_S
    real = (group < GROUPS) & (member < SIZE)
    expert = group * SIZE + member
    mask = (row < T)[:, None] & real[None, :]
    logits = tl.load(logits_ptr + row[:, None] * row_stride + expert[None, :], mask=mask, other=0.0).to(tl.float32)
    scores = tl.sigmoid(logits)
    tl.store(scores_ptr + row[:, None] * (GROUPS * SIZE) + expert[None, :], scores, mask=mask)
    choice = scores + tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    key = tl.where(real[None, :], _sortable(choice), TAKEN)
    if GROUPS > 1:
        value = tl.reshape(choice, (ROWS, BLOCK_G, BLOCK_S))
        left = tl.reshape(key, (ROWS, BLOCK_G, BLOCK_S))
        members = tl.arange(0, BLOCK_S)[None, None, :]
        best = tl.zeros((ROWS, BLOCK_G), tl.float32)
        for _ in tl.static_range(2):
            here = members == tl.argmax(left, axis=2)[:, :, None]
            best += tl.sum(tl.where(here, value, 0.0), axis=2)
            left = tl.where(here, TAKEN, left)
        groups = tl.arange(0, BLOCK_G)[None, :]
        group_key = tl.where(groups < GROUPS, _sortable(best), TAKEN)
        allowed = tl.zeros((ROWS, BLOCK_G), tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            here = groups == tl.argmax(group_key, axis=1)[:, None]
            allowed += here.to(tl.int32)
            group_key = tl.where(here, TAKEN, group_key)
        spread = tl.broadcast_to(allowed[:, :, None], (ROWS, BLOCK_G, BLOCK_S))
        key = tl.where(tl.reshape(spread, (ROWS, BLOCK_G * BLOCK_S)) > 0, key, TAKEN)
    slots = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((ROWS, BLOCK_K), tl.int64)
    chosen = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for slot in tl.static_range(TOP_K):
        first = tl.argmax(key, axis=1)
        here = place[None, :] == first[:, None]
        score = tl.sum(tl.where(here, scores, 0.0), axis=1)
        number = first // BLOCK_S * SIZE + first % BLOCK_S
        ids = tl.where(slots == slot, number[:, None].to(tl.int64), ids)
        chosen = tl.where(slots == slot, score[:, None], chosen)
        key = tl.where(here, TAKEN, key)
    if NORM:
        chosen /= (tl.sum(chosen, axis=1) + EPS)[:, None]
    out = row[:, None] * TOP_K + slots
    mask = (row < T)[:, None] & (slots < TOP_K)
    tl.store(ids_ptr + out, ids, mask=mask)
    tl.store(weight_ptr + out, chosen * scale, mask=mask)


@triton.jit
def _moe_gate_bwd_kernel(
    dweight_ptr, dscores_ptr, ids_ptr, scores_ptr, dlogits_ptr, T, E, dweight_stride, dscores_stride, scale,
    TOP_K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HAS_DSCORES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dlogits [T, E] from the gradients of weights and, if any, of scores; rows `..._stride` apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slots = tl.arange(0, BLOCK_K)[None, :]
    mask = (row < T)[:, None] & (slots < TOP_K)
    ids = tl.load(ids_ptr + row[:, None] * TOP_K + slots, mask=mask, other=0)
    grad = scale * tl.load(dweight_ptr + row[:, None] * dweight_stride + slots, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        chosen = tl.load(scores_ptr + row[:, None] * E + ids, mask=mask, other=0.0)
        total = tl.sum(chosen, axis=1) + EPS
        mean = tl.sum(grad * chosen, axis=1) / total
        grad = (grad - mean[:, None]) / total[:, None]
    experts = tl.arange(0, BLOCK_E)[None, :]
    dscores = tl.zeros((ROWS, BLOCK_E), tl.float32)
    inside = (row < T)[:, None] & (experts < E)
    if HAS_DSCORES:
        dscores += tl.load(dscores_ptr + row[:, None] * dscores_stride + experts, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(slots == slot, ids, 0), axis=1)
        share = tl.sum(tl.where(slots == slot, grad, 0.0), axis=1)
        dscores += tl.where(experts == expert[:, None], share[:, None], 0.0)
    scores = tl.load(scores_ptr + row[:, None] * E + experts, mask=inside, other=0.0)
    dlogits = dscores * scores * (1.0 - scores)
    tl.store(dlogits_ptr + row[:, None] * E + experts, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _triton_fwd(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weight, scores = (logits.new_empty(tokens, n, dtype=torch.float32) for n in (top_k, experts))
    size = experts // n_group
    config = _launch.config("moe_gate", "moe_gate", _launch.arch(logits), E=experts)
    _launch.launch(
        _moe_gate_kernel, (triton.cdiv(tokens, config["ROWS"]),),
        logits, bias.contiguous(), ids, weight, scores, tokens, logits.stride(0), scale,
        GROUPS=n_group, SIZE=size, TOPK_GROUP=topk_group, TOP_K=top_k, NORM=norm, EPS=TINY,
        BLOCK_G=triton.next_power_of_2(n_group), BLOCK_S=triton.next_power_of_2(size),
        BLOCK_K=triton.next_power_of_2(top_k), **config,
    )  # fmt: skip
    return weight, scores, ids


def _triton_bwd(
    dweight: Tensor | None, dscores: Tensor | None, ids: Tensor, scores: Tensor, norm: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (tokens, experts), top_k = scores.shape, ids.shape[1]
    dlogits = scores.new_empty(tokens, experts, dtype=dtype)
    dweight = scores.new_zeros(tokens, top_k) if dweight is None else dweight.contiguous()
    other = dweight if dscores is None else dscores.contiguous()
    config = _launch.config("moe_gate", "moe_gate_bwd", _launch.arch(scores), E=experts)
    _launch.launch(
        _moe_gate_bwd_kernel, (triton.cdiv(tokens, config["ROWS"]),),
        dweight, other, ids, scores, dlogits, tokens, experts, dweight.stride(0), other.stride(0), scale,
        TOP_K=top_k, NORM=norm, EPS=TINY, HAS_DSCORES=dscores is not None,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_K=triton.next_power_of_2(top_k), **config,
    )  # fmt: skip
    return dlogits


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _largest(choice: Tensor, count: int) -> Tensor:
    """Where in each row of [T, N] its `count` largest numbers are, of equals the first. For a few of them quicker than
    torch.topk."""
    found: list[Tensor] = []
    rest = choice.clamp(min=torch.finfo(choice.dtype).min)
    for _ in range(count):
        if found:
            rest.scatter_(-1, found[-1], -torch.inf)
        found.append(rest.max(-1, keepdim=True).indices)
    return torch.cat(found, -1)


def _torch_fwd(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = logits.to(_wide(logits)).sigmoid()
    choice = scores + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1)
        hidden = torch.ones_like(best, dtype=torch.bool).scatter_(-1, _largest(best, topk_group), False)
        choice = grouped.masked_fill_(hidden.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = _largest(choice, top_k)
    weight = scores.gather(-1, ids)
    if norm:
        weight /= weight.sum(-1, keepdim=True) + TINY
    return weight.mul_(scale), scores, ids


def _torch_bwd(
    dweight: Tensor | None, dscores: Tensor | None, ids: Tensor, scores: Tensor, norm: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    grad = torch.zeros_like(scores) if dscores is None else dscores.clone()
    if dweight is not None:
        share = dweight * scale
        if norm:
            chosen = scores.gather(-1, ids)
            total = chosen.sum(-1, keepdim=True) + TINY
            share = (share - (share * chosen).sum(-1, keepdim=True) / total) / total
        grad.scatter_add_(-1, ids, share)
    return torch.ops.aten.sigmoid_backward(grad, scores).to(dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("moe_gate")
def _moe_gate(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> weight, scores, ids."""
    forward = _triton_fwd if _launch.use_triton(logits) else _torch_fwd
    return forward(logits, bias, top_k, n_group, topk_group, norm, scale)


@operator("moe_gate_backward")
def _moe_gate_backward(
    dweight: Tensor | None, dscores: Tensor | None, ids: Tensor, scores: Tensor, norm: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """-> dlogits [T, E] in `dtype`; a gradient that is None is zero."""
    backward = _triton_bwd if _launch.use_triton(scores) else _torch_bwd
    return backward(dweight, dscores, ids, scores, norm, scale, dtype)


@_moe_gate.register_fake
def _(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    weight, scores = (logits.new_empty(tokens, n, dtype=_wide(logits)) for n in (top_k, experts))
    return weight, scores, logits.new_empty(tokens, top_k, dtype=torch.int64)


@_moe_gate_backward.register_fake
def _(
    dweight: Tensor | None, dscores: Tensor | None, ids: Tensor, scores: Tensor, norm: bool, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return scores.new_empty(scores.shape, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    logits, _, _, _, _, ctx.norm, ctx.scale = inputs
    _, scores, ids = output
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids, scores)


def _backward(ctx, dweight, dscores, _):
    if dweight is None and dscores is None:  # nothing came back
        return (None,) * 7
    ids, scores = ctx.saved_tensors
    dlogits = _moe_gate_backward(dweight, dscores, ids, scores, ctx.norm, ctx.scale, ctx.dtype)
    return dlogits, None, None, None, None, None, None


_moe_gate.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def moe_gate(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1, norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [T, E], bias [E] -> topk_ids [T, top_k] int64, best first, topk_weight [T, top_k] and scores [T, E], both
    fp32 (fp64 for fp64).

    Weights and scores are differentiable in logits, once; the bias only selects. Raises TypeError for a dtype that is
    no float, ValueError when shapes disagree or a token cannot have `top_k` experts.
    """
    check_float("logits", logits)
    check_shape("logits", logits, (None, None))
    experts = logits.shape[1]
    check_float("bias", bias)
    check_shape("bias", bias, (experts,))
    check_devices(logits, bias=bias)
    if n_group < 1 or experts % n_group or (n_group > 1 and experts < 2 * n_group):
        raise ValueError(f"n_group: got {n_group}, allowed is a divisor of {experts} experts leaving 2 or more a group")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: got {topk_group}, allowed is 1 to n_group = {n_group}")
    if not 1 <= top_k <= experts // n_group * topk_group:
        raise ValueError(f"top_k: got {top_k}, allowed is 1 to {experts // n_group * topk_group}")
    weight, scores, ids = _moe_gate(logits, bias.detach(), top_k, n_group, topk_group, norm_topk_prob, scale)
    return ids, weight, scores
