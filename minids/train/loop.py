"""The training loop that pretrain, sft and dpo share.

A Task supplies batches, their loss and held-out values; `train` does everything around them: gradient accumulation,
precision, clipping, AdamW, the schedule, expert balancing, metrics, evaluation, checkpoints, signals. Weights,
gradients and optimizer state are fp32. What a step computes depends on its number and on what checkpoints hold, on
nothing else, so a resumed run repeats an uninterrupted one bit for bit (same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from minids_kernels import precompile
from torch import Tensor
from torch.nn.utils import get_total_norm

from minids.config import TrainConfig
from minids.data.loader import Batch
from minids.device import keep_freed_memory, queue_copy
from minids.errors import FULL, InputError, Interrupted
from minids.graph import CannotRecord, Recorded, pad_cu_seqlens
from minids.model.model import DeepseekV3
from minids.precision import autocast, pick_dtype
from minids.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from minids.train.log import (
    CURVES,
    METRICS,
    REPORT,
    Means,
    MetricsLog,
    Panels,
    note,
    progress,
    write_curves,
    write_report,
)
from minids.train.optim import build_optimizer, gradient_norm, set_learning_rate
from minids.train.run import Run, StageConfig
from minids.train.schedule import bias_speed, learning_rate, mtp_weight


@dataclass(frozen=True)
class Window:
    """One optimizer step's batches: how many, what they count in total (`Task.count`), whether MTP modules are trained,
    and the weight of their loss. Tensors are scalars, where the model is."""

    batches: int
    counted: Tensor
    mtp: bool
    mtp_weight: Tensor


Gradients = tuple[dict[str, Tensor], Tensor | None]  # a step's metrics and expert counts; gradients lie in parameters


@dataclass
class StepLoss:
    """One batch's share of a step: `loss` and the scalars in `metrics` add up over the window. expert_counts [MoE
    layers, E] or None."""

    loss: Tensor
    metrics: dict[str, Tensor]
    expert_counts: Tensor | None = None


class Task(Protocol):
    """What a stage teaches. `loss` and `evaluate` run within `autocast`. Batches come on the CPU; with `same_shapes`
    they are `Batch`es of as many tokens each, and `loss` takes them on a GPU, too, for which it does not wait."""

    @property
    def stage(self) -> str: ...

    seq_len: int
    same_shapes: bool

    @property
    def curves(self) -> Panels: ...
    @property
    def lower_is_better(self) -> Sequence[str]: ...
    def next_batch(self) -> Any: ...
    def count(self, batch: Any) -> int: ...
    def tokens(self, batch: Any) -> int: ...
    def loss(self, model: DeepseekV3, batch: Any, window: Window) -> StepLoss: ...
    def evaluate(self, model: DeepseekV3) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...
    def summary(self) -> list[str]: ...
    def next_commands(self, out: Path) -> list[str]: ...


def counted_tokens(batch: Batch) -> int:
    return int((batch.labels >= 0).sum())


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA when there is one, else the CPU. InputError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InputError(f"device: got {name!r}, which cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def _random_state(device: torch.device) -> dict[str, str]:
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(value.tolist()).hex() for name, value in state.items()}


def _set_random_state(state: Mapping[str, str], device: torch.device) -> None:
    values = {name: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for name, text in state.items()}
    torch.set_rng_state(values["torch"])
    if device.type == "cuda" and "cuda" in values:
        torch.cuda.set_rng_state(values["cuda"], device)


def _imbalance(counts: Tensor) -> Tensor:
    """How much busier the busiest expert is than the mean, as a share of it, in the worst layer ("MaxVio")."""
    return (counts.amax(1) / counts.mean(1).clamp(min=1e-9)).amax() - 1


@contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """A full disk is the user's to mend: one line that says what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        last = latest_checkpoint(out)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise InputError(f"{out}: {error.strerror}; make room and run again with --resume; {kept}") from error


class Trainer:
    """The state of one run. `train` is the way in."""

    def __init__(self, task: Task, model: DeepseekV3, train: TrainConfig, config: StageConfig, run: Run) -> None:
        self.task, self.model, self.train, self.config, self.run = task, model, train, config, run
        self.device = next(model.parameters()).device
        self.dtype = pick_dtype(train.dtype, self.device)
        self.optimizer = build_optimizer(model, train)
        self.documents = 0  # of each batch of a recorded step
        self.recorded: Recorded[bool, Gradients] | None = None
        if self.device.type == "cuda" and train.cuda_graph and task.same_shapes:
            self.recorded = Recorded(self._work, self.device, model.parameters())
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.means = Means()
        # what a result's last bits may hang on, besides the configuration
        self.numerics = {
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        if run.checkpoint is not None:
            self._restore(load_checkpoint(run.checkpoint, model, self.optimizer))
        self.log = MetricsLog(run.out, -1 if run.checkpoint is None else self.step)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.means = Means(state["means"])
        self.task.load_state(state["task"])
        _set_random_state(state["random"], self.device)
        for name, value in self.numerics.items():
            if state["numerics"][name] != value:
                former = state["numerics"][name]
                note(f"warning: {name} was {former} and is {value} now: results may differ in their last bits")

    def save(self) -> None:
        if latest_checkpoint(self.run.out) == self.run.out / f"step_{self.step:06d}":
            return  # interrupted right after a checkpoint
        with torch.no_grad():
            if not get_total_norm(self.model.parameters()).isfinite():
                raise self._diverged("weights are no longer finite")
        self.log.sync()
        state = {
            "stage": self.task.stage,
            "seq_len": self.task.seq_len,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "means": self.means.state(),
            "task": self.task.state(),
            "random": _random_state(self.device),
            "numerics": self.numerics,
        }
        save_checkpoint(self.run.out, self.step, self.model, self.optimizer, state, self.config.checkpoint.keep)

    def evaluate(self) -> None:
        """InputError when a held-out value is no longer finite."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            values = self.task.evaluate(self.model)
        if not all(map(math.isfinite, values.values())):
            raise self._diverged(", ".join(f"{name} {value}" for name, value in values.items()) + " on held-out rows")
        self.log.write("eval", self.step, values)

    def _diverged(self, what: str) -> InputError:
        train = self.train
        return InputError(
            f"step {self.step}: {what}, so training has diverged; lower train.lr (now {train.lr:g}) or raise "
            f"train.warmup_steps"
        )

    def _gradients(self, batches: Sequence[Any], window: Window) -> Gradients:
        """Forward and backward of a step; leaves gradients in the parameters."""
        sums: dict[str, Tensor] = {}
        counts: Tensor | None = None
        for batch in batches:
            with autocast(self.device, self.dtype):
                part = self.task.loss(self.model, batch, window)
            part.loss.backward()
            for name, value in {"loss": part.loss, **part.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
            if part.expert_counts is not None and part.expert_counts.numel():
                counts = part.expert_counts if counts is None else counts + part.expert_counts
        sums["grad_norm"] = gradient_norm(self.model)
        if counts is not None:
            sums["expert_imbalance"] = _imbalance(counts)
        return sums, counts

    def _inputs(self, batches: Sequence[Batch], window: Window) -> list[Tensor]:
        """What a recorded step reads. All batches get as many documents, empty ones at the end: a power of two, never
        fewer than before. Otherwise each combination of numbers would be a graph, with gradients of its own."""
        most = max(b.cu_seqlens.shape[0] - 1 for b in batches)
        if most > self.documents:
            self.documents = 1 << (most - 1).bit_length()
            if self.recorded is not None:
                self.recorded.forget()
        rows = [x for b in batches for x in (b.input_ids, b.labels, pad_cu_seqlens(b.cu_seqlens, self.documents))]
        return [window.counted, window.mtp_weight, *rows]

    def _work(self, inputs: list[Tensor], mtp: bool) -> Gradients:
        """`_gradients` from what `_inputs` made of batches and window."""
        counted, weight, *tensors = inputs
        batches = [Batch(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        return self._gradients(batches, Window(len(batches), counted, mtp, weight))

    def _window(self, batches: Sequence[Any]) -> Window:
        counted = torch.tensor(max(1, sum(map(self.task.count, batches))))
        weight = torch.tensor(mtp_weight(self.step, self.train), dtype=torch.float32)
        return Window(len(batches), queue_copy(counted, self.device), bool(weight > 0), queue_copy(weight, self.device))

    def precompile(self) -> None:
        """A step's kernels, all at once; leaves no trace in the run."""
        state = self.task.state()
        batches = [self.task.next_batch()]
        self.task.load_state(state)
        window = self._window(batches)

        def step() -> None:
            if self.recorded is None:
                self._gradients(batches, window)
            else:
                self._work([queue_copy(x, self.device) for x in self._inputs(batches, window)], window.mtp)

        try:
            precompile(step)
        except Exception as error:  # the step compiles what it needs, and raises what stays wrong
            note(f"kernels are compiled one after the other: {type(error).__name__}: {error}")
        self.optimizer.zero_grad()

    def optimizer_step(self) -> dict[str, float]:
        """One step; returns its metrics. InputError when the loss or the gradient is no longer finite."""
        train, task = self.train, self.task
        batches = [task.next_batch() for _ in range(train.grad_accumulation_steps)]
        window = self._window(batches)
        if self.recorded is None:
            sums, counts = self._gradients(batches, window)
        else:
            try:
                sums, counts = self.recorded(self._inputs(batches, window), window.mtp)
            except CannotRecord as why:
                raise InputError(f"train.cuda_graph: this step cannot be recorded ({why}); wanted false") from why
        lr, speed = learning_rate(self.step, train), bias_speed(self.step, train)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step(sums["grad_norm"])
        self.optimizer.zero_grad()
        if counts is not None and speed:
            self.model.update_expert_bias(counts, speed)
        values = dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True))  # one wait for the device
        self.step += 1
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise self._diverged(f"the loss is {values['loss']} and the gradient norm {values['grad_norm']}")
        self.tokens += sum(map(task.tokens, batches))
        return {**values, "lr": lr}

    def loop(self) -> None:
        """To the last step. Interrupted, after a checkpoint, when a signal came."""
        train, every, signals = self.train, self.config.checkpoint.every, self.run.signals
        bar = progress(train.steps, self.step, "step", self.task.stage)
        began, logged, tokens = time.perf_counter(), time.perf_counter(), self.tokens
        before = self.seconds
        signals.training = True
        try:
            if self.device.type == "cuda" and self.step < train.steps:
                self.precompile()
            if self.run.checkpoint is None:
                self.evaluate()
            while self.step < train.steps and not signals.received:
                values = self.optimizer_step()
                bar.update()
                self.means.add(values)
                last = self.step == train.steps
                now = time.perf_counter()
                self.seconds = before + now - began
                if last or self.step % train.log_every == 0:
                    speed = (self.tokens - tokens) / (now - logged)
                    means = self.means.take()
                    timing = {"tokens_per_second": round(speed, 1), "seconds": round(self.seconds, 3)}
                    self.log.write("train", self.step, {**means, "tokens": self.tokens, **timing})
                    bar.set_postfix(loss=f"{means['loss']:.3f}", tok_s=f"{speed:.0f}", refresh=False)
                    logged, tokens = now, self.tokens
                if last or (train.eval_every and self.step % train.eval_every == 0):
                    self.evaluate()
                if last or (every and self.step % every == 0):
                    self.save()
            if signals.received and self.step < train.steps:
                self.save()
                raise Interrupted(
                    f"{signals.received}: saved {latest_checkpoint(self.run.out)} (step {self.step} of {train.steps}); "
                    f"--resume continues"
                )
        finally:
            signals.training = False
            bar.close()
            self.log.close()


def train(task: Task, model: DeepseekV3, train: TrainConfig, config: StageConfig, run: Run) -> dict[str, Any]:
    """Trains `model` in place to `train.steps`, from `run.checkpoint` when there is one, and writes the run folder.

    `train`: config.train with what the stage worked out (steps from epochs). Returns the key figures: before and after
    hold the held-out values, seconds counts earlier sittings too. Raises InputError (damaged checkpoint, full disk,
    divergence) and Interrupted (saved).
    """
    began = time.perf_counter()
    keep_freed_memory()
    out = run.out
    with _full_disk(out):
        trainer = Trainer(task, model, train, config, run)
        resumed_from = trainer.step if run.checkpoint is not None else None
        finished = resumed_from is not None and resumed_from >= train.steps
        if finished:
            note(f"{out}: already finished at step {resumed_from}; nothing left to train")
        trainer.loop()
        records = trainer.log.records
        evals = [{k: v for k, v in r.items() if k not in ("step", "kind")} for r in records if r["kind"] == "eval"]
        speed = trainer.tokens / trainer.seconds if trainer.seconds else 0.0
        summary = [
            f"{task.stage}: {trainer.step} steps, {trainer.tokens:,} tokens in {trainer.seconds:.0f} s "
            f"({speed:,.0f} tokens/s)",
            f"model: {model.num_parameters():,} parameters, {model.num_parameters(active=True):,} active",
            ", ".join(f"{name} {value}" for name, value in trainer.numerics.items()),
            *task.summary(),
        ]
        has_curves = write_curves(out, records, task.curves)
        commands = task.next_commands(out)
        write_report(
            out, f"{task.stage} {out.name}", summary, records, task.lower_is_better, config, has_curves, commands
        )
    return {
        "stage": task.stage,
        "out": str(out),
        "checkpoint": str(latest_checkpoint(out)),
        "steps": trainer.step,
        "resumed_from": resumed_from,
        "already_finished": finished,
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(active=True),
        "tokens": trainer.tokens,
        "tokens_per_second": round(speed, 1),
        "seconds": round(trainer.seconds, 2),
        "wall_seconds": round(time.perf_counter() - began, 2),
        "before": evals[0] if evals else {},
        "after": evals[-1] if evals else {},
        "metrics": str(out / METRICS),
        "report": str(out / REPORT),
        "curves": str(out / CURVES) if has_curves else None,
    }
