"""A transformers DeepSeek-V3 served by these kernels computes what it did, and is itself again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from minids_kernels import moe_experts, rms_norm
from minids_kernels.compat import transformers as compat
from minids_kernels.compat.transformers import apply_to_transformers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

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


def results(model: nn.Module, logits: Callable[[], Tensor]) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    found = logits()
    found.square().mean().backward()
    return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(found: list[Tensor], wanted: list[Tensor], ids: Tensor) -> None:
    """Each of some 20 operators in a row rounds anew and sums in its own order; norms and softmax keep errors' size."""
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want.double(), error_bound(torch.float32, 20 * LAYERS, ids.numel() * 56))


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
    model = peer()

    def outcome() -> list[Tensor]:
        return results(model, lambda: model(ids).logits)

    before = outcome()
    undo = apply_to_transformers(model)
    after = outcome()
    assert calls == {"rms_norm": NORMS, "moe_experts": LAYERS - 1}
    assert_alike(after, before, ids)
    undo()
    assert all(torch.equal(got, want) for got, want in zip(outcome(), before, strict=True))
    assert calls["rms_norm"] == NORMS


class Cache(DynamicCache):
    """Notes the shapes it is given and gives back."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.shapes = [*getattr(self, "shapes", []), (tuple(key.shape[1:]), tuple(value.shape[1:]))]
        return super().update(key, value, *args, **kwargs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope_interleave": False}], ids=str)
def test_generates_the_same(implementation: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, prompts of unequal lengths padded on the left, logits of each step within 1e-4; the cache is given a
    latent and a rotated key a token, and only the prompt's are ever expanded."""
    model = peer(**changes).eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 50, (3, 9))
    mask = (torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]).long()
    prompts, expanded = [], compat._expanded

    def counted(self: nn.Module, q: Tensor, *args: Any) -> Tensor:
        prompts.append(q.shape[1])
        return expanded(self, q, *args)

    monkeypatch.setattr(compat, "_expanded", counted)
    for options in ({}, {"attention_mask": mask}):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | options
        settings = dict(
            max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        want = model.generate(**inputs, **settings)
        undo = apply_to_transformers(model)
        cache = Cache(config=model.config)
        prompts.clear()
        got = model.generate(**inputs, **settings, past_key_values=cache)
        undo()
        assert torch.equal(got.sequences, want.sequences) and got.sequences.shape == (3, 21)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
        assert prompts == [9] * LAYERS
        new = [9] * LAYERS + [1] * (11 * LAYERS)
        assert cache.shapes == [((1, n, 16), (1, n, 8)) for n in new]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_no_logit_and_no_gradient(side: str, implementation: str) -> None:
    model = peer()
    model.set_attn_implementation(implementation)
    ids, lengths = torch.randint(50, (3, 9)), torch.tensor([9, 5, 1])[:, None]
    place = torch.arange(9) if side == "right" else torch.arange(9).flip(0)
    mask = place < lengths

    before = results(model, lambda: model(ids, attention_mask=mask.long()).logits[mask])
    apply_to_transformers(model)
    assert_alike(results(model, lambda: model(ids, attention_mask=mask.long()).logits[mask]), before, ids)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_packed_documents_are_refused(implementation: str) -> None:
    """transformers sees them in positions that begin anew, and says so in its mask, if it makes one."""
    model = peer().eval()
    model.config._attn_implementation = implementation  # of the third we need the mask, which is none, not its package
    apply_to_transformers(model)
    for lengths in ([5, 4], [1, 8], [8, 1], [3, 3, 3]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.no_grad(), pytest.raises(ValueError, match=r"got (packed documents|another mask)"):
            model(torch.randint(50, (1, 9)), position_ids=positions, use_cache=False)
    with torch.no_grad():
        assert model(torch.randint(50, (1, 9)), position_ids=torch.arange(3, 12)[None]).logits.isfinite().all()


def test_checkpointed_layers_give_the_same_gradients(ids: Tensor) -> None:
    model = peer().train()
    before = results(model, lambda: model(ids).logits)
    apply_to_transformers(model)
    model.gradient_checkpointing_enable()
    assert_alike(results(model, lambda: model(ids).logits), before, ids)


def test_gradients_flow_behind_a_past(ids: Tensor) -> None:
    """To the new tokens' own computation, as in transformers; one prompt is padded."""
    model = peer().eval()
    mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 7])

    def logits() -> Tensor:
        with torch.no_grad():
            cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        return model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits

    before = results(model, logits)
    apply_to_transformers(model)
    assert_alike(results(model, logits), before, ids)


class Adapted(nn.Module):
    """A linear layer with more to it than its weight, as adapters for fine-tuning have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Parameter(torch.randn(base.out_features, 2) @ torch.randn(2, base.in_features) / 8)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.low.T


@pytest.mark.parametrize("how", ["adapter", "hook", "forward"])
def test_projections_that_are_more_than_their_weight(how: str) -> None:
    model, ids = peer().eval(), torch.randint(1, 50, (2, 5))
    attention = model.model.layers[1].self_attn
    projection = attention.kv_b_proj
    if how == "adapter":
        attention.kv_b_proj = Adapted(projection)
    elif how == "hook":
        projection.register_forward_hook(lambda module, args, out: 1.5 * out)
    else:
        projection.forward = lambda x: nn.functional.linear(x, projection.weight) - 0.5
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    want = model.generate(ids, **settings)
    apply_to_transformers(model)
    got = model.generate(ids, **settings)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)


def test_masks_of_two_dimensions() -> None:
    """As models on FlashAttention give them: what those of four say."""
    keys = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for queries in (1, 2, 4):
        causal = torch.ones(queries, 4).tril(4 - queries).bool()
        whole = (keys.bool()[:, None] & causal).unsqueeze(1)
        for mask in (keys, whole, torch.where(whole, 0.0, torch.finfo().min)):
            seen = compat._seen(mask, queries, 4)
            assert seen is not None and torch.equal(seen, keys.bool())
            assert compat._seen(mask[1:], queries, 4) is None
    with pytest.raises(ValueError, match="attention_mask: got padding among the new tokens"):
        compat._seen(keys.flip(1), 2, 4)


def test_beams(ids: Tensor) -> None:
    """The cache's rows change places."""
    model = peer().eval()
    settings = dict(num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = model.generate(ids, **settings)
    apply_to_transformers(model)
    assert torch.equal(model.generate(ids, **settings), want)


def test_several_tokens_behind_a_past(ids: Tensor) -> None:
    """As in speculative decoding: a cache that transformers filled, several new tokens, some taken back."""
    model = peer().eval()
    with torch.no_grad():
        want = model(ids).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        apply_to_transformers(model)
        first = model(ids[:, 4:8], past_key_values=cache).logits
        cache.crop(-2)
        again = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first[:, :2], again), dim=1), want[:, 4:], atol=1e-4, rtol=1e-4)


def test_what_is_refused(ids: Tensor) -> None:
    model = peer(attention_dropout=0.1).eval()
    apply_to_transformers(model)
    with torch.no_grad():
        with pytest.raises(ValueError, match="attention_mask: got another mask, allowed is a causal one"):
            model(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
        cache = model(ids[:, :4], use_cache=True).past_key_values
        mask = torch.ones(2, 9).long()
        mask[1, 8] = 0
        with pytest.raises(ValueError, match="attention_mask: got"):
            model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="cu_seq_lens_q: got packed documents"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 18]))
        for setting in (model.config, model.model.layers[0].self_attn):
            setting.is_causal = False
            with pytest.raises(ValueError, match="is_causal: got False, allowed is True"):
                model(ids)
            setting.is_causal = True
    with pytest.raises(ValueError, match="cache: got a StaticCache of fixed length"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1 in training"):
        model.train()(ids)


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
    before = results(model, lambda: model(ids).logits)
    undo = apply_to_transformers(model)
    with pytest.raises(ValueError, match=r"model: the forward of model\.\S* has been replaced already"):
        apply_to_transformers(model)
    undo()
    after = results(model, lambda: model(ids).logits)
    assert all(torch.equal(got, want) for got, want in zip(after, before, strict=True))


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


def test_a_served_model_can_be_saved_whole(ids: Tensor, tmp_path: Path) -> None:
    model = peer()
    apply_to_transformers(model)
    torch.save(model, tmp_path / "model.pt")
    copy = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(copy(ids).logits, model(ids).logits)
    assert copy.model.norm.forward.args == (copy.model.norm,)


class SameAttention(DeepseekV3Attention):
    pass


class OtherAttention(DeepseekV3Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_subclasses_are_served_unless_they_compute_something_else(ids: Tensor) -> None:
    model = peer()
    for layer, kind in zip(model.model.layers, (SameAttention, OtherAttention), strict=True):
        layer.self_attn.__class__ = kind
    before = model(ids).logits
    apply_to_transformers(model)
    assert ["forward" in vars(layer.self_attn) for layer in model.model.layers] == [True, False]
    assert_alike([model(ids).logits], [before], ids)


def test_another_activation_keeps_its_experts(ids: Tensor, calls: dict[str, int]) -> None:
    model = peer(hidden_act="gelu")
    before = model(ids).logits
    apply_to_transformers(model)
    assert_alike([model(ids).logits], [before], ids)
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
