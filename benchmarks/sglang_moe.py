"""A peer of moe_experts' forward: sglang's Triton experts. Their files are loaded as they lie in the installed wheel:
kernels, tuned tables and the choice of a launch are sglang 0.5.23's. What else of the package they import is stood in
for.

sglang takes the alignment of segments and the sum over experts from a second wheel, sglang-kernel, and compiles its
activation when it runs. In their place: vLLM's compiled alignment and activation, and the Triton kernel with which
sglang itself sums over few tokens' experts.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.triton_decode import load, standing_in
from benchmarks.triton_moe import operators

KERNELS, FOLDER = "kernels/ops/moe", "srt/layers/moe/moe_runner/triton_utils"
ROOM = f"sglang.{FOLDER.replace('/', '.')}"


def _never(*_: Any, **__: Any) -> bool:
    return False


def _align(ids: Tensor, groups: int, block: int, rows: Tensor, experts: Tensor, padded: Tensor, *_: Any) -> None:
    """`groups` counts one more than there are experts: sglang's first is for rows of none of them. Here are no such."""
    operators().moe_align_block_size(ids, groups - 1, block, rows, experts, padded, None)


def _silu_and_mul(gate_up: Tensor, out: Tensor, **_: Any) -> None:
    """Of all rows, also where it may leave some out."""
    operators().silu_and_mul(out, gate_up)


@functools.cache
def sglang() -> ModuleType:
    capability = torch.cuda.get_device_capability()
    launches = {"is_arch_support_pdl": lambda: capability[0] >= 9}
    invariant = {"is_batch_invariant_mode_enabled": _never}
    padding = {"get_moe_padding_size": lambda _: 0, "get_moe_runner_backend": None}
    names = ("is_cpu", "is_hip", "is_musa", "is_xpu", "cpu_has_amx_support", "get_bool_env_var")
    utils = {
        **dict.fromkeys(names, _never),
        "is_cuda": lambda: True, "is_sm90_supported": lambda: capability[0] == 9,
        "get_device_name": torch.cuda.get_device_name,
    }  # fmt: skip
    unset = SimpleNamespace(get=_never)
    envs = {"envs": SimpleNamespace(SGLANG_USE_AITER=unset, SGLANG_EXPERIMENTAL_LORA_OPTI=unset)}
    running = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )
    context = {"get_exec": lambda: running, "get_parallel": lambda: SimpleNamespace(tp_group=None)}
    quantisers = {
        "fp8": ("per_token_group_quant_fp8", "scaled_fp8_quant", "sglang_per_token_group_quant_fp8"),
        "int8": ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8"),
    }
    kernels = load("sglang", f"{KERNELS}/fused_moe_triton_kernels.py", {
        **{
            f"sglang.kernels.ops.quantization.{dtype}_kernel": dict.fromkeys(unused)
            for dtype, unused in quantisers.items()
        },
        "sglang.kernels.jit.utils": launches,
        "sglang.srt.batch_invariant_ops": invariant,
        "sglang.srt.environ": envs,
        "sglang.srt.layers.moe.utils": padding,
        "sglang.srt.utils": utils,
    })  # fmt: skip
    few = load("sglang", f"{KERNELS}/moe_align_small_numel.py", {"sglang.kernels.jit.utils": launches})
    load("sglang", f"{FOLDER}/moe_align_block_size.py", {
        "sglang.srt.environ": envs,
        "sglang.srt.utils": utils,
        "sglang.kernels.ops.moe": {"moe_align_block_size": _align},
        "sglang.kernels.ops.moe.moe_align_small_numel": vars(few),
    })  # fmt: skip
    tables = load("sglang", f"{FOLDER}/fused_moe_triton_config.py", {
        "sglang.srt.runtime_context": context,
        "sglang.srt.utils": utils,
    })  # fmt: skip
    unused = ("gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_with_activation_rounding")
    experts = load("sglang", f"{FOLDER}/fused_moe.py", {
        "sgl_kernel": {"moe_sum_reduce": kernels.moe_sum_reduce_triton},
        "sglang.kernels.jit.utils": launches,
        "sglang.kernels.ops.activation.activation": {"silu_and_mul": _silu_and_mul, **dict.fromkeys(unused)},
        "sglang.kernels.ops.moe.fused_moe_triton_kernels": vars(kernels),
        "sglang.kernels.ops.quantization.per_token_group_quant": {"per_token_group_quant": None},
        "sglang.srt.batch_invariant_ops": invariant,
        "sglang.srt.distributed.device_communicators.pynccl_allocator": {
            "use_symmetric_memory": lambda *_, **__: contextlib.nullcontext(),
        },
        "sglang.srt.layers.dp_attention": {"is_allocation_symmetric": _never},
        "sglang.srt.layers.moe.moe_runner": {"MoeRunnerConfig": SimpleNamespace},
        "sglang.srt.layers.moe.utils": padding,
        "sglang.srt.runtime_context": context,
        "sglang.srt.utils": utils,
        "sglang.srt.utils.custom_op": {"register_custom_op": lambda **_: lambda fn: fn},
    })  # fmt: skip
    for module in (tables, experts):
        module.logger = SimpleNamespace(info=_never, warning=_never, warning_once=_never)  # type: ignore[attr-defined]
    return experts


def sglang_experts(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`moe_experts`' arguments, without gradients."""
    with standing_in({ROOM: {"get_config": lambda: None}}):  # asked at each call
        out: Tensor = sglang().fused_experts_impl(
            x, w_gate_up, w_down, topk_weight.float(), topk_ids.int(), filter_expert=False
        )
    return out
