"""A peer of grouped_gemm and of moe_experts: unsloth's, forward and backward. The packages unsloth and unsloth_zoo are
not imported; what their files want of them, and of pandas, is stood in for. The files are under the AGPL: they are
loaded as they lie in the installed wheels, none is copied.

Tiles are asked for as unsloth_zoo 2026.10 asks: unsloth's tuner tries its candidates once for a shape of weights, which
compiles for minutes, and keeps what it found in ~/.cache/unsloth. Under UNSLOTH_MOE_DISABLE_AUTOTUNE=1, unsloth's own
switch, they are those that it takes to be safe everywhere.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import Inputs, Run, calls
from benchmarks.triton_decode import load

FOLDER, PATCHES = "kernels/moe", "temporary_patches"


@functools.cache
def unsloth() -> tuple[ModuleType, ModuleType]:
    """Its grouped products, and its choice of tiles."""
    for name in ("autotuning", "tuning", "forward", "backward"):
        load("unsloth", f"{FOLDER}/grouped_gemm/kernels/{name}.py", {"pandas": {}})
    products = load("unsloth", f"{FOLDER}/grouped_gemm/interface.py", {
        "unsloth": {"DEVICE_TYPE": "cuda"},
        "unsloth.device_type": {"cuda_visible_capabilities": lambda: [torch.cuda.get_device_capability()]},
        "unsloth.kernels.utils": {"torch_gpu_device": contextlib.nullcontext},
    })  # fmt: skip
    return products, load("unsloth", f"{FOLDER}/autotune_cache.py", {})


@functools.cache
def tiles(experts: int, n: int, k: int, top_k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of the forward and both gradients, for weights [E, N, K]."""
    forward, dx, dw = unsloth()[1].get_or_autotune_moe_kernels(experts, k, n // 2, top_k, dtype)
    return {"kernel_config_fwd": forward, "kernel_config_bwd_dX": dx, "kernel_config_bwd_dW": dw}


@functools.cache
def zoo() -> tuple[ModuleType, ModuleType]:
    """What a layer has beside the products: routing and activation."""
    routing = load("unsloth_zoo", f"{PATCHES}/moe_routing_triton.py", {})
    return routing, load("unsloth_zoo", f"{PATCHES}/moe_fused_swiglu.py", {})


def _grouped_gemm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    out: Tensor = unsloth()[0].grouped_gemm(x, w, counts, 1, **tiles(*w.shape, 1, w.dtype))
    return out


def bind(inputs: Inputs, mode: str) -> Run:
    """`grouped_gemm`'s arguments; experts' numbers of rows are counted beforehand."""
    x, w, offsets = inputs.args
    return calls(_grouped_gemm, mode)(Inputs((x, w, offsets.diff()), inputs.douts))


def unsloth_experts(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`moe_experts`' arguments, in the steps of unsloth_zoo's layer: the first product reads tokens' rows where they
    are, the second writes each token's rows side by side; weighting and adding these up are PyTorch's."""
    product, (routing, activation), top_k = unsloth()[0].grouped_gemm, zoo(), topk_ids.shape[1]
    counts, order, _ = routing.moe_routing_sort(topk_ids, w_gate_up.shape[0])
    gate_up = product(x, w_gate_up, counts, top_k, order, permute_x=True, **tiles(*w_gate_up.shape, top_k, x.dtype))
    hidden = activation.moe_fused_swiglu(gate_up)
    y = product(
        hidden, w_down, counts, top_k, order, permute_y=True, is_first_gemm=False,
        **tiles(*w_down.shape, top_k, x.dtype),
    )  # fmt: skip
    return (y.unflatten(0, (-1, top_k)) * topk_weight.to(y.dtype).unsqueeze(2)).sum(1)
