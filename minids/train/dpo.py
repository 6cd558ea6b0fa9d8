"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290), with a term that holds on to chosen answers.

With log-probabilities summed over an answer's tokens, a pair's margin = beta * ((chosen - rejected) - (reference chosen
- reference rejected)) and its loss = -log sigmoid(margin), TRL's "sigmoid" loss. Alone it may lower the probability of
both answers until the model collapses, so sft_loss_weight times the chosen answer's nats per token is added (arXiv
2404.19733). Both are means over the step's pairs. The reference is the starting model; its log-probabilities are
computed once and kept. MTP modules and expert biases stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minids.config import DPOConfig, TrainConfig
from minids.data.chat import preference_samples
from minids.data.loader import Batch, permuted
from minids.data.pack import Sample
from minids.data.rows import Row, RowReport, read_rows
from minids.device import queue_copy
from minids.errors import InputError
from minids.files import atomic_write, sha256
from minids.model.model import DeepseekV3
from minids.precision import autocast, pick_dtype
from minids.tokenizer import Tokenizer
from minids.train.checkpoint import MODEL, read_state
from minids.train.log import note, progress
from minids.train.loop import StepLoss, Window, pick_device, train
from minids.train.measure import join
from minids.train.run import absolute, open_base, open_run, steps_for

PAIRS, REFERENCE = "pairs.safetensors", "reference.safetensors"
LEFT_OUT = "left_out"  # in the metadata of PAIRS: the only key, as safetensors writes several in any order


def write_pairs(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    out: Path,
    seq_len: int,
    holdout: float,
    report: RowReport | None = None,
) -> dict[str, int]:
    """Preference rows as tokens in `out` (pairs.safetensors); returns how many were left out, by reason. Of the prompts
    the share `holdout`, chosen by hash and at least one, is held out with all its pairs. `report`: that of `read_rows`,
    which pairs that the chat template refuses are added to.

    InputError when fewer than two prompts have a usable pair, or the chat template marks no answers.
    """
    bad = RowReport() if report is None else report
    dropped: dict[str, int] = {}
    found = list(preference_samples(rows, tokenizer, seq_len, dropped, bad))
    prompts = sorted({pair.digest for pair in found})
    if len(prompts) < 2:
        why = bad.left_out(dropped) or "none"
        raise InputError(
            f"--data: usable preference pairs of {len(prompts)} prompts, wanted 2 or more (left out: {why})"
        )
    kept = set(prompts[: min(len(prompts) - 1, max(1, round(holdout * len(prompts))))])
    documents = [document for pair in found for document in (pair.chosen, pair.rejected)]
    tensors = {
        "tokens": torch.from_numpy(np.concatenate([document.tokens for document in documents]).astype(np.int32)),
        "mask": torch.from_numpy(np.concatenate([np.asarray(document.mask) for document in documents])),
        "bounds": torch.from_numpy(np.cumsum([0, *(len(document.tokens) for document in documents)])),
        "held_out": torch.tensor([pair.digest in kept for pair in found]),
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / PAIRS, save(tensors, metadata={LEFT_OUT: json.dumps(bad.facts(dropped))}))
    return dropped


class Pairs:
    """The pairs that `write_pairs` wrote: document 2 i is pair i's chosen conversation, 2 i + 1 the rejected one.
    `left_out`: which rows it did not use."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PAIRS
        if not self.path.is_file():
            raise InputError(f"{self.path}: missing, so this run cannot be resumed; start a new one")
        try:
            tensors = load_file(self.path)
            with safe_open(self.path, "pt") as file:
                self.left_out: dict[str, Any] = json.loads((file.metadata() or {}).get(LEFT_OUT, "{}"))
        except SafetensorError as error:
            raise InputError(f"{self.path}: damaged ({error}); start a new run") from None
        self.fingerprint = sha256(self.path)
        self._tokens, self._mask = tensors["tokens"].numpy(), tensors["mask"].numpy()
        self._bounds, held_out = tensors["bounds"].tolist(), tensors["held_out"].numpy()
        self.train: list[int] = np.flatnonzero(~held_out).tolist()
        self.held_out: list[int] = np.flatnonzero(held_out).tolist()

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)

    def documents(self, numbers: Iterable[int]) -> list[Sample]:
        """Chosen and rejected, in turn, of the pairs `numbers`."""
        spans = [slice(*self._bounds[document : document + 2]) for n in numbers for document in (2 * n, 2 * n + 1)]
        return [Sample(self._tokens[span], self._mask[span]) for span in spans]


@dataclass(frozen=True)
class PairBatch:
    """Pairs `numbers` [n] in one batch; of each document its `lengths` [2 n] and counted tokens `answers` [2 n]."""

    numbers: list[int]
    batch: Batch
    lengths: list[int]
    answers: Tensor


def pair_batch(pairs: Pairs, numbers: list[int], seq_len: int, pad_id: int) -> PairBatch:
    documents = pairs.documents(numbers)
    answers = torch.tensor([int(np.asarray(document.mask)[1:].sum()) for document in documents])
    return PairBatch(
        numbers, join(documents, seq_len, pad_id), [len(document.tokens) for document in documents], answers
    )


def answer_log_probs(model: DeepseekV3, pairs: PairBatch) -> Tensor:
    """[n, 2] fp32: log-probability of each pair's chosen and rejected answer, summed over the answer's tokens."""
    device = next(model.parameters()).device
    batch = pairs.batch
    input_ids, labels = (queue_copy(x, device) for x in (batch.input_ids, batch.labels))
    log_probs = model.token_log_probs(input_ids, labels, batch.cu_seqlens)
    parts = log_probs[: sum(pairs.lengths)].split(pairs.lengths)
    return torch.stack([part.sum() for part in parts]).view(-1, 2)


def dpo_metrics(log_probs: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """Per pair [n], from [n, 2] log-probabilities (chosen, rejected): preference_loss, rewards_chosen,
    rewards_rejected, margin, accuracy (of the margin's sign; a tie, as before training, counts half)."""
    rewards = beta * (log_probs - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "preference_loss": -F.logsigmoid(margin),
        "rewards_chosen": rewards[:, 0],
        "rewards_rejected": rewards[:, 1],
        "margin": margin,
        "accuracy": (torch.sign(margin) + 1) / 2,
    }


class PreferenceTask:
    """DPO on a run's pairs. `reference` [pairs, 2]: the starting model's log-probabilities, NaN where never used."""

    stage = "dpo"
    curves = (
        ("loss", ("preference_loss", "chosen_nll")),
        ("rewards", ("rewards_chosen", "rewards_rejected", "margin")),
        ("accuracy", ("accuracy", "preference_accuracy", "preference_accuracy_per_token")),
        ("learning rate", ("lr",)),
    )
    lower_is_better = ("loss", "preference_loss", "chosen_nll")
    same_shapes = False

    def __init__(self, pairs: Pairs, settings: TrainConfig, config: DPOConfig, seq_len: int, pad_id: int) -> None:
        self.pairs, self.settings, self.config, self.seq_len, self.pad_id = pairs, settings, config, seq_len, pad_id
        self.position = 0  # of the next pair, counted through all epochs
        limit = min(len(pairs.held_out), settings.eval_batches * settings.batch_size)
        chosen = [pairs.held_out[i * len(pairs.held_out) // limit] for i in range(limit)]
        self.eval_numbers = [chosen[i : i + settings.batch_size] for i in range(0, limit, settings.batch_size)]
        self.reference = torch.full((len(pairs), 2), float("nan"))
        self.reference_fingerprint = ""

    def _batch(self, numbers: list[int]) -> PairBatch:
        return pair_batch(self.pairs, numbers, self.seq_len, self.pad_id)

    @torch.no_grad()
    def compute_reference(self, model: DeepseekV3) -> None:
        """Held-out pairs in the batches that `evaluate` uses, so that before training margins are exactly 0."""
        size = self.settings.batch_size
        training = [self.pairs.train[i : i + size] for i in range(0, len(self.pairs.train), size)]
        device = next(model.parameters()).device
        bar = progress(len(self.eval_numbers) + len(training), 0, "batch", "reference")
        for numbers in [*self.eval_numbers, *training]:
            with autocast(device, pick_dtype(self.settings.dtype, device)):
                self.reference[numbers] = answer_log_probs(model, self._batch(numbers)).cpu()
            bar.update()
        bar.close()

    def save_reference(self, file: Path, key: dict[str, str]) -> None:
        atomic_write(file, save({"log_probs": self.reference}, metadata=key))

    def load_reference(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(f"{file}: missing, so this run cannot be resumed; start a new one")
        self.reference_fingerprint = sha256(file)
        try:
            self.reference = load_file(file)["log_probs"]
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{file}: damaged ({error}); start a new run") from None

    def next_batch(self) -> PairBatch:
        total = len(self.pairs.train)
        numbers = []
        for _ in range(self.settings.batch_size):
            epoch, index = divmod(self.position, total)
            numbers.append(self.pairs.train[permuted(index, total, self.settings.seed, epoch)])
            self.position += 1
        return self._batch(numbers)

    def count(self, batch: PairBatch) -> int:
        return len(batch.numbers)

    def tokens(self, batch: PairBatch) -> int:
        return sum(batch.lengths)

    def _values(self, model: DeepseekV3, batch: PairBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Per pair [n]: metrics; and [n, 2] the log-probabilities, summed and per token."""
        log_probs = answer_log_probs(model, batch)
        reference = queue_copy(self.reference[batch.numbers], log_probs.device)
        per_token = log_probs / queue_copy(batch.answers.view(-1, 2), log_probs.device)
        values = dpo_metrics(log_probs, reference, self.config.beta)
        return {**values, "chosen_nll": -per_token[:, 0]}, log_probs, per_token

    def loss(self, model: DeepseekV3, batch: PairBatch, window: Window) -> StepLoss:
        values, _, _ = self._values(model, batch)
        metrics = {name: value.sum() / window.counted for name, value in values.items()}
        return StepLoss(metrics["preference_loss"] + self.config.sft_loss_weight * metrics["chosen_nll"], metrics)

    def evaluate(self, model: DeepseekV3) -> dict[str, float]:
        """Means over held-out pairs. preference_accuracy: how often the chosen answer is the more probable one, by
        summed log-probability and per token; unlike `accuracy` it says something about the untrained model, too."""
        parts: dict[str, list[Tensor]] = {}
        for numbers in self.eval_numbers:
            values, log_probs, per_token = self._values(model, self._batch(numbers))
            values["preference_accuracy"] = (log_probs[:, 0] > log_probs[:, 1]).float()
            values["preference_accuracy_per_token"] = (per_token[:, 0] > per_token[:, 1]).float()
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(found).double().mean().item() for name, found in parts.items()}

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "pairs": self.pairs.fingerprint, "reference": self.reference_fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        now = self.state()
        for name, file in (("pairs", PAIRS), ("reference", REFERENCE)):
            if state[name] != now[name]:
                raise InputError(f"{self.pairs.path.with_name(file)}: changed since the run began; start a new run")
        self.position = state["position"]

    def summary(self) -> list[str]:
        counts = {**self.pairs.left_out.get("dropped", {}), **self.pairs.left_out.get("skipped_rows", {})}
        left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return [
            f"data: {len(self.pairs.train)} pairs to train on, {len(self.pairs.held_out)} held out"
            + (f"; left out: {left_out}" if left_out else "")
        ]

    def next_commands(self, out: Path) -> list[str]:
        return [f"minids chat {out}", f"minids export {out} --to hf --out {out}-hf"]


def _is_cached(file: Path, key: dict[str, str]) -> bool:
    """Whether `file` holds the reference for exactly this base model, these pairs and this precision."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() == key
    except (OSError, SafetensorError):
        return False


def dpo(config: DPOConfig, resume: bool = False) -> dict[str, Any]:
    """Trains the model `config.base` on the preference pairs in `config.data` into the run folder `config.out`.

    Pairs and the reference's log-probabilities are kept in out/data, from which a resumed run continues. Returns
    `loop.train`'s dict (`before` and `after`: see PreferenceTask.evaluate) and which rows were left out; raises
    InputError and Interrupted.
    """
    if not config.data:
        raise InputError("--data: not given; name files of preference pairs")
    for name in ("mtp_loss_weight", "bias_update_speed"):
        if getattr(config.train, name):
            raise InputError(
                f"train.{name}: got {getattr(config.train, name)}, but dpo trains only the main model; wanted 0"
            )
    config = absolute(config)
    device = pick_device(config.train.device)
    with open_run(config, resume) as run:
        base = open_base(config, run)
        base.tokenizer.save(run.out / "tokenizer")
        data = run.out / "data"
        if run.checkpoint is None:
            report = RowReport()
            rows = read_rows(config.data, report=report)
            dropped = write_pairs(rows, base.tokenizer, data, base.seq_len, config.holdout, report)
            if left_out := report.left_out(dropped):
                note(f"left out: {left_out}")
        pairs = Pairs(data)
        settings = steps_for(config.train, config.epochs, len(pairs.train))
        torch.manual_seed(settings.seed)
        task = PreferenceTask(pairs, settings, config, base.seq_len, base.tokenizer.pad_id)
        model = base.load(device)
        if run.checkpoint is None:
            key = {
                "model": read_state(base.checkpoint)["files"][MODEL],
                "pairs": pairs.fingerprint,
                "dtype": str(pick_dtype(settings.dtype, device)),
                "batches": f"{settings.batch_size} {settings.eval_batches}",
            }
            if not _is_cached(data / REFERENCE, key):
                task.compute_reference(model)
                task.save_reference(data / REFERENCE, key)
        task.load_reference(data / REFERENCE)
        return train(task, model, settings, config, run) | pairs.left_out
