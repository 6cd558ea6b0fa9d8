"""A peer of moe_experts' forward: vLLM's Triton experts. Its files are loaded as they lie in the installed wheel, its
compiled operators (alignment of segments, activation, sum over experts) as well; what else of the package they import
is stood in for.

The launch is chosen as vllm/model_executor/layers/fused_moe/fused_moe.py of vLLM 0.23 chooses it: a tuned table for the
GPU where the wheel has one for these experts, else its default.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import flash
from benchmarks.triton_decode import load

FOLDER = "model_executor/layers/fused_moe"


@functools.cache
def operators() -> SimpleNamespace:
    """vLLM's compiled ones that its experts call."""
    for name in ("_moe_C", "_C_stable_libtorch"):
        flash.library(name)
    moe, activation = torch.ops._moe_C, torch.ops._C
    return SimpleNamespace(
        moe_align_block_size=moe.moe_align_block_size, moe_sum=moe.moe_sum, silu_and_mul=activation.silu_and_mul
    )


@functools.cache
def vllm() -> ModuleType:
    language = {"triton": triton, "tl": triton.language}
    align = load("vllm", f"{FOLDER}/moe_align_block_size.py", {
        "vllm": {"_custom_ops": operators()},
        "vllm.triton_utils": language,
        "vllm.utils.math_utils": {"round_up": lambda x, multiple: -(-x // multiple) * multiple},
    })  # fmt: skip
    room = f"vllm.{FOLDER.replace('/', '.')}"
    says_nothing = SimpleNamespace(info_once=lambda *_, **__: None, warning_once=lambda *_, **__: None)
    experts = SimpleNamespace(adjust_N_for_activation=lambda width, _: width // 2)
    platform = SimpleNamespace(is_rocm=lambda: False, get_device_name=torch.cuda.get_device_name)
    module = load("vllm", f"{FOLDER}/fused_moe.py", {
        "vllm": {"_custom_ops": operators()},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None},
        "vllm.logger": {"init_logger": lambda _: says_nothing},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": language,
        "vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None},
        "vllm.model_executor": {}, "vllm.model_executor.layers": {}, room: {},
        f"{room}.modular_kernel": {"FusedMoEExpertsModular": experts},
        f"{room}.activation": {
            "MoEActivation": SimpleNamespace(SILU="silu", from_str=str),
            "apply_moe_activation": lambda _, out, gate_up: operators().silu_and_mul(out, gate_up),
        },
        f"{room}.config": {
            "FUSED_MOE_UNQUANTIZED_CONFIG": None, "FusedMoEQuantConfig": object,
            "_get_config_dtype_str": lambda **_: None,
        },
        f"{room}.moe_align_block_size": {"moe_align_block_size": align.moe_align_block_size},
        f"{room}.utils": {"moe_kernel_quantize_input": lambda A, A_scale, **_: (A, A_scale)},
    })  # fmt: skip

    def launch(w1: Any, w2: Any, top_k: int, dtype: str | None, tokens: int, block_shape: None) -> dict[str, int]:
        tables = module.get_moe_configs(w2[0], w2[2], dtype)
        if tables:
            return tables[min(tables, key=lambda size: abs(size - tokens))]
        return module.get_default_config(tokens, w2[0], w2[2], w1[2], top_k, dtype, block_shape)

    module.try_get_optimal_moe_config = launch  # type: ignore[attr-defined]
    return module


def vllm_experts(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`moe_experts`' arguments, without gradients."""
    out: Tensor = vllm().fused_experts_impl(x, w_gate_up, w_down, topk_weight.float(), topk_ids.int())
    return out
