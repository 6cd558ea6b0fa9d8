"""A transformers DeepSeek-V3 served by these kernels computes what it did, and is itself again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from minids_kernels import moe_experts, rms_norm
from minids_kernels.compat import transformers as compat
from minids_kernels.compat.transformers import apply_to_transformers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.kernels.numerics import assert_near, error_bound

LAYERS = 2
NORMS = 4 * LAYERS + 1  # before attention and MLP, on the queries' and the keys' latents; one before the head


def peer(**changes: object) -> DeepseekV3ForCausalLM:
    settings = dict(
        vocab_size=50, hidden_size=40, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=10, first_k_dense_replace=1, n_shared_experts=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=64, rms_norm_eps=1e-3,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name:
                parameter += 1.0
    return model


def results(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(50, (2, 9))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of our ops was called."""
    counts = {"rms_norm": 0, "moe_experts": 0}

    def counted(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            counts[name] += 1
            return op(*args)

        return call

    monkeypatch.setattr("minids_kernels.layers.rms_norm", counted("rms_norm", rms_norm))
    monkeypatch.setattr(compat, "moe_experts", counted("moe_experts", moe_experts))
    return counts


def test_logits_and_gradients_are_the_same(ids: Tensor, calls: dict[str, int]) -> None:
    """Each of some 20 operators in a row rounds anew and sums in its own order; norms and softmax keep errors' size."""
    model = peer()
    before = results(model, ids)
    undo = apply_to_transformers(model)
    after = results(model, ids)
    assert calls == {"rms_norm": NORMS, "moe_experts": LAYERS - 1}
    for got, want in zip(after, before, strict=True):
        assert_near(got, want.double(), error_bound(torch.float32, 20 * LAYERS, ids.numel() * 56))
    undo()
    assert all(torch.equal(got, want) for got, want in zip(results(model, ids), before, strict=True))
    assert calls["rms_norm"] == NORMS


def test_bf16(ids: Tensor) -> None:
    """Against the same weights in fp32, no further off than transformers itself by more than half."""
    model = peer(n_routed_experts=2)  # both experts serve every token: rounding changes nobody's choice
    exact = model(ids).logits.double()
    model = model.bfloat16()
    theirs = (model(ids).logits.double() - exact).square().mean().sqrt()
    apply_to_transformers(model)
    assert model(ids).logits.dtype == torch.bfloat16
    assert (model(ids).logits.double() - exact).square().mean().sqrt() <= 1.5 * theirs


def test_undo_leaves_no_trace(ids: Tensor) -> None:
    model = peer()
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    undo = apply_to_transformers(model)
    assert list(model.state_dict()) == keys
    undo()
    undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state
    apply_to_transformers(model)()


def test_twice_is_refused_and_changes_nothing(ids: Tensor) -> None:
    model = peer()
    before = results(model, ids)
    undo = apply_to_transformers(model)
    with pytest.raises(ValueError, match=r"model: the forward of model\.\S*norm\S* has been replaced already"):
        apply_to_transformers(model)
    undo()
    assert all(torch.equal(got, want) for got, want in zip(results(model, ids), before, strict=True))


def test_other_models_and_copies_are_their_own(ids: Tensor, calls: dict[str, int]) -> None:
    model, other = peer(), peer()
    apply_to_transformers(model)
    other(ids)
    assert calls["rms_norm"] == 0
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert copy(ids).logits.abs().max() == 0 and calls["rms_norm"] == NORMS
    assert model(ids).logits.abs().max() > 0


def test_another_activation_keeps_its_experts(ids: Tensor, calls: dict[str, int]) -> None:
    model = peer(hidden_act="gelu")
    before = model(ids).logits
    apply_to_transformers(model)
    assert_near(model(ids).logits, before.double(), error_bound(torch.float32, 20 * LAYERS, ids.numel() * 56))
    assert calls == {"rms_norm": NORMS, "moe_experts": 0}


def test_one_graph_under_compile() -> None:
    """A norm as the model holds it; the op itself is test_every_op's matter."""
    model = peer()
    norm, x = model.model.norm, torch.randn(3, 40)
    want = norm(x).detach()
    apply_to_transformers(model)
    got = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    assert_near(got.detach(), want.double(), error_bound(torch.float32, 4, 40))


def test_another_class_is_refused() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for model in (llama, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"model: got {type(model).__name__}, allowed is .*DeepseekV3ForCausalLM"):
            apply_to_transformers(model)
