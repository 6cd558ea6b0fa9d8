"""RMSNorm: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from minids_kernels import _launch, rms_norm, rms_norm_reference
from torch import Tensor

from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    compiled,
    exact,
    normal,
    precision,
    sizes,
)

DTYPE = torch.bfloat16
EPS = 1e-6

# rows and columns: V3's hidden size, its latents, mini models, ragged
GPU_SHAPES = [
    (4096, 7168), (16_384, 7168), (128, 7168), (4096, 1536), (4096, 512), (8192, 1024), (4096, 4096), (4099, 5003),
]  # fmt: skip
CPU_SHAPES = [(4096, 1024), (2048, 256), (1023, 517)]
SMALL_SHAPE = (256, 512)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a few roundings of the dtype


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """The formula as model code writes it: in fp32, rounded before the weight."""
    xf = x.float()
    return weight * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def functional(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)  # False: dy is not overwritten


def fla(x: Tensor, weight: Tensor) -> Tensor:
    from fla.modules.norm.layernorm import rms_norm as fla_rms_norm

    return fla_rms_norm(x, weight, None, eps=EPS)


def liger_residual(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def fla_residual(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    from fla.modules.norm.layernorm import rms_norm as fla_rms_norm

    return fla_rms_norm(x, weight, None, residual=residual, eps=EPS, prenorm=True)


def with_residual(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    return both


def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    return rms_norm(x, weight, EPS, residual=residual)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, EPS)


def _case(rows: int, columns: int, dtype: torch.dtype, mode: str, residual: bool, device: torch.device) -> Case:
    matrices = 1 + residual  # [M, N], both in and out: x and y, the residual and the sum

    def make() -> Inputs:
        x, *more, dy, dsum = (normal(rows, columns, device=device, dtype=dtype) for _ in range(matrices + 2))
        weight = normal(columns, device=device, dtype=dtype)
        return Inputs((x, weight, *more), () if mode == "fwd" else (dy, dsum)[:matrices])

    plain: dict[str, Callable[..., Any]] = {"eager": eager, "F.rms_norm": functional}
    if residual:
        plain = {name: with_residual(fn) for name, fn in plain.items()}
    liger_op, fla_op = (liger_residual, fla_residual) if residual else (liger, fla)
    forward, backward = 2 * matrices, 3 + residual  # backward: dy, x, dx, with the residual dsum; dx serves both
    passes = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
    return Case(
        name=f"residual {mode}" if residual else mode,
        shape={"M": rows, "N": columns},
        dtype=dtype,
        make=make,
        reference=exact(with_residual(reference) if residual else reference, mode),
        contestants={
            OURS: Contestant(calls(ours, mode), package="minids"),
            **{name: Contestant(calls(fn, mode)) for name, fn in plain.items()},
            "compile": Contestant(compiled(plain["eager"], mode)),
            "liger": Contestant(calls(liger_op, mode), package="liger-kernel", on=("cuda",)),
            "fla": Contestant(calls(fla_op, mode), package="fla-core", on=("cuda",)),
        },
        tolerance=TOLERANCE[dtype],
        bytes=passes * rows * columns * dtype.itemsize,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes, dtype = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE), precision(device)
    return [
        _case(rows, columns, dtype, mode, residual, device)
        for rows, columns in shapes
        for residual in (False, True)
        for mode in ("fwd", "bwd", "fwd+bwd")
    ]


def tuning(device: torch.device) -> dict[str, Tuning]:

    def bind(shape: Mapping[str, int], mode: str) -> Run:
        columns = shape["N"]
        rows = max(256, 2**25 // columns)  # 64 MiB, more than any L2 holds together with the output
        x, dy = (normal(rows, columns, device=device, dtype=DTYPE) for _ in range(2))
        return calls(ours, mode)(Inputs((x, normal(columns, device=device, dtype=DTYPE)), (dy,)))

    def forward(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        rows = (1, 2, 4, 8, 16, 32)
        return [dict(ROWS=r, num_warps=w) for r in rows for w in (1, 2, 4, 8, 16) if 256 <= r * shape["N"] <= 32_768]

    def backward(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return [
            dict(ROWS=r, STAGES=s, PROGRAMS_PER_SM=p, num_warps=w)
            for r in (1, 2, 4, 8, 16, 32)
            if 1024 <= r * shape["N"] <= 16_384
            for s in (1, 2, 3)
            for p in (1, 2, 4, 8)
            for w in (4, 8, 16)
            if p * w <= 32 and 4 <= r * shape["N"] / (32 * w) <= 64  # warps that fit, numbers of a thread
        ]

    def wide_backward(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return [
            dict(ROWS=r, BLOCK_N=n, DX_BLOCK_N=d, PROGRAMS_PER_SM=p, num_warps=w)
            for r in (4, 8, 16)
            for n in (128, 256, 512)
            for d in (2048, 4096, 8192)
            for p in (1, 2, 4)
            for w in (4, 8)
        ]

    return {
        "rms_norm_fwd": Tuning(lambda shape: bind(shape, "fwd"), forward),
        "rms_norm_bwd": Tuning(lambda shape: bind(shape, "bwd"), backward),
        "rms_norm_wide_bwd": Tuning(lambda shape: bind(shape, "bwd"), wide_backward),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168, 32_768}
    if every:
        for kernel in ("rms_norm_fwd", "rms_norm_bwd", "rms_norm_wide_bwd"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("rms_norm", kernel, arch)}

    def both(width: int, fused: bool) -> None:
        x, residual = torch.empty(2, 256, width, dtype=DTYPE).requires_grad_()
        weight = torch.empty(width, dtype=DTYPE).requires_grad_()
        if fused:
            y, total = rms_norm(x, weight, residual=residual)
            torch.autograd.backward((y, total), (torch.empty_like(y), torch.empty_like(total)))
        else:
            rms_norm(x, weight).backward(torch.empty(256, width, dtype=DTYPE))

    return [
        (f"N={width}{' + residual' if fused else ''}", lambda width=width, fused=fused: both(width, fused))  # type: ignore[misc]
        for width in sorted(widths)
        for fused in (True, False)
    ]
