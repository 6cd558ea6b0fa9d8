"""Checkpoints: folders `step_000123/` of safetensors and json that are whole or absent, and checksummed.

    model.safetensors      parameters and buffers, fp32, under the model's own names
    config.json            the architecture under Hugging Face's `DeepseekV3Config` names
    optimizer.safetensors  AdamW's moments, `<parameter>.exp_avg` and so on (absent in an imported model)
    state.json             step, loader position, random state, and the SHA-256 of every file, of the run's tokenizer
                           and of itself

A checkpoint is filled under a temporary name, flushed to disk and renamed: a kill at any instant leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minids.config import ModelConfig
from minids.convert.hf_config import from_hf_config, to_hf_config
from minids.errors import InputError
from minids.files import atomic_directory, read_json, sha256, write_json
from minids.train.optim import AdamW

MODEL, CONFIG, OPTIMIZER, STATE = "model.safetensors", "config.json", "optimizer.safetensors", "state.json"
_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\..+\.\d+\.(tmp|old)")


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    if not run_dir.is_dir():
        return []
    steps = {int(m[1]): path for path in run_dir.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir()}
    return [steps[step] for step in sorted(steps)]


def is_leftover(path: Path) -> bool:
    """Whether minids.files made `path` as a temporary that only a killed process leaves behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(run_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed process left half-written or half-deleted directly in a run folder."""
    for path in Path(run_dir).iterdir():
        if is_leftover(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: AdamW | None,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `run_dir/step_<step>` and deletes all but the newest `keep` checkpoints. `model.config` is a ModelConfig.

    `state`: json-able; the SHA-256 of the run's tokenizer.json is added. InputError when the disk refuses; the
    checkpoints before it stay.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"step_{step:06d}"
    config: Any = model.config
    try:
        with atomic_directory(path) as folder:
            save_file(_tensors(model), folder / MODEL)
            write_json(folder / CONFIG, to_hf_config(config))
            if optimizer is not None:
                save_file(_optimizer_tensors(model, optimizer), folder / OPTIMIZER)
            files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
            tokenizer = run_dir / "tokenizer" / "tokenizer.json"
            fingerprint = sha256(tokenizer) if tokenizer.is_file() else None
            full = {**state, "step": step, "files": files, "tokenizer": fingerprint}
            write_json(folder / STATE, {**full, "checksum": _checksum(full)})
    except (OSError, SafetensorError) as error:
        last = latest_checkpoint(run_dir)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise InputError(
            f"{path}: cannot be written ({error}); make room and run again with --resume; {kept}"
        ) from error
    for old in _checkpoints(run_dir)[:-keep]:
        doomed = old.with_name(f".{old.name}.{os.getpid()}.old")
        os.replace(old, doomed)  # so that a kill while deleting leaves nothing that looks like a checkpoint
        shutil.rmtree(doomed)
    return path


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The run's newest checkpoint, or None."""
    found = _checkpoints(Path(run_dir))
    return found[-1] if found else None


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder meant by `path`: a checkpoint itself, or the newest one of a run folder."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder")
    if (path / STATE).is_file():
        return path.resolve()  # its tokenizer lies beside it, not beside a link to it
    found = latest_checkpoint(path)
    if found is None:
        raise InputError(f"{path}: neither a checkpoint (no {STATE}) nor a run folder with step_* checkpoints in it")
    return found


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`state.json` of a checkpoint folder; InputError when it was edited or cut off."""
    file = Path(path) / STATE
    state = read_json(file)
    if not isinstance(state, dict) or state.pop("checksum", None) != _checksum(state):
        raise InputError(f"{file}: does not match its own checksum: it was edited or cut off; use another checkpoint")
    return state


def _verify(path: Path, name: str, state: Mapping[str, Any]) -> Path:
    """The checkpoint's file `name`, known to hold what was written."""
    file = path / name
    if name not in state["files"]:
        raise InputError(f"{path}: this checkpoint was written without {name}, so it cannot be resumed from")
    if not file.is_file():
        raise InputError(f"{file}: missing from the checkpoint; use another checkpoint")
    if sha256(file) != state["files"][name]:
        raise InputError(
            f"{file}: does not match its checksum in {STATE}: it was edited or cut off; use another checkpoint"
        )
    return file


def load_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of a checkpoint (or of a run folder's newest one)."""
    path = resolve(path)
    file = _verify(path, CONFIG, read_state(path))
    return from_hf_config(read_json(file), str(file))


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: AdamW | None = None) -> dict[str, Any]:
    """Fills `model`, and `optimizer` when given, in place and returns the state saved with them (plus step, files).

    InputError naming the file that is missing, changed, or does not fit the model.
    """
    path = resolve(path)
    state = read_state(path)
    file = _verify(path, MODEL, state)
    optimizer_file = _verify(path, OPTIMIZER, state) if optimizer is not None else None
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:  # names or shapes differ
        raise InputError(f"{file}: does not fit the model: {' '.join(str(error).split())}") from None
    if optimizer is not None and optimizer_file is not None:
        saved = load_file(optimizer_file)
        for name, parameter in model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in saved]
            if keys:  # none: a parameter that has had no gradient yet
                # a copy: the file's tensors are views of its memory map, and the checkpoint may be deleted
                optimizer.state[parameter] = {k: saved[f"{name}.{k}"].to(parameter.device, copy=True) for k in keys}
    return state
