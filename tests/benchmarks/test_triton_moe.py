"""vLLM's experts are handed the case's own problem: stand-ins in a package of the same layout, which import what the
real files import and read the arguments where these do, must agree with the case's reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import triton_moe
from benchmarks.ops import moe as cases
from benchmarks.protocol import judge

ALIGN = """
import torch
from vllm import _custom_ops as ops
from vllm.triton_utils import triton
from vllm.utils.math_utils import round_up

assert round_up(5, 4) == 8 and triton.cdiv(5, 4) == 2


def moe_align_block_size(topk_ids, block_size, num_experts):
    assert topk_ids.dtype == torch.int32
    return ops.moe_align_block_size(topk_ids, block_size, num_experts)
"""
EXPERTS = """
import functools

import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, _get_config_dtype_str,
)
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(__name__)
direct_register_custom_op(op_name="fused_experts")
assert triton.language is tl and not current_platform.is_rocm() and not envs.VLLM_BATCH_INVARIANT


def fused_experts(activation: MoEActivation = MoEActivation.SILU, config: FusedMoEQuantConfig | None = None): ...


def get_moe_configs(experts, inner, dtype):
    logger.warning_once("no table", scope="global")
    return {} if experts == 4 else {1: {"BLOCK_SIZE_M": 2}, 64: {"BLOCK_SIZE_M": 8}}


def get_default_config(tokens, experts, inner, width, top_k, dtype, block_shape):
    assert experts == 4 and dtype is None and block_shape is None
    return {"BLOCK_SIZE_M": 16}


def try_get_optimal_moe_config(*args):
    raise AssertionError("imports the package")


def fused_experts_impl(hidden_states, w1, w2, topk_weights, topk_ids, activation="silu"):
    (tokens, width), (experts, both, _), top_k = hidden_states.shape, w1.shape, topk_ids.size(1)
    config = functools.partial(
        try_get_optimal_moe_config, w1.size(), w2.size(), top_k, _get_config_dtype_str(dtype=w1.dtype), block_shape=None
    )(tokens)
    assert config == {"BLOCK_SIZE_M": 16 if experts == 4 else 2 if tokens < 32 else 8}
    inner = mk.FusedMoEExpertsModular.adjust_N_for_activation(both, MoEActivation.from_str(activation))
    x, scale = moe_kernel_quantize_input(A=hidden_states, A_scale=None, quant_dtype=None)
    assert scale is None and topk_weights.dtype == torch.float32
    ids = moe_align_block_size(topk_ids, config["BLOCK_SIZE_M"], experts)
    gate_up = torch.einsum("td,tknd->tkn", x, w1[ids]).flatten(0, 1)
    hidden = gate_up.new_empty(tokens * top_k, inner)
    apply_moe_activation(activation, hidden, gate_up)
    y = torch.einsum("tkn,tkdn->tkd", hidden.unflatten(0, (tokens, top_k)), w2[ids]) * topk_weights.unsqueeze(2)
    out = torch.empty_like(x)
    ops.moe_sum(y, out)
    return out
"""


def silu_and_mul(out: Tensor, gate_up: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "vllm" / triton_moe.FOLDER
    folder.mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").write_text("raise AssertionError('the package itself was imported')")
    (folder / "moe_align_block_size.py").write_text(ALIGN)
    (folder / "fused_moe.py").write_text(EXPERTS)
    monkeypatch.syspath_prepend(tmp_path)
    operators = SimpleNamespace(
        moe_align_block_size=lambda ids, block, experts: ids.long(), silu_and_mul=silu_and_mul,
        moe_sum=lambda y, out: out.copy_(y.sum(1)),
    )  # fmt: skip
    monkeypatch.setattr(triton_moe, "operators", lambda: operators)
    triton_moe.vllm.cache_clear()
    yield
    triton_moe.vllm.cache_clear()


@pytest.mark.parametrize(("tokens", "experts"), [(9, 4), (9, 6), (70, 6)])
def test_experts(package: None, tokens: int, experts: int) -> None:
    torch.manual_seed(0)
    case = cases._case(tokens, 16, 12, experts, 2, torch.float32, "fwd", torch.device("cpu"))
    inputs, contestant = case.make(), case.contestants["vllm triton"]
    run = contestant.bind(inputs)
    assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert not any(module.split(".")[0] == "vllm" for module in sys.modules)


def test_no_backward() -> None:
    case = cases._case(9, 16, 12, 4, 2, torch.float32, "fwd+bwd", torch.device("cpu"))
    assert "vllm triton" not in case.contestants


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    triton_moe.operators.cache_clear()
    with pytest.raises(ImportError, match="_moe_C: no such library in vLLM's folders"):
        triton_moe.operators()
