"""Quantisation to fp8: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import (
    _launch,
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_blocks_reference,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_both_reference,
    quantize_tiles_reference,
    quantize_tiles_transposed,
    quantize_tiles_transposed_reference,
)
from torch import Tensor

from benchmarks.protocol import OURS, Case, Contestant, Inputs, Run, Tuning, calls, compiled, normal, sizes

DTYPE = torch.bfloat16
E4M3 = torch.float8_e4m3fn

# rows and columns: V3's hidden size and its experts' width, a long and a short batch, mini models; torchao wants 128s
GPU_SHAPES = [(4096, 7168), (16_384, 7168), (128, 7168), (4096, 2048), (8192, 1024)]
CPU_SHAPES = [(4096, 1024), (1024, 4096)]
SMALL_SHAPE = (256, 512)
TOLERANCE = 5e-3  # x / scale and x * (1 / scale) part at ties: a few codes in 1,000 are neighbours, 1/16 away


def eager(tile_m: int, tile: int, turned: bool = False) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The formula as model code writes it, tiles of [tile_m, tile]."""

    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        m, k = x.shape
        tiles = x.float().view(m // tile_m, tile_m, k // tile, tile)
        scales = tiles.abs().amax((1, 3)).clamp(min=1e-30) / 448
        codes = (tiles / scales[:, None, :, None]).view(m, k).to(E4M3)
        return (codes.view(torch.uint8).t().contiguous().view(E4M3), scales.t()) if turned else (codes, scales)

    return quantise


def eager_both(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *eager(1, 128)(x), *eager(128, 1, turned=True)(x)


def torchao(name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.prototype.blockwise_fp8_training import kernels

        return getattr(kernels, f"triton_fp8_blockwise_{name}")(x)

    return quantise


def torchao_both(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *torchao("act_quant_lhs")(x), *torchao("act_quant_transposed_lhs")(x)


def deepseek(x: Tensor) -> tuple[Tensor, Tensor]:
    from benchmarks.deepseek import act_quant

    return act_quant(x)


def read_tiles(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Codes and scales, pair by pair, as numbers."""
    pairs = zip(output[::2], output[1::2], strict=True)
    return tuple(dequantize_tiles(codes, scales, torch.float32) for codes, scales in pairs)


def read_blocks(output: tuple[Tensor, Tensor]) -> Tensor:
    return dequantize_blocks(*output, torch.float32)


def _case(name: str, rows: int, columns: int, device: torch.device) -> Case:
    ours, reference, plain, theirs = {
        "tiles fwd": (quantize_tiles, quantize_tiles_reference, eager(1, 128), torchao("act_quant_lhs")),
        "blocks fwd": (quantize_blocks, quantize_blocks_reference, eager(128, 128), torchao("weight_quant_rhs")),
        "transposed fwd": (
            quantize_tiles_transposed, quantize_tiles_transposed_reference, eager(128, 1, turned=True),
            torchao("act_quant_transposed_lhs"),
        ),
        "both fwd": (quantize_tiles_both, quantize_tiles_both_reference, eager_both, torchao_both),
    }[name]  # fmt: skip
    read: Callable[[Any], Any] = read_blocks if name == "blocks fwd" else read_tiles
    official = {"deepseek": Contestant(calls(deepseek), package="triton", on=("cuda",), read=read)}
    written = 2 if name == "both fwd" else 1
    return Case(
        name=name,
        shape={"M": rows, "K": columns},
        dtype=DTYPE,
        make=lambda: Inputs((normal(rows, columns, device=device, dtype=DTYPE),)),
        reference=lambda inputs: read(reference(*inputs.args)),
        contestants={
            OURS: Contestant(calls(ours), package="minids", read=read),
            "eager": Contestant(calls(plain), read=read),
            "compile": Contestant(compiled(plain), read=read),
            "torchao": Contestant(calls(theirs), package="torchao", on=("cuda",), read=read),
            **(official if name == "tiles fwd" else {}),
        },
        tolerance=TOLERANCE,
        bytes=rows * columns * (DTYPE.itemsize + written),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)
    names = ("tiles fwd", "blocks fwd", "transposed fwd", "both fwd")
    return [_case(name, rows, columns, device) for rows, columns in shapes for name in names]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def numbers(shape: Mapping[str, int]) -> Tensor:
        rows = max(256, 2**25 // shape["K"])  # 64 MiB, more than any L2 holds together with the output
        return normal(rows, shape["K"], device=device, dtype=DTYPE)

    def quantise(op: Callable[[Tensor], Any]) -> Callable[[Mapping[str, int]], Run]:
        return lambda shape: calls(op)(Inputs((numbers(shape),)))

    def dequantise(shape: Mapping[str, int]) -> Run:
        codes, scales = quantize_tiles(numbers(shape))
        return lambda: dequantize_tiles(codes, scales, DTYPE)

    def groups(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        return [
            dict(ROWS=r, GROUPS=g, num_warps=w)
            for r in (1, 2, 4, 8, 16, 32)
            for g in (1, 2, 4, 8, 16)
            for w in (1, 2, 4, 8, 16)
            if g * 128 <= max(128, shape["K"]) and 256 <= r * g * 128 // w <= 2048
        ]

    def columns(*widths: int) -> Callable[[Mapping[str, int]], list[dict[str, Any]]]:
        return lambda shape: [dict(COLS=c, num_warps=w) for c in widths for w in (4, 8, 16) if c * 128 // w >= 512]

    return {
        "quantize_tiles": Tuning(quantise(quantize_tiles), groups),
        "quantize_blocks": Tuning(quantise(quantize_blocks), lambda shape: [dict(num_warps=w) for w in (4, 8, 16, 32)]),
        "quantize_tiles_transposed": Tuning(quantise(quantize_tiles_transposed), columns(16, 32, 64, 128)),
        "dequantize": Tuning(dequantise, groups),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at DeepSeek-V3's width, with `every` at each width of the tables."""
    widths = {7168}
    if every:
        for kernel in ("quantize_tiles", "quantize_tiles_transposed", "dequantize"):
            widths |= {entry["shape"]["K"] for entry in _launch.entries("fp8_quant", kernel, arch)}
    calls: list[tuple[str, Callable[[], Any]]] = []
    for width in sorted(widths, reverse=True):
        x = torch.empty(256, width, dtype=DTYPE)
        codes, rows, blocks = x.to(torch.float8_e4m3fn), torch.empty(256, width // 128), torch.empty(2, width // 128)
        calls += [
            (f"K={width} transposed", lambda x=x: quantize_tiles_transposed(x)),  # type: ignore[misc]
            (f"K={width} blocks", lambda x=x: quantize_blocks(x)),  # type: ignore[misc]
            (f"K={width} dequantize tiles", lambda c=codes, s=rows: dequantize_tiles(c, s, DTYPE)),  # type: ignore[misc]
            (f"K={width} dequantize blocks", lambda c=codes, s=blocks: dequantize_blocks(c, s, DTYPE)),  # type: ignore[misc]
        ]
        for scale_format in ("fp32", "ue8m0"):
            calls.append((f"K={width} {scale_format}", lambda x=x, f=scale_format: quantize_tiles(x, f)))  # type: ignore[misc]
    return calls
