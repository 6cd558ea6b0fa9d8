"""What FlashMLA and FlashAttention-3 are handed is the case's own problem: stand-ins that read the arguments at the
places where these operators do, and know of nothing else, must agree with its reference."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from minids_kernels import mla_attention, mla_decode
from torch import Tensor

from benchmarks import flash
from benchmarks.ops import mla_decode as decode_cases
from benchmarks.ops import mla_prefill as prefill_cases
from benchmarks.protocol import Case, judge

CPU = torch.device("cpu")


def dense_decode_fwd(
    q: Tensor, k_cache: Tensor, head_size_v: int, seqlens_k: Tensor, block_table: Tensor, softmax_scale: float,
    is_causal: bool, tile_scheduler_metadata: Tensor | None, num_splits: Tensor | None, out: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert is_causal and k_cache.shape[1:3] == (64, 1) and seqlens_k.dtype == block_table.dtype == torch.int32
    assert (tile_scheduler_metadata is None) == (num_splits is None)
    out, lse = mla_decode(q, k_cache.squeeze(2), block_table, seqlens_k, head_size_v, softmax_scale)
    return out, lse, torch.zeros(1), torch.zeros(1)


def fa3_fwd(*args: Any) -> list[Tensor]:
    """hopper/flash_api.cpp's mha_fwd, with vLLM's three arguments of context parallelism behind."""
    assert len(args) == 37
    q, k, v, _, _, q_v, _, cu_seqlens, cu_seqlens_k, _, _, seqused_k, longest, longest_k, table = args[:15]
    assert args[15:23] == (None,) * 8 and args[24:30] == (True, -1, -1, 0.0, True, None)
    assert args[30:] == (0, None, 0, None, 1, 0, None)
    assert longest == int(cu_seqlens.diff().max())
    if table is None:
        assert q_v is None and seqused_k is None and longest_k == int(cu_seqlens_k.diff().max())
        return [mla_attention(q, k, v, cu_seqlens, True, args[23], cu_seqlens_k=cu_seqlens_k)]
    assert cu_seqlens_k is None and longest_k == int(seqused_k.max())
    whole = torch.cat((q_v, q), -1).unflatten(0, (len(table), -1))
    out, _ = mla_decode(whole, torch.cat((v, k), -1).squeeze(2), table, seqused_k, v.shape[-1], args[23])
    return [out.flatten(0, 1)]


def agree(case: Case, name: str) -> None:
    torch.manual_seed(0)
    inputs, contestant = case.make(), case.contestants[name]
    run = contestant.bind(inputs)
    run()
    assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {
        "_flashmla_C": SimpleNamespace(dense_decode_fwd=dense_decode_fwd), "_vllm_fa3_C": SimpleNamespace(fwd=fa3_fwd),
    }  # fmt: skip
    monkeypatch.setattr(flash, "library", libraries.__getitem__)


@pytest.mark.parametrize("name", ["flashmla", "fa3"])
@pytest.mark.parametrize("new", [1, 3])
def test_decode(name: str, new: int) -> None:
    agree(decode_cases._case(2, new, 3, 130, 512, 64, torch.float32, CPU), name)


def test_prefill() -> None:
    agree(prefill_cases._case(2, 24, 70, 2, 16, 8, 16, 32, torch.float32, CPU), "fa3")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="_flashmla_C: no such library in vLLM's folders"):
        flash.library("_flashmla_C")
