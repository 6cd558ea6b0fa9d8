"""Every kernel once on a small problem, for compute-sanitizer: out-of-bounds accesses and races that change no number.

    python -m pytest -m gpu tests/kernels/test_sanitizer.py

needs NVIDIA's compute-sanitizer, which comes with the CUDA toolkit. PyTorch's allocator hands out parts of large
blocks, within which nothing is out of bounds, so it is told not to.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minids_kernels as kernels
import pytest
import torch
from minids_kernels import _launch
from minids_kernels.precompile import Zeros
from torch import Tensor

from tests.kernels.numerics import leaves
from tests.kernels.test_every_op import CASES, TRITON

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
OFFSETS = torch.tensor([0, 130, 130, 330, 590], dtype=torch.int32)  # expert 1 is empty, ten rows are nobody's
ROWS, WIDTH, INNER, EXPERTS = 600, 256, 128, 4


def trained(op: Callable[..., Tensor], *inputs: Tensor) -> None:
    out = op(*leaves(inputs))
    out.backward(torch.randn_like(out))


def half_precision(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(BF16)


def decode(device: torch.device, fp8: bool, heads: int = 16) -> None:
    """Rows written into the cache, then read."""
    latent, rotary, page, pages = 512, 64, 64, 12
    tokens = page * pages
    rows = (
        torch.empty(pages, page, 656, dtype=torch.uint8)
        if fp8
        else torch.empty(pages, page, latent + rotary, dtype=BF16)
    )
    cache, angle = rows.to(device), torch.randn(tokens, rotary // 2, device=device)
    kernels.write_latent_cache(
        half_precision(tokens, latent + rotary, device=device), half_precision(latent, device=device), angle.cos(),
        angle.sin(), cache, torch.arange(tokens, device=device), 1e-6, half_precision(tokens, 2, rotary, device=device),
    )  # fmt: skip
    table = torch.arange(pages, dtype=torch.int32, device=device).view(3, -1)
    lengths = torch.tensor([250, 0, 65], dtype=torch.int32, device=device)
    kernels.mla_decode(half_precision(3, 1, heads, latent + rotary, device=device), cache, table, lengths, latent, 0.1)


def masked(device: torch.device) -> None:
    codes, scales = kernels.quantize_tiles(half_precision(EXPERTS, 64, WIDTH, device=device))
    weights = [kernels.quantize_blocks(half_precision(INNER, WIDTH, device=device)) for _ in range(EXPERTS)]
    w, w_scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
    counts = torch.tensor([3, 0, 64, 17], dtype=torch.int32, device=device)
    out = torch.empty(EXPERTS, 64, INNER, dtype=BF16, device=device)
    kernels.grouped_fp8_gemm_masked(codes, scales, w, w_scales, counts, out, 16)


def experts(device: torch.device, tokens: int, fp8: bool) -> None:
    x, weight = half_precision(tokens, WIDTH, device=device), torch.rand(tokens, 2, device=device)
    ids = (torch.arange(tokens, device=device)[:, None] + torch.tensor([0, 1], device=device)) % EXPERTS
    sizes = (2 * INNER, WIDTH), (WIDTH, INNER)
    w_gate_up, w_down = (torch.randn(EXPERTS, *s, device=device) for s in sizes)  # fp32, as training has them

    def added(base: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        return kernels.moe_experts(x, ids, *weights, fp8=fp8, base=base)

    trained(added, half_precision(tokens, WIDTH, device=device), x, weight, w_gate_up, w_down)


def by_hand(device: torch.device) -> None:
    """`grouped_gemm`'s products as no table has them yet: rows in order and tokens', both gradients."""
    module = importlib.import_module("minids_kernels._grouped_gemm_hopper")
    config = dict(BLOCK_N=128, DEPTH=64, PIECES=2, STAGES=4, STRIPE=8)
    offsets, token = OFFSETS.to(device), torch.arange(ROWS, device=device)
    x, dy = half_precision(ROWS, WIDTH, device=device), half_precision(ROWS, 2 * INNER, device=device)
    w = half_precision(EXPERTS, 2 * INNER, WIDTH, device=device)
    activated = torch.empty(ROWS, INNER, dtype=BF16, device=device)
    for rows in (None, token):
        module.grouped(x, rows, w, offsets, torch.empty_like(dy), None, **config)
        module.grouped(dy, rows, w.transpose(1, 2), offsets, torch.empty_like(x), None, **config)
    module.grouped(
        x, token, w, offsets, torch.empty_like(dy), (torch.rand(ROWS).to(device), token, activated), **config
    )
    module.outer(dy, x, offsets, torch.empty_like(w), **config)


def every_kernel(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) pairs that launch each kernel, on chips that have several forms of one those that tables choose."""

    def made(*shape: int) -> Tensor:
        return half_precision(*shape, device=device)

    offsets = OFFSETS.to(device)
    for name in sorted(TRITON):
        op, inputs = CASES[name]
        yield name, lambda op=op, inputs=inputs: trained(op, *(x.to(device, BF16) for x in inputs()))
    x = made(ROWS, WIDTH)
    angle = torch.randn(ROWS, 16, device=device)
    yield "rope", lambda: trained(lambda q: kernels.rope(q, angle.cos(), angle.sin()), made(ROWS, 2, 48))
    targets = torch.randint(INNER, (ROWS,), device=device)
    yield (
        "sum of losses",
        lambda: trained(
            lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction="sum"), x, made(INNER, WIDTH)
        ),
    )
    yield "wide norm", lambda: trained(kernels.rms_norm, made(3, 20_000), made(20_000))
    yield "norm to codes", lambda: kernels.rms_norm_quant(x, made(WIDTH), transposed=True)
    yield "swiglu to codes", lambda: kernels.swiglu_quant(x)
    yield "codes of values", lambda: kernels.dequantize_tiles(*kernels.quantize_tiles(x), BF16)
    yield "fp8 layer", lambda: trained(kernels.fp8_linear, x, made(INNER, WIDTH))
    yield "fp8 layer of many rows", lambda: trained(kernels.fp8_linear, made(2900, 2048), made(2112, 2048))
    yield "fp8 layer of odd widths", lambda: trained(kernels.fp8_linear, made(130, 200), made(72, 200))
    yield "fp8 feed-forward", lambda: trained(kernels.fp8_mlp, x, made(2 * INNER, WIDTH), made(WIDTH, INNER))
    yield "fp8 product in parts", lambda: kernels.fp8_linear(made(8, 4096), made(256, 4096))
    yield (
        "grouped product",
        lambda: trained(lambda x, w: kernels.grouped_gemm(x, w, offsets), x, made(EXPERTS, INNER, WIDTH)),
    )
    yield (
        "grouped product of few rows",
        lambda: kernels.grouped_gemm(
            made(12, WIDTH),
            made(EXPERTS, INNER, WIDTH),
            torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32, device=device),
        ),
    )
    yield (
        "fp8 grouped layer",
        lambda: trained(lambda x, w: kernels.grouped_fp8_linear(x, w, offsets), x, made(EXPERTS, INNER, WIDTH)),
    )
    yield (
        "fp8 grouped layer of odd widths",
        lambda: trained(
            lambda x, w: kernels.grouped_fp8_linear(x, w, offsets), made(ROWS, 203), made(EXPERTS, 101, 203)
        ),
    )
    yield (
        "fp8 grouped layer of few rows",
        lambda: kernels.grouped_fp8_linear(
            made(12, WIDTH),
            made(EXPERTS, INNER, WIDTH),
            torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32, device=device),
        ),
    )
    if _launch.arch(x) == "sm_90":
        yield "grouped product by hand", lambda: by_hand(device)
    yield "fp8 grouped product, masked", lambda: masked(device)
    for tokens in (8, 600):
        yield f"experts, {tokens} tokens", lambda tokens=tokens: experts(device, tokens, fp8=False)
        yield f"fp8 experts, {tokens} tokens", lambda tokens=tokens: experts(device, tokens, fp8=True)
    for fp8 in (False, True):
        yield f"decoding, fp8 {fp8}", lambda fp8=fp8: decode(device, fp8)


def launched(device: torch.device, by: Callable[..., None]) -> set[str]:
    """Names of the kernels that `every_kernel` launches, each of which goes to `by`."""
    names: set[str] = set()

    def seen(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        names.add(kernel.__name__)
        by(kernel, grid, *args, **kwargs)

    with _launch.launched_by(seen), torch.autograd.set_multithreading_enabled(False):
        for _, call in every_kernel(device):
            call()
    return names


def known() -> set[str]:
    """Names of the package's kernels."""
    names = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        room = vars(importlib.import_module(f"minids_kernels.{module.name}"))
        names |= {name for name, value in room.items() if name.endswith("_kernel") and hasattr(value, "arg_names")}
    return names


def test_no_kernel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As chips without and with bulk copies would launch them. Kernels are left out, and their outputs zeros, so that
    they are valid indices."""
    if not _launch.HAS_TRITON:
        pytest.skip("no Triton here")
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "RUNS_GLUON", True)
    found = set()
    for arch in ("sm_89", "sm_90"):
        monkeypatch.setattr(_launch, "arch", lambda x, arch=arch: arch)
        with Zeros():
            found |= launched(torch.device("cpu"), lambda *args, **kwargs: None)
    assert found == known()


def run() -> None:
    """On the GPU, under the sanitizer."""
    torch.manual_seed(0)
    launched(torch.device("cuda"), _launch.run)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_out_of_bounds_and_no_race(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    script = [sys.executable, "-c", "from tests.kernels.test_sanitizer import run; run()"]
    found = subprocess.run([*command, *script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
