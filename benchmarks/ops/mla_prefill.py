"""Many new tokens over a paged latent cache: what to time and what to compile ahead of time. It has no kernel of its
own: tables are mla_attention's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from minids_kernels import mla_decode, mla_prefill, mla_prefill_reference
from torch import Tensor

from benchmarks import flash
from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, calls, normal, precision, sizes

DTYPE, PAGE = torch.bfloat16, 64

# sequences, new tokens and rows of each, heads, Dn, Dr, Dv, Dc: V3's heads on one of 8 devices, a prompt and the next
# chunk of a long one; a mini model's second message
GPU_SHAPES = [(1, 8192, 8192, 16, 128, 64, 128, 512), (4, 2048, 16_384, 16, 128, 64, 128, 512)]
CPU_SHAPES, SMALL_SHAPE = [(1, 512, 1536, 8, 32, 16, 32, 64)], (2, 24, 70, 2, 16, 8, 16, 32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the root mean square: roundings of the dtype


def _case(
    batch: int, new: int, length: int, heads: int, nope: int, rope: int, value: int, latent: int, dtype: torch.dtype,
    device: torch.device,
) -> Case:  # fmt: skip
    """Sequences of equal length whose pages lie scattered."""
    pages, scale = -(-length // PAGE), (nope + rope) ** -0.5

    def make() -> Inputs:
        q_nope, q_pe = (normal(batch * new, heads, width, device=device, dtype=dtype) for width in (nope, rope))
        cache = normal(batch * pages, PAGE, latent + rope, device=device, dtype=dtype)
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        w_kv = normal(heads * (nope + value), latent, device=device, dtype=dtype) / latent**0.5
        return Inputs((q_nope, q_pe, cache, table, w_kv))

    lengths = torch.full((batch,), length, dtype=torch.int32)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * new

    def ours(q_nope: Tensor, q_pe: Tensor, cache: Tensor, table: Tensor, w_kv: Tensor) -> Tensor:
        return mla_prefill((q_nope, q_pe), cache, table, lengths, cu_seqlens, w_kv, scale)

    def absorbed(q_nope: Tensor, q_pe: Tensor, cache: Tensor, table: Tensor, w_kv: Tensor) -> Tensor:
        """As decoders attend."""
        w_uk, w_uv = w_kv.unflatten(0, (heads, -1)).split([nope, value], 1)
        q = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_pe), -1).unflatten(0, (batch, new))
        out, _ = mla_decode(q, cache, table, lengths.to(q.device), latent, scale)
        return torch.einsum("thc,hvc->thv", out.flatten(0, 1), w_uv)

    def bind_fa3(inputs: Inputs) -> Run:
        """As vLLM does it: rows gathered and expanded, rope keys copied to the heads, one call."""
        q_nope, q_pe, cache, table, w_kv = inputs.args
        bounds, key_bounds = (x.to(device) for x in (cu_seqlens, torch.arange(batch + 1, dtype=torch.int32) * length))

        def run() -> Tensor:
            rows = cache[table.long()].flatten(1, 2)[:, :length].flatten(0, 1)
            k_nope, v = (rows[:, :latent] @ w_kv.T).unflatten(1, (heads, -1)).tensor_split([nope], -1)
            k = torch.cat((k_nope, rows[:, None, latent:].expand(-1, heads, -1)), -1)
            return flash.fa3_attention(
                torch.cat((q_nope, q_pe), -1), k, v.contiguous(), bounds, key_bounds, (new, length), scale
            )

        return run

    def reference(inputs: Inputs) -> Tensor:
        q_nope, q_pe, cache, table, w_kv = (x if x.dtype == torch.int32 else x.float() for x in inputs.args)
        return mla_prefill_reference((q_nope, q_pe), cache, table, lengths, cu_seqlens, w_kv, scale)

    pairs = batch * heads * (new * (length - new) + new * (new + 1) // 2)
    return Case(
        name="fwd",
        shape={"B": batch, "S": new, "T": length, "H": heads, "Dqk": nope + rope, "Dv": value, "Dc": latent},
        dtype=dtype,
        make=make,
        reference=reference,
        contestants={
            OURS: Contestant(calls(ours), package="minids"),
            "absorbed": Contestant(calls(absorbed), package="minids"),
            "fa3": Contestant(bind_fa3, package="vllm", on=("sm_90",)),
        },
        tolerance=TOLERANCE[dtype],
        bytes=batch * (length * (latent + rope) + new * heads * (nope + rope + value)) * dtype.itemsize,
        flops=2 * pairs * (nope + rope + value) + 2 * batch * length * latent * heads * (nope + value),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [_case(*shape, dtype, device) for shape in shapes]


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: keys that are not the queries' tokens, at DeepSeek-V3's widths."""

    def prefill() -> None:
        q = torch.empty(64, 16, 128, dtype=DTYPE), torch.empty(64, 16, 64, dtype=DTYPE)
        cache, w_kv = torch.empty(2, PAGE, 576, dtype=DTYPE), torch.empty(16 * 256, 512, dtype=DTYPE)
        bounds = torch.tensor([0, 64], dtype=torch.int32)
        mla_prefill(q, cache, torch.tensor([[0, 1]]), torch.tensor([128]), bounds, w_kv, 0.1)

    return [("192/128 over a cache", prefill)]
