"""Two peers of mla_decode written in Triton: vLLM's and sglang's, for one new token a sequence. Their files are loaded
as they lie in the installed wheels; what else of the two packages these import is stood in for.

Arguments and numbers of splits follow vllm/v1/attention/backends/mla/triton_mla.py of vLLM 0.23 and
sglang/srt/layers/attention/triton_backend.py of sglang 0.5.23.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from minids_kernels import _launch

from benchmarks.protocol import Inputs, Run

VLLM_KEYS_A_SPLIT = 512
SGLANG_SPLITS = 8  # --triton-attention-num-kv-splits
SGLANG_SEQUENCES = 256  # its schedule is worked out for at least as many


@contextlib.contextmanager
def standing_in(others: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """While it lasts, imports of the named modules find ones that hold what is given."""
    before = {name: sys.modules.get(name) for name in others}
    for name, values in others.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        yield
    finally:
        for name, earlier in before.items():
            del sys.modules[name]
            if earlier is not None:
                sys.modules[name] = earlier


def load(package: str, path: str, others: Mapping[str, Mapping[str, Any]]) -> ModuleType:
    """The module at `path` in an installed package that is not imported. `others`: names of modules that it imports,
    and what these hold. What it imports relatively, when it is loaded or later, are modules loaded here."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / path for folder in folders if (Path(folder) / path).is_file()]
    if not files:
        raise ImportError(f"{path}: no such file in {package}'s folders {folders}")
    name = ".".join([f"{package}_files", *Path(path).with_suffix("").parts])
    own = importlib.util.spec_from_file_location(name, files[0])
    assert own is not None and own.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(own)
    with standing_in(others):
        own.loader.exec_module(module)
    return module


@functools.cache
def vllm() -> ModuleType:
    others = {
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=lambda: False)},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
    }
    return load("vllm", "v1/attention/ops/triton_decode_attention.py", others)


@functools.cache
def sglang() -> tuple[ModuleType, ModuleType]:
    """Attention, and the kernel that says into how many splits each sequence goes."""
    score_mod = load("sglang", "kernels/ops/attention/score_mod.py", {})
    names = ("is_hip", "is_gfx95_supported", "is_gfx1250_supported", "get_device_core_count")
    others = {
        "sglang.kernels.ops.attention.score_mod": vars(score_mod),
        "sglang.srt.environ": {"envs": None},
        "sglang.srt.utils": {name: lambda *_: False for name in names},
    }
    attention = load("sglang", "kernels/ops/attention/decode_attention.py", others)
    return attention, load("sglang", "kernels/ops/attention/metadata.py", {})


def vllm_decode(inputs: Inputs, v_dim: int, scale: float) -> Run:
    q, cache, table, lengths = inputs.args
    batch, _, heads, _ = q.shape
    splits = triton.next_power_of_2(max(1, int(lengths.max()) // VLLM_KEYS_A_SPLIT))
    splits = min(splits, 2 * _launch.multiprocessors(q))
    rows, one = cache.unsqueeze(2), torch.ones((), device=q.device)
    out, lse = q.new_zeros(batch, heads, v_dim), q.new_zeros(batch, heads)
    parts = torch.empty(batch, heads, splits, v_dim + 1, device=q.device)

    def run() -> torch.Tensor:
        vllm().decode_attention_fwd(
            q.squeeze(1), rows, rows[..., :v_dim], out, lse, table, lengths, parts, splits, scale, cache.shape[1],
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out.unsqueeze(1)

    return run


def sglang_decode(inputs: Inputs, v_dim: int, scale: float) -> Run:
    """It knows places of rows, not pages."""
    q, cache, table, lengths = inputs.args
    batch, _, heads, width = q.shape
    attention, metadata = sglang()
    rows = cache.view(-1, 1, width)
    within = torch.arange(cache.shape[1], device=q.device)
    places = (table.long().unsqueeze(2) * cache.shape[1] + within).flatten(1)
    places = torch.cat([line[:length] for line, length in zip(places, lengths.tolist(), strict=True)])
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    out = q.new_zeros(batch, heads, v_dim)
    parts = torch.empty(batch, heads, SGLANG_SPLITS, v_dim, device=q.device)
    lse = torch.empty(batch, heads, SGLANG_SPLITS, device=q.device)
    splits = lengths.new_empty(batch)
    metadata.get_num_kv_splits_triton[(1,)](
        splits, lengths, batch, 1, heads, 1, SGLANG_SPLITS, _launch.multiprocessors(q),
        MAX_NUM_SEQ=max(SGLANG_SEQUENCES, triton.next_power_of_2(batch)),
    )  # fmt: skip

    def run() -> torch.Tensor:
        attention.decode_attention_fwd(
            q.squeeze(1), rows, rows[..., :v_dim], out, starts, places, parts, lse, splits, SGLANG_SPLITS, scale, 1.0,
            1.0, has_mla=True,
        )  # fmt: skip
        return out.unsqueeze(1)

    return run
