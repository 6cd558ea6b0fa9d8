"""Attention over packed documents: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import _launch, mla_attention, mla_attention_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
    tensors,
)

DTYPE = torch.bfloat16
CUDNN, EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
KERNELS = ("mla_attention_fwd", "mla_attention_dq", "mla_attention_dkdv")


# tokens, documents, heads, Dqk, Dv: V3's heads on one of 8 devices, mini models
GPU_SHAPES = [(8192, 1, 16, 192, 128), (32_768, 1, 16, 192, 128), (8192, 16, 16, 192, 128), (8192, 4, 8, 48, 32)]
CPU_SHAPES = [(2048, 8, 8, 48, 32), (2048, 16, 8, 48, 32), (2048, 1, 8, 48, 32)]
SMALL_SHAPE = (128, 4, 2, 24, 16)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """All documents as one sequence under a [T, T] mask."""
    index = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(index, cu_seqlens.long(), right=True)
    mask = (document.unsqueeze(1) == document) & (index.unsqueeze(1) >= index)
    out = F.scaled_dot_product_attention(*(_heads_first(x) for x in (q, k, v)), attn_mask=mask)
    return out.squeeze(0).transpose(0, 1)


def each_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One call a document, whose lengths the host must know."""
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*(_heads_first(x) for x in part), is_causal=True) for part in parts]
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs])


def batched(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, backends: list[SDPBackend]) -> Tensor:
    """Equally long documents as a batch: what nobody's packed documents are, and the limit for those."""
    rows = (x.unflatten(0, (cu_seqlens.shape[0] - 1, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backends):
        out = F.scaled_dot_product_attention(*rows, is_causal=True)
    return out.transpose(1, 2).flatten(0, 1)


def _bind_flex(mode: str) -> Callable[[Inputs], Run]:
    """flex_attention under a mask of documents, which is made beforehand."""

    def bind(inputs: Inputs) -> Run:
        q, *_, cu_seqlens = inputs.args
        tokens = q.shape[0]
        document = torch.bucketize(torch.arange(tokens, device=q.device), cu_seqlens.long(), right=True)

        def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return (document[row] == document[column]) & (row >= column)

        mask = create_block_mask(seen, None, None, tokens, tokens, device=q.device.type)
        attention = torch.compile(flex_attention)

        def flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
            out: Tensor = attention(*(_heads_first(x) for x in (q, k, v)), block_mask=mask)
            return out.squeeze(0).transpose(0, 1)

        return calls(flex, mode)(inputs)

    return bind


def _reference(mode: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Head by head: all heads' scores of a long document at once are more than a GPU holds."""
    head = exact(mla_attention_reference, mode)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        *rows, cu_seqlens = inputs.args
        heads = zip(*(x.split(1, 1) for x in (*rows, *inputs.douts)), strict=True)
        parts = [head(Inputs((*x[: len(rows)], cu_seqlens), x[len(rows) :])) for x in heads]
        return tuple(torch.cat(same, 1) for same in zip(*map(tensors, parts), strict=True))

    return reference


def _case(
    tokens: int, documents: int, heads: int, width: int, value: int, dtype: torch.dtype, mode: str, device: torch.device
) -> Case:
    """Equally long documents."""
    length = tokens // documents

    def make() -> Inputs:
        q, k, v, dout = (
            normal(tokens, heads, last, device=device, dtype=dtype) for last in (width, width, value, value)
        )
        cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        return Inputs((q, k, v, cu_seqlens), () if mode == "fwd" else (dout,))

    pairs = documents * length * (length + 1) // 2 * heads  # of rows that see each other
    products = {"fwd": width + value, "fwd+bwd": 4 * width + 3 * value}[mode]
    return Case(
        name=mode,
        shape={"T": tokens, "documents": documents, "H": heads, "Dqk": width, "Dv": value},
        dtype=dtype,
        make=make,
        reference=_reference(mode),
        contestants={
            OURS: Contestant(calls(mla_attention, mode), package="minids"),
            "eager": Contestant(calls(each_document, mode)),
            "dense mask": Contestant(calls(dense_mask, mode)),
            "cudnn": Contestant(calls(functools.partial(batched, backends=[CUDNN]), mode), on=("cuda",)),
            "efficient": Contestant(calls(functools.partial(batched, backends=[EFFICIENT]), mode), on=("cuda",)),
            "flex": Contestant(_bind_flex(mode), on=("cuda",)),
        },
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,  # of the root mean square: roundings of the dtype
        bytes=(1 if mode == "fwd" else 3) * tokens * heads * 2 * (width + value) * dtype.itemsize,
        flops=2 * pairs * products,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [_case(*shape, dtype, mode, device) for shape in shapes for mode in ("fwd", "fwd+bwd")]


def tuning(device: torch.device) -> dict[str, Tuning]:
    """At Dqk : Dv = 3 : 2 as V3 and small models have it, on one document of 8,192 tokens (fp32: 2,048)."""

    def bind(mode: str) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            half, width = shape["BITS"] == 16, shape["WIDTH"]
            tokens, dtype = (8192, DTYPE) if half else (2048, torch.float32)
            case = _case(tokens, 1, 16, 3 * width // 5, 2 * width // 5, dtype, "fwd+bwd", device)
            return calls(mla_attention, mode)(case.make())

        return run

    def candidates(rows: str, shape: Mapping[str, int]) -> list[dict[str, Any]]:
        """Tensor cores take 16 rows of scores a warp: more warps would do the same rows again."""
        if shape["BITS"] == 32:
            return combinations(BLOCK_M=(16, 32, 64), BLOCK_N=(16, 32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
        sides = (32, 64, 128)
        configs = combinations(BLOCK_M=sides, BLOCK_N=sides, num_warps=(4, 8), num_stages=(1, 2, 3, 4))
        return [config for config in configs if config["num_warps"] == 4 or config[rows] == 128]

    forward, dq, dkdv = KERNELS
    return {
        forward: Tuning(bind("fwd"), functools.partial(candidates, "BLOCK_M")),
        dq: Tuning(bind("bwd"), functools.partial(candidates, "BLOCK_M")),
        dkdv: Tuning(bind("bwd"), functools.partial(candidates, "BLOCK_N")),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot, in bf16: at DeepSeek-V3's widths and its one rope key, with rotations on
    the way in; with `every` at all widths of the tables, with keys that heads share in whole and not at all, and with
    rows that see the whole document."""
    sizes = {320}
    if every:
        for kernel in KERNELS:
            entries = (entry["shape"] for entry in _launch.entries("mla_attention", kernel, arch))
            sizes |= {shape["WIDTH"] for shape in entries if shape["BITS"] == 16}
    cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32)

    def both(size: int, key_heads: int, rope_heads: int, causal: bool) -> None:
        rope, value = size // 5, 2 * size // 5  # as V3 has them: 128 + 64 and 128
        q, k, k_pe, v = (
            torch.empty(256, heads, last, dtype=DTYPE).requires_grad_()
            for heads, last in ((16, rope + value), (key_heads, value), (rope_heads, rope), (key_heads, value))
        )
        angles = torch.empty(2, 256, rope // 2)
        out = mla_attention(q, (k, k_pe), v, cu_seqlens, causal, rotary_cos=angles[0], rotary_sin=angles[1])
        out.backward(torch.empty_like(out))

    cases = [(size, 16, 1, True) for size in sorted(sizes, reverse=True)]
    if every:
        cases += [(320, 16, 16, True), (320, 1, 1, True), (320, 16, 1, False)]
    return [
        (
            f"{3 * case[0] // 5}/{2 * case[0] // 5}, {case[1]} + {case[2]} key heads{', both ways' * (not case[3])}",
            functools.partial(both, *case),
        )
        for case in cases
    ]
