"""A stage's run folder: opened fresh or to be resumed, and the signals that interrupt the work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from minids.config import (
    DPOConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    TrainConfig,
    from_dict,
    load_toml,
    setting_names,
    to_dict,
    to_toml,
)
from minids.convert.hf import checkpoint_tokenizer
from minids.errors import InputError, Interrupted
from minids.files import atomic_write
from minids.model.model import DeepseekV3
from minids.signals import STOPS, answered_by
from minids.tokenizer import Tokenizer
from minids.train.checkpoint import (
    is_leftover,
    latest_checkpoint,
    load_checkpoint,
    load_model_config,
    read_state,
    remove_leftovers,
    resolve,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

StageConfig = PretrainConfig | SFTConfig | DPOConfig
C = TypeVar("C", bound=StageConfig)

CONFIG = "config.toml"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# on resume: these change no number, but for the device, about which the loop warns
MAY_CHANGE = {"out", "checkpoint.every", "checkpoint.keep", "train.cuda_graph", "train.device"}
DEFAULT_SEQ_LEN = 512  # where neither the configuration nor the base run says (imported models)
PATHS = ("data", "tokenizer", "base")


class Signals:
    """SIGINT and SIGTERM. While `training`, the first one only sets `received`: the loop saves at the end of its step.
    Before that, and the second one always, raises Interrupted on the spot."""

    def __init__(self) -> None:
        self.training = False
        self.received: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received or not self.training:
            raise Interrupted(
                f"{signal.Signals(number).name}: stopped without saving; --resume continues what is there"
            )
        self.received = signal.Signals(number).name
        with contextlib.suppress(OSError):  # not by sys.stderr, in the middle of whose writing this may come
            os.write(2, f"\n{self.received}: saving at the end of this step; once more stops at once\n".encode())


@dataclass
class Run:
    """An opened run folder. `checkpoint`: the one to continue from, None for a fresh start."""

    out: Path
    checkpoint: Path | None
    signals: Signals


def absolute(config: C) -> C:
    """`config` with its input paths made absolute, so that it means the same from any working directory."""
    changes: dict[str, Any] = {}
    for name in PATHS:
        value = getattr(config, name, None)
        if isinstance(value, list):
            changes[name] = [os.path.abspath(path) for path in value]
        elif value:
            changes[name] = os.path.abspath(value)
    return dataclasses.replace(config, **changes)


def _value(config: StageConfig, path: str) -> Any:
    node: Any = to_dict(config)
    for part in path.split("."):
        node = node[part] if isinstance(node, dict) else None
    return node


def _require_unchanged(config: StageConfig, file: Path) -> None:
    """InputError naming the first setting that differs from those the run began with."""
    former = from_dict(type(config), load_toml(file), where=f"{file}: ")
    for name in setting_names(type(config)):
        old, new = _value(former, name), _value(config, name)
        if old != new and name not in MAY_CHANGE:
            raise InputError(
                f"{name}: got {new!r}, but the run in {file.parent} began with {old!r}; resume with the settings it "
                f"began with (only {', '.join(sorted(MAY_CHANGE))} may change) or start a new --out"
            )


@dataclass
class Base:
    """What sft and dpo start from: a checkpoint, its architecture and tokenizer, and the row length to train with."""

    checkpoint: Path
    model: ModelConfig
    tokenizer: Tokenizer
    seq_len: int

    def load(self, device: torch.device) -> DeepseekV3:
        with device:
            model = DeepseekV3(self.model)
        load_checkpoint(self.checkpoint, model)
        return model


def open_base(config: SFTConfig | DPOConfig, run: Run) -> Base:
    """The run's own checkpoint on resume (the base may be gone by then), else the one `config.base` names.

    InputError when there is none, or when `config.seq_len` is longer than the model allows.
    """
    if run.checkpoint is None and not config.base:
        raise InputError("--from: not given; name the run folder or checkpoint to start from")
    checkpoint = run.checkpoint or resolve(config.base)
    model = load_model_config(checkpoint)
    longest = model.max_position_embeddings
    seq_len = config.seq_len or read_state(checkpoint).get("seq_len") or min(longest, DEFAULT_SEQ_LEN)
    if seq_len > longest:
        raise InputError(f"seq_len: got {seq_len}, but the model in {checkpoint} takes at most {longest} tokens")
    return Base(checkpoint, model, checkpoint_tokenizer(checkpoint, model), seq_len)


def steps_for(settings: TrainConfig, epochs: float | None, items: int) -> TrainConfig:
    """`settings` with the steps that `epochs` passes over `items` (rows or pairs) take; unchanged without epochs."""
    if epochs is None:
        return settings
    per_step = settings.batch_size * settings.grad_accumulation_steps
    return dataclasses.replace(settings, steps=max(1, math.ceil(epochs * items / per_step)))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The run folder to ourselves, as long as this process lives; where a file system has no locks, without."""
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock(folder, out)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another command is at work in this run; wait for it, or give another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextlib.contextmanager
def open_run(config: StageConfig, resume: bool) -> Iterator[Run]:
    """The run folder `config.out`, with `config` written down as config.toml, while signals are watched.

    InputError when it is not empty and `resume` is False, when it is no run folder, or when a setting has changed. With
    `resume` and no checkpoint the run starts fresh. A fresh run that fails before its first checkpoint leaves nothing.
    """
    if not config.out:
        raise InputError("--out: not given; name a folder for the run")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out wants a folder")
    config = absolute(config)
    started = [path.name for path in out.iterdir() if not is_leftover(path)] if out.exists() else []
    if started and not resume:
        raise InputError(f"{out}: not empty; add --resume to continue the run in it, or give another --out")
    if started and CONFIG not in started:
        raise InputError(f"{out}: no run to resume (it holds no {CONFIG}) and not empty; give another --out")
    if started:
        _require_unchanged(config, out / CONFIG)
    out.mkdir(parents=True, exist_ok=True)
    signals = Signals()
    with answered_by(signals.handle, *STOPS), _alone(out):
        try:
            remove_leftovers(out)
            if not started:
                atomic_write(out / CONFIG, to_toml(config))
            yield Run(out, latest_checkpoint(out), signals)
        except BaseException:
            if not started and latest_checkpoint(out) is None:
                shutil.rmtree(out, ignore_errors=True)
            raise
