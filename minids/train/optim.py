"""AdamW as in DeepSeek-V3 (arXiv 2412.19437, 4.2): betas 0.9/0.95, decay 0.1 on matrices only, gradient norm 1.0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from minids.config import TrainConfig


class AdamW:
    """torch's fused AdamW over fp32 parameters, with a torch optimizer's `param_groups` and `state`.

    It is torch's functional form: `torch.optim.AdamW` imports torch's compiler, for which a start waits seconds.
    """

    def __init__(self, groups: list[dict[str, Any]], train: TrainConfig) -> None:
        self.param_groups = [{**group, "lr": train.lr} for group in groups]
        self.beta1, self.beta2, self.eps, self.grad_clip = train.beta1, train.beta2, train.eps, train.grad_clip
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, grad_norm: Tensor) -> None:
        """Takes gradients as if scaled down to a norm of `grad_clip`, where `grad_norm` [] says that they have more. A
        norm that is not finite changes nothing. The gradients themselves may come out scaled."""
        scale = ((grad_norm + 1e-6) / self.grad_clip).clamp(min=1.0)
        skip = grad_norm.isfinite().logical_not().float()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state.get(p) or self._fresh(p) for p in parameters]
            adamw(
                parameters, [p.grad for p in parameters], [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states], fused=True,
                grad_scale=scale, found_inf=skip, amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=self.eps, maximize=False,
            )  # fmt: skip

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = {"step": step, **moments}
        return self.state[parameter]

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices and embeddings (at least two dimensions) decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, train: TrainConfig) -> AdamW:
    return AdamW(parameter_groups(model, train.weight_decay), train)


def gradient_norm(model: nn.Module) -> Tensor:
    """[]: of all gradients as one vector."""
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
