"""AdamW's groups; one step against the formula of the AdamW paper (arXiv 1711.05101), many against torch's class."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from minids.config import TrainConfig
from minids.train.optim import build_optimizer, gradient_norm, parameter_groups, set_learning_rate


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
    optimizer.step(torch.tensor(1.0))
    for name, p in model.named_parameters():
        decay = 0.1 if p.ndim == 2 else 0.0
        first, second = 0.1 * p.grad / (1 - 0.9), 0.05 * p.grad**2 / (1 - 0.95)
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def with_gradients(model: nn.Module, size: float) -> None:
    for p in model.parameters():
        p.grad = size * torch.randn_like(p)


def test_steps_are_those_of_torchs_class():
    """With gradients above and below the norm that is clipped: to the rounding of a division instead of a product."""
    torch.manual_seed(0)
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    config = TrainConfig(lr=0.1, grad_clip=2.0)
    ours = build_optimizer(model, config)
    theirs = torch.optim.AdamW(parameter_groups(other, 0.1), lr=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for size in (1.0, 0.01, 3.0, 0.1, 0.3):
        with_gradients(model, size)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        norm = gradient_norm(model)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(other.parameters(), 2.0), rtol=0, atol=0)
        ours.step(norm)
        theirs.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert ours.state[p]["step"] == theirs.state[q]["step"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = network()
    optimizer = build_optimizer(model, TrainConfig(lr=0.1))
    with_gradients(model, 1.0)
    optimizer.step(gradient_norm(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    with_gradients(model, 1.0)
    model["head"].weight.grad[2, 1] = bad
    optimizer.step(gradient_norm(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(v, moments[p][k]) for p, state in optimizer.state.items() for k, v in state.items())


def test_training_does_not_import_torchs_compiler():
    code = (
        "import sys, torch; from minids.config import TrainConfig; from minids.model import DeepseekV3;"
        "from minids.train.optim import build_optimizer, gradient_norm; from tests.minids.tiny import model_config;"
        "model = DeepseekV3(model_config(50)); optimizer = build_optimizer(model, TrainConfig());"
        "ids = torch.zeros(1, 8, dtype=torch.int64); losses = model.losses(ids, ids); losses.nll_sum.backward();"
        "optimizer.step(gradient_norm(model)); optimizer.zero_grad(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
