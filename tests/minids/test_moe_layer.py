"""Load balance of mixture-of-experts layers: the report's balance loss in a loop, and the bias that moves loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import moe_experts_reference, moe_gate
from torch import Tensor

from minids.model import DeepseekV3
from minids.model.moe import MLP, Gate, MoE, Routing, _GateLogits, balance_loss, update_biases
from tests.minids.tiny import model_config, one_thread


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@settings(max_examples=30, deadline=None)
@given(
    sequences=st.integers(1, 4), length=st.integers(1, 9), experts=st.integers(1, 6), top_k=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_balance_loss_in_a_loop(sequences: int, length: int, experts: int, top_k: int, seed: int) -> None:
    """Equations 17 to 20: f_i = E / (k T) * tokens whose k highest scores i is among, P_i = mean of s_i / sum of s; the
    sum of f_i P_i. Padding is in none of it."""
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    logits = torch.randn(sequences * length, experts, requires_grad=True)
    ids, _, scores = moe_gate(logits, torch.randn(experts), top_k)
    real = torch.arange(length) < torch.randint(length + 1, (sequences, 1))
    other = Routing(ids.roll(1, 0), scores.roll(1, 0))
    (balance, _), counts = balance_loss([Routing(ids, scores), other], real)
    total = torch.zeros(())
    for sequence in range(sequences):
        tokens = [sequence * length + place for place in range(length) if real[sequence, place]]
        for i in range(experts):
            f = experts / (top_k * max(1, len(tokens))) * sum(i in scores[t].topk(top_k).indices for t in tokens)
            p = sum(scores[t, i] / scores[t].sum() for t in tokens) / max(1, len(tokens))
            total = total + f * p / sequences
    torch.testing.assert_close(balance, total)
    for found, chosen in zip(counts, (ids, other.topk_ids), strict=True):
        assert found.tolist() == [int((chosen[real.flatten()] == i).sum()) for i in range(experts)]
    if not total.requires_grad:  # nothing but padding
        return
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (balance, total)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def balance(ids: Tensor, scores: Tensor, sequences: int) -> float:
    return balance_loss([Routing(ids, scores)], torch.ones(sequences, len(ids) // sequences).bool())[0].item()


def test_balance_loss_is_one_when_even_and_more_when_not() -> None:
    ids = torch.arange(8).view(8, 1) % 4
    even = torch.full((8, 4), 0.5).scatter_add(1, ids, torch.full((8, 1), 1e-6))
    assert balance(ids, even, 1) == pytest.approx(1.0)
    skewed = torch.tensor([[0.9, 0.1, 0.1, 0.1]]).expand(8, 4)
    # all tokens to expert 0, whose mean share is 0.9 / 1.2: 4 * 0.75
    assert balance(torch.zeros(8, 1, dtype=torch.int64), skewed, 1) == pytest.approx(3.0)


def test_balance_is_taken_within_each_sequence() -> None:
    """Two sequences that each use one expert are unbalanced, though the batch is not."""
    ids = torch.tensor([[0]] * 4 + [[1]] * 4)
    scores = torch.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 4)
    assert balance(ids, scores, 2) == pytest.approx(1.8)
    assert balance(ids, scores, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("groups", [1, 4])
def test_bias_evens_out_skewed_loads(groups: int) -> None:
    """Experts that every token likes lose their lead in a few hundred steps; without the bias they would keep it."""
    torch.manual_seed(1)
    config = dataclasses.replace(
        model_config(60), n_routed_experts=16, num_experts_per_tok=4, n_group=groups, topk_group=max(1, groups // 2)
    )
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    taste = 4 * gate.weight.detach()[:3].mean(0)  # what all tokens share: the direction of three experts

    def overload() -> float:
        """The fullest expert's tokens over the mean's, less one, on new tokens."""
        ids, *_ = gate(torch.randn(512, config.hidden_size) + taste)
        counts = ids.flatten().bincount(minlength=16).float()
        update_biases([gate], counts[None], 0.005)
        return (counts.max() / counts.mean() - 1).item()

    history = [overload() for _ in range(400)]
    assert sum(history[:3]) / 3 > 1.0
    assert sum(history[-20:]) / 20 < 0.25
    assert gate.e_score_correction_bias[:3].max() < gate.e_score_correction_bias[3:].mean()


@pytest.mark.gpu
def test_logits_by_tensor_cores_are_those_of_fp32() -> None:
    """Products of 24-bit weights with 8-bit numbers, summed in fp32: within what 768 sums that may be cut
    off instead of rounded lose. Their
    gradients are rounded to bf16 once on the way in and, but for the weight's, once on the way out."""
    gate = Gate(dataclasses.replace(model_config(60), hidden_size=768, n_routed_experts=16)).cuda()
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(300, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    taste = torch.randn(300, 16, device="cuda")
    logits, same = _GateLogits.apply(x, gate.weight)
    torch.autograd.backward([logits, same], [taste, torch.zeros_like(x)])
    wide, weight = x.detach().double().requires_grad_(), gate.weight.detach().double().requires_grad_()
    (expected := wide @ weight.t()).backward(taste.double())
    size = wide.detach().abs() @ weight.detach().abs().t()
    assert logits.dtype == torch.float32 and ((logits - expected).abs() <= 768 * 2**-23 * size).all()
    bound = 2**-7 * (taste.double().abs() @ weight.detach().abs())
    assert ((x.grad - wide.grad).abs() <= bound).all()
    assert ((gate.weight.grad - weight.grad).abs() <= 2**-7 * (taste.double().abs().t() @ wide.detach().abs())).all()


def test_bias_moves_against_the_load_by_its_speed() -> None:
    gate = Gate(model_config(60))
    update_biases([gate], torch.tensor([[10.0, 2, 6, 6]]), 0.25)
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    update_biases([gate], torch.tensor([[10.0, 2, 6, 6]]), 0.0)
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert not gate.e_score_correction_bias.requires_grad


def test_bias_chooses_but_does_not_weigh() -> None:
    gate = Gate(model_config(60))
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(7, 32)
    gate.e_score_correction_bias[2] = 100.0
    ids, weight, scores, _ = gate(x)
    assert (ids == 2).any(-1).all()
    torch.testing.assert_close(weight, F.normalize(scores.gather(1, ids), p=1, dim=-1))


def test_gate_is_fp32_under_autocast() -> None:
    """Half-precision scores would tie and choose other experts."""
    gate = Gate(model_config(60))
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(50, 32)
    want = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[2].dtype == torch.float32


def test_tokens_in_fp32_under_autocast() -> None:
    """Products in bf16 then, and a gradient in fp32: near the layer's without autocast, by bf16's 2^-9 a few times."""
    moe = MoE(model_config(60))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    results = []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 50 * 32).view(50, 32).sin().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = moe(x)[0]
        out.float().square().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        results.append((out.float(), x.grad))
    for exact, rough in zip(*results, strict=True):
        assert (rough - exact).norm() < 2**-6 * exact.norm()


def test_tokens_are_cast_once_for_all_experts() -> None:
    """Under autocast shared and routed experts keep the same copy of them."""
    moe = MoE(model_config(60))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.linspace(-1, 1, 50 * 32).view(50, 32).sin()
    copies: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if torch.equal(tensor, x.bfloat16()):
            copies.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe(x.clone().requires_grad_())
    assert len(copies) == 2 and len({t.data_ptr() for t in copies}) == 1


def test_shared_experts_see_every_token() -> None:
    """With routed experts silenced, what is left is the shared experts' dense layer, of n_shared_experts widths."""
    moe = MoE(model_config(60, n_shared_experts=2))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.zeros_(moe.experts.down_proj)
    assert isinstance(moe.shared_experts, MLP) and moe.shared_experts.gate_proj.out_features == 2 * 16
    x = torch.randn(6, 32)
    gate, up, down = (getattr(moe.shared_experts, f"{n}_proj").weight for n in ("gate", "up", "down"))
    torch.testing.assert_close(moe(x)[0], (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert MoE(model_config(60, n_shared_experts=0)).shared_experts is None


def test_training_goes_as_with_a_loop_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 steps of AdamW, the bias moved after each: losses are those with `moe_experts`'s reference."""
    config = model_config(64)
    batches = torch.randint(0, 64, (8, 4, 16), generator=torch.Generator().manual_seed(1))

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = DeepseekV3(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        found = []
        for step in range(50):
            batch = batches[step % len(batches)]
            result = model.losses(batch, batch)
            loss = result.nll_sum / result.tokens + 1e-3 * result.balance
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_expert_bias(result.expert_counts, 1e-3)
            found.append(loss.item())
        return found

    ours = losses()
    monkeypatch.setattr("minids.model.moe.moe_experts", lambda *args, fp8, base: base + moe_experts_reference(*args))
    loop = losses()
    assert ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(loop, abs=1e-5)  # of losses near 4: some 20 roundings of fp32
