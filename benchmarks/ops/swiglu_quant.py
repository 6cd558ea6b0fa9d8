"""SwiGLU with quantisation: what to time, what to tune and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from minids_kernels import (
    _launch,
    swiglu_backward_quant,
    swiglu_backward_quant_reference,
    swiglu_quant,
    swiglu_quant_reference,
)
from torch import Tensor

from benchmarks.ops import fp8_quant, swiglu
from benchmarks.protocol import (
    OURS,
    Case,
    Contestant,
    Inputs,
    Run,
    Tuning,
    calls,
    combinations,
    compiled,
    normal,
    sizes,
)

DTYPE = torch.bfloat16
TOLERANCE = 3e-2  # peers round to bf16 before they quantise: some 3 codes in 100 are neighbours, 1/16 to 1/8 away

# tokens and inner width: V3's experts, mini models; torchao wants 128s
GPU_SHAPES, CPU_SHAPES = [(8192, 2048), (32_768, 2048), (128, 2048)], [(4096, 256), (2048, 768)]
SMALL_SHAPE = (256, 128)


def eager(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return fp8_quant.eager(1, 128)(swiglu.eager(gate_up))


def eager_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.chunk(2, -1)
    share = gate.sigmoid()
    grad = torch.cat((dy * up * share * (1 + gate * (1 - share)), dy * gate * share), -1)
    return fp8_quant.eager_both(grad)


def torchao(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return fp8_quant.torchao("act_quant_lhs")(swiglu.eager(gate_up))


def _case(rows: int, width: int, backward: bool, device: torch.device) -> Case:
    ours, reference, plain = (
        (swiglu_backward_quant, swiglu_backward_quant_reference, eager_backward)
        if backward
        else (swiglu_quant, swiglu_quant_reference, eager)
    )
    read = fp8_quant.read_tiles

    def make() -> Inputs:
        gate_up = normal(rows, 2 * width, device=device, dtype=DTYPE)
        return Inputs((normal(rows, width, device=device, dtype=DTYPE), gate_up) if backward else (gate_up,))

    contestants = {
        OURS: Contestant(calls(ours), package="minids", read=read),
        "eager": Contestant(calls(plain), read=read),
        "compile": Contestant(compiled(plain), read=read),
    }
    if not backward:
        contestants["torchao"] = Contestant(calls(torchao), package="torchao", on=("cuda",), read=read)
    return Case(
        name="backward fwd" if backward else "fwd",
        shape={"M": rows, "N": width},
        dtype=DTYPE,
        make=make,
        reference=lambda inputs: read(reference(*inputs.args)),
        contestants=contestants,
        tolerance=TOLERANCE,
        bytes=rows * width * ((3 * DTYPE.itemsize + 4) if backward else (2 * DTYPE.itemsize + 1)),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = sizes(device, quick, GPU_SHAPES, CPU_SHAPES, SMALL_SHAPE)
    return [_case(*shape, backward, device) for shape in shapes for backward in (False, True)]


def tuning(device: torch.device) -> dict[str, Tuning]:
    def bind(backward: bool) -> Callable[[Mapping[str, int]], Run]:
        def run(shape: Mapping[str, int]) -> Run:
            rows = max(256, 2**24 // shape["N"])  # 64 MiB of gate_up, more than any L2 holds together with the output
            case = _case(rows, shape["N"], backward, device)
            return case.contestants[OURS].bind(case.make())

        return run

    def forward(shape: Mapping[str, int]) -> list[dict[str, Any]]:
        grid = combinations(ROWS=(1, 2, 4, 8, 16), GROUPS=(1, 2, 4, 8, 16), num_warps=(2, 4, 8))
        return [c for c in grid if c["GROUPS"] * 128 <= shape["N"] and 4 <= c["ROWS"] * c["GROUPS"] <= 32]

    backward = combinations(num_warps=(4, 8, 16, 32)) + combinations(num_warps=(8,), maxnreg=(128,))
    return {
        "swiglu_quant": Tuning(bind(False), forward),
        "swiglu_backward_quant": Tuning(bind(True), lambda shape: backward),
    }


def launches(arch: str, every: bool) -> list[tuple[str, Callable[[], Any]]]:
    """(label, call) pairs for benchmarks.aot: at the width of DeepSeek-V3's experts, with `every` at each width of the
    tables."""
    widths = {2048}
    if every:
        for kernel in ("swiglu_quant", "swiglu_backward_quant"):
            widths |= {entry["shape"]["N"] for entry in _launch.entries("swiglu_quant", kernel, arch)}

    def both(width: int, scale_format: Any) -> None:
        gate_up, dy = torch.empty(256, 2 * width, dtype=DTYPE), torch.empty(256, width, dtype=DTYPE)
        swiglu_quant(gate_up, scale_format)
        swiglu_quant(gate_up, scale_format, torch.empty(256, dtype=DTYPE))
        swiglu_backward_quant(dy, gate_up, scale_format)

    return [
        (f"F={width} {scale_format}", lambda width=width, scale_format=scale_format: both(width, scale_format))  # type: ignore[misc]
        for width in sorted(widths)
        for scale_format in ("fp32", "ue8m0")
    ]
