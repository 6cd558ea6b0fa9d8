"""sglang's experts are handed the case's own problem: stand-ins in a package of the same layout, which import what the
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

from benchmarks import sglang_moe
from benchmarks.ops import moe as cases
from benchmarks.protocol import judge

KERNELS = """
import torch
from sglang.kernels.jit.utils import is_arch_support_pdl
from sglang.kernels.ops.quantization.fp8_kernel import (
    per_token_group_quant_fp8, scaled_fp8_quant, sglang_per_token_group_quant_fp8,
)
from sglang.kernels.ops.quantization.int8_kernel import (
    per_token_group_quant_int8, per_token_quant_int8, sglang_per_token_group_quant_int8,
)
from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
from sglang.srt.environ import envs
from sglang.srt.layers.moe.utils import get_moe_padding_size
from sglang.srt.utils import cpu_has_amx_support, is_cpu, is_cuda, is_hip, is_sm90_supported

assert is_cuda() and is_sm90_supported() and not (is_cpu() or is_hip() or cpu_has_amx_support())
assert get_moe_padding_size(envs.SGLANG_USE_AITER.get()) == 0 and not is_batch_invariant_mode_enabled()


def invoke_fused_moe_kernel(A, B, C, topk_weights, experts, mul_routed_weight, top_k):
    assert is_arch_support_pdl() and topk_weights.dtype == torch.float32
    y = torch.einsum("rk,rnk->rn", A[torch.arange(len(experts)) // top_k], B[experts])
    C.view(y.shape).copy_(y * topk_weights.view(-1, 1) if mul_routed_weight else y)


def moe_sum_reduce_triton(input, output, routed_scaling_factor):
    torch.sum(input, dim=1, out=output).mul_(routed_scaling_factor)


def act_and_mul_triton(): ...


def support_tensor_descriptor(): ...
"""
SMALL = """
from sglang.kernels.jit.utils import is_arch_support_pdl

SMALL_NUMEL_LIMIT = 8


def moe_align_small_numel(topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_tokens_post_pad):
    assert is_arch_support_pdl() and num_experts == 6 + 1
    expert_ids.copy_(topk_ids.flatten())
"""
ALIGN = """
import torch
from sglang.srt.environ import envs
from sglang.srt.utils import is_cuda, is_hip, is_musa, is_xpu

assert not (envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get() or is_hip() or is_musa() or is_xpu())
if is_cuda():
    from sglang.kernels.ops.moe import moe_align_block_size as sgl_moe_align_block_size
    from sglang.kernels.ops.moe.moe_align_small_numel import SMALL_NUMEL_LIMIT, moe_align_small_numel


def moe_align_block_size(topk_ids, block_size, num_experts):
    assert topk_ids.dtype == torch.int32
    n = topk_ids.numel()
    buffers = [topk_ids.new_empty(size) for size in (n, n, 1)]
    if n <= SMALL_NUMEL_LIMIT:
        moe_align_small_numel(topk_ids, num_experts + 1, block_size, *buffers)
    else:
        cumsum = topk_ids.new_empty(num_experts + 2)
        sgl_moe_align_block_size(topk_ids, num_experts + 1, block_size, *buffers, cumsum, True, False)
    return buffers[1]
"""
TABLES = """
import logging

from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import get_device_name, is_hip

logger = logging.getLogger(__name__)
assert callable(get_device_name) and not is_hip()


def get_config_dtype_str(dtype): ...


def try_get_optimal_moe_config(tokens):
    from sglang.srt.layers.moe.moe_runner.triton_utils import get_config

    assert not get_exec().deterministic.enable_deterministic_inference
    logger.warning_once("no table for %d", tokens)
    return get_config() or {"BLOCK_SIZE_M": 16}
"""
EXPERTS = """
import logging

import torch
from sglang.kernels.jit.utils import is_arch_support_pdl
from sglang.kernels.ops.moe.fused_moe_triton_kernels import (
    act_and_mul_triton, invoke_fused_moe_kernel, moe_sum_reduce_triton, support_tensor_descriptor,
)
from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.utils import get_moe_padding_size, get_moe_runner_backend
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import cpu_has_amx_support, get_bool_env_var, is_cpu, is_cuda, is_hip, is_musa, is_xpu
from sglang.srt.utils.custom_op import register_custom_op

from .fused_moe_triton_config import get_config_dtype_str, try_get_optimal_moe_config
from .moe_align_block_size import moe_align_block_size

if is_cuda():
    from sgl_kernel import moe_sum_reduce
    from sglang.kernels.ops.activation.activation import (
        gelu_and_mul, gelu_tanh_and_mul, silu_and_mul, silu_and_mul_with_activation_rounding,
    )
    from sglang.kernels.ops.quantization.per_token_group_quant import per_token_group_quant

logger = logging.getLogger(__name__)
assert get_moe_padding_size(get_bool_env_var("SGLANG_USE_AITER")) == 0
assert not (is_cpu() or is_hip() or is_musa() or is_xpu() or cpu_has_amx_support())


@register_custom_op(out_shape="hidden_states")
def outplace_fused_experts(hidden_states): ...


def fused_moe(moe_runner_config=MoeRunnerConfig()): ...


def fused_experts_impl(hidden_states, w1, w2, topk_weights, topk_ids, filter_expert=True):
    assert not (filter_expert or get_exec().moe.enable_fused_moe_sum_all_reduce or is_batch_invariant_mode_enabled())
    logger.warning_once("here")
    top_k, (experts, both, _) = topk_ids.shape[1], w1.shape
    ids = moe_align_block_size(topk_ids, try_get_optimal_moe_config(len(hidden_states))["BLOCK_SIZE_M"], experts)
    gate_up = hidden_states.new_empty(topk_ids.numel(), both)
    invoke_fused_moe_kernel(hidden_states, w1, gate_up, topk_weights, ids, False, top_k)
    hidden = gate_up.new_empty(len(gate_up), both // 2)
    silu_and_mul(gate_up, hidden, **{"expert_ids": ids, "expert_step": 1})
    y = hidden_states.new_empty(len(hidden_states), top_k, w2.shape[1])
    invoke_fused_moe_kernel(hidden, w2, y, topk_weights, ids, True, 1)
    with use_symmetric_memory(get_parallel().tp_group, disabled=not is_allocation_symmetric()):
        out = torch.empty_like(hidden_states)
    moe_sum_reduce(y, out, 1.0)
    return out
"""
FILES = {
    f"{sglang_moe.KERNELS}/fused_moe_triton_kernels.py": KERNELS,
    f"{sglang_moe.KERNELS}/moe_align_small_numel.py": SMALL,
    f"{sglang_moe.FOLDER}/moe_align_block_size.py": ALIGN,
    f"{sglang_moe.FOLDER}/fused_moe_triton_config.py": TABLES,
    f"{sglang_moe.FOLDER}/fused_moe.py": EXPERTS,
}


def align(
    ids: Tensor, experts: int, block: int, rows: Tensor, expert_ids: Tensor, padded: Tensor, expert_map: None
) -> None:
    assert experts == 6
    expert_ids.copy_(ids.flatten())


def silu_and_mul(out: Tensor, gate_up: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path, text in FILES.items():
        file = tmp_path / "sglang" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "sglang/__init__.py").write_text("raise AssertionError('the package itself was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    operators = SimpleNamespace(moe_align_block_size=align, silu_and_mul=silu_and_mul)
    monkeypatch.setattr(sglang_moe, "operators", lambda: operators)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sglang_moe.sglang.cache_clear()
    yield
    sglang_moe.sglang.cache_clear()


@pytest.mark.parametrize("tokens", [3, 70])
def test_experts(package: None, tokens: int) -> None:
    torch.manual_seed(0)
    case = cases._case(tokens, 16, 12, 6, 2, torch.float32, "fwd", torch.device("cpu"))
    inputs, contestant = case.make(), case.contestants["sglang triton"]
    run = contestant.bind(inputs)
    assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert not any(module.split(".")[0] in ("sglang", "sgl_kernel") for module in sys.modules)


def test_no_backward() -> None:
    case = cases._case(9, 16, 12, 4, 2, torch.float32, "fwd+bwd", torch.device("cpu"))
    assert "sglang triton" not in case.contestants
