"""Training in fp8: which products it is of, how far gradients and losses are from exact ones, every stage, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minids import precision
from minids.cli import main
from minids.config import PretrainConfig
from minids.errors import Interrupted
from minids.model import DeepseekV3, moe
from minids.precision import autocast, in_fp8, linear, pick_dtype
from minids.train import loop
from minids.train.checkpoint import latest_checkpoint, read_state
from minids.train.loop import Trainer
from minids.train.pretrain import pretrain
from tests.minids import tiny

CPU = torch.device("cpu")
FP8 = pick_dtype("fp8", CPU)
VOCAB = 60
# A rounding's error in the root mean square, 2.7 %: between two powers of two e4m3's numbers lie 2^-3 of the lower one
# apart, and numbers to be rounded are spread as their logarithms are.
E4M3_ROUNDING = 2**-3 / math.sqrt(12) * math.sqrt(3 / 8 / math.log(2))
# Of a gradient's norm, 18 %: two dozen products lie between the input and the loss and back, each of two operands, and
# their errors are independent.
GRADIENT_ERROR = math.sqrt(24 * 2) * E4M3_ROUNDING


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loop, "write_curves", lambda *_: False)
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    tiny.write_shards(folder)
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(24))
    tiny.write_rows(folder / "pairs.jsonl", tiny.preferences(24))
    return folder


# --- the setting ------------------------------------------------------------------------------------------------------


def test_names_of_precisions() -> None:
    assert (pick_dtype("fp32", CPU), pick_dtype("bf16", CPU)) == (torch.float32, torch.bfloat16)
    assert pick_dtype("fp8", CPU) is torch.float8_e4m3fn
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_context_ends_with_its_block() -> None:
    """Also one that breaks off; an inner one counts in its own block."""
    with contextlib.suppress(KeyError), autocast(CPU, FP8):
        assert in_fp8() and torch.is_autocast_enabled("cpu")
        with autocast(CPU, torch.float32):
            assert not in_fp8() and not torch.is_autocast_enabled("cpu")
        assert in_fp8()
        raise KeyError
    assert not in_fp8() and not torch.is_autocast_enabled("cpu")


# --- linear layers ----------------------------------------------------------------------------------------------------


def of_linear(call: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast to bf16: the product, and the gradients of x in bf16 and of a weight in fp32."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(70, 40), torch.randn(24, 40), torch.randn(70, 24)
    x, dy = (t.to(device, torch.bfloat16) for t in (x, dy))
    x, weight = x.requires_grad_(), weight.to(device).requires_grad_()
    with autocast(device, torch.bfloat16):
        out = call(x, weight)
    out.backward(dy)
    assert x.grad is not None and weight.grad is not None
    return out, x.grad, weight.grad


def test_linear_does_as_autocast() -> None:
    """The form that GPUs take, where libraries round a product to its operands' dtype: the same bits."""
    for got, want in zip(of_linear(precision._Linear.apply, CPU), of_linear(F.linear, CPU), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.gpu
def test_linear_rounds_no_gradient_of_an_fp32_weight() -> None:
    device = torch.device("cuda")
    (out, dx, dweight), (want, wanted_dx, rounded) = (of_linear(call, device) for call in (linear, F.linear))
    assert torch.equal(out, want) and torch.equal(dx, wanted_dx)
    assert dweight.dtype == torch.float32 and not torch.equal(dweight, rounded)
    torch.testing.assert_close(dweight, rounded, rtol=2**-8, atol=2**-8 * rounded.abs().max().item() / 100)


# --- the model --------------------------------------------------------------------------------------------------------


def losses(model: DeepseekV3, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (2, 30), generator=generator)
    with autocast(CPU, dtype):
        found = model.losses(ids, ids, torch.tensor([0, 7, 30, 33, 60], dtype=torch.int32))
    return (found.nll_sum + 0.3 * found.mtp_nll_sum[0]) / found.tokens + found.balance


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
def test_linear_layers_of_blocks_and_nothing_else(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are told by their values, since some are multiplied as one or in parts."""
    model = DeepseekV3(tiny.model_config(VOCAB))
    names = {}
    for number, (name, parameter) in enumerate(model.named_parameters(), 1):
        torch.nn.init.constant_(parameter, number / 1024)
        names[number / 1024] = name
    calls: list[set[str]] = []

    def seen(*weights: Tensor) -> None:
        calls.append({names[value] for weight in weights for value in weight.unique().tolist()})

    def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
        seen(weight)
        return real_linear(x, weight)

    def fp8_mlp(x: Tensor, *weights: Tensor) -> Tensor:
        seen(*weights)
        return real_mlp(x, *weights)

    def moe_experts(*args: Tensor, fp8: bool, base: Tensor | None) -> Tensor:
        if fp8:
            seen(*args[3:])
        return real_experts(*args, fp8=fp8, base=base)

    real_linear, real_mlp, real_experts = precision.fp8_linear, moe.fp8_mlp, moe.moe_experts
    monkeypatch.setattr(precision, "fp8_linear", fp8_linear)
    monkeypatch.setattr(moe, "fp8_mlp", fp8_mlp)
    monkeypatch.setattr(moe, "moe_experts", moe_experts)
    losses(model, pick_dtype(dtype, CPU)).backward()
    expected: list[list[str]] = []
    for layer, is_moe in ((0, False), (1, True), (2, True)) if dtype == "fp8" else ():  # the last is the MTP module's
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        expected += [
            [attention + "q_a_proj.weight", attention + "kv_a_proj_with_mqa.weight"],
            [attention + "kv_b_proj.weight"],  # keys' part
            [attention + "kv_b_proj.weight"],  # values'
            [attention + "q_b_proj.weight"],
            [attention + "o_proj.weight"],
        ]
        dense = mlp + "shared_experts." if is_moe else mlp
        expected.append([dense + f"{part}_proj.weight" for part in ("gate", "up", "down")])
        if is_moe:
            expected.append([mlp + "experts.gate_up_proj", mlp + "experts.down_proj"])
    assert calls == [set(group) for group in expected]


def test_gradients_are_near_the_exact_ones() -> None:
    """All experts are active: a token that rounding sends elsewhere is another matter than rounding."""
    model = DeepseekV3(dataclasses.replace(tiny.model_config(VOCAB), num_experts_per_tok=4))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, FP8):
        model.zero_grad()
        loss = losses(model, dtype)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        found[dtype] = loss.item(), grads
    exact_loss, exact = found[torch.float32]
    loss, grads = found[FP8]
    assert loss == pytest.approx(exact_loss, rel=0.0025)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, want in exact.items():
        assert (grads[name] - want).norm() < GRADIENT_ERROR * want.norm(), name

    def error(dtype: torch.dtype) -> float:
        return torch.stack([(found[dtype][1][name] - want).norm() for name, want in exact.items()]).norm().item()

    assert error(FP8) > 4 * error(torch.bfloat16)  # it is fp8: a rounding errs 16 times as much


# --- training ---------------------------------------------------------------------------------------------------------


def test_losses_follow_those_of_fp32(folder: Path) -> None:
    """Within the report's 0.25 % in the mean over 40 steps, which halve the loss: errors are independent from step to
    step. Stale codes of weights, for example, would be five times as far off."""

    def losses(dtype: str) -> Tensor:
        settings = dict(steps=40, every=0, eval_every=0, log_every=1, lr=3e-3, batch_size=8)
        pretrain(tiny.pretrain_config(folder, f"forty-{dtype}", dtype=dtype, **settings))
        records = tiny.metrics(folder / f"forty-{dtype}")
        return torch.tensor([record["nll"] for record in records if record["kind"] == "train"])

    exact, fp8 = losses("fp32"), losses("fp8")
    assert exact[-1] < 0.5 * exact[0]
    assert 1e-5 < (fp8 / exact - 1).abs().mean() < 0.0025


def test_an_interrupted_run_ends_like_one_never_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> PretrainConfig:
        return tiny.pretrain_config(folder, name, steps=6, dtype="fp8", grad_accumulation_steps=2)

    pretrain(config("whole"))
    original = Trainer.optimizer_step

    def optimizer_step(self: Trainer) -> dict[str, float]:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", optimizer_step)
        with pytest.raises(Interrupted, match="step 3 of 6"):
            pretrain(config("resumed"))
    assert pretrain(config("resumed"), resume=True)["resumed_from"] == 3
    tiny.assert_same_run(folder / "resumed", folder / "whole")


def test_every_stage(folder: Path) -> None:
    """By the command line. Evaluation is in fp8, too: held-out losses before training are not quite fp32's."""
    sizes = dataclasses.asdict(tiny.model_config(tiny.tokenizer_size(folder)))
    model = [
        word for name, value in sizes.items() if name != "rope_scaling" for word in (f"--model.{name}", str(value))
    ]
    settings = "--train.steps 3 --train.batch_size 2 --train.eval_batches 1 --train.device cpu --train.dtype".split()
    evaluated = {}
    with contextlib.chdir(folder):
        for dtype in ("fp8", "fp32"):
            runs = {
                "pretrain": ["--data", "shards", "--tokenizer", "tok", *model],
                "sft": ["--from", "pretrain-fp8", "--data", "chats.jsonl", "--seq-len", "64"],
                "dpo": ["--from", "sft-fp8", "--data", "pairs.jsonl", "--seq-len", "64"],
            }
            for stage, options in runs.items():
                out = f"{stage}-{dtype}"
                with contextlib.redirect_stdout(io.StringIO()) as stdout:
                    assert main([stage, *options, "--out", out, *settings, dtype]) == 0
                evaluated[out] = json.loads(stdout.getvalue())["before"]
    for stage, measure in (("pretrain", "nll"), ("sft", "nll"), ("dpo", "chosen_nll")):
        checkpoint = latest_checkpoint(folder / f"{stage}-fp8")
        assert checkpoint is not None and checkpoint.name == "step_000003"
        assert read_state(checkpoint)["numerics"]["dtype"] == "float8_e4m3fn"
        fp8, exact = (evaluated[f"{stage}-{dtype}"][measure] for dtype in ("fp8", "fp32"))
        assert fp8 != exact and fp8 == pytest.approx(exact, rel=0.01)
        assert "dtype float8_e4m3fn" in (folder / f"{stage}-fp8" / "report.md").read_text()
