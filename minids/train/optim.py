"""AdamW as in DeepSeek-V3 (arXiv 2412.19437, 4.2): betas 0.9/0.95, decay 0.1 on matrices only, gradient norm 1.0."""

from __future__ import annotations

import torch
from torch import nn

from minids.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices and embeddings (at least two dimensions) decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's fp32 parameters; its state is fp32 too."""
    groups = parameter_groups(model, train.weight_decay)
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
