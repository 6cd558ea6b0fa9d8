"""What `benchmarks.train` counts and how it reads its options; test_whole_models.py runs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import first_step, train
from benchmarks.cases import MINI
from benchmarks.flops import active_ffn_width, active_matmul_parameters, training_flops_per_token
from benchmarks.peers import autocast_experts, minimind_file, minimind_model, transformers_model
from minids.config import ModelConfig, preset
from minids.model import DeepseekV3

TINY = ModelConfig(
    vocab_size=48, hidden_size=24, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, num_nextn_predict_layers=0,
)  # fmt: skip
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_active_parameters_by_hand() -> None:
    attention = 24 * 8 + 8 * 2 * 12 + 24 * (12 + 4) + 12 * 2 * (8 + 6) + 2 * 6 * 24
    dense, moe = 3 * 24 * 40, 3 * 24 * (2 + 1) * 16 + 24 * 4
    assert active_matmul_parameters(TINY) == 3 * attention + dense + 2 * moe + 24 * 48
    assert training_flops_per_token(TINY, 10) == 6 * active_matmul_parameters(TINY) + 3 * 3 * 2 * (12 + 6) * 10


@pytest.mark.parametrize("config", [TINY, MINI, preset("v2-lite", num_hidden_layers=2, vocab_size=64)])
def test_active_parameters_are_the_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DeepseekV3(config)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    embedding = model.model.embed_tokens.weight.numel()
    assert active_matmul_parameters(config) == model.num_parameters(active=True) - embedding - vectors


def test_flops_are_those_that_pytorch_counts() -> None:
    """In transformers' model, which makes every score, masked or not, and multiplies frequencies by positions."""
    length, batch = 16, 2
    peer = transformers_model(DeepseekV3(TINY))
    ids = torch.randint(0, TINY.vocab_size, (batch, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        peer(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masked = training_flops_per_token(TINY, 2 * length) - training_flops_per_token(TINY, length)
    counted = counter.get_total_flops() / (batch * length)
    angles = TINY.qk_rope_head_dim  # at most, and not for every sequence
    assert 0 <= counted - (training_flops_per_token(TINY, length) + masked) <= angles


def test_dense_twin_multiplies_as_many_weights() -> None:
    model = DeepseekV3(TINY)
    twin = train.dense_twin(model)
    matrices = sum(p.numel() for p in twin.parameters() if p.dim() > 1) - twin.model.embed_tokens.weight.numel()
    gates = TINY.num_moe_layers * TINY.hidden_size * TINY.n_routed_experts
    assert matrices == active_matmul_parameters(TINY) - gates
    assert active_ffn_width(TINY) == twin.model.layers[1].mlp.up_proj.weight.shape[0] == 48
    assert twin.model.layers[0].mlp.up_proj.weight.shape[0] == TINY.intermediate_size  # as in the model itself
    ids = torch.randint(0, TINY.vocab_size, (2, 8))
    assert train.our_loss(twin, ids).isfinite() and train.our_loss(model, ids).isfinite()


def test_our_loss_moves_no_bias() -> None:
    model = DeepseekV3(TINY)
    before = {name: value.clone() for name, value in model.named_buffers()}
    train.our_loss(model, torch.randint(0, TINY.vocab_size, (2, 8))).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_experts_of_the_peer_follow_autocast() -> None:
    model = DeepseekV3(TINY)
    peer = autocast_experts(transformers_model(model, "grouped_mm"))
    ids = torch.randint(0, TINY.vocab_size, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert peer.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        loss = train.their_loss(peer, ids)
    loss.backward()
    torch.testing.assert_close(loss, train.our_loss(model, ids), atol=train.LOSS_TOLERANCE["bf16"], rtol=0)
    weights = [p for name, p in peer.named_parameters() if "parametrizations" in name]
    assert len(weights) == 4
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in weights)


MINIMIND = """
from types import SimpleNamespace
import torch
import torch.nn.functional as F

MiniMindConfig = SimpleNamespace

class MiniMindForCausalLM(torch.nn.Module):  # its matrices, and a loss of two of them
    def __init__(self, config):
        super().__init__()
        width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
        inner, experts = (
            (config.moe_intermediate_size, config.num_experts) if config.use_moe else (config.intermediate_size, 1)
        )
        rows = [width, head * config.num_key_value_heads, head * config.num_key_value_heads, width]
        rows += [experts] if config.use_moe else []
        self.lm_head = torch.nn.Parameter(torch.randn(config.vocab_size, width))
        self.others = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(n, width)) for n in rows * config.num_hidden_layers
        )
        self.experts = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(experts, 3 * inner, width)) for _ in range(config.num_hidden_layers)
        )

    def forward(self, ids, labels):
        x = self.lm_head[ids] + sum(w.sum() for w in (*self.others, *self.experts))
        loss = F.cross_entropy((x @ self.lm_head.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, aux_loss=0.5 * loss.detach())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of something that has MiniMind's names and shapes."""
    minimind_file(tmp_path).parent.mkdir()
    minimind_file(tmp_path).write_text(MINIMIND)
    return tmp_path


@pytest.mark.parametrize("config", [MINI, preset("small", num_nextn_predict_layers=0)])
@pytest.mark.parametrize("use_moe", [True, False])
def test_minimind_multiplies_as_many_weights(config: ModelConfig, use_moe: bool, checkout: Path) -> None:
    with torch.device("meta"):
        peer = minimind_model(config, checkout, use_moe)
    share = config.num_experts_per_tok / config.n_routed_experts if use_moe else 1
    numbers = {name: p.numel() * (share if name.startswith("experts") else 1) for name, p in peer.named_parameters()}
    step = 8 * 3 * config.hidden_size * config.num_hidden_layers * (config.num_experts_per_tok if use_moe else 1)
    assert abs(sum(numbers.values()) - active_matmul_parameters(config)) <= step / 2


def test_minimind_competes(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "MINI", TINY)
    train.main([*"--rounds 1 --warmup 1 --batch 2 --length 16 --dtypes fp32 --minimind".split(), str(checkout)])
    report = json.loads(capsys.readouterr().out)
    speed = report["tokens_per_second"]
    for name in ("moe", "dense"):
        ratio = speed["minids fp32"] / speed[f"minimind {name} fp32"]
        assert report[f"ratio_to_minimind_{name}"] == pytest.approx(ratio, rel=0.01)


def test_loss_of_minimind_is_its_trainers(checkout: Path) -> None:
    peer, ids = minimind_model(TINY, checkout, True), torch.randint(0, TINY.vocab_size, (2, 8))
    torch.testing.assert_close(train.minimind_loss(peer, ids), 1.5 * peer(ids, labels=ids).loss)


def test_options_of_a_cpu() -> None:
    options = train.parse([], CPU)
    assert (options.config, options.batch, options.length, options.dtypes) == (MINI, 8, 256, ["fp32", "bf16"])
    assert options.sides == list(train.PEERS)
    assert train.parse(["--compile"], CPU).sides == [*train.PEERS, *train.COMPILED]


def test_options_with_minimind(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert train.parse(["--minimind", str(checkout)], CPU).sides == [*train.PEERS, *train.MINIMIND]
    sides = ["--sides", "minimind moe"]
    assert train.parse([*sides, "--minimind", str(checkout)], CPU).sides == ["minimind moe"]
    for bad in ([], ["--minimind", str(tmp_path_factory.mktemp("empty"))]):
        with pytest.raises(SystemExit):
            train.parse([*sides, *bad], CPU)


def test_options_of_a_gpu() -> None:
    options = train.parse([], GPU)
    assert options.config == preset("small", num_nextn_predict_layers=0)
    assert (options.batch, options.length, options.dtypes) == (16, 2048, ["bf16"])
    assert options.sides == [train.DENSE, *train.PEERS]
    assert train.parse(["--sides", "transformers eager"], GPU).sides == ["transformers eager"]
    assert train.parse(["--preset", "mini", "--batch", "4"], GPU).config.hidden_size == 384
    assert train.parse(["--dtypes", "bf16", "fp8"], GPU).dtypes == ["bf16", "fp8"]


@pytest.mark.parametrize("bad", [["--warmup", "0"], ["--batch", "0"], ["--profile", "x"], ["--sides", "liger"]])
def test_options_that_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(bad, CPU)


def test_a_side_that_breaks_costs_the_others_nothing() -> None:
    def breaks(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory\nat all")

    ours, peer = (train.Side(name, DeepseekV3(TINY), train.our_loss, "fp32") for name in ("minids", "peer"))
    peer.loss = breaks
    failed = train.run([ours, peer], torch.randint(0, TINY.vocab_size, (2, 2, 8)), "warm-up")
    assert failed == {"peer fp32": "RuntimeError: no memory"} and len(ours.seconds) == 2
    assert train.survivors([ours, peer], failed) == [ours]
    with pytest.raises(SystemExit, match="no memory"):
        train.survivors([peer, ours], failed)


def test_a_run_that_is_cut_off_leaves_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []
    step = train.Side.step

    def cut_off(side: train.Side, batch: torch.Tensor) -> None:
        steps.append(side.name)
        if len(steps) == 2 + 2 + 2 + 1:  # two sides: a warm-up, two rounds, and ours once more
            raise KeyboardInterrupt
        step(side, batch)

    monkeypatch.setattr(train, "MINI", TINY)
    monkeypatch.setattr(train, "pick_device", lambda name: CPU)
    monkeypatch.setattr(train.Side, "step", cut_off)
    sizes = "--rounds 3 --warmup 1 --batch 1 --length 8 --dtypes fp32".split()
    with pytest.raises(KeyboardInterrupt):
        train.main([*sizes, "--sides", "transformers eager", "--out", str(tmp_path / "train.json")])
    left = json.loads((tmp_path / "train.json").read_text())
    assert left["rounds"] == 2 and left["ratio"] > 0 and set(left["tokens_per_second"]) == set(steps)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("warm-up 1 of 1 | minids fp32 ") and " s | transformers eager fp32 " in lines[0]


def test_fp8_is_a_side_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ours only, timed beside the fastest of the other precisions, whatever the order they were asked for in."""
    monkeypatch.setattr(train, "MINI", TINY)
    train.main([*"--rounds 1 --warmup 1 --batch 2 --length 16 --dtypes fp8 bf16 --sides".split(), train.PEERS[0]])
    report = json.loads(capsys.readouterr().out)
    assert [*report["warm_up_tokens_per_second"]] == ["minids bf16", "minids fp8", "transformers eager bf16"]
    speed = report["tokens_per_second"]
    assert [*speed] == ["minids bf16", "minids fp8", "transformers eager bf16"]
    assert report["ratio"] == pytest.approx(speed["minids bf16"] / speed["transformers eager bf16"], rel=0.01)


def test_report_of_a_gpu() -> None:
    sides = []
    for name, dtype, seconds in (
        ("minids", "bf16", 0.5), ("minids", "fp8", 0.25), ("minids dense", "bf16", 0.4),
        ("transformers eager", "bf16", 2.0),
    ):  # fmt: skip
        side = train.Side(name, torch.nn.Linear(2, 2), train.their_loss, dtype)
        side.seconds, side.tokens, side.peak_bytes = [9.0, seconds, seconds], 1000, 7
        sides.append(side)
    report = train.gpu_report(sides, 1, 1e12 * 0.1, 500.0)
    assert report["moe_to_dense"] == 1.25 and report["ratio_to"]["transformers eager bf16"] == 4.0
    assert report["first_step_seconds"]["minids bf16"] == 9.0 and report["peak_bytes"]["minids bf16"] == 7
    assert report["mfu"]["model_tflops"] == 200.0 and report["mfu"]["of_measured_matmul"] == 0.4
    assert report["mfu"]["of_sheet"] == round(200 / 989, 4)
    assert report["ratio_to"]["minids fp8"] == 0.5 and report["mfu_fp8"]["model_tflops"] == 400.0


def test_kernels_by_time() -> None:
    def event(key: str, us: float, count: int, device: DeviceType = DeviceType.CUDA, note: bool = False) -> object:
        return SimpleNamespace(
            key=key, self_device_time_total=us, count=count, device_type=device, is_user_annotation=note
        )

    found = train.by_kernel(
        [event("a", 10, 2), event("b", 30, 1), event("launch", 5, 3, DeviceType.CPU), event("step", 40, 1, note=True)]
    )
    assert found["gpu_seconds"] == 40e-6 and found["launches"] == 3
    assert [(k["name"], k["calls"], k["share"]) for k in found["kernels"]] == [("b", 1, 0.75), ("a", 2, 0.25)]


def test_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    first_step.main(["--batch", "1", "--length", "16"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["cold", "warm"]
    assert found["cold"]["step"] > 0 and found["warm"]["seconds"] > found["warm"]["import torch"] > 0
    parts = [value for name, value in found["warm"].items() if name != "seconds"]
    assert len(parts) == 4 and sum(parts) == pytest.approx(found["warm"]["seconds"], abs=0.03)
