"""AdamW's groups, and one step against the formula of the AdamW paper (arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import nn

from minids.config import TrainConfig
from minids.train.optim import build_optimizer, parameter_groups, set_learning_rate


def network() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.RMSNorm(4), "head": nn.Linear(4, 5)})


def test_only_matrices_decay():
    model = network()
    decay, rest = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in decay["params"]] == ["embed.weight", "head.weight"]
    assert [names[id(p)] for p in rest["params"]] == ["norm.weight", "head.bias"]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = network()
    model["embed"].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == 3


def test_one_step_is_adamw_with_the_reports_constants():
    torch.manual_seed(0)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(lr=0.5))
    set_learning_rate(optimizer, 0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.1 if p.ndim == 2 else 0.0
        first, second = 0.1 * p.grad / (1 - 0.9), 0.05 * p.grad**2 / (1 - 0.95)
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
