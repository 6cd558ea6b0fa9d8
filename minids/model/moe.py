"""Feed-forward layers: dense SwiGLU, and DeepSeekMoE with shared and routed experts (DeepSeek-V3 report, 2.1.2).

Load is balanced by a bias per expert that only steers selection and is moved after each step (`update_biases`), and by
a small sequence-wise balance loss. T tokens, D hidden_size, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import fp8_mlp, moe_experts, moe_gate, swiglu
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minids.config import ModelConfig
from minids.precision import LinearBeside, in_fp8, linear, product_dtype, weight_gradient


class _GateLogits(torch.autograd.Function):
    """The same for a gate on a GPU, x in bf16 and weight in fp32, with a product in fp32 by tensor cores: three bf16
    matrices, each of what those before leave of the weight, add up to its 24 bits. Gradients are bf16 products, as any
    layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        parts, rest = [], weight
        for _ in range(3):
            parts.append(rest.to(x.dtype))
            rest = rest - parts[-1]
        ctx.save_for_backward(x, parts[0])
        logits = torch.mm(x, torch.cat(parts).t(), out_dtype=torch.float32)
        return logits.unflatten(1, (3, -1)).sum(1), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dlogits = dlogits.to(x.dtype)
        return dx.addmm_(dlogits, weight), weight_gradient(dlogits, x, torch.float32)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x [T, D] -> [T, D]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if in_fp8():
            return fp8_mlp(x, self._gate_up(), self.down_proj.weight)
        return linear(swiglu(linear(x, self._gate_up())), self.down_proj.weight)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and x for its next reader."""
        if in_fp8():
            return self(x), x
        gate_up, x = LinearBeside.apply(x, self._gate_up())
        return linear(swiglu(gate_up), self.down_proj.weight), x

    def _gate_up(self) -> Tensor:
        return torch.cat((self.gate_proj.weight, self.up_proj.weight))


class Gate(nn.Module):
    """Scores in fp32 whatever the surrounding precision; `e_score_correction_bias` [E] is a buffer, moved by hand."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, D] -> topk_ids [T, k], topk_weight [T, k], scores [T, E], and x for its next reader."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            if self.weight.dtype == x.dtype == torch.float32:
                logits, x = LinearBeside.apply(x, self.weight)
            elif x.is_cuda and x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32:
                logits, x = _GateLogits.apply(x, self.weight)
            else:
                logits = F.linear(x.float(), self.weight.float())
        routed = moe_gate(
            logits, self.e_score_correction_bias, config.num_experts_per_tok, config.n_group, config.topk_group,
            config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        return *routed, x


class Experts(nn.Module):
    """All routed experts' weights, stacked: `gate_up_proj` [E, 2F, D], `down_proj` [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor, base: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, D], with `base` [T, D] added."""
        return moe_experts(x, topk_ids, topk_weight, self.gate_up_proj, self.down_proj, fp8=in_fp8(), base=base)


@dataclass
class Routing:
    """What one MoE layer's gate said: `topk_ids` [T, k] and `scores` [T, E]."""

    topk_ids: Tensor
    scores: Tensor


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [T, D] -> [T, D] and how tokens were routed."""
        ids, weight, scores, x = self.gate(x)
        x = x.to(product_dtype(x))  # once for all experts
        if self.shared_experts is None:
            return self.experts(x, ids, weight), Routing(ids, scores)
        shared, x = self.shared_experts.beside(x)
        return self.experts(x, ids, weight, shared), Routing(ids, scores)


def balance_loss(routings: list[Routing], real: Tensor) -> tuple[Tensor, Tensor]:
    """Of L layers, with real [B, S] False where a token is padding: the sequence-wise balance losses [L] without alpha
    (report, equations 17-20: sum over experts of f_i P_i, averaged over sequences), and tokens per expert [L, E].

    f_i counts the tokens whose highest scores without the bias are i's (equation 18): where the bias has evened the
    load, the routed tokens would say that nothing is left to do.
    """
    ids = torch.stack([r.topk_ids for r in routings])
    scores = torch.stack([r.scores for r in routings])
    (layers, _, top_k), experts, (sequences, length) = ids.shape, scores.shape[-1], real.shape
    weight = real.to(scores.dtype)
    tokens = weight.sum(1).clamp(min=1).view(1, sequences, 1)

    def counts(chosen: Tensor) -> Tensor:
        """[L, T, k] -> tokens of each sequence that chose each expert [L, B, E]."""
        each = weight.view(1, sequences, length, 1).expand(layers, -1, -1, top_k).flatten(2)
        zeros = scores.new_zeros(layers, sequences, experts)
        return zeros.scatter_add_(2, chosen.view(layers, sequences, length * top_k), each)

    share = (scores / scores.sum(-1, keepdim=True)).view(layers, sequences, length, experts)
    mean_share = (share * weight.unsqueeze(-1)).sum(2) / tokens
    highest = counts(scores.detach().topk(top_k, dim=-1).indices)
    balance = (highest * (experts / top_k) / tokens * mean_share).sum(-1).mean(1)
    return balance, counts(ids).sum(1)


@torch.no_grad()
def update_biases(gates: list[Gate], counts: Tensor, speed: float) -> None:
    """Moves biases of overloaded experts down and of underloaded ones up by `speed` (report, section 2.1.2). counts
    [gates, E]."""
    steps = torch.sign(counts.mean(1, keepdim=True) - counts) * speed
    torch._foreach_add_([gate.e_score_correction_bias for gate in gates], [*steps])
