"""Peers of moe_experts' forward: vLLM's Triton experts, in bf16 and in fp8. Their files are loaded as they lie in the
installed wheel, its compiled operators (alignment of segments, activation, quantisation, sum over experts) as well;
what else of the package they import is stood in for.

The launch is chosen by vLLM 0.23 itself: a tuned table for the GPU where the wheel has one for these experts, else its
default.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from minids_kernels import quantize_blocks
from torch import Tensor

from benchmarks import flash
from benchmarks.protocol import Absent, Inputs, Run, calls
from benchmarks.triton_decode import load, standing_in

FOLDER, QUANTISATION = "model_executor/layers/fused_moe", "model_executor/layers/quantization/utils"
ROOM = f"vllm.{FOLDER.replace('/', '.')}"
E4M3, BLOCK = torch.float8_e4m3fn, [128, 128]


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
    says_nothing = SimpleNamespace(info_once=lambda *_, **__: None, warning_once=lambda *_, **__: None)
    platform = SimpleNamespace(
        is_rocm=lambda: False, is_xpu=lambda: False, is_cuda_alike=torch.cuda.is_available, fp8_dtype=lambda: E4M3,
        get_device_name=torch.cuda.get_device_name,
    )  # fmt: skip
    shared = {
        "vllm": {"_custom_ops": operators()},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None},
        "vllm.logger": {"init_logger": lambda _: says_nothing},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.utils.torch_utils": {"direct_register_custom_op": lambda *_, **__: None},
    }
    align = load("vllm", f"{FOLDER}/moe_align_block_size.py", {
        **shared,
        "vllm.utils.math_utils": {"round_up": lambda x, multiple: -(-x // multiple) * multiple},
    })  # fmt: skip
    parameters = ("BlockQuantScaleParameter", "ChannelQuantScaleParameter", "PerTensorScaleParameter")
    limits = torch.finfo(E4M3)
    quantisation = load("vllm", f"{QUANTISATION}/fp8_utils.py", {
        **shared,
        f"vllm.{QUANTISATION.replace('/', '.')}.quant_utils": {"get_fp8_min_max": lambda: (limits.min, limits.max)},
        f"vllm.{QUANTISATION.replace('/', '.')}.w8a8_utils": dict.fromkeys(("all_close_1d", "per_tensor_dequantize")),
        "vllm.model_executor.parameter": dict.fromkeys(parameters),
        "vllm.model_executor.utils": {"set_weight_attrs": None},
        "vllm.utils.deep_gemm": {
            "get_tma_aligned_size": None, "transform_sf_into_required_layout": None,
            "is_deep_gemm_e8m0_used": lambda: False,
        },
    })  # fmt: skip

    def quantise(A: Tensor, A_scale: None, quant_dtype: Any, block_shape: list[int] | None, **_: Any) -> Any:
        if block_shape is None:
            return A, A_scale
        return quantisation.per_token_group_quant_fp8(A, block_shape[1], dtype=quant_dtype)

    experts = SimpleNamespace(adjust_N_for_activation=lambda width, _: width // 2)
    return load("vllm", f"{FOLDER}/fused_moe.py", {
        **shared,
        "vllm.model_executor": {}, "vllm.model_executor.layers": {}, ROOM: {},
        f"{ROOM}.modular_kernel": {"FusedMoEExpertsModular": experts},
        f"{ROOM}.activation": {
            "MoEActivation": SimpleNamespace(SILU="silu", from_str=str),
            "apply_moe_activation": lambda _, out, gate_up: operators().silu_and_mul(out, gate_up),
        },
        f"{ROOM}.config": {
            "FUSED_MOE_UNQUANTIZED_CONFIG": None, "FusedMoEQuantConfig": object,
            "_get_config_dtype_str": lambda use_fp8_w8a8, **_: "fp8_w8a8" if use_fp8_w8a8 else None,
        },
        f"{ROOM}.moe_align_block_size": {"moe_align_block_size": align.moe_align_block_size},
        f"{ROOM}.utils": {"moe_kernel_quantize_input": quantise},
    })  # fmt: skip


def vllm_experts(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, **fp8: Any
) -> Tensor:
    """`moe_experts`' arguments, without gradients."""
    with standing_in({ROOM: {"get_config": lambda: None}}):  # asked at each call
        out: Tensor = vllm().fused_experts_impl(x, w_gate_up, w_down, topk_weight.float(), topk_ids.int(), **fp8)
    return out


def bind_vllm_fp8(inputs: Inputs) -> Run:
    """`moe_experts`' arguments, without gradients. Weights are quantised beforehand, 128 x 128, as a server has them;
    of what is timed only activations are quantised, 1 x 128. `moe_experts(..., fp8=True)` quantises both in each call,
    for training, where weights change."""
    x, topk_ids, topk_weight, *weights = inputs.args
    if any(width % 128 for w in weights for width in w.shape[1:]):
        raise Absent("takes multiples of 128 only")
    w1, w2 = (tuple(map(torch.stack, zip(*map(quantize_blocks, w), strict=True))) for w in weights)
    fp8 = {"use_fp8_w8a8": True, "w1_scale": w1[1], "w2_scale": w2[1], "block_shape": BLOCK}
    return calls(functools.partial(vllm_experts, **fp8))(Inputs((x, topk_ids, topk_weight, w1[0], w2[0])))
