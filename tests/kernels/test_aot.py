"""Every kernel compiled for six generations of chips, and what their machine code must hold: no spills, shared memory
within the chip's limit, the tensor-core instructions that were meant. What is launched comes from benchmarks/ops."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import ARCHS, HIP, ROOMS, Compiled

ROOT = Path(__file__).parents[2]

# the tensor-core instruction of a product by operand type
TENSOR_CORE = {
    "fp8": dict(sm_80="HMMA", sm_86="HMMA", sm_89="QMMA", sm_90="QGMMA", sm_100="UTCQMMA", sm_120="QMMA"),
    "bf16": dict(sm_80="HMMA", sm_86="HMMA", sm_89="HMMA", sm_90="HGMMA", sm_100="UTCHMMA", sm_120="HMMA"),
}
ANY_TENSOR_CORE = {"HMMA", "HGMMA", "QMMA", "QGMMA", "UTCQMMA", "UTCHMMA"}

# kernel -> operand type of its products; kernels that are not named have none
PRODUCTS: dict[str, str] = {
    "_fp8_gemm_kernel": "fp8",
    "_fp8_gemm_tma_kernel": "fp8",
    "_fp8_gemm_hopper_kernel": "fp8",
    "_fp8_gemm_wgrad_hopper_kernel": "fp8",
    "_grouped_fp8_gemm_hopper_kernel": "fp8",
    "_grouped_fp8_gemm_wgrad_hopper_kernel": "fp8",
    "_mla_decode_hopper_kernel": "bf16",
    "_grouped_fp8_gemm_kernel": "fp8",
    "_grouped_fp8_gemm_masked_kernel": "fp8",
    "_grouped_fp8_gemm_small_kernel": "fp8",
    "_grouped_fp8_gemm_wgrad_kernel": "fp8",
    "_grouped_gemm_kernel": "bf16",
    "_grouped_gemm_hopper_kernel": "bf16",
    "_grouped_gemm_small_kernel": "bf16",
    "_grouped_outer_hopper_kernel": "bf16",
    "_grouped_outer_kernel": "bf16",
    "_mla_decode_kernel": "bf16",
    "_mla_attention_fwd_kernel": "bf16",
    "_mla_attention_dq_kernel": "bf16",
    "_mla_attention_dkdv_kernel": "bf16",
}

# kernels that fetch by bulk tensor copies; others do if their launch says so (X_TMA, ...)
TMA = {"_fp8_gemm_tma_kernel"} | {kernel for kernel in PRODUCTS if kernel.endswith("_hopper_kernel")}

# kernels whose tables hold tiles of fewer than the 64 rows that the instructions of sm_90 and sm_100 need, unless keys
# are the rows
SMALL_TILES = {"_mla_decode_kernel"}


# rooms that serve AMD's MI300 as they are. The others do not yet: fp8 products spill there, grouped ones need
# more shared memory than it has, and mla_decode's kernel does not compile.
HIP_ROOMS = (
    "cross_entropy", "fp8_quant", "mla_attention", "mla_cache", "moe_gate", "moe_plan", "rms_norm", "rms_norm_quant",
    "swiglu", "swiglu_quant",
)  # fmt: skip


@functools.cache
def compiled(room: str, every: bool, archs: tuple[str, ...] = ARCHS) -> dict[str, list[Compiled]]:
    """By architecture. In a process of its own: this one interprets its kernels."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MINIDS_KERNELS")
    }
    command = [sys.executable, "-m", "benchmarks.aot", "--rooms", room, "--workers", "1", "--archs", *archs]
    run = subprocess.run(
        [*command, *(["--all"] if every else [])],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]
    return {arch: [r for r in results if r.arch == arch] for arch in archs}


def check(result: Compiled) -> None:
    what = f"{result.kernel} on {result.arch}, {result.label}: {result}"
    assert result.spills == 0, what
    assert result.fits, what
    found = ANY_TENSOR_CORE & set(result.instructions)
    product = PRODUCTS.get(result.kernel)
    few = result.kernel in SMALL_TILES and result.config["BLOCK_M"] < 64 and not result.config["KEYS_FIRST"]
    arch = "sm_80" if few else result.arch
    assert found == (set() if product is None else {TENSOR_CORE[product][arch]}), what
    described = result.kernel in TMA or any(result.config[name] for name in result.config if name.endswith("TMA"))
    assert described == ("UTMALDG" in result.instructions), what


@pytest.mark.parametrize("room", ROOMS)
def test_main_launches(room: str) -> None:
    results = compiled(room, every=False)
    assert all(results.values())
    for arch in ARCHS:
        for result in results[arch]:
            check(result)


@pytest.mark.parametrize("room", HIP_ROOMS)
def test_main_launches_on_hip(room: str) -> None:
    results = compiled(room, False, HIP)
    assert all(results.values())
    for result in (r for found in results.values() for r in found):
        assert result.spills == 0 and result.fits, result
        assert any(name.startswith("v_mfma") for name in result.instructions) == (result.kernel in PRODUCTS), result


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_every_entry_of_the_tables(room: str) -> None:
    for results in compiled(room, every=True).values():
        for result in results:
            check(result)
