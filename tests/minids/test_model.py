"""The model by itself: sizes, initial state, losses against slow loops, documents kept apart. test_model_parity.py
compares it with transformers'."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minids.config import PRESETS, ModelConfig, YarnConfig, preset
from minids.model.block import Block
from minids.model.model import IGNORE, DeepseekV3, Losses
from minids.model.rope import rope_angles
from minids.precision import autocast, pick_dtype
from tests.minids.tiny import model_config, one_thread

VOCAB = 60
BOUNDS = [0, 7, 8, 10, 30, 35, 60]  # of two sequences of 30; documents of one and of two tokens among them
CU_SEQLENS = torch.tensor(BOUNDS, dtype=torch.int32)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


def build(**changes: object) -> DeepseekV3:
    """Weights far larger than at the start of training, so that mistakes show; unequal expert biases."""
    model = DeepseekV3(model_config(VOCAB, **changes))
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, mean=1.0 if value.dim() == 1 else 0.0, std=0.3 if value.dim() == 1 else 0.2)
        assert "bias" not in name
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(value, std=0.05)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Two rows of packed documents, and labels as the loader makes them, with some ignored besides."""
    ids = torch.randint(VOCAB, (2, 30))
    labels = ids.clone().flatten()
    labels[BOUNDS[:-1]] = IGNORE
    labels[[12, 13, 40, 59]] = IGNORE
    return ids, labels.view(2, 30)


def gradients(model: DeepseekV3, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """By norm: single entries of a sum over tokens may cancel."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert (got[name] - expected).norm() <= bound * expected.norm(), name


def training_loss(losses: Losses) -> Tensor:
    return losses.nll_sum + torch.stack(losses.mtp_nll_sum).sum()


# --- sizes and initial state ---


def counted(c: ModelConfig) -> tuple[int, int]:
    """Total and active parameters, layer by layer, from the report's section 2.1."""
    attention = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    attention += c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention += c.num_attention_heads * c.v_head_dim * c.hidden_size
    queries = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    if c.q_lora_rank is None:
        attention += c.hidden_size * queries
    else:
        attention += c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * queries
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    sizes = []
    for routed in (c.n_routed_experts, c.num_experts_per_tok):
        total = 2 * c.vocab_size * c.hidden_size + c.hidden_size
        for layer in range(c.num_hidden_layers):
            total += attention + 2 * c.hidden_size
            if layer < c.first_k_dense_replace:
                total += 3 * c.hidden_size * c.intermediate_size
            else:
                total += c.n_routed_experts * c.hidden_size + (c.n_shared_experts + routed) * expert
        sizes.append(total)
    return sizes[0], sizes[1]


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = DeepseekV3(preset(name))
    assert (model.num_parameters(), model.num_parameters(active=True)) == counted(model.config)


def test_published_sizes() -> None:
    with torch.device("meta"):
        v3, mini, lite = (DeepseekV3(preset(name)) for name in ("v3", "mini", "v2-lite"))
    assert v3.num_parameters() == 671_026_404_352  # "671B"
    assert v3.num_parameters(active=True) == 37_552_282_624  # "37B activated"
    with_mtp = sum(p.numel() for p in v3.parameters())
    # README_WEIGHTS.md: 11.5B unique parameters of the MTP module
    assert with_mtp - v3.num_parameters() == pytest.approx(11.5e9, rel=0.02)
    assert mini.num_parameters() == pytest.approx(26e6, rel=0.1)
    assert lite.num_parameters() == pytest.approx(15.7e9, rel=0.1)


def test_initial_weights() -> None:
    """Normal with the report's 0.006 everywhere, norms at one, expert biases at zero."""
    model = DeepseekV3(ModelConfig(vocab_size=500))
    assert model.config.initializer_range == 0.006
    for name, value in model.named_parameters():
        if value.dim() == 1:
            assert "norm" in name and (value == 1).all(), name
        else:
            # a deviation estimated from n numbers is off by 1 / sqrt(2 n), a mean by 1 / sqrt(n); five times that
            slack = 5 / value.numel() ** 0.5
            assert value.std().item() == pytest.approx(0.006, rel=slack), name
            assert abs(value.mean().item()) < 0.006 * slack, name
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4 and all(b.dtype == torch.float32 and not b.any() for b in biases)


def test_no_dropout_and_an_untied_head() -> None:
    model = build()
    ids, labels = batch()
    first, second = model.train()(ids, labels), model(ids, labels)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(model.eval()(ids, labels).logits, first.logits)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


# --- losses ---


def test_loss_is_cross_entropy_of_shifted_labels() -> None:
    """transformers' convention: the label at t is predicted from t - 1; without cu_seqlens each row is a document."""
    model = build()
    ids, labels = batch()
    out = model(ids, labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert out.loss is not None
    torch.testing.assert_close(out.loss, want)
    losses = model.losses(ids, labels)
    assert losses.tokens == int((labels[:, 1:] != IGNORE).sum())
    torch.testing.assert_close(losses.nll_sum / losses.tokens, want)
    assert model(ids).loss is None


def test_a_document_s_first_token_is_never_predicted() -> None:
    """Even if its label is not ignored: the token before it is another document's."""
    model = build()
    ids, _ = batch()
    losses = model.losses(ids, ids, CU_SEQLENS)
    assert losses.tokens == 60 - (len(BOUNDS) - 1)
    separate = [model.losses(ids.flatten()[None, a:b], ids.flatten()[None, a:b]) for a, b in itertools.pairwise(BOUNDS)]
    torch.testing.assert_close(losses.nll_sum, torch.stack([one.nll_sum for one in separate]).sum())


def test_everything_ignored_teaches_nothing() -> None:
    model = build()
    ids, labels = batch()
    losses = model.losses(ids, torch.full_like(labels, IGNORE), CU_SEQLENS)
    assert losses.tokens == losses.mtp_tokens[0] == 0
    assert losses.nll_sum == losses.mtp_nll_sum[0] == 0
    assert not any(g.any() for g in gradients(model, training_loss(losses)).values())


@pytest.mark.parametrize("depth", [1, 2])
def test_packed_documents_learn_as_if_alone(depth: int) -> None:
    """Losses of every depth, and every gradient of their sum."""
    model = build(num_nextn_predict_layers=depth)
    ids, labels = batch()
    packed = model.losses(ids, labels, CU_SEQLENS)
    separate = [
        model.losses(ids.flatten()[None, a:b], labels.flatten()[None, a:b]) for a, b in itertools.pairwise(BOUNDS)
    ]
    assert packed.tokens == sum(one.tokens for one in separate)
    torch.testing.assert_close(packed.nll_sum, torch.stack([one.nll_sum for one in separate]).sum())
    for d in range(depth):
        assert packed.mtp_tokens[d] == sum(one.mtp_tokens[d] for one in separate) > 0
        torch.testing.assert_close(packed.mtp_nll_sum[d], torch.stack([one.mtp_nll_sum[d] for one in separate]).sum())
    want = gradients(model, torch.stack([training_loss(one) for one in separate]).sum())
    assert_same_gradients(gradients(model, training_loss(packed)), want, 1e-4)


def test_documents_never_see_their_neighbours() -> None:
    """Other tokens next door change nothing here, and lessons about one document touch no embedding of another's."""
    model = build(num_nextn_predict_layers=2)
    ids, labels = batch()
    ids = ids % (VOCAB // 2)
    start, end = BOUNDS[3:5]
    other = ids.clone().flatten()
    other[:start] += VOCAB // 2
    other[end:] += VOCAB // 2
    other = other.view(2, 30)
    own = torch.full_like(labels, IGNORE).flatten()
    own[start:end] = labels.flatten()[start:end]
    own = own.view(2, 30)
    with torch.no_grad():
        mine, changed = (model(x, cu_seqlens=CU_SEQLENS).logits.flatten(0, 1)[start:end] for x in (ids, other))
    torch.testing.assert_close(changed, mine, rtol=1e-5, atol=1e-5)  # experts meet other numbers of rows
    losses = model.losses(other, own, CU_SEQLENS)
    torch.testing.assert_close(training_loss(losses), training_loss(model.losses(ids, own, CU_SEQLENS)))
    touched = gradients(model, training_loss(losses))["model.embed_tokens.weight"].any(-1)
    assert touched[: VOCAB // 2].any() and not touched[VOCAB // 2 :].any()


def test_later_tokens_change_no_earlier_logits() -> None:
    model = build()
    ids, _ = batch()
    later = ids.clone()
    later[:, 17:] = (later[:, 17:] + 1) % VOCAB
    with torch.no_grad():
        one, two = model(ids).logits, model(later).logits
    torch.testing.assert_close(one[:, :17], two[:, :17], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[:, 17], two[:, 17], atol=1e-2)


@pytest.mark.parametrize("depth", [1, 2])
def test_prediction_losses_against_a_slow_loop(depth: int) -> None:
    """The report's section 2.2, one document at a time: depth k sees the hidden state of depth k - 1 at i and the token
    at i + k, and predicts the token at i + k + 1; sequences get one token shorter with each depth."""
    model = build(
        num_nextn_predict_layers=depth, rope_scaling=YarnConfig(original_max_position_embeddings=16, factor=4)
    )
    ids, labels = batch()
    with torch.no_grad():
        losses = model.losses(ids, labels, CU_SEQLENS)
        sums, counts = [0.0] * depth, [0] * depth
        for start, end in itertools.pairwise(BOUNDS):
            document, wanted = ids.flatten()[start:end], labels.flatten()[start:end]
            seen: list[Tensor] = []
            hook = model.model.norm.register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(out[0]))
            model(document[None])
            hook.remove()
            hidden = seen[0]
            for k in range(1, depth + 1):
                length = len(document) - k
                if length <= 0:
                    break
                layer = model.model.layers[model.config.num_hidden_layers + k - 1]
                embedded = model.model.embed_tokens(document[k:])
                x = layer.eh_proj(torch.cat((layer.enorm(embedded), layer.hnorm(hidden[:length])), -1))
                angles = rope_angles(model.config, torch.arange(length))
                out, residual, _ = Block.forward(layer, x, None, *angles, torch.tensor([0, length], dtype=torch.int32))
                hidden, _ = layer.shared_head.norm(out, residual)
                for i in range(length - 1):
                    if wanted[i + k + 1] != IGNORE:
                        sums[k - 1] -= model.lm_head(hidden[i]).log_softmax(-1)[wanted[i + k + 1]].item()
                        counts[k - 1] += 1
    assert losses.mtp_tokens == counts
    assert [s.item() for s in losses.mtp_nll_sum] == pytest.approx(sums, rel=1e-5)


def test_evaluation_leaves_prediction_modules_out() -> None:
    model = build()
    ids, labels = batch()
    with torch.no_grad():
        whole, main = model.losses(ids, labels, CU_SEQLENS), model.losses(ids, labels, CU_SEQLENS, mtp=False)
    assert main.mtp_nll_sum == [] and main.mtp_tokens == []
    assert torch.equal(main.nll_sum, whole.nll_sum)
    assert len(main.expert_counts) == 1 and torch.equal(main.expert_counts, whole.expert_counts[:1])


def test_token_log_probs() -> None:
    """In place of their own token, 0 where nothing is predicted; their sum is the loss."""
    model = build()
    ids, labels = batch()
    logits = model(ids, cu_seqlens=CU_SEQLENS).logits.flatten(0, 1).log_softmax(-1)
    got = model.token_log_probs(ids, labels, CU_SEQLENS)
    want = torch.zeros(60)
    for t, label in enumerate(labels.flatten().tolist()):
        if label != IGNORE and t not in BOUNDS:
            want[t] = logits[t - 1, label]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.dtype == torch.float32 and got.shape == (60,)
    losses = model.losses(ids, labels, CU_SEQLENS, mtp=False)
    torch.testing.assert_close(-got.sum(), losses.nll_sum)
    assert_same_gradients(gradients(model, -got.sum()), gradients(model, losses.nll_sum), 1e-5)


# --- training ---


def test_every_parameter_learns() -> None:
    model = build(num_nextn_predict_layers=2)
    ids, labels = batch()
    losses = model.losses(ids, labels, CU_SEQLENS)
    grads = gradients(model, training_loss(losses) + losses.balance)
    assert grads.keys() == dict(model.named_parameters()).keys()
    dead = [name for name, g in grads.items() if not (g.isfinite().all() and g.any())]
    assert not dead
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        stacked = grads[f"model.layers.1.mlp.{name}"]
        assert stacked.flatten(1).any(-1).all()  # every expert had tokens


def test_bf16_autocast_learns_nearly_the_same() -> None:
    """Two dozen matrix products with roundings of 2^-9 each, which add up like their root: 2 % of a gradient's norm.
    Experts are all active here: a token that bf16 sends elsewhere is another matter than rounding.
    """
    model = DeepseekV3(dataclasses.replace(model_config(VOCAB), num_experts_per_tok=4))
    ids, labels = batch()
    exact = model.losses(ids, labels, CU_SEQLENS)
    want = gradients(model, training_loss(exact))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.losses(ids, labels, CU_SEQLENS)
    got = gradients(model, training_loss(rough))
    assert rough.nll_sum.dtype == torch.float32
    assert rough.nll_sum.item() == pytest.approx(exact.nll_sum.item(), rel=2e-3)
    assert all(g.dtype == torch.float32 for g in got.values())
    for name, expected in want.items():
        assert (got[name] - expected).norm() < 0.05 * expected.norm(), name
    whole, all_want = (torch.cat([g.flatten() for g in grads.values()]) for grads in (got, want))
    assert (whole - all_want).norm() < 0.02 * all_want.norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_few_texts_are_learnt_by_heart(autocast: bool) -> None:
    model = DeepseekV3(model_config(VOCAB))
    ids, labels = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model.losses(ids, labels, CU_SEQLENS)
        loss = losses.nll_sum / losses.tokens + 0.3 * losses.mtp_nll_sum[0] / losses.mtp_tokens[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((losses.nll_sum / losses.tokens).item())
    assert history[0] == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.1)  # knows nothing at first
    assert history[-1] < 0.3 * history[0]


def test_expert_biases_are_moved_layer_by_layer() -> None:
    """Counts come in the order of layers, prediction modules last; a step without those moves only the first."""
    model = DeepseekV3(model_config(VOCAB))
    ids, labels = batch()
    losses = model.losses(ids, labels, CU_SEQLENS)
    assert losses.expert_counts.shape == (2, 4)  # one MoE layer and one prediction module
    trained = sum(max(place for place, label in enumerate(row) if label != -100) + 1 for row in labels.tolist())
    assert losses.expert_counts.sum(1).tolist() == [trained * 2] * 2  # none behind a row's last label
    counts = torch.tensor([[9.0, 1, 5, 5], [0, 0, 0, 20]])
    model.update_expert_bias(counts, 0.01)
    biases = [model.model.layers[i].mlp.gate.e_score_correction_bias for i in (1, 2)]
    torch.testing.assert_close(biases[0], torch.tensor([-0.01, 0.01, 0, 0]))
    torch.testing.assert_close(biases[1], torch.tensor([0.01, 0.01, 0.01, -0.01]))
    model.update_expert_bias(counts[:1], 0.01)
    torch.testing.assert_close(biases[0], torch.tensor([-0.02, 0.02, 0, 0]))
    torch.testing.assert_close(biases[1], torch.tensor([0.01, 0.01, 0.01, -0.01]))
    assert all(name in model.state_dict() for name, _ in model.named_buffers())


# --- bad input ---


def test_too_long_a_sequence() -> None:
    model = build()
    with pytest.raises(
        ValueError, match="got sequences of 129 tokens, allowed is at most max_position_embeddings = 128"
    ):
        model(torch.zeros(1, 129, dtype=torch.int64))
    assert model(torch.zeros(1, 128, dtype=torch.int64)).logits.shape == (1, 128, VOCAB)


@pytest.mark.parametrize("bounds", [[0, 59], [0, 61], [1, 60], [0, 40, 30, 60]])
def test_documents_that_do_not_fill_the_batch(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        build()(torch.zeros(2, 30, dtype=torch.int64), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_labels_of_another_shape() -> None:
    with pytest.raises(ValueError, match="labels: got shape"):
        build().losses(torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 29, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU is waited for")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_a_training_pass_waits_for_no_gpu(dtype: str) -> None:
    model, ids = build().cuda(), torch.randint(0, VOCAB, (2, 30), device="cuda")

    def training_pass() -> None:
        with autocast(ids.device, pick_dtype(dtype, ids.device)):
            losses = model.losses(ids, ids, CU_SEQLENS)
        (losses.nll_sum / losses.tokens + losses.mtp_nll_sum[0] + losses.balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.update_expert_bias(losses.expert_counts, 1e-3)

    training_pass()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_pass()
    finally:
        torch.cuda.set_sync_debug_mode("default")
