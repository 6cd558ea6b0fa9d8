"""Mixture of experts: DeepSeek-V3's gate and the experts themselves (report, section 2.1.2).

Gate: scores = sigmoid(logits); selection by scores + bias, first the best `topk_group` of `n_group` groups (a group
counts the sum of its two best), then the best `top_k` experts in them; weights are the chosen scores (without bias),
normalised to one if asked, times `scale`.
Experts: y[t] = sum_j topk_weight[t, j] * down_e(swiglu(gate_up_e(x[t]))) with e = topk_ids[t, j]. Tokens are sorted by
expert, so that each expert is one matrix product; the weight is applied before `down` (which is linear), so the
products' outputs need not be kept. Test: tests/kernels/test_moe.py.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_float, check_shape, compute_dtype
from .swiglu import swiglu_backward

__all__ = ["moe_experts", "moe_experts_reference", "moe_gate"]

ALIGN = 64  # rows an expert's segment is padded to


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, E] fp32, bias [E] -> topk_ids [T, top_k] int64, topk_weight [T, top_k], scores [T, E].

    The weights and scores are differentiable in logits; the bias only selects. Raises TypeError for a dtype that is no
    float, ValueError when shapes disagree or a token cannot have `top_k` experts.
    """
    check_float("logits", logits)
    check_shape("logits", logits, (None, None))
    experts = logits.shape[1]
    check_shape("bias", bias, (experts,))
    if experts % n_group or (n_group > 1 and experts < 2 * n_group):
        raise ValueError(f"n_group: got {n_group}, allowed is a divisor of {experts} experts leaving 2 or more a group")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: got {topk_group}, allowed is 1 to n_group = {n_group}")
    if not 1 <= top_k <= experts // n_group * topk_group:
        raise ValueError(f"top_k: got {top_k}, allowed is 1 to {experts // n_group * topk_group}")
    scores = logits.sigmoid()
    choice = scores.detach() + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        group_score = grouped.topk(2, dim=-1).values.sum(-1)
        keep = torch.zeros_like(group_score, dtype=torch.bool)
        keep.scatter_(-1, group_score.topk(topk_group, dim=-1).indices, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = choice.topk(top_k, dim=-1).indices
    weight = scores.gather(-1, ids)
    if norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return ids, weight * scale, scores


def moe_experts_reference(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """fp32, one expert after the other; shapes as `moe_experts`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w_gate_up.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w_gate_up[expert].float().T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w_down[expert].float().T
        out.index_add_(0, token, y * topk_weight[token, slot, None].float())
    return out.to(x.dtype)


class _Plan:
    """Where each (token, slot) pair goes when pairs are sorted by expert, each expert's segment padded to ALIGN rows.

    The padding bounds the number of different matrix shapes: CPU libraries prepare code for each shape they meet, which
    for an expert's product takes longer than the product itself.
    offsets int32 [E + 1] segment starts; rows: all segments' length; place [T * k] row of each pair; token [rows] the
    token of each row (0 in padding).
    """

    def __init__(self, topk_ids: Tensor, experts: int) -> None:
        flat = topk_ids.flatten()
        pairs, device = flat.numel(), flat.device
        counts = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
        padded = (counts + ALIGN - 1) // ALIGN * ALIGN
        self.offsets = F.pad(padded.cumsum(0, dtype=torch.int32), (1, 0))
        on_cpu = device.type == "cpu"
        self.rows = int(self.offsets[-1]) if on_cpu else -(-pairs // ALIGN) * ALIGN + experts * ALIGN
        order = flat.argsort(stable=True)
        shift = self.offsets[:-1] - (counts.cumsum(0) - counts)  # from sorted position to padded row, an expert
        row = torch.arange(pairs, device=device) + shift[flat[order]]
        self.place = torch.empty_like(order).scatter_(0, order, row)
        self.token = torch.zeros(self.rows, dtype=torch.int64, device=device).scatter_(
            0, row, order // topk_ids.shape[1]
        )

    def spread(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Router weights [T, k] -> [rows, 1], 0 in padding."""
        return weight.new_zeros(self.rows, dtype=dtype).scatter_(0, self.place, weight.flatten().to(dtype)).unsqueeze(1)

    def combine(self, y: Tensor, top_k: int) -> Tensor:
        """Sums each token's rows: y [rows, D] -> [T, D]."""
        first, *others = self.place.view(-1, top_k).unbind(1)
        out = y[first]
        for place in others:
            out += y[place]
        return out


def _grouped_mm(x: Tensor, w: Tensor, plan: _Plan) -> Tensor:
    """x [rows, K], w [E, K, N] -> [rows, N], each segment by its own expert's matrix."""
    if x.device.type != "cpu":
        return F.grouped_mm(x, w, offs=plan.offsets[1:])
    out = x.new_empty(plan.rows, w.shape[2])
    bounds = plan.offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            torch.mm(x[start:end], w[expert], out=out[start:end])
    return out


def _grouped_outer(a: Tensor, b: Tensor, plan: _Plan, dtype: torch.dtype) -> Tensor:
    """a [rows, M], b [rows, N] -> [E, M, N] in `dtype`: a.T @ b of each segment, zero for an empty one."""
    experts = plan.offsets.numel() - 1
    if a.device.type != "cpu":
        return F.grouped_mm(a.T, b, offs=plan.offsets[1:]).to(dtype)
    out = a.new_empty(experts, a.shape[1], b.shape[1], dtype=dtype)
    bounds = plan.offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        out[expert] = a[start:end].T @ b[start:end]
    return out


class _Experts(torch.autograd.Function):
    """Keeps x, the gate_up products and the plan; everything else is computed again in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor, dtype: torch.dtype):
        plan = _Plan(ids, w_gate_up.shape[0])
        xc, wg, wd = x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype)
        gate_up = _grouped_mm(xc[plan.token], wg.transpose(1, 2), plan)
        gate, up = gate_up.chunk(2, dim=-1)
        scaled = F.silu(gate).mul_(up).mul_(plan.spread(weight, dtype))
        y = _grouped_mm(scaled, wd.transpose(1, 2), plan)
        ctx.save_for_backward(xc, weight, wg, wd, gate_up)
        ctx.plan, ctx.dtypes = plan, (x.dtype, w_gate_up.dtype)
        return plan.combine(y, ids.shape[1]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        xc, weight, wg, wd, gate_up = ctx.saved_tensors
        plan, dtype, (x_dtype, w_dtype) = ctx.plan, xc.dtype, ctx.dtypes
        w = plan.spread(weight, dtype)
        gate, up = gate_up.chunk(2, dim=-1)
        act = F.silu(gate).mul_(up)
        dy = dout.to(dtype)[plan.token]
        dscaled = _grouped_mm(dy, wd, plan)
        dweight = torch.linalg.vecdot(dscaled, act).to(weight.dtype)[plan.place].view_as(weight)
        dwd = _grouped_outer(dy, act.mul_(w), plan, w_dtype)
        dgate_up = swiglu_backward(dscaled.mul_(w), gate_up)
        dwg = _grouped_outer(dgate_up, xc[plan.token], plan, w_dtype)
        dx = plan.combine(_grouped_mm(dgate_up, wg, plan), weight.shape[1])
        return dx.to(x_dtype), None, dweight, dwg, dwd, None


def moe_experts(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """x [T, D], topk_ids [T, k] int64, topk_weight [T, k], w_gate_up [E, 2F, D], w_down [E, D, F] -> [T, D], x's dtype.

    Differentiable in x, topk_weight and both weights. Under autocast the products run in autocast's dtype. Raises
    TypeError for a dtype that is no float, ValueError when shapes disagree.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    tokens, width = x.shape
    check_shape("w_down", w_down, (None, width, None))
    experts, _, inner = w_down.shape
    check_shape("w_gate_up", w_gate_up, (experts, 2 * inner, width))
    check_shape("topk_ids", topk_ids, (tokens, None))
    check_shape("topk_weight", topk_weight, tuple(topk_ids.shape))
    if topk_ids.dtype != torch.int64:
        raise TypeError(f"topk_ids: got {topk_ids.dtype}, allowed is torch.int64")
    return _Experts.apply(x, topk_ids, topk_weight, w_gate_up, w_down, compute_dtype(x))
