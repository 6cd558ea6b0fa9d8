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
from benchmarks.protocol import Absent, judge

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
QUANTISATION = """
import torch
import vllm.envs as envs
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils.quant_utils import get_fp8_min_max
from vllm.model_executor.layers.quantization.utils.w8a8_utils import all_close_1d, per_tensor_dequantize
from vllm.model_executor.parameter import (
    BlockQuantScaleParameter, ChannelQuantScaleParameter, PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.deep_gemm import get_tma_aligned_size, is_deep_gemm_e8m0_used, transform_sf_into_required_layout
from vllm.utils.torch_utils import direct_register_custom_op

direct_register_custom_op("quantise", init_logger, fake_impl=None)
assert not current_platform.is_xpu() and current_platform.is_cuda_alike() == torch.cuda.is_available()


def per_token_group_quant_fp8(x, group_size, dtype=None):
    assert not is_deep_gemm_e8m0_used() and dtype == current_platform.fp8_dtype() == torch.float8_e4m3fn
    low, high = get_fp8_min_max()
    groups = x.unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1) / high
    return (groups / scale.unsqueeze(-1)).clamp(low, high).to(dtype).flatten(-2), scale
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
    assert experts == 4
    return {"BLOCK_SIZE_M": 16}


def try_get_optimal_moe_config(w1_shape, w2_shape, top_k, dtype, M, block_shape=None):
    from vllm.model_executor.layers.fused_moe import get_config

    assert dtype == ("fp8_w8a8" if block_shape else None) and not get_config()
    tables = get_moe_configs(w2_shape[0], w2_shape[2], dtype)
    if tables:
        return tables[min(tables, key=lambda size: abs(size - M))]
    return get_default_config(M, w2_shape[0], w2_shape[2], w1_shape[2], top_k, dtype, block_shape)


def wide(codes, scale, block_shape):
    if block_shape is None:
        assert scale is None
        return codes
    rows = block_shape[0] if codes.dim() == 3 else 1
    return codes.float() * scale.repeat_interleave(rows, -2).repeat_interleave(block_shape[1], -1)


def fused_experts_impl(
    hidden_states, w1, w2, topk_weights, topk_ids, activation="silu", use_fp8_w8a8=False, w1_scale=None, w2_scale=None,
    block_shape=None,
):
    (tokens, width), (experts, both, _), top_k = hidden_states.shape, w1.shape, topk_ids.size(1)
    quant_dtype = current_platform.fp8_dtype() if use_fp8_w8a8 else None
    dtype = _get_config_dtype_str(use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a16=False, dtype=hidden_states.dtype)
    config = functools.partial(
        try_get_optimal_moe_config, w1.size(), w2.size(), top_k, dtype, block_shape=block_shape
    )(tokens)
    assert config == {"BLOCK_SIZE_M": 16 if experts == 4 else 2 if tokens < 32 else 8}
    inner = mk.FusedMoEExpertsModular.adjust_N_for_activation(both, MoEActivation.from_str(activation))

    def quantised(rows):
        kind = dict(quant_dtype=quant_dtype, per_act_token_quant=False, block_shape=block_shape)
        return wide(*moe_kernel_quantize_input(A=rows, A_scale=None, **kind), block_shape)

    assert topk_weights.dtype == torch.float32
    ids = moe_align_block_size(topk_ids, config["BLOCK_SIZE_M"], experts)
    w1, w2 = wide(w1, w1_scale, block_shape), wide(w2, w2_scale, block_shape)
    gate_up = torch.einsum("td,tknd->tkn", quantised(hidden_states), w1[ids]).flatten(0, 1)
    hidden = gate_up.new_empty(tokens * top_k, inner)
    apply_moe_activation(activation, hidden, gate_up)
    hidden = quantised(hidden).unflatten(0, (tokens, top_k))
    y = torch.einsum("tkn,tkdn->tkd", hidden, w2[ids]) * topk_weights.unsqueeze(2)
    out = torch.empty_like(hidden_states)
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
    quantisation = tmp_path / "vllm" / triton_moe.QUANTISATION / "fp8_utils.py"
    quantisation.parent.mkdir(parents=True)
    quantisation.write_text(QUANTISATION)
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


@pytest.mark.parametrize("experts", [4, 6])
def test_fp8(package: None, experts: int) -> None:
    torch.manual_seed(0)
    case = cases._case(9, 256, 128, experts, 2, torch.float32, "fwd", torch.device("cpu"))
    case = cases._fp8_case(case, "fwd")
    inputs, contestant = case.make(), case.contestants["vllm triton"]
    run = contestant.bind(inputs)
    assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert judge(run(), case.contestants["minids"].bind(inputs)(), 1e-5).error < 1e-5  # the same roundings


def test_fp8_widths() -> None:
    case = cases._fp8_case(cases._case(9, 128, 64, 4, 2, torch.float32, "fwd", torch.device("cpu")), "fwd")
    with pytest.raises(Absent, match="multiples of 128"):
        case.contestants["vllm triton"].bind(case.make())


def test_no_backward() -> None:
    case = cases._case(9, 16, 12, 4, 2, torch.float32, "fwd+bwd", torch.device("cpu"))
    assert "vllm triton" not in {*case.contestants, *cases._fp8_case(case, "fwd+bwd").contestants}


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    triton_moe.operators.cache_clear()
    with pytest.raises(ImportError, match="_moe_C: no such library in vLLM's folders"):
        triton_moe.operators()
