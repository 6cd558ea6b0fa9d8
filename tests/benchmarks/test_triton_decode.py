"""vLLM's and sglang's decoding is handed the case's own problem: stand-ins in packages of the same layout, which import
what the real files import and read the arguments where these do, must agree with the case's reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import triton_decode
from benchmarks.ops import mla_decode as decode_cases
from benchmarks.protocol import judge

VLLM = """
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

assert not current_platform.is_rocm() and triton.language is tl


def decode_attention_fwd(
    q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale, page_size=1,
    logit_cap=0.0, k_scale=None, v_scale=None, is_mla=False,
):
    assert is_mla and k_scale == v_scale == 1 and lse.shape == q.shape[:2]
    assert attn_logits.shape == (*q.shape[:2], num_kv_splits, v_buffer.shape[-1] + 1)
    for b, length in enumerate(b_seq_len.tolist()):
        index = torch.arange(length)
        places = req_to_token[b][index // page_size], index % page_size, 0
        p = (q[b] @ k_buffer[places].T * sm_scale).softmax(-1)
        o[b] = p @ v_buffer[places]
"""
SGLANG = {
    "score_mod": "def unpack_aux_tensors(score_mod, aux_tensors): ...\n",
    "metadata": """
class Kernel:
    def __getitem__(self, grid):
        return self.run

    def run(self, splits, lengths, sequences, group, heads, kv_heads, most, cores, MAX_NUM_SEQ):
        assert len(splits) == len(lengths) == sequences <= MAX_NUM_SEQ and group == kv_heads == 1 and cores > 0
        splits.fill_(most)


get_num_kv_splits_triton = Kernel()
""",
    "decode_attention": """
from sglang.kernels.ops.attention.score_mod import unpack_aux_tensors
from sglang.srt.environ import envs
from sglang.srt.utils import get_device_core_count, is_gfx95_supported, is_gfx1250_supported, is_hip

assert not is_hip() and callable(unpack_aux_tensors)


def decode_attention_fwd(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits, sm_scale,
    k_scale, v_scale, logit_cap=0.0, sinks=None, xai_temperature_len=-1, has_mla=False,
):
    assert has_mla and k_scale == v_scale == 1 and (num_kv_splits <= max_kv_splits).all()
    assert attn_logits.shape == (*q.shape[:2], max_kv_splits, v_buffer.shape[-1])
    assert attn_lse.shape == attn_logits.shape[:3]
    for b in range(len(q)):
        places = kv_indices[kv_indptr[b] : kv_indptr[b + 1]], 0
        p = (q[b] @ k_buffer[places].T * sm_scale).softmax(-1)
        o[b] = p @ v_buffer[places]
""",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    files = {f"sglang/kernels/ops/attention/{name}.py": text for name, text in SGLANG.items()}
    files["vllm/v1/attention/ops/triton_decode_attention.py"] = VLLM
    for package in ("vllm", "sglang"):
        files[f"{package}/__init__.py"] = "raise AssertionError('the package itself was imported')"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for load in (triton_decode.vllm, triton_decode.sglang):
        load.cache_clear()
    yield
    for load in (triton_decode.vllm, triton_decode.sglang):
        load.cache_clear()


@pytest.mark.parametrize("name", ["vllm triton", "sglang triton"])
@pytest.mark.parametrize("length", [3, 130, 1100])
def test_decode(packages: None, name: str, length: int) -> None:
    torch.manual_seed(0)
    case = decode_cases._case(2, 1, 3, length, 48, 16, torch.float32, torch.device("cpu"))
    inputs, contestant = case.make(), case.contestants[name]
    run = contestant.bind(inputs)
    run()
    assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert not any(module.split(".")[0] in ("vllm", "sglang") for module in sys.modules)


def test_several_new_tokens_are_not_theirs() -> None:
    case = decode_cases._case(2, 2, 3, 130, 512, 64, torch.float32, torch.device("cpu"))
    assert not {"vllm triton", "sglang triton"} & set(case.contestants)


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    triton_decode.vllm.cache_clear()
    with pytest.raises(ImportError, match=r"triton_decode_attention.py: no such file in vllm's folders"):
        triton_decode.vllm()
