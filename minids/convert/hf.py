"""Hugging Face folders of DeepSeek-V3 models: export of a checkpoint, import, and direct loading.

On disk every routed expert has its own three matrices (`model.layers.i.mlp.experts.e.gate_proj.weight`, ...). The
multi-token-prediction modules are the layers after the last (`model.layers.{N}.enorm/hnorm/eh_proj/shared_head.norm`),
with copies of the shared embedding and head. FP8 matrices come with `weight_scale_inv`, one fp32 scale for each block
of 128 x 128. Sources: README_WEIGHTS.md of the official release; transformers 5.23, which stacks the experts as we do
(`conversion_mapping.py`, "qwen2_moe"). Tensors stream: beside the model one tensor, or one shard, is in memory.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minids.config import ModelConfig, PretrainConfig, to_toml
from minids.convert.hf_config import from_hf_config, to_hf_config
from minids.errors import InputError
from minids.files import atomic_directory, atomic_write, read_json, write_json
from minids.model.model import DeepseekV3
from minids.tokenizer import Tokenizer
from minids.train.checkpoint import load_checkpoint, load_model_config, read_state, resolve, save_checkpoint

M = TypeVar("M", bound=DeepseekV3)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALE = "_scale_inv"
GATE_BIAS = "e_score_correction_bias"  # stays fp32 whatever the weights are

Shape = tuple[int, ...]


# ---- names: one of our tensors is one or many of theirs


def _parts(name: str, shape: Shape) -> dict[str, Shape]:
    """Names and shapes of the Hugging Face tensors which, stacked and reshaped, are our tensor `name`."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".mlp.experts"):
        experts, rows, columns = shape
        projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        part = (rows // len(projections), columns)
        return {f"{stem}.{e}.{p}.weight": part for e in range(experts) for p in projections}
    return {name: shape}


def _shared_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors of the official layout which repeat another one: {copy: original}."""
    first = config.num_hidden_layers
    copies = {}
    for layer in range(first, first + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = HEAD
    return copies


def _model_shapes(config: ModelConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DeepseekV3(config).state_dict().items()}


def to_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under Hugging Face's names, one at a time; experts are views of their stack."""
    for name in state:
        tensor = state[name]
        parts = _parts(name, tuple(tensor.shape))
        if len(parts) == 1:
            yield next(iter(parts)), tensor
        else:
            yield from zip(parts, tensor.reshape(len(parts), *next(iter(parts.values()))).unbind(), strict=True)
    for copy, original in _shared_copies(config).items():
        yield copy, state[original].clone()
    if not config.n_shared_experts:  # transformers has these matrices, empty, and would report them missing
        for name in [name for name in state if name.endswith(".mlp.gate.weight")]:
            stem, width = name.removesuffix("gate.weight") + "shared_experts.", config.hidden_size
            yield stem + "gate_proj.weight", state[name].new_empty(0, width)
            yield stem + "up_proj.weight", state[name].new_empty(0, width)
            yield stem + "down_proj.weight", state[name].new_empty(width, 0)


def from_hf_state(
    source: Mapping[str, Tensor], config: ModelConfig, rope_interleave: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The model's whole state from Hugging Face tensors, one of ours at a time; `source` may read them on demand.

    `rope_interleave` False: the rotary rows are stored as two halves and are brought into pairs, the model's order.
    """
    for name, shape in _model_shapes(config).items():
        tensors = [source[part] for part in _parts(name, shape)]
        tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors).reshape(shape)
        yield name, tensor if rope_interleave else _pair_rotary_rows(name, tensor, config)


def _pair_rotary_rows(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if name.endswith((".q_proj.weight", ".q_b_proj.weight")):
        heads = config.num_attention_heads
    elif name.endswith(".kv_a_proj_with_mqa.weight"):
        heads = 1
    else:
        return tensor
    plain, rotary = tensor.unflatten(0, (heads, -1)).split_with_sizes(
        [tensor.shape[0] // heads - config.qk_rope_head_dim, config.qk_rope_head_dim], dim=1
    )
    rotary = rotary.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([plain, rotary], dim=1).flatten(0, 1)


# ---- reading


def dequantize_blocks(codes: Tensor, scale_inv: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """fp32 [N, K] = codes (float8_e4m3fn [N, K]) times the scale of each block ([ceil(N/128), ceil(K/128)])."""
    rows, columns = codes.shape
    scale = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return codes.float() * scale


class HFFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model folder, read on demand; FP8 blocks come back as fp32.

    Raises InputError when the folder is no DeepSeek-V3 model, or its tensors are not those its config.json describes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        values = read_json(self.path / "config.json")
        self.config = from_hf_config(values, str(self.path / "config.json"))
        self.rope_interleave = values.get("rope_interleave", True) is not False
        self.dtype = _torch_dtype(values.get("torch_dtype") or values.get("dtype"))
        self.block = self._block_size(values.get("quantization_config") or {})
        self._files: dict[str, Any] = {}
        for file in self._shards():
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a readable safetensors file ({error})") from None
            self._files |= dict.fromkeys(handle.keys(), handle)
        self._drop_absent_mtp()
        self._check_names()
        self._check_copies()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files[name].get_tensor(name)
        if name + SCALE in self._files:
            return dequantize_blocks(tensor, self._files[name + SCALE].get_tensor(name + SCALE), self.block)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._files if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _shards(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise InputError(f"{index}: no weight_map in it; wanted one from tensor to file name")
            return [self.path / name for name in sorted(set(weight_map.values()))]
        if (self.path / "model.safetensors").exists():
            return [self.path / "model.safetensors"]
        raise InputError(f"{self.path}: no model.safetensors and no model.safetensors.index.json in it")

    def _block_size(self, quantization: Mapping[str, Any]) -> tuple[int, int]:
        method = quantization.get("quant_method", "fp8")
        if method != "fp8":
            raise InputError(f"{self.path}/config.json: quantization {method!r}; only 'fp8' blocks can be read")
        block = quantization.get("weight_block_size") or [128, 128]
        if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
            raise InputError(f"{self.path}/config.json: weight_block_size is {block}; wanted rows and columns")
        return block[0], block[1]

    def _shape(self, name: str) -> Shape:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _stored_type(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def _drop_absent_mtp(self) -> None:
        """transformers' save_pretrained writes `num_nextn_predict_layers: 1` but never those layers."""
        first = self.config.num_hidden_layers
        prefixes = tuple(f"model.layers.{first + d}." for d in range(self.config.num_nextn_predict_layers))
        if prefixes and not any(name.startswith(prefixes) for name in self._files):
            warnings.warn(f"{self.path}: no multi-token-prediction layers in it; the model has none now", stacklevel=2)
            self.config.num_nextn_predict_layers = 0

    def _check_names(self) -> None:
        wanted: dict[str, Shape] = {}
        for name, shape in _model_shapes(self.config).items():
            wanted |= _parts(name, shape)
        missing = [name for name in wanted if name not in self._files]
        copies = _shared_copies(self.config)
        unexpected, misshapen = [], []
        for name in self._files:
            base = name.removesuffix(SCALE)
            if name != base and base in self._files:
                shape = self._shape(base)
                fit = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=False))
            elif name in wanted or name in copies:
                fit = wanted[copies.get(name, name)]
            else:
                # transformers writes empty matrices for zero shared experts; old versions the rotary frequencies
                if 0 not in self._shape(name) and not name.endswith("rotary_emb.inv_freq"):
                    unexpected.append(name)
                continue
            if self._shape(name) != fit:
                misshapen.append(f"{name} is {list(self._shape(name))}, not {list(fit)}")
            elif self._stored_type(name) == "F8_E4M3" and name + SCALE not in self._files:
                missing.append(name + SCALE)
        problems = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
            if names
        ]
        if problems:
            raise InputError(f"{self.path}: tensors are not those config.json describes: {'; '.join(problems)}")

    def _check_copies(self) -> None:
        for copy, original in _shared_copies(self.config).items():
            if copy in self._files and not torch.equal(self[copy], self[original]):
                warnings.warn(f"{self.path}: {copy} differs from {original}; the model shares the latter", stacklevel=2)


def _torch_dtype(name: str | None) -> torch.dtype:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_hf(path: str | Path, model_class: type[M], dtype: torch.dtype | None = None) -> M:
    """A `model_class` with the weights of the Hugging Face folder `path`, in `dtype` (None: what config.json names).

    The router bias stays fp32. Raises InputError as HFFolder does; warns when the folder's multi-token-prediction
    layers are absent, or come with an embedding or head of their own.
    """
    folder = HFFolder(path)
    with torch.device("meta"):
        model = model_class(folder.config)
    for name, tensor in from_hf_state(folder, folder.config, folder.rope_interleave):
        wanted = torch.float32 if name.endswith(GATE_BIAS) else dtype or folder.dtype
        # a copy: the file's tensors are views of its memory map
        model.load_state_dict({name: tensor.to(wanted, copy=True)}, strict=False, assign=True)
    return model


# ---- writing


def export_hf(
    path: str | Path, out: str | Path, dtype: str | None = None, max_shard_size: int = 5_000_000_000
) -> dict[str, Any]:
    """Writes a checkpoint (or a run folder's newest one) and its tokenizer as a Hugging Face folder.

    `dtype`: "fp32" or "bf16"; None keeps what the checkpoint holds, fp32. `max_shard_size`: bytes of tensors in a file;
    more than that makes shards and `model.safetensors.index.json`. Returns what was written. Raises InputError for a
    bad option, a damaged checkpoint, or an `out` that is not empty.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if max_shard_size < 1:
        raise InputError(f"--max-shard-size: got {max_shard_size}, wanted a number of bytes >= 1")
    checkpoint = resolve(path)
    model = DeepseekV3(load_model_config(checkpoint))
    tokenizer = checkpoint_tokenizer(checkpoint, model.config)
    load_checkpoint(checkpoint, model)
    config, torch_dtype = model.config, DTYPES[dtype or "fp32"]
    tensors = (
        (name, tensor if name.endswith(GATE_BIAS) else tensor.to(torch_dtype))
        for name, tensor in to_hf_state(model.state_dict(), config)
    )
    with atomic_directory(out) as folder:
        report = _write_shards(tensors, folder, max_shard_size)
        tokenizer.save(folder)
        write_json(folder / "config.json", to_hf_config(config, str(torch_dtype).removeprefix("torch.")))
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(
            folder / "generation_config.json", {name: number for name, number in ids.items() if number is not None}
        )
    return {"out": str(out), "checkpoint": str(checkpoint), "dtype": dtype or "fp32", **report}


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_size: int) -> dict[str, int]:
    files: list[list[str]] = []  # the tensors' names in each file so far
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        files.append(list(shard))
        try:
            save_file(shard, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise _system_error(error) from None
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "1.safetensors").rename(folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(files, 1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            (folder / f"{number}.safetensors").rename(folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return {"bytes": total, "tensors": sum(map(len, files)), "shards": len(files)}


def _system_error(error: SafetensorError) -> Exception:
    """The operating system's error that safetensors tells of in words, "... (os error 28)"; any other as it is."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


def import_hf(hf_dir: str | Path, out: str | Path) -> dict[str, Any]:
    """Writes a Hugging Face DeepSeek-V3 folder as a run folder with one checkpoint, `step_000000`, in fp32.

    Raises InputError when it is no such model, lacks a tokenizer, or the tokenizer has ids that the model has not.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    model = load_hf(hf_dir, DeepseekV3, torch.float32)
    tokenizer = load_tokenizer(hf_dir, model.config)
    with atomic_directory(out) as folder:
        tokenizer.save(folder / "tokenizer")
        save_checkpoint(folder, 0, model, None, {"stage": "import", "source": str(hf_dir)}, keep=1)
        run = PretrainConfig(tokenizer=str(out / "tokenizer"), out=str(out), model=model.config)
        atomic_write(folder / "config.toml", to_toml(run))
    return {"out": str(out), "source": str(hf_dir), "parameters": model.num_parameters()}


def load_tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in `folder`; InputError when it has more ids than the model has embeddings."""
    tokenizer = Tokenizer.load(Path(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}"
        )
    return tokenizer


def checkpoint_tokenizer(checkpoint: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer beside `checkpoint`; InputError also when it is not the one that was there when that was written:
    the model knows its ids by what they meant then."""
    folder = checkpoint.parent / "tokenizer"
    tokenizer, former = load_tokenizer(folder, config), read_state(checkpoint).get("tokenizer")
    if former not in (None, tokenizer.fingerprint):  # None: written by a version that did not note it
        raise InputError(
            f"{folder}: holds another tokenizer ({tokenizer.fingerprint[:12]}) than the model in {checkpoint} was "
            f"trained with ({former[:12]}); put that one back"
        )
    return tokenizer
