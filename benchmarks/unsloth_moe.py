"""A peer of grouped_gemm: unsloth's, forward and backward. The package is not imported; what its files want of it, and
of pandas, is stood in for. They are under the AGPL: they are loaded as they lie in the installed wheel, none is copied.

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

FOLDER = "kernels/moe"


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


def _grouped_gemm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    out: Tensor = unsloth()[0].grouped_gemm(x, w, counts, 1, **tiles(*w.shape, 1, w.dtype))
    return out


def bind(inputs: Inputs, mode: str) -> Run:
    """`grouped_gemm`'s arguments; experts' numbers of rows are counted beforehand."""
    x, w, offsets = inputs.args
    return calls(_grouped_gemm, mode)(Inputs((x, w, offsets.diff()), inputs.douts))
