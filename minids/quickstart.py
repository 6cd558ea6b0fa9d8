"""`minids quickstart`: tokenizer, pretraining, SFT, DPO and a chat, in a few minutes on a laptop, each stage measured.

    OUT/data        the rows that all stages read, as jsonl: look at them
    OUT/tokenizer   OUT/shards   OUT/pretrain   OUT/sft   OUT/dpo
    OUT/report.md   OUT/quickstart.json

Time is shared out as it passes: a few steps are timed, pretraining gets the steps that fit its part of what is left,
then SFT and DPO get theirs at the speed pretraining had. A stage that has begun keeps its settings when it is resumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from minids import corpus, tasks
from minids.config import (
    CheckpointConfig,
    DPOConfig,
    PretrainConfig,
    SFTConfig,
    TrainConfig,
    from_dict,
    load_toml,
    preset,
)
from minids.data.chat import preference_samples
from minids.data.loader import Loader
from minids.data.prepare import prepare
from minids.data.rows import RowReport, read_rows
from minids.data.store import HOLDOUT, TRAIN, TokenShards
from minids.device import keep_freed_memory
from minids.errors import InputError
from minids.files import atomic_directory, atomic_write, read_json, write_json
from minids.infer.generate import LanguageModel
from minids.loading import load
from minids.model.model import DeepseekV3
from minids.precision import autocast, pick_dtype
from minids.tokenizer import Tokenizer
from minids.tokenizer.train import train_tokenizer
from minids.train.dpo import dpo
from minids.train.log import note
from minids.train.loop import pick_device
from minids.train.measure import join
from minids.train.optim import build_optimizer, gradient_norm
from minids.train.pretrain import pretrain
from minids.train.sft import sft

C = TypeVar("C", PretrainConfig, SFTConfig, DPOConfig)
Result = dict[str, Any]

MINUTES = 4.75
VOCAB_SIZE = 4096
SEQ_LEN = 256
BATCH_SIZE = 4  # sequences: small, as steps count for more than tokens in a run this short
PAIRS_PER_STEP = 16
MOST_DPO_STEPS, LEAST_STEPS = 80, 20
TEXT_BYTES = 1_200_000  # of pretraining text for every minute
TASK_SHARE = 0.3  # of it: questions in training phrasings with their answers, as plain text
TOKENIZER_BYTES = 4 << 20
CONVERSATIONS = 4500  # for every minute
PAIRS, HELDOUT_PAIRS, QUESTIONS, SAMPLES = 1200, 200, 160, 6
PARTS = {"pretrain": 0.34, "sft": 0.58, "dpo": 0.08}  # of the time left for training
RESERVE = 30.0  # seconds kept for asking questions between the stages and for reports

DONE = "quickstart.json"
WHEN = ("before", "after")
SAMPLE = ("你好", "Hello!", "Who are you?")  # greetings in the sample chat; held-out questions follow them


# --- the rows ---------------------------------------------------------------------------------------------------------


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _own_rows(files: Sequence[str], size: float) -> dict[str, list[Any]]:
    """The user's rows by kind, the first ones up to about `size` bytes in all; without texts, chats serve as text."""
    rows: dict[str, list[Any]] = {"text": [], "chat": [], "preference": []}
    bad = RowReport()
    for row in read_rows(files, report=bad):
        if row.kind == "text" and row.text is not None:
            rows["text"].append(row.text)
            size -= len(row.text.encode())
        elif row.kind in ("chat", "preference"):
            sides = (
                {"messages": row.messages} if row.kind == "chat" else {"chosen": row.chosen, "rejected": row.rejected}
            )
            rows[row.kind].append(sides | ({"tools": row.tools} if row.tools else {}))
            size -= _bytes(message["content"] for messages in sides.values() for message in messages)
        if size < 0:
            break
    if left_out := bad.left_out():
        note(f"left out: {left_out}")
    if not rows["text"]:
        chats = rows["chat"] or [{"messages": pair["chosen"]} for pair in rows["preference"]]
        rows["text"] = ["\n".join(message["content"] for message in chat["messages"]) for chat in chats]
    if not rows["text"]:
        raise InputError(f"{', '.join(files)}: only prompts without answers; wanted text, chats or preference pairs")
    return rows


def write_data(folder: Path, files: Sequence[str] | None, minutes: float, seed: int = 0) -> Result:
    """Writes pretrain, sft, preferences and heldout_preferences .jsonl into `folder`; returns their numbers of rows.

    files None: text of the packages, and generated questions. Else the user's: their texts (or chats) for pretraining,
    their chats beside the questions for SFT, their pairs instead of the generated ones for DPO.
    Raises InputError when the packages cannot be fetched or the files hold nothing to train on.
    """
    size, rng = TEXT_BYTES * minutes * (1 - TASK_SHARE), random.Random(seed)
    questions = round(CONVERSATIONS * minutes)
    if files is None:
        texts = corpus.load()
        documents = texts.documents(size, seed)
        conversations = list(tasks.sft_rows(questions, texts.idioms, texts.chats, seed))
        pairs = []
    else:
        own = _own_rows(files, size)
        documents, pairs = own["text"], own["preference"]
        conversations = own["chat"] + list(tasks.sft_rows(max(questions - len(own["chat"]), questions // 2), seed=seed))
    rng.shuffle(pairs)
    heldout_pairs = pairs[: min(HELDOUT_PAIRS, len(pairs) // 10)]
    pairs = pairs[len(heldout_pairs) :] or list(tasks.preference_rows(PAIRS, heldout=False, seed=seed))
    heldout_pairs = heldout_pairs or list(tasks.preference_rows(HELDOUT_PAIRS, heldout=True, seed=seed))
    wanted = _bytes(documents) * TASK_SHARE / (1 - TASK_SHARE)
    for text in tasks.task_text(seed):
        wanted -= len(text.encode())
        if wanted < 0:
            break
        documents.append(text)
    rng.shuffle(documents)
    return {
        "source": "packages" if files is None else list(files),
        "text_bytes": _bytes(documents),
        "pretrain": _write_rows(folder / "pretrain.jsonl", ({"text": text} for text in documents)),
        "sft": _write_rows(folder / "sft.jsonl", conversations),
        "preferences": _write_rows(folder / "preferences.jsonl", pairs),
        "heldout_preferences": _write_rows(folder / "heldout_preferences.jsonl", heldout_pairs),
    }


# --- what is measured -------------------------------------------------------------------------------------------------


def replies(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
    """The greedy answer to each text as the first turn of a chat."""
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in texts
    ]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    answers = [""] * len(texts)
    for length, numbers in by_length.items():
        ids = model.generate(torch.tensor([prompts[number] for number in numbers]), max_new_tokens=max_new_tokens)
        for number, row in zip(numbers, ids[:, length:].tolist(), strict=True):
            written = itertools.takewhile(lambda id: id != tokenizer.eos_id, row)
            answers[number] = tokenizer.decode(written).strip()
    return answers


def score(model: LanguageModel, tokenizer: Tokenizer, questions: Sequence[tasks.Question]) -> Result:
    """How many of `questions` are answered right and how many of those in full, as shares; right by family."""
    found = replies(model, tokenizer, [question.text for question in questions])
    right = [question.is_right(reply) for question, reply in zip(questions, found, strict=True)]
    full = [question.is_full(reply) for question, reply in zip(questions, found, strict=True)]
    families: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(questions, right, strict=True):
        families[f"{question.family} ({question.language})"].append(is_right)
    return {
        "questions": len(questions),
        "right": round(statistics.mean(right), 4),
        "full": round(statistics.mean(full), 4),
        "families": {name: round(statistics.mean(answers), 4) for name, answers in families.items()},
    }


@torch.no_grad()
def preference_accuracy(model: DeepseekV3, tokenizer: Tokenizer, file: Path) -> float:
    """In what share of the pairs in `file` the chosen answer is more probable than the rejected one."""
    pairs = list(preference_samples(read_rows(str(file)), tokenizer, SEQ_LEN))
    won = 0
    for start in range(0, len(pairs), PAIRS_PER_STEP):
        documents = [side for pair in pairs[start : start + PAIRS_PER_STEP] for side in (pair.chosen, pair.rejected)]
        lengths = [len(document.tokens) for document in documents]
        batch = join(documents, SEQ_LEN, tokenizer.pad_id)
        log_probs = model.token_log_probs(batch.input_ids, batch.labels, batch.cu_seqlens)[: sum(lengths)]
        chosen, rejected = torch.stack([part.sum() for part in log_probs.split(lengths)]).view(-1, 2).unbind(1)
        won += int((chosen > rejected).sum())
    return round(won / max(1, len(pairs)), 4)


# --- the stages -------------------------------------------------------------------------------------------------------


def seconds_per_step(config: PretrainConfig, mtp: bool, longest: float, steps: int = 12) -> float:
    """Time of a training step of `config` with or without MTP, measured for about `longest` seconds at most: the lower
    quartile, as other programs only add to it."""
    keep_freed_memory()
    device = pick_device(config.train.device)
    model = DeepseekV3(config.model).to(device)
    optimizer = build_optimizer(model, config.train)
    loader = Loader(TokenShards(config.data), TRAIN, config.train.batch_size, seed=0)
    times: list[float] = []
    for batch in itertools.islice(loader, steps):
        if len(times) > 1 and sum(times) > longest:
            break
        began = time.perf_counter()
        with autocast(device, pick_dtype(config.train.dtype, device)):
            losses = model.losses(batch.input_ids.to(device), batch.labels.to(device), batch.cu_seqlens, mtp)
        (losses.nll_sum + sum(losses.mtp_nll_sum)).backward()
        optimizer.step(gradient_norm(model))
        optimizer.zero_grad()
        losses.nll_sum.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]


class Clock:
    """Shares the time until `minutes` after its making out to the stages that are still to come."""

    def __init__(self, minutes: float) -> None:
        self.began, self.seconds = time.perf_counter(), minutes * 60

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.began

    def steps(self, stage: str, per_step: float) -> int:
        """How many steps of `per_step` seconds `stage` gets; LEAST_STEPS when the time has run out."""
        names = list(PARTS)
        coming = names[names.index(stage) :]
        left = self.seconds - RESERVE * len(coming) / len(names) - self.passed
        budget = left * PARTS[stage] / sum(PARTS[name] for name in coming)
        return max(LEAST_STEPS, int(budget / per_step))


def _train(run: Callable[[C, bool], Result], folder: Path, make: Callable[[], C]) -> Result:
    """Runs a stage with the settings that `make` gives, or goes on with those it began with."""
    stored = folder / "config.toml"
    if not stored.is_file():
        return run(make(), False)
    kind = {pretrain: PretrainConfig, sft: SFTConfig, dpo: DPOConfig}[run]
    return run(from_dict(kind, load_toml(stored)), True)


def _data(out: Path, files: Sequence[str] | None, minutes: float) -> Result:
    with atomic_directory(out / "data", replace=True) as folder:
        return write_data(folder, files, minutes)


def _tokenizer(out: Path) -> Result:
    shutil.rmtree(out / "tokenizer", ignore_errors=True)  # of an interrupted quickstart
    files = [str(out / "data" / name) for name in ("pretrain.jsonl", "sft.jsonl")]
    return train_tokenizer(files, VOCAB_SIZE, out / "tokenizer", sample_bytes=TOKENIZER_BYTES)


def _shards(out: Path) -> Result:
    file = out / "data" / "pretrain.jsonl"
    result = prepare([file], out / "tokenizer", out / "shards", seq_len=SEQ_LEN, replace=True)
    if not TokenShards(out / "shards").rows(HOLDOUT):
        raise InputError(f"--data: {file.stat().st_size} bytes of text are too few to hold any of them out; give more")
    return result


def _train_config(steps: int, **changes: Any) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=BATCH_SIZE, eval_every=max(1, steps // 4), eval_batches=16, **changes)


def _checkpoints(steps: int) -> CheckpointConfig:
    return CheckpointConfig(every=max(1, steps // 2), keep=1)


def _pretrain(out: Path, clock: Clock, vocab_size: int) -> Result:
    def config(steps: int) -> PretrainConfig:
        return PretrainConfig(
            data=str(out / "shards"),
            tokenizer=str(out / "tokenizer"),
            out=str(out / "pretrain"),
            model=preset("nano", vocab_size=vocab_size),
            train=_train_config(steps, lr=3e-3),
            checkpoint=_checkpoints(steps),
        )

    probe = config(1)
    with_mtp, without = (seconds_per_step(probe, mtp, clock.seconds / 20) for mtp in (True, False))
    result = _train(pretrain, out / "pretrain", lambda: config(clock.steps("pretrain", with_mtp)))
    # what a token costs the later stages, which leave MTP out
    return result | {"tuning_seconds_per_token": result["seconds"] / result["tokens"] * without / with_mtp}


def _sft(out: Path, clock: Clock, per_token: float) -> Result:
    def config() -> SFTConfig:
        steps = clock.steps("sft", per_token * BATCH_SIZE * SEQ_LEN)
        return SFTConfig(
            data=[str(out / "data" / "sft.jsonl")],
            base=str(out / "pretrain"),
            out=str(out / "sft"),
            train=_train_config(steps, lr=2.5e-3, schedule="cosine", mtp_loss_weight=0.0),
            checkpoint=_checkpoints(steps),
        )

    return _train(sft, out / "sft", config)


def _dpo(out: Path, clock: Clock, per_token: float) -> Result:
    def config() -> DPOConfig:
        tokens_per_pair = 60  # of the generated ones
        steps = min(MOST_DPO_STEPS, clock.steps("dpo", per_token * tokens_per_pair * PAIRS_PER_STEP))
        train = _train_config(steps, lr=1e-4, schedule="cosine", weight_decay=0.0)
        return DPOConfig(
            data=[str(out / "data" / "preferences.jsonl")],
            base=str(out / "sft"),
            out=str(out / "dpo"),
            holdout=0.05,
            sft_loss_weight=1.0,
            train=dataclasses.replace(train, batch_size=PAIRS_PER_STEP, mtp_loss_weight=0.0, bias_update_speed=0.0),
            checkpoint=_checkpoints(steps),
        )

    return _train(dpo, out / "dpo", config)


# --- the whole --------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    ruler = ["-" * width for width in widths]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (head, ruler, *rows)]


def improvements(stages: Mapping[str, Result]) -> list[list[str]]:
    """[stage, measure, before, after] for each held-out measure, from the stages' results."""
    pre, tuned, preferred = (stages[name] for name in PARTS)

    def share(name: str, of: Result) -> str:
        return f"{of['questions'][name]:.0%}"

    def change(digits: int, name: str, of: Result) -> list[str]:
        return [f"{of[when][name]:.{digits}f}" for when in ("before", "after")]

    accuracy = [f"{stage['preference_accuracy']:.0%}" for stage in (tuned, preferred)]
    return [
        ["tokenizer", "bytes per token (raw bytes have 1)", "1.00", f"{stages['tokenizer']['bytes_per_token']:.2f}"],
        ["pretrain", "bits per byte of text", *change(3, "bits_per_byte", pre)],
        ["sft", "loss of answers, nats per token", *change(3, "nll", tuned)],
        ["sft", "questions answered right", share("right", pre), share("right", tuned)],
        ["dpo", "pairs whose chosen answer is the likelier one", *accuracy],
        ["dpo", "questions answered right and in full", share("full", tuned), share("full", preferred)],
        ["dpo", "questions answered right", share("right", tuned), share("right", preferred)],
    ]


def next_commands(out: Path) -> list[str]:
    question = tasks.heldout_questions(1)[0].text
    return [
        f"minids chat {out / 'dpo'}",
        f'minids generate {out / "dpo"} --prompt "{question}" --temperature 0',
        f"minids export {out / 'dpo'} --to hf --out {out / 'hf'}",
        "minids quickstart --out runs/longer --minutes 30",
        "minids quickstart --out runs/mine --data my.jsonl",
    ]


def report(result: Result) -> str:
    """report.md: what each stage improved, the score by kind of question, a chat, what to type next."""
    asked = result["stages"]["dpo"]["questions"]
    lines = [
        "# minids quickstart", "",
        *_table(["stage", "held-out measure", "before", "after"], improvements(result["stages"])), "",
        f"The {asked['questions']} questions are put in phrasings that no stage was trained on. "
        f"{result['seconds']['all']:.0f} seconds in all.", "",
        "## Right answers by kind of question", "",
        *_table(["kind", "right"], [[name, f"{share:.0%}"] for name, share in asked["families"].items()]), "",
        "## Sample chat", "", "```",
        *(f"> {question}\n  {answer}" for question, answer in result["sample"]),
        "```", "",
        "## Next", "", "```", *next_commands(Path(result["out"])), "```",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def quickstart(
    out: str | Path = "runs/quickstart",
    data: Sequence[str] | None = None,
    minutes: float = MINUTES,
    resume: bool = False,
) -> Result:
    """Everything, into the folder `out`, in about `minutes`; longer on a machine too slow for LEAST_STEPS a stage.

    data: the user's own files (see minids.data.rows) instead of the packages' text. resume: goes on with what an
    interrupted quickstart left in `out`. Returns what quickstart.json holds; raises InputError and Interrupted.
    """
    if not 0 < minutes < float("inf"):
        raise InputError(f"--minutes: got {minutes}, wanted a number > 0")
    out, clock = Path(out), Clock(minutes)
    if out.exists() and not resume and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists; give another --out, add --resume to go on with it, or remove it")
    former = read_json(out / DONE) if (out / DONE).is_file() else {}
    if out.is_dir() and not former and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"{out}: no quickstart to go on with (it holds no {DONE}) and not empty; give another --out")
    stages: dict[str, Result] = former.get("stages", {})
    if data and stages and stages["data"]["source"] != list(data):
        raise InputError(f"--data: got {list(data)}, but the quickstart in {out} began with {stages['data']['source']}")
    seconds: dict[str, float] = former.get("seconds", {})

    def stage(name: str, title: str, work: Callable[[], Result]) -> Result:
        """`work` done, timed and written down, unless it was before."""
        if name not in stages:
            note(f"{title} ...")
            began = time.perf_counter()
            stages[name] = work()
            seconds[name] = round(time.perf_counter() - began, 1)
            write_json(out / DONE, {"stage": "quickstart", "out": str(out), "stages": stages, "seconds": seconds})
        return stages[name]

    def measured(name: str, result: Result) -> Result:
        model, tokenizer = load(out / name)
        accuracy = preference_accuracy(model, tokenizer, out / "data" / "heldout_preferences.jsonl")
        return result | {"questions": score(model, tokenizer, questions), "preference_accuracy": accuracy}

    def train_on_text() -> Result:
        return measured("pretrain", _pretrain(out, clock, vocabulary["vocab_size"]))

    questions = tasks.heldout_questions(QUESTIONS)
    stage("data", "collecting text, conversations and preference pairs", lambda: _data(out, data, minutes))
    vocabulary = stage("tokenizer", "training the tokenizer", lambda: _tokenizer(out))
    stage("shards", "tokenising and packing the text", lambda: _shards(out))
    trained = stage("pretrain", "pretraining on the text", train_on_text)
    per_token = trained["tuning_seconds_per_token"]
    stage("sft", "fine-tuning on the conversations", lambda: measured("sft", _sft(out, clock, per_token)))
    stage("dpo", "learning from the preference pairs", lambda: measured("dpo", _dpo(out, clock, per_token)))

    model, tokenizer = load(out / "dpo")
    sample = [*SAMPLE, *(question.text for question in questions[:SAMPLES])]
    seconds["all"] = round(clock.passed, 1)
    result: Result = {
        "stage": "quickstart",
        "out": str(out),
        "stages": stages,
        "sample": list(zip(sample, replies(model, tokenizer, sample), strict=True)),
        "seconds": seconds,
    }
    text = report(result)
    atomic_write(out / "report.md", text)
    write_json(out / DONE, result)
    note("\n" + text)
    return result
