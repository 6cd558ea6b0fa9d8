"""Training speed on this machine: minids against transformers' DeepseekV3ForCausalLM, one process, steps interleaved.

    python -m benchmarks.train [--rounds 9] [--dtypes fp32 bf16 fp8] [--compile] [--preset small] [--batch 16]
                               [--length 2048] [--sides NAME ...] [--minimind CHECKOUT] [--profile FILE.json]
                               [--out FILE.json]

A step is forward, backward, gradient clipping and AdamW: on a CPU on 8 sequences of 256 tokens of a small model, on a
GPU on 16 sequences of 2048 of the preset "small", whose MTP module is left out, in bf16 with fp32 master weights. All
sides start from the same weights and see the same batches, which lie on the CPU, and all have what our trainer makes of
the process (`keep_freed_memory`); their first losses must agree before anything is timed. Warm-up runs each side in
every precision; only its fastest goes on to the timed rounds, so that nobody's caches are cleared by what does not
count. fp8, if asked for, is a side of its own, "minids fp8": peers have none, and the ratio stays that of ours in fp32
or bf16. On a GPU our forward and backward are one CUDA graph from the second step on, and their kernels are compiled
side by side before the first, as in `minids pretrain`. Times are by the clock, on a GPU from an idle device to an idle
device. Prints one JSON object with tokens/s (medians; of the warm-up the fastest step) and the ratio. --out is written
after each round, so that a run that is cut off leaves the rounds it had; each step's seconds go to stderr.

--minimind: a checkout of MiniMind, whose model file gives two more sides, "minimind moe" and "minimind dense", each of
as many layers, heads and active parameters as ours; `ratio_to_minimind_moe` and `..._dense` are tokens/s over theirs.
They differ in architecture (GQA for MLA, no shared expert, no dense first layer), start from weights of their own, and
have their auxiliary loss and the step of their trainer, which is that of all sides.

On a GPU the object also has, by side, the seconds of the first step (compilers included; caches of earlier runs count)
and the peak of memory, as if the side were alone; the ratio to each side; `moe_to_dense`, our step's time over that of
our model with a dense FFN of equal active width for the experts (the same products a token but the gates'); and `mfu`,
`flops.training_flops_per_token` a second over what a bf16 product of 8192 reaches here, and over the data sheet's;
`mfu_fp8` is the same of "minids fp8", over bf16's speed, too. A side that breaks, out of memory for instance, is listed
in `failed` and costs the others nothing.

--profile: one more step of ours, GPU time by kernel, and where the host waits for the GPU within a step.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from minids_kernels import precompile
from torch.autograd import DeviceType

from benchmarks import timing
from benchmarks.cases import MINI
from benchmarks.flops import active_ffn_width, training_flops_per_token
from benchmarks.peers import autocast_experts, minimind_file, minimind_model, minimind_version, transformers_model
from benchmarks.watch import say, shown
from minids.config import PRESETS, ModelConfig, TrainConfig, preset
from minids.device import keep_freed_memory, queue_copy
from minids.files import write_json
from minids.graph import Recorded
from minids.model import DeepseekV3
from minids.model.moe import MLP, MoE
from minids.precision import autocast, pick_dtype
from minids.train.loop import pick_device
from minids.train.optim import build_optimizer, gradient_norm

Loss = Callable[[Any, torch.Tensor], torch.Tensor]

RECIPE = TrainConfig(lr=1e-6)  # leaves routing as even as a fresh gate's: no side's bias is moved to keep it so
DTYPES = ("fp32", "bf16", "fp8")
# Of a loss near ln(6400) = 8.8 or ln(32000) = 10.4. fp8: roundings of 2.7 % on both operands of two dozen products in a
# row leave 18 % of a hidden state's norm at most. Logits are 0.006 sqrt(D) large at the start, so that they err by 0.03
# for D = 768, and their mean over 2,048 tokens by 0.03 / 45: the tolerance is seven times that.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 5e-3}
OURS, DENSE = "minids", "minids dense"
PEERS = ("transformers eager", "transformers grouped_mm")  # by how they compute experts
COMPILED = tuple(f"{name} compiled" for name in PEERS)
MINIMIND = MINIMIND_MOE, MINIMIND_DENSE = "minimind moe", "minimind dense"
OTHER_WEIGHTS = {DENSE, *MINIMIND}  # whose losses are not ours
RATIOS = {
    "ratio": PEERS, "ratio_to_compiled": COMPILED, "ratio_to_minimind_moe": (MINIMIND_MOE,),
    "ratio_to_minimind_dense": (MINIMIND_DENSE,),
}  # fmt: skip
SHEET_TFLOPS = 989.0  # bf16 without sparsity: H100 SXM and H200, NVIDIA's data sheets
TOP_KERNELS = 40


class Side:
    """One contestant: a model, its optimizer and its loss, in one precision."""

    def __init__(self, name: str, model: torch.nn.Module, loss: Loss, dtype: str, pool: Any = None) -> None:
        self.name, self.dtype, self.loss = f"{name} {dtype}", dtype, loss
        self.peer = self.name if dtype == "fp8" else name  # precisions of a peer compete for its place, fp8 has its own
        self.model = model.train()
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(self.model, RECIPE)
        self.tokens = 0  # in a step
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes: int | None = None  # on a GPU
        self.gradients: Callable[[list[torch.Tensor], None], tuple[torch.Tensor, torch.Tensor]] = self._gradients
        if self.device.type == "cuda" and loss is our_loss:
            self.gradients = Recorded(self._gradients, self.device, self.model.parameters(), pool)

    def _gradients(self, inputs: list[torch.Tensor], kind: None) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward; the loss and the gradient's norm."""
        with autocast(self.device, pick_dtype(self.dtype, self.device)):
            loss = self.loss(self.model, queue_copy(inputs[0], self.device))
        loss.backward()
        return loss.detach(), gradient_norm(self.model)

    def train_step(self, batch: torch.Tensor) -> torch.Tensor:
        """As `minids.train.loop` does it, but for the numbers it reads."""
        loss, norm = self.gradients([batch], None)
        self.optimizer.step(norm)
        self.optimizer.zero_grad()
        return loss

    def step(self, batch: torch.Tensor) -> None:
        others = self._others_bytes()
        synchronize(self.device)
        start = time.perf_counter()
        if isinstance(self.gradients, Recorded) and not self.seconds:
            precompile(lambda: self._gradients([batch], None))
            self.optimizer.zero_grad()
        loss = self.train_step(batch)
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.tokens = batch.numel()
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated() - others)

    def _others_bytes(self) -> int:
        """What lies on the GPU and is not this side's; the peak is counted anew from here."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        state = (x for values in self.optimizer.state.values() for x in values.values())
        own = [*self.model.parameters(), *self.model.buffers(), *state]
        return torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in own if x.is_cuda)

    def median(self, warmup: int) -> float:
        return statistics.median(self.seconds[warmup:])

    def tokens_per_second(self, warmup: int) -> float:
        return self.tokens / self.median(warmup)

    def fastest(self) -> float:
        """Tokens/s of the fastest step so far."""
        return self.tokens / min(self.seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_loss(model: DeepseekV3, batch: torch.Tensor) -> torch.Tensor:
    """Without the balance loss (transformers has none) and the experts' bias (it would route otherwise); both are
    computed all the same."""
    losses = model.losses(batch, batch)
    model.update_expert_bias(losses.expert_counts, 0.0)
    return losses.nll_sum / losses.tokens + 0.0 * losses.balance


def their_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def minimind_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """As in its trainer."""
    out = model(batch, labels=batch)
    loss: torch.Tensor = out.loss + out.aux_loss
    return loss


def dense_twin(model: DeepseekV3) -> DeepseekV3:
    """`model` with a dense FFN of equal active width for each MoE layer; what it costs a token less is the gates."""
    twin, config = copy.deepcopy(model), model.config
    for layer in twin.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp = MLP(config.hidden_size, active_ffn_width(config))
    twin.reset_parameters()
    return twin


def contestant(name: str, model: DeepseekV3, minimind: Path | None) -> tuple[torch.nn.Module, Loss]:
    """The model that competes under `name`, with `model`'s weights where it can have them, and its loss."""
    if name == OURS:
        return copy.deepcopy(model), our_loss
    if name == DENSE:
        return dense_twin(model), our_loss
    if name in MINIMIND and minimind:
        return minimind_model(model.config, minimind, name == MINIMIND_MOE), minimind_loss
    experts = name.split()[1]
    peer: torch.nn.Module = transformers_model(model, experts)
    if experts == "grouped_mm" and next(model.parameters()).is_cuda:
        peer = autocast_experts(peer)
    return torch.compile(peer) if name in COMPILED else peer, their_loss  # type: ignore[return-value]


def contestants(
    config: ModelConfig,
    device: torch.device,
    names: Sequence[str],
    dtypes: Sequence[str],
    minimind: Path | None = None,
) -> list[Side]:
    """Each in each precision, made on `device`; in fp8, the last of them, ours only. Recorded steps share their memory,
    so that more is left for the others."""
    torch.manual_seed(0)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    with device:
        model = DeepseekV3(config)
        return [
            Side(name, *contestant(name, model, minimind), dtype, pool)
            for name in names
            for dtype in DTYPES
            if dtype in dtypes and (dtype != "fp8" or name == OURS)
        ]


def run(
    sides: Sequence[Side],
    batches: torch.Tensor,
    label: str,
    save: Callable[[dict[str, str]], None] = lambda failed: None,
) -> dict[str, str]:
    """A step of each side on each batch in turn -> why sides broke, which are left out from there on. `save` gets
    that after each batch."""
    failed: dict[str, str] = {}
    for index, batch in enumerate(batches):
        say(f"{label} {index + 1} of {len(batches)}", end="")
        for side in sides:
            if side.name not in failed:
                try:
                    with shown(side.name):
                        side.step(batch)
                except Exception as error:
                    failed[side.name] = timing.first_line(error)
                    side.optimizer.zero_grad()
        say("")
        save(failed)
    return failed


def survivors(sides: Sequence[Side], failed: Mapping[str, str]) -> list[Side]:
    """Those that did not break, of which ours, the first, has to be one."""
    if sides[0].name in failed:
        raise SystemExit(f"{sides[0].name}: {failed[sides[0].name]}")
    return [side for side in sides if side.name not in failed]


def check_losses(sides: Sequence[Side]) -> None:
    """All first losses agree with ours, but of models that have other weights."""
    for side in sides:
        if side.peer not in OTHER_WEIGHTS and not abs(side.losses[0] - sides[0].losses[0]) < LOSS_TOLERANCE[side.dtype]:
            raise SystemExit(f"{side.name}: first loss {side.losses[0]}, {sides[0].name} has {sides[0].losses[0]}")


def mfu(flops_per_second: float, measured_tflops: float) -> dict[str, float]:
    return {
        "model_tflops": round(flops_per_second / 1e12, 1),
        "measured_matmul_tflops": round(measured_tflops, 1),
        "of_measured_matmul": round(flops_per_second / 1e12 / measured_tflops, 4),
        "sheet_tflops": SHEET_TFLOPS,
        "of_sheet": round(flops_per_second / 1e12 / SHEET_TFLOPS, 4),
    }


def gpu_report(sides: Sequence[Side], warmup: int, flops_per_token: float, matmul_tflops: float) -> dict[str, Any]:
    """What is reported on a GPU only. Ours is the first of `sides`."""
    ours, seconds = sides[0], {side.peer: side.median(warmup) for side in sides}
    report: dict[str, Any] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),  # "highest": no TF32
        "step_seconds": {side.name: round(side.median(warmup), 5) for side in sides},
        "ratio_to": {side.name: round(seconds[side.peer] / seconds[ours.peer], 3) for side in sides[1:]},
        "first_step_seconds": {side.name: round(side.seconds[0], 2) for side in sides},
        "peak_bytes": {side.name: side.peak_bytes for side in sides},
        "mfu": mfu(flops_per_token * ours.tokens_per_second(warmup), matmul_tflops),
    }
    if DENSE in seconds:
        report["moe_to_dense"] = round(seconds[ours.peer] / seconds[DENSE], 3)
    for side in sides[1:]:
        if side.dtype == "fp8":
            report["mfu_fp8"] = mfu(flops_per_token * side.tokens_per_second(warmup), matmul_tflops)
    return report


def by_kernel(events: Iterable[Any]) -> dict[str, Any]:
    """A profiler's averages -> GPU seconds, launches (copies and fills too), and the kernels that take longest."""
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    total = sum(e.self_device_time_total for e in kernels)
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:TOP_KERNELS]
    return {
        "gpu_seconds": total / 1e6,
        "launches": sum(e.count for e in kernels),
        "kernels": [
            {
                "name": e.key, "calls": e.count, "us": round(e.self_device_time_total, 1),
                "share": round(e.self_device_time_total / total, 4),
            }
            for e in longest
        ],
    }  # fmt: skip


def host_waits(side: Side, batch: torch.Tensor) -> dict[str, int]:
    """Lines of a step at which PyTorch waits for the GPU, and how often."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            side.train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    return dict(Counter(f"{os.path.relpath(w.filename)}:{w.lineno}" for w in waits))


def profile(side: Side, batch: torch.Tensor, warmup: int) -> dict[str, Any]:
    """Where a step's time goes. A GPU that is busy for much less than the step waits for launches."""
    waits = host_waits(side, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        side.train_step(batch)
        torch.cuda.synchronize()
    found = by_kernel(profiler.key_averages())
    seconds = side.median(warmup)
    busy = round(found["gpu_seconds"] / seconds, 4)
    return {"side": side.name, "step_seconds": seconds, "gpu_busy": busy, **found, "host_waits": waits}


def parse(arguments: Sequence[str] | None, device: torch.device) -> argparse.Namespace:
    """Options, with the defaults of the device; `config` is the model's."""
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, in every precision, at least 1")
    parser.add_argument("--compile", action="store_true", help="also transformers under torch.compile")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["bf16"] if gpu else ["fp32", "bf16"],
        help="of all sides; fp8 of ours only",
    )
    parser.add_argument("--preset", choices=PRESETS, default="small" if gpu else None, help="instead of 9M parameters")
    parser.add_argument("--batch", type=int, default=16 if gpu else 8, help="sequences")
    parser.add_argument("--length", type=int, default=2048 if gpu else 256, help="tokens of each")
    parser.add_argument(
        "--sides", nargs="*", choices=(DENSE, *PEERS, *COMPILED, *MINIMIND), help="only these beside ours"
    )
    parser.add_argument("--minimind", type=Path, metavar="CHECKOUT", help="of MiniMind, which competes then")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="GPU time by kernel of a step of ours, as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what is printed, after each round")
    options = parser.parse_args(arguments)
    for name in ("rounds", "warmup", "batch", "length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, allowed is 1 or more")
    if options.profile and not gpu:
        parser.error("--profile: there is no GPU here")
    if options.sides is None:
        options.sides = [
            *((DENSE,) if gpu else ()), *PEERS, *(COMPILED if options.compile else ()),
            *(MINIMIND if options.minimind else ()),
        ]  # fmt: skip
    if {*options.sides} & {*MINIMIND} and not (options.minimind and minimind_file(options.minimind).is_file()):
        parser.error(f"--minimind: got {options.minimind}, allowed is a folder with {minimind_file(Path('.'))}")
    options.config = preset(options.preset, num_nextn_predict_layers=0) if options.preset else MINI
    return options


def report(
    options: argparse.Namespace,
    sides: Sequence[Side],
    warm: Mapping[str, int],
    failed: Mapping[str, str],
    matmul_tflops: float,
) -> dict[str, Any]:
    """What the rounds so far say. Ours is the first of `sides`."""
    warmup = options.warmup
    speed = {side.name: side.tokens_per_second(warmup) for side in sides}
    parameters = sum(p.numel() for p in sides[0].model.parameters())
    found: dict[str, Any] = {
        "what": f"training step, {options.batch} x {options.length} tokens, {parameters} parameters",
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            **({"minimind": minimind_version(options.minimind)} if options.minimind else {}),
        },
        "warm_up_tokens_per_second": warm,
        "rounds": len(sides[0].seconds) - warmup,
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
    }
    for name, group in RATIOS.items():
        if theirs := [speed[side.name] for side in sides if side.peer in group]:
            found[name] = round(speed[sides[0].name] / max(theirs), 3)
    if (device := sides[0].device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found |= gpu_report(sides, warmup, training_flops_per_token(options.config, options.length), matmul_tflops)
    if failed:
        found["failed"] = failed
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    device = pick_device("auto")
    options = parse(arguments, device)
    config, warmup = options.config, options.warmup
    matmul_tflops = 0.0
    if device.type == "cuda":
        with timing.side_stream(device):
            matmul_tflops = timing.ceilings(device, repeats=20)["bf16_tflops"]
    sides = contestants(config, device, [OURS, *options.sides], options.dtypes, options.minimind)
    batches = torch.randint(0, config.vocab_size, (warmup + options.rounds, options.batch, options.length))
    failed = run(sides, batches[:warmup], "warm-up")
    sides = survivors(sides, failed)
    check_losses(sides)
    warm = {side.name: round(side.fastest()) for side in sides}
    sides = [max((s for s in sides if s.peer == peer), key=Side.fastest) for peer in {s.peer: None for s in sides}]

    def found(now: dict[str, str]) -> dict[str, Any]:
        return report(options, survivors(sides, now), warm, failed | now, matmul_tflops)

    def save(now: dict[str, str]) -> None:
        if options.out:
            write_json(options.out, found(now))

    print(json.dumps(found(run(sides, batches[warmup:], "round", save))))
    if options.profile:
        write_json(options.profile, profile(sides[0], batches[-1], warmup))


if __name__ == "__main__":
    main()
