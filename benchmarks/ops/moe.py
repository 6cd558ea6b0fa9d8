"""Mixture of experts: what to time, what to tune, what to compile ahead of time, and a layer's price on the CPU.

    python -m benchmarks.ops.moe [--rounds 31] [--dtypes fp32 bf16]

times one MoE layer of the mini model, forward and backward on the CPU, in turn with a dense SwiGLU of as many active
FLOPs and with transformers' layer under its two quick expert implementations, all in each precision, and prints one
JSON object; against transformers each side's best precision counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from minids_kernels import _launch, moe_experts, moe_experts_reference, swiglu
from torch import Tensor, nn

from benchmarks import sglang_moe, triton_moe, unsloth_moe
from benchmarks.cases import MINI
from benchmarks.ops import grouped_gemm
from benchmarks.peers import transformers_model
from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    exact,
    normal,
    precision,
    sizes,
)
from minids.device import keep_freed_memory
from minids.model import DeepseekV3
from minids.model.moe import MLP, MoE

DTYPE = torch.bfloat16
EXPERTS, TOP_K = 8, 2
LAYER_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the median token: in bf16 transformers routes some otherwise

# tokens, width, inner width, experts, experts a token: V3's layer on one of 32 and one of 8 devices, mini models
GPU_SHAPES = [
    (8192, 7168, 2048, 8, 2), (8192, 7168, 2048, 32, 8), (16, 7168, 2048, 32, 8), (16_384, 512, 256, 32, 4),
    (16_384, 1024, 512, 64, 8),
]  # fmt: skip
CPU_SHAPES, SMALL_SHAPE = [(2048, 256, 128, 8, 2)], (128, 64, 32, 4, 2)


def eager(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """One expert after the other, as model code writes it; the host waits for each expert's tokens."""
    out = torch.zeros_like(x)
    for expert in range(w_gate_up.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w_down[expert].T
        out = out.index_add(0, token, y * topk_weight[token, slot, None].to(y.dtype))
    return out


def grouped(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Tokens sorted by expert, two F.grouped_mm."""
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    token = order // topk_ids.shape[1]
    offsets = F.pad(torch.bincount(flat, minlength=w_gate_up.shape[0]).cumsum(0), (1, 0)).int()
    gate, up = grouped_gemm.functional(x[token], w_gate_up, offsets).chunk(2, dim=-1)
    y = grouped_gemm.functional(F.silu(gate) * up, w_down, offsets)
    return torch.zeros_like(x).index_add(0, token, y * topk_weight.flatten()[order, None].to(y.dtype))


def bind_dense(mode: str) -> Callable[[Inputs], Run]:
    """One SwiGLU as wide as a token's experts together, which are the first ones here: the limit of the layer."""

    def bind(inputs: Inputs) -> Run:
        x, topk_ids, _, w_gate_up, w_down = inputs.args
        chosen = slice(topk_ids.shape[1])
        w_in = torch.cat([part.flatten(0, 1) for part in w_gate_up[chosen].chunk(2, dim=1)])
        w_out = w_down[chosen].transpose(0, 1).flatten(1).contiguous()

        def layer(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
            return F.linear(swiglu(F.linear(x, w_in)), w_out)

        return calls(layer, mode)(Inputs((x, w_in, w_out), inputs.douts))

    return bind


def liger(x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    out: Tensor = LigerFusedMoEFunction.apply(x, w_gate_up, w_down, topk_ids.int(), topk_weight)
    return out


def _case(
    tokens: int, width: int, inner: int, experts: int, top_k: int, dtype: torch.dtype, mode: str, device: torch.device
) -> Case:
    """Routed by independent draws."""

    def make() -> Inputs:
        x = normal(tokens, width, device=device, dtype=dtype)
        w_gate_up, w_down = (
            (torch.randn(experts, *size, device=device) / size[1] ** 0.5).to(dtype)
            for size in ((2 * inner, width), (width, inner))
        )
        weight, ids = torch.rand(tokens, experts, device=device).topk(top_k)
        return Inputs((x, ids, weight, w_gate_up, w_down), () if mode == "fwd" else (torch.randn_like(x),))

    passes = 1 if mode == "fwd" else 3
    serving = {
        "vllm triton": Contestant(calls(triton_moe.vllm_experts), package="vllm", on=("cuda",)),
        "sglang triton": Contestant(calls(sglang_moe.sglang_experts), package="sglang", on=("cuda",)),
    }  # have no backward
    return Case(
        name=f"layer {mode}",
        shape={"M": tokens, "N": width, "K": inner, "E": experts, "top_k": top_k},
        dtype=dtype,
        make=make,
        reference=exact(moe_experts_reference, mode),
        contestants={
            OURS: Contestant(calls(moe_experts, mode), package="minids"),
            "eager": Contestant(calls(eager, mode)),
            "F.grouped_mm": Contestant(calls(grouped, mode)),
            "dense": Contestant(bind_dense(mode), limit=True),
            "liger": Contestant(calls(liger, mode), package="liger-kernel", on=("cuda",)),
            "unsloth": Contestant(calls(unsloth_moe.unsloth_experts, mode), package="unsloth", on=("cuda",)),
            **(serving if mode == "fwd" else {}),
        },
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,  # of the root mean square: roundings in between
        bytes=passes * (2 * tokens * width + 3 * experts * width * inner) * dtype.itemsize,
        flops=passes * 2 * 3 * tokens * top_k * width * inner,
    )


def _fp8_case(case: Case, mode: str) -> Case:
    """The same layer in fp8, with its form in the case's dtype as a peer."""
    vllm = Contestant(triton_moe.bind_vllm_fp8, package="vllm", on=("cuda",))  # has no backward
    return dataclasses.replace(
        case,
        name=f"layer fp8 {mode}",
        contestants={
            OURS: Contestant(calls(functools.partial(moe_experts, fp8=True), mode), package="minids"),
            "without fp8": case.contestants[OURS],
            "dense": case.contestants["dense"],
            **({"vllm triton": vllm} if mode == "fwd" else {}),
        },
        tolerance=1e-1,  # four to eight roundings to e4m3, of 2^-4 / sqrt(3) each in the root mean square
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    found = []
    for shape in shapes:
        for mode in ("fwd", "fwd+bwd"):
            case = _case(*shape, dtype, mode, device)
            found += [case, _fp8_case(case, mode)]
    return found


def tuning(device: torch.device) -> dict[str, Tuning]:
    """The kernels between the products alone."""
    room = importlib.import_module("minids_kernels.moe")

    def rows(width: int) -> int:
        return max(256, 2**24 // width)  # more than any L2 holds together with the output

    def activate_backward(shape: Mapping[str, int]) -> Run:
        width = shape["N"]
        gate_up, dout = (normal(rows(width), n, device=device, dtype=DTYPE) for n in (2 * width, width))
        weight, pair = normal(rows(width), 1, device=device, dtype=DTYPE), torch.randperm(rows(width), device=device)
        return lambda: room._triton_activate_backward(dout, gate_up, weight, pair)

    def combine(shape: Mapping[str, int]) -> Run:
        y = normal(rows(shape["N"]) // TOP_K * TOP_K, shape["N"], device=device, dtype=DTYPE)
        place = torch.randperm(y.shape[0], device=device)
        return lambda: room._triton_combine(y, place, TOP_K, None)

    def candidates(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        grid = combinations(ROWS=(1, 2, 4, 8, 16), BLOCK_N=(64, 128, 256, 512, 1024, 2048), num_warps=(2, 4, 8))
        return [c for c in grid if c["BLOCK_N"] < 2 * shape["N"] and 512 <= c["ROWS"] * c["BLOCK_N"] <= 8192]

    return {
        "activate_backward": Tuning(activate_backward, candidates),
        "combine": Tuning(combine, candidates),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at the widths of DeepSeek-V3's layer, with `every` at each width of the
    tables."""
    widths = {(7168, 2048)}
    if every:
        for kernel in ("activate_backward", "combine"):
            widths |= {(w, w) for w in (entry["shape"]["N"] for entry in _launch.entries("moe", kernel, arch))}

    def both(width: int, inner: int, tokens: int = 128) -> None:
        x = torch.empty(tokens, width, dtype=DTYPE).requires_grad_()
        ids = torch.zeros(tokens, TOP_K, dtype=torch.int64)
        weight = torch.empty(tokens, TOP_K).requires_grad_()
        # fp32, as training has them, but for what would take gigabytes
        kind = torch.float32 if width * inner <= 2**23 else DTYPE
        w_gate_up, w_down = (
            torch.empty(EXPERTS, *size, dtype=kind).requires_grad_() for size in ((2 * inner, width), (width, inner))
        )
        base = torch.empty(tokens, width, dtype=DTYPE)
        moe_experts(x, ids, weight, w_gate_up, w_down, base=base).backward(torch.empty(tokens, width, dtype=DTYPE))

    def forward(width: int, inner: int, tokens: int) -> None:
        x, weight, ids = torch.empty(tokens, width, dtype=DTYPE), torch.empty(tokens, TOP_K), torch.zeros(tokens, TOP_K)
        w_gate_up, w_down = (torch.empty(EXPERTS, *size, dtype=DTYPE) for size in ((2 * inner, width), (width, inner)))
        moe_experts(x, ids.long(), weight, w_gate_up, w_down)

    found = [("tokens=8192", functools.partial(both, 2048, 2048, 8192))] if every else []
    for size in sorted(widths, reverse=True):
        label = "D={} F={}".format(*size)
        found.append((label, functools.partial(both, *size)))
        found += [(f"{label} tokens={t} without gradients", functools.partial(forward, *size, t)) for t in (8, 8192)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--dtypes", nargs="+", choices=LAYER_TOLERANCE, default=list(LAYER_TOLERANCE))
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    model = DeepseekV3(MINI)
    ours = next(layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE))
    active = MINI.moe_intermediate_size * (MINI.num_experts_per_tok + MINI.n_shared_experts)
    dense = MLP(MINI.hidden_size, active)
    layers: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        OURS: (ours, lambda x: ours(x.flatten(0, 1))[0]),
        "dense": (dense, lambda x: dense(x.flatten(0, 1))),
    }
    for experts in ("eager", "grouped_mm"):
        theirs = transformers_model(model, experts).model.layers[MINI.first_k_dense_replace].mlp
        layers[f"transformers {experts}"] = (theirs, theirs)
    x, dout = torch.randn(2, 8, 256, MINI.hidden_size)
    want = layers[OURS][1](x).view_as(x)
    seconds: dict[tuple[str, str], list[float]] = {(name, dtype): [] for name in layers for dtype in options.dtypes}
    for round_ in range(3 + options.rounds):
        for name, dtype in seconds:
            layer, call = layers[name]
            given = x.clone().requires_grad_()
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                out = call(given).view_as(x)
            out.backward(dout.to(out.dtype))
            if round_ >= 3:
                seconds[name, dtype].append(time.perf_counter() - start)
            elif name.startswith("transformers"):
                error = ((out - want).norm(dim=-1) / want.norm(dim=-1)).median().item()
                if not error < LAYER_TOLERANCE[dtype]:
                    raise SystemExit(f"{name} {dtype}: a token's output is off by {error}")
            layer.zero_grad()
    median = {key: statistics.median(values) for key, values in seconds.items()}

    def best(side: str) -> float:
        return min(value for (name, _), value in median.items() if name.startswith(side))

    print(json.dumps({
        "what": f"MoE layer forward and backward, {x.shape[0]} x {x.shape[1]} tokens",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "median_ms": {f"{name} {dtype}": round(value * 1e3, 2) for (name, dtype), value in median.items()},
        "of_dense": {dtype: round(median[OURS, dtype] / median["dense", dtype], 3) for dtype in options.dtypes},
        "times_as_fast_as_transformers": round(best("transformers") / best(OURS), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
